"""Small questions about the settings of RLP, answered on the heading world over seeds.

    rlp world experiments/world/headings --kind headings
    python experiments/world/make_bases.py --kind headings --seeds 5
    python experiments/questions/ask.py lm_weight --seeds 5      # or all
    python experiments/questions/ask.py --tables                 # those of README.md

Every run is configs/headings.yaml with the overrides of one setting, from the base of its seed
and with that `run.seed`, evaluated before and after only. So two settings differ, seed by seed, in
nothing but their overrides, and their difference is taken in pairs. One line of results.jsonl per
finished run; run again, only missing runs are made.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlp.measure.pages import fill_page, markdown_table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"
README = HERE / "README.md"
BASES = ROOT / "experiments" / "world" / "heading_seeds"
HELD_OUT = ROOT / "experiments" / "world" / "headings" / "held_out.jsonl"
RUNS = ROOT / "runs" / "questions"

DEFAULT = "default"
"""The setting without overrides, which every question shares."""


class Column(NamedTuple):
    """One column of a table: a number of a run, and how it is told."""

    title: str
    value: Callable[[dict], float]
    """From a row of results.jsonl."""
    form: str
    """Format of the number."""
    compared: bool = False
    """Whether the paired difference to the default, with its interval, is told too."""
    over_seeds: Callable[[list[float]], float] = np.mean
    """How the seeds become one number."""


class Question(NamedTuple):
    """Settings that differ in one thing, and the columns that answer."""

    settings: dict[str, tuple[str, ...]]
    """Overrides by setting, in the order of the table; the default has none."""
    default: str
    """What the default setting is called in the table."""
    columns: tuple[Column, ...]


def accuracy(row: dict) -> float:
    """Held-out accuracy with a thought, on the answers: the panel of the default setting."""
    return row["answers"]["accuracy_with_thought"]


def gain(row: dict) -> float:
    """Nats: log-probability of the held-out answers after a thought, minus the base's without
    one."""
    return row["answers"]["reasoned_logprob_nats"] - row["answers_before"]["no_think_logprob_nats"]


def learned(row: dict) -> float:
    """Nats: what training added to the gain."""
    return row["answers"]["reasoned_logprob_nats"] - row["answers_before"]["reasoned_logprob_nats"]


ACCURACY = Column("accuracy with a thought", accuracy, "{:.3f}", compared=True)
GAIN = Column("gain over the base, nats", gain, "{:.3f}", compared=True)
UPDATE = (
    Column(
        "largest change of a weight by training",
        lambda row: row["weights_max_change"],
        "{:.1e}",
        over_seeds=max,
    ),
    Column(
        "largest difference of a weight to the default's",
        lambda row: row["weights_max_difference"],
        "{:.1e}",
        over_seeds=max,
    ),
)
GAIN_OVER_EMA = Column(
    "reported gain over the baseline, nats",
    lambda row: row["after"].get("gain_over_ema_nats", float("nan")),
    "{:.3f}",
)
FLOPS = Column("FLOPs, 1e9", lambda row: row["flops"] / 1e9, "{:.1f}")
PER_FLOP = Column(
    "nats learned per 1e10 FLOPs",
    lambda row: learned(row) / row["flops"] * 1e10,
    "{:.3f}",
    compared=True,
)

QUESTIONS = {
    "baseline": Question(
        {
            DEFAULT: (),
            "frozen": ("baseline.kind=frozen",),
            "self": ("baseline.kind=self",),
            "none": ("baseline.kind=none",),
        },
        "ema",
        (*UPDATE, ACCURACY, GAIN_OVER_EMA, FLOPS),
    ),
    "lm_weight": Question(
        {"0": ("objective.lm_weight=0.0",), DEFAULT: (), "1": ("objective.lm_weight=1.0",)},
        "0.1",
        (
            ACCURACY,
            Column(
                "LM loss without thoughts, nats per token",
                lambda row: row["plain"]["lm_nats"],
                "{:.3f}",
                compared=True,
            ),
            Column("that of the base", lambda row: row["plain_before"]["lm_nats"], "{:.3f}"),
            Column(
                "off the answers", lambda row: row["plain"]["other_nats"], "{:.3f}", compared=True
            ),
            Column(
                "mass on the open marker before an answer",
                lambda row: row["answers"]["open_marker_mass"],
                "{:.3f}",
            ),
            Column(
                "answer without a thought, marker left out, nats",
                lambda row: row["answers"]["no_think_logprob_nats"],
                "{:.3f}",
                compared=True,
            ),
        ),
    ),
    "group_size": Question(
        {
            "2": ("thought.group_size=2",),
            "4": ("thought.group_size=4",),
            DEFAULT: (),
            "16": ("thought.group_size=16",),
        },
        "8",
        (ACCURACY, GAIN, FLOPS, PER_FLOP),
    ),
    "thought_budget": Question(
        {"8": ("thought.max_thought_tokens=8",), DEFAULT: ()},
        "16",
        (
            Column(
                "accuracy with a thought, own budget",
                lambda row: row["after"]["accuracy_with_thought"],
                "{:.3f}",
                compared=True,
            ),
            Column(
                "truncated, before", lambda row: row["before"]["thought_truncated_frac"], "{:.3f}"
            ),
            Column(
                "truncated, after", lambda row: row["after"]["thought_truncated_frac"], "{:.3f}"
            ),
            Column("accuracy with a thought, budget 16", accuracy, "{:.3f}", compared=True),
            Column(
                "that of the base",
                lambda row: row["answers_before"]["accuracy_with_thought"],
                "{:.3f}",
            ),
            FLOPS,
        ),
    ),
    "positions": Question(
        {
            "uniform": ("position.selector=uniform", "position.marker=null"),
            "entropy": ("position.selector=entropy", "position.marker=null"),
            DEFAULT: (),
        },
        "marker",
        (
            ACCURACY,
            GAIN,
            Column(
                "where it may think: positions with a gain, base",
                lambda row: row["before"]["positive_gain_frac"],
                "{:.3f}",
            ),
            Column(
                "mean gain there, base, nats",
                lambda row: row["before"]["gain_over_start_nats"],
                "{:.3f}",
            ),
            Column(
                "documents whose most uncertain position is an answer, base",
                lambda row: row["plain_before"]["most_uncertain_is_answer_frac"],
                "{:.3f}",
            ),
            Column(
                "the same, after",
                lambda row: row["plain"]["most_uncertain_is_answer_frac"],
                "{:.3f}",
            ),
            FLOPS,
        ),
    ),
    "ema_decay": Question(
        {"0": ("baseline.ema_decay=0.0",), DEFAULT: (), "0.9999": ("baseline.ema_decay=0.9999",)},
        "0.999",
        (*UPDATE, ACCURACY, GAIN_OVER_EMA),
    ),
}

PANEL_SECTIONS = ("position.", "thought.max_thought_tokens")
"""Settings that change the held-out panel; a model trained under them is evaluated on the default's
panel too."""


# Running


def answer(names: Iterable[str], seeds: list[int]) -> None:
    """Make the runs of some questions that results.jsonl lacks, the default's first, one after
    another."""
    from rlp.process.ranks import start_ranks, stop_ranks

    done = {(row["question"], row["setting"], row["seed"]) for row in read_results()}
    wanted = {("all", DEFAULT): ()} | {
        (name, setting): overrides
        for name in names
        for setting, overrides in QUESTIONS[name].settings.items()
        if setting != DEFAULT
    }
    ranks = start_ranks()
    try:
        for (question, setting), overrides in wanted.items():
            for seed in seeds:
                if (question, setting, seed) not in done:
                    row = one_run(question, setting, overrides, seed, ranks)
                    with RESULTS.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
    finally:
        stop_ranks()


def one_run(
    question: str, setting: str, overrides: tuple[str, ...], seed: int, ranks: object
) -> dict:
    """Train one setting from the base of a seed; its line of results.jsonl. The exported model
    stays under runs/questions."""
    from rlp import Trainer
    from rlp.process.exit_codes import DONE

    base, run = BASES / str(seed) / "base", RUNS / f"{question}_{setting}_seed_{seed}"
    shutil.rmtree(run, ignore_errors=True)  # left by an interrupted call
    code = Trainer(quickstart(base, run, seed, *overrides), ranks=ranks).fit().code
    if code != DONE:
        raise RuntimeError(
            f"{run}: the run ended with code {code}, expected {DONE}. Run the same command"
            " again; finished runs are kept."
        )
    summary, environment, ledger = (
        json.loads((run / name).read_text())
        for name in ("summary.json", "environment.json", "ledger.json")
    )
    shutil.rmtree(run / "checkpoints")
    other_panel = any(override.startswith(PANEL_SECTIONS) for override in overrides)
    default = json.loads((RUNS / f"all_{DEFAULT}_seed_{seed}" / "summary.json").read_text())
    weights, default_weights, base_weights = (
        read_weights(folder)
        for folder in (run / "export", RUNS / f"all_{DEFAULT}_seed_{seed}" / "export", base)
    )
    return {
        "question": question,
        "setting": setting,
        "overrides": list(overrides),
        "seed": seed,
        "before": summary["before"],
        "after": summary["after"],
        "answers_before": default["before"],
        "answers": (
            evaluate_answers(run / "export", run.with_name(f"{run.name}_panel"), ranks)
            if other_panel
            else summary["after"]
        ),
        "plain_before": plain_text(base),
        "plain": plain_text(run / "export"),
        "weights_sha256": (
            hashlib.sha256(
                b"".join(weights[name].tobytes() for name in sorted(weights))
            ).hexdigest()
        ),
        "weights_max_change": max_difference(weights, base_weights),
        "weights_max_difference": max_difference(weights, default_weights),
        "flops": summary["flops"],
        "input_tokens": ledger["input_tokens"],
        "seconds": summary["seconds"],
        "commit": environment["commit"],
        "cpu": environment["cpu"],
        "packages": environment["packages"],
    }


def quickstart(model: Path, run: Path, seed: int, *overrides: str) -> object:
    """The config of a run: the quickstart from another model, evaluated before and after only."""
    from rlp.config import load_config

    return load_config(
        ROOT / "configs" / "headings.yaml",
        [
            f"model.path={model}",
            f"run.dir={run}",
            f"run.seed={seed}",
            "evaluation.every_n_steps=0",
            "checkpoint.every_n_steps=0",
            *overrides,
        ],
    )


def evaluate_answers(model: Path, run: Path, ranks: object) -> dict:
    """The default's held-out panel (the answers, 16 thought tokens) for a model trained on other
    positions or with another budget."""
    from rlp import Trainer
    from rlp.run.held_out import HeldOut
    from rlp.run.state import Host

    shutil.rmtree(run, ignore_errors=True)
    config = quickstart(model, run, 0)
    opened = Trainer(config, ranks=ranks).open_on(Host.unwatched(config, ranks))
    evaluation = HeldOut(opened).evaluate()
    shutil.rmtree(run)
    return evaluation.values


def read_weights(model: Path) -> dict[str, np.ndarray]:
    """Float32 weights of an exported model by name."""
    from safetensors.numpy import load_file

    return load_file(model / "model.safetensors")


def max_difference(weights: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """Largest absolute difference of a weight between two models of one shape."""
    return max(float(np.abs(weights[name] - others[name]).max()) for name in weights)


def plain_text(model: Path) -> dict[str, float]:
    """What a model makes of the held-out documents as plain text, no thought in them: LM loss, and
    where it is least certain."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
    )
    documents = [json.loads(line)["text"] for line in HELD_OUT.read_text().splitlines()]
    tokens = torch.tensor(
        [tokenizer(text).input_ids for text in documents]
    )  # [B, P]; all have 30 tokens
    with torch.no_grad():
        logprob = network(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)  # [B, P - 1, V]
    of_token = logprob.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(logprob.exp() * logprob).sum(dim=-1)
    answers = tokens[:, :-1] == tokenizer.convert_tokens_to_ids("faces")
    return {
        "lm_nats": -of_token.mean().item(),
        "answer_nats": -of_token[answers].mean().item(),
        "other_nats": -of_token[~answers].mean().item(),
        "most_uncertain_is_answer_frac": (
            answers.gather(1, entropy.argmax(dim=1, keepdim=True)).double().mean().item()
        ),
        "answer_position_frac": answers.double().mean().item(),
    }


