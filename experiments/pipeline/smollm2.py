"""Rows for smollm2.yaml, the stage that hands on the warm start, and the page of its results.

    python experiments/pipeline/smollm2.py --gsm8k FOLDER                 # the rows
    python experiments/pipeline/smollm2.py --show runs/pipeline_smollm2/results.jsonl

Lines of GSM8K's solutions as `experiments/smollm2` deals them out for its arms, in three parts: for
RLP, for SFT and for RLVR. No problem of theirs is on the panel.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.smollm2.documents import Line, part_of, read_lines, solutions
from rlp.config import ConfigError, require
from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.results_file import Results
from rlp.post.pipeline_results import open_results
from rlp.post.stages.interface import Kept, Made, Spent, Work
from rlp.process.files import make_folder, new_folder, write_new

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
DATA, RESULTS, PAGE = HERE / "data" / "smollm2", HERE / "smollm2.jsonl", HERE / "smollm2.md"

PLACES = {
    ("base", "start"): "as it comes",
    ("base", "warm"): "warm start",
    ("rlp", "rlp"): "RLP",
    ("rlp", "sft"): "RLP, SFT",
    ("base", "sft"): "SFT",
    ("rlp", "rlvr"): "RLP, SFT, RLVR",
    ("base", "rlvr"): "SFT, RLVR",
}
"""Arm and stage of a column of the table."""

FIGURES = {
    "accuracy_with_thought": "two digits right, with a thought",
    "accuracy_without_thought": "without",
    "gain_over_no_think_nats": "gain of a thought, nats a token",
    "thought_duplicates_frac": "thoughts that are the same",
    "open_intra": "open answers: intra",
    "open_floor": "open answers: floor",
    "open_vendi": "open answers: Vendi of 4",
    "open_distinct_2": "open answers: distinct-2",
    "open_words": "open answers: words",
    "closed_accuracy": "closed answers: right",
    "closed_intra": "closed answers: intra",
    "language_script_frac": "letters in latin script",
    "language_mixed_frac": "answers of several scripts",
    "language_letterless_frac": "answers without letters",
}


def write_rows(gsm8k: str, out: Path = DATA) -> dict[str, int]:
    """The three parts, and a third of the committed open prompts with half of the closed ones.

    Returns:
        rows by file.
    """
    lines = [
        line
        for number, answer in enumerate(solutions(gsm8k, "train"))
        if part_of("train", number) == "train"
        for line in read_lines(answer)
        if line.thought
    ]
    parts = {
        "rlp": [{"text": line.plain} for line in lines[0::3]],
        "sft": [shown(line) for line in lines[1::3]],
        "rlvr": [asked(line) for line in lines[2::3]],
        "prompts": prompts(),
    }
    make_folder(out.parent, exist_ok=True)
    with new_folder(out, point="world.before_rename") as new:
        for name, rows in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_new(new / f"{name}.jsonl", text.encode(), point="world.torn_file")
    return {name: len(rows) for name, rows in parts.items()}


def shown(line: Line) -> dict[str, str]:
    """The right chain, and what follows it."""
    return {
        "prompt": f"{line.before}<think>",
        "completion": f"{line.thought}</think>{line.after}",
    }


def asked(line: Line) -> dict[str, str]:
    """Up to where a thought begins, and the whole result."""
    return {"prompt": f"{line.before}<think>", "answer": re.match(r"\d+", line.after)[0]}


def prompts() -> list[dict]:
    """Every third open prompt, and every second closed one."""
    folder = ROOT / "rlp" / "post" / "prompts"
    panels = [(folder / f"{kind}.jsonl").read_text().splitlines() for kind in ("open", "closed")]
    return [json.loads(line) for line in (*panels[0][::3], *panels[1][::2])]


def warmed(work: Work) -> Made:
    """Hand on a model that was made before."""
    model = Path(work.settings.options["model"])
    require(
        (model / "config.json").is_file(),
        "options.model",
        str(model),
        "has to be a model; write make smollm2",
    )
    place = work.models / "step_0"
    if not place.exists():
        make_folder(place.parent, exist_ok=True)
        with new_folder(place, point="stage.before_model") as new:
            for path in model.iterdir():
                shutil.copy(path, new / path.name)
    return Made((Kept(0, place, Spent()),))


def table(results: Results) -> str:
    """Every figure along the way of both arms, seed by seed."""
    rows = []
    for figure, name in FIGURES.items():
        cells = []
        for arm, stage in PLACES:
            values = results.where(arm=arm, stage=stage).by_seed(arm, figure).values()
            cells.append(" / ".join(f"{value:.2f}" for value in values) or "-")
        rows.append([name, *cells])
    return markdown_table(["", *PLACES.values()], rows)


def parts(results: Results) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {"table": table(results)}


def draw(results: Results, path: Path) -> None:
    """Three figures along the way, a line for each arm and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, 3), DRAWN.items()):
        for arm, color in (("rlp", "#0072b2"), ("base", "#d55e00")):
            for seed in results.values("seed"):
                values = [_figure(results, name, arm, stage, seed) for stage in STAGES]
                there = [point for point in enumerate(values) if point[1] is not None]
                title = f"{'with' if arm == 'rlp' else 'without'} RLP" if seed == 0 else None
                axis.plot(*zip(*there), marker="o", color=color, alpha=0.8, label=title)
        axis.set_title(label, fontsize=10)
        axis.set_xticks(range(len(STAGES)), STAGES.values(), fontsize=8)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _figure(results: Results, name: str, arm: str, stage: str, seed: int) -> float | None:
    part = results.where(arm=arm, stage=stage, seed=seed)
    values = [part.by_seed(arm, one).get(seed) for one in name.split(" - ")]
    return None if None in values else values[0] - sum(values[1:])


STAGES = {
    "start": "as it comes",
    "warm": "warm start",
    "rlp": "RLP",
    "sft": "SFT",
    "rlvr": "RLVR",
}
"""Along the picture; an arm without RLP has nothing there."""

DRAWN = {
    "accuracy_with_thought": "two digits right, with a thought",
    "open_intra - open_floor": "open answers: intra above its floor",
    "thought_duplicates_frac": "thoughts that are the same",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--gsm8k", metavar="FOLDER", help="make rows of its train.jsonl")
    one.add_argument("--show", type=Path, metavar="FILE", help="publish results")
    options = parser.parse_args()
    try:
        if options.gsm8k:
            print(write_rows(options.gsm8k))
            return 0
        results = open_results(options.show)
    except ConfigError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    if options.show.resolve() != RESULTS:
        shutil.copy(options.show, RESULTS)
    draw(results, PAGE.with_suffix(".png"))
    PAGE.write_text(fill_page(PAGE.read_text(), parts(results)))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
