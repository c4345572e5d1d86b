"""Draw every cell, measure it, and add its lines to results.jsonl; continues where it stopped.

    make smollm2                                # the models, once (experiments/smollm2)
    python experiments/diversity/run.py         # draws, measures and tells; some 15 CPU-minutes
    python experiments/diversity/run.py --measure   # of cells that are drawn, nothing is drawn

Answers are kept in --out, and drawn again by nobody. A line of results.jsonl is of one stage,
format (`arm`), temperature and panel.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import numpy as np
from cells import COMPARED, FOCUS, FORMATS, STAGES, Cell, cells, focus, panel
from exact import exact_lines
from report import write_report

from rlp.config import ConfigError
from rlp.measure.results_file import Layout, add_results, read_results
from rlp.post.diversity import measure
from rlp.post.diversity_measures import entropy
from rlp.post.diversity_samples import Sample, read_samples
from rlp.process.files import make_folder
from rlp.process.schemas import NUMBER, Many, Maybe

HERE = Path(__file__).resolve().parent

LAYOUT = Layout(
    ("arm", "seed", "stage", "panel", "temperature"),
    ("n", "valid"),
    {
        **dict.fromkeys(
            (
                *("intra", "intra_low", "intra_high", "floor", "duplicates", "vendi"),
                *("distinct_2", "answer_entropy", "words", "empty_frac", "verbatim"),
                *("inter", "above_floor", "above_floor_low", "above_floor_high"),
                *("top_share", "entropy"),
            ),
            Maybe(NUMBER),
        ),
        "counts": Many(NUMBER),
    },
)
"""arm: the format; temperature: of the answers; valid: the share of right answers (closed), or of
answers that name one number from 1 to 10 (numbers), else null; counts: how often each of these
came, for `numbers_exact` its chance; a panel of `BESIDE`: inter of the stage and another one, both
in this format."""

BESIDE = {
    "open_beside_plain": dict.fromkeys(("warm", "calibrated", "rlp"), "plain"),
    "open_beside_before": {"calibrated": "warm", "rlp": "calibrated"},
}
"""Panels of two models: the other one of each stage."""

OF_PANEL = ("duplicates", "vendi", "distinct_2", "answer_entropy", "words", "empty_frac")


def own_lines(cell: Cell, folder: Path) -> list[dict]:
    """The figures of one cell."""
    prompts = {prompt.text for prompt in panel()}
    samples = [one for one in read_samples(cell.samples(folder)) if one.prompt.text in prompts]
    lines = [
        _line(cell, kind, figures)
        for kind, figures in measure(samples).items()
        if kind in ("open", "closed")
    ]
    answers = read_samples(cell.focus(folder))
    for name, prompt in zip(FOCUS, focus()):
        own = [one for one in answers if one.prompt.text == prompt.text]
        line = _line(cell, name, measure(own)["open"])
        lines.append(line | _numbers(own) if name == "numbers" else line)
    return lines


def _line(cell: Cell, name: str, figures: dict) -> dict:
    low, high = figures["intervals"]["intra"] if figures["prompts"] > 1 else (None, None)
    return {
        **_identity(cell, name),
        "n": figures["texts"],
        "valid": figures.get("accuracy"),
        "intra": figures["intra"],
        "intra_low": low,
        "intra_high": high,
        "floor": figures["floor"],
        **{key: figures[key] for key in OF_PANEL},
    }


def _identity(cell: Cell, name: str) -> dict:
    return {
        "arm": cell.format,
        "seed": 0,
        "stage": cell.stage,
        "panel": name,
        "temperature": cell.temperature,
    }


def number_of(text: str) -> int | None:
    """The number from 1 to 10 that an answer names, once or again; None where it names none, or
    several, as a list does that begins with 1."""
    named = set(re.findall(r"\d+(?:[.,]\d+)*", text))
    return next((int(one) for one in named if len(named) == 1 and one in TEN), None)


TEN = {str(number) for number in range(1, 11)}


def _numbers(samples: list[Sample]) -> dict:
    """Which numbers from 1 to 10, and how often."""
    drawn = [number for one in samples if (number := number_of(one.text)) is not None]
    counts = np.bincount(drawn, minlength=11)[1:]
    return {
        "valid": len(drawn) / len(samples),
        "counts": counts.tolist(),
        "top_share": float(counts.max() / len(drawn)) if drawn else None,
        "entropy": entropy(counts) if drawn else None,
    }


def beside(other: str, stage: str, form: str, folder: Path, panel_name: str) -> dict | None:
    """How alike a stage and another one answer; None where one of them is not drawn."""
    both = [Cell(one, form, COMPARED) for one in (other, stage)]
    if not all(is_drawn(cell, folder) for cell in both):
        return None
    prompts = {prompt.text for prompt in panel()}
    samples = [one for cell in both for one in read_samples(cell.samples(folder))]
    found = measure([one for one in samples if one.prompt.text in prompts])["open"]
    low, high = found["intervals"]["inter_above_floor"]
    return {
        **_identity(both[1], panel_name),
        "n": found["texts"],
        "valid": None,
        "inter": found["inter"],
        "floor": found["floor"],
        "above_floor": found["inter_above_floor"],
        "above_floor_low": low,
        "above_floor_high": high,
        "verbatim": found["verbatim"],
    }


def is_drawn(cell: Cell, folder: Path) -> bool:
    """Whether all answers of a cell are there."""
    wanted = sum(prompt.samples for prompt in focus())
    path = cell.focus(folder)  # the last that is drawn
    return path.exists() and path.read_bytes().count(b"\n") == wanted


def measure_drawn(folder: Path, results: Path) -> None:
    """Add the lines of cells that are drawn, and that the file does not have."""
    for cell in cells():
        there = read_results(results, LAYOUT)
        known = {"arm": cell.format, "stage": cell.stage, "temperature": cell.temperature}
        if is_drawn(cell, folder) and not there.has(panel="open", **known):
            add_results(results, LAYOUT, own_lines(cell, folder))
    for form in FORMATS:
        for stage in STAGES:
            for name, other in BESIDE.items():
                there = read_results(results, LAYOUT)
                if stage not in other or there.has(arm=form, stage=stage, panel=name):
                    continue
                if (line := beside(other[stage], stage, form, folder, name)) is not None:
                    add_results(results, LAYOUT, [line])


def add_exact(models: Path, results: Path) -> None:
    """Add the chances of numbers of the stages that the file does not have."""
    for stage in STAGES:
        for form in FORMATS:
            there = read_results(results, LAYOUT)
            if not there.has(arm=form, stage=stage, panel="numbers_exact"):
                add_results(results, LAYOUT, exact_lines(stage, form, models))


def main() -> int:
    """Run what is missing; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/smollm2"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("runs/diversity"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", metavar="FILE")
    parser.add_argument("--measure", action="store_true", help="draw nothing")
    asked = parser.parse_args()
    try:
        make_folder(asked.out, exist_ok=True)
        if not asked.measure:
            add_exact(asked.models, asked.results)
        for cell in cells():
            if not asked.measure and not is_drawn(cell, asked.out):
                begun = time.process_time()
                cell.draw(asked.models, asked.out)
                print(f"{cell.name}: drawn in {time.process_time() - begun:.0f} CPU-seconds")
        measure_drawn(asked.out, asked.results)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    write_report(read_results(asked.results, LAYOUT), asked.out, HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