# Telling


def read_results() -> list[dict]:
    """The lines of results.jsonl; none where there is no file."""
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean (percentiles of 9999 resamples of the seeds). With five
    seeds it is somewhat too narrow."""
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every difference the same: the interval is a point
        low, high = bootstrap(
            (np.array(differences),), np.mean, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    return float(low), float(high)


def table(name: str, rows: list[dict]) -> str:
    """The table of a question: means over seeds, paired differences to the default with their
    intervals."""
    question = QUESTIONS[name]
    by_setting = {
        setting: {
            row["seed"]: row
            for row in rows
            if row["setting"] == setting and row["question"] in (name, "all")
        }
        for setting in question.settings
    }
    lines = []
    for setting, of_seed in by_setting.items():
        label = f"{question.default} (default)" if setting == DEFAULT else setting
        cells = [
            cell(column, of_seed, by_setting[DEFAULT] if setting != DEFAULT else {})
            for column in question.columns
        ]
        lines.append([label, *cells])
    return markdown_table([f"`{name}`", *(column.title for column in question.columns)], lines)


def cell(column: Column, of_seed: dict[int, dict], default: dict[int, dict]) -> str:
    """A number over seeds and, where the column is compared, the paired difference to the
    default."""
    number = float(column.over_seeds([column.value(row) for row in of_seed.values()]))
    if np.isnan(number):
        return "-"
    text = column.form.format(number)
    if not (column.compared and default):
        return text
    differences = [
        column.value(row) - column.value(default[seed]) for seed, row in sorted(of_seed.items())
    ]
    low, high = interval(differences)
    form = column.form.replace(":", ":+")
    return f"{text} ({form.format(np.mean(differences))} [{form.format(low)}, {form.format(high)}])"


def tables(rows: list[dict]) -> dict[str, str]:
    """Of all questions, by name."""
    return {name: table(name, rows) for name in QUESTIONS}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Small questions about the settings of RLP, answered over seeds."
    )
    parser.add_argument("question", nargs="?", choices=[*QUESTIONS, "all"], help="which one")
    parser.add_argument("--seeds", type=int, default=5, help="bases to run from, 5 by default")
    parser.add_argument(
        "--tables", action="store_true", help="write the tables of README.md from results.jsonl"
    )
    arguments = parser.parse_args()
    if not arguments.question and not arguments.tables:
        parser.error(f"nothing to do: name a question ({', '.join(QUESTIONS)}, all), or --tables")
    if arguments.question:
        seeds = counting_seeds(arguments.seeds)
        answer(QUESTIONS if arguments.question == "all" else [arguments.question], seeds)
        print(
            "\n\n".join(
                table(name, read_results())
                for name in ([arguments.question] if arguments.question != "all" else QUESTIONS)
            )
        )
    if arguments.tables:
        README.write_text(fill_page(README.read_text(), tables(read_results())))
    return 0


def counting_seeds(wanted: int) -> list[int]:
    """The first seeds whose base counts; makes the bases that are missing."""
    make = ROOT / "experiments" / "world" / "make_bases.py"
    wanted_of = ["--kind", "headings", "--seeds", str(wanted), "--out", str(BASES)]
    subprocess.run([sys.executable, str(make), *wanted_of], check=True)
    rows = [json.loads(path.read_text()) for path in BASES.glob("*/base.json")]
    return sorted(row["seed"] for row in rows if row["counts"])[:wanted]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
