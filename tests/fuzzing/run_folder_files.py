"""Run folders of which a file is another, and numbers that a figure is drawn of."""

import atexit
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml
from hypothesis import strategies as st

from rlp.cli import main as rlp_command
from rlp.compare.budget import open_budget_match
from rlp.config import load_config
from rlp.measure.figures import Curve, Interval, draw_curves, draw_intervals
from rlp.measure.ledger import PHASES
from rlp.process.environment import environment
from tests.fuzzing.ingredients import (
    GOOD_CONFIG,
    OURS,
    damaged,
    in_file,
    json_bytes,
    mutated,
    odd_value,
    raw_json,
)
from tests.measure.run_folders import make_run, make_thought


def _lines(count: int = 3) -> dict[str, list[dict]]:
    """What the logs of a run hold that `make_run` leaves out."""
    numbers = {"reward/mean": (0.5).hex(), "lm/loss": (2.5).hex()}
    journal = [
        {
            "step": step,
            "applied": True,
            "documents": "0" * 16,
            "thoughts": "1" * 16,
            "numbers": numbers,
            "tokens": 10 * step,
            "flops": (1e9).hex(),
            "state": "2" * 16,
        }
        for step in range(1, count + 1)
    ]
    post_training = {
        "stage": "sft",
        "accuracy_with_thought": 0.5,
        "accuracy_without_thought": 0.25,
        "gain_over_start_nats": 0.1,
    }
    return {
        "journal": journal,
        "alarms": [{"step": 2, "text": "an alarm"}],
        "config_changes": [{"step": 2, "key": "optim.learning_rate", "from": 1e-6, "to": 1e-5}],
        "post_training": [post_training],
    }


def _ledger() -> dict:
    phase = {
        "tokens_in": 1,
        "tokens_generated": 2,
        "tokens_trained": 3,
        "flops": 1e9,
        "seconds": 1.0,
    }
    return {
        "phases": {name: dict(phase) for name in PHASES},
        "input_tokens": 30,
        "flops": 6e9,
        "paper_flops": 100.0,
        "paper_flops_sampled": 90.0,
        "seconds": 6.0,
        "steps": 3,
    }


def _complete(run: Path) -> None:
    """Write what `make_run` leaves out, so that every file of a run folder is there."""
    for file, content in _lines().items():
        (run / f"{file}.jsonl").write_bytes(b"".join(json_bytes(line) + b"\n" for line in content))

    (run / "ledger.json").write_bytes(json_bytes(_ledger()))
    summary = json.loads((run / "summary.json").read_bytes())
    summary |= {"match": {"by": "flops", "ratio": 1.0}, "bad_documents": {"empty text": 1}}
    (run / "summary.json").write_bytes(json_bytes(summary))
    (run / "environment.json").write_bytes(json_bytes(environment(["cpu"])))


@functools.cache
def run_folders() -> tuple[Path, Path, dict[str, object]]:
    """Two folders of finished runs, and what the files of the first hold: a list of lines, or a
    value."""
    home = Path(tempfile.mkdtemp(prefix="rlp_fuzz_"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    thoughts = [make_thought(1, 0.5), make_thought(1, -0.5), make_thought(3, None)]
    for name in ("run", "other"):
        _complete(make_run(home / name, steps=3, thoughts=thoughts))

    held = {}
    for path in (home / "run").iterdir():
        if path.suffix == ".jsonl":
            held[path.name] = [json.loads(line) for line in path.read_bytes().splitlines()]
        elif path.suffix in (".json", ".yaml"):
            held[path.name] = yaml.safe_load(path.read_text())
    return home / "run", home / "other", held


def one_file(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
    good = run_folders()[2][name]
    return st.tuples(
        st.just(name),
        st.one_of(
            mutated(good).map(lambda tree: in_file(name, tree)),
            mutated(good).map(lambda tree: in_file(name, tree)),
            damaged(in_file(name, good)),
            odd_value.map(raw_json),
        ),
    )


run_folder_cases = st.deferred(
    lambda: st.tuples(
        st.integers(0, 1),
        st.lists(
            st.sampled_from(sorted(run_folders()[2])).flatmap(one_file), min_size=1, max_size=2
        ),
    )
)


_COMMANDS: dict[str, Callable[[Path, Path, Path], set[tuple]]] = {
    "thoughts.jsonl": lambda run, other, folder: {
        ("view", run, "--sort", "best"),
        ("view", run, "--step", "1", "--search", "x"),
    },
    "journal.jsonl": lambda run, other, folder: {
        ("audit", run, other, "--tolerance", "0.1"),
        ("audit", other, run),
    },
    **dict.fromkeys(
        ("config.yaml", "ledger.json", "summary.json"),
        lambda run, other, folder: {
            ("match", run, "--arm", "cpt", "--by", "flops", "--out", folder / "arm.yaml")
        },
    ),
}
"""What reads a file beside the report, which reads them all."""


def read_run_folder(folder: Path, case: tuple[int, list[tuple[str, bytes]]]) -> str:
    """Every command that reads what was changed of a run folder, and the ends of them."""
    (number, case), (run, other, held) = case, run_folders()
    said = []
    try:
        for name, content in case:
            (run / name).write_bytes(content)
        drawn = {
            "rlp.measure.report_plots.draw_curves": lambda *values, **options: "data:,",
            "rlp.measure.report_plots.draw_intervals": lambda *values, **options: "data:,",
        }
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), ExitStack() as patches:
            for what, instead in drawn.items():
                patches.enter_context(patch(what, instead))
            commands = {
                (
                    ("report", run, other, "--out", folder / "page.html")
                    if number % 2
                    else ("report", run, "--out", folder / "page.html")
                )
            }
            commands |= {
                command
                for name, _ in case
                for command in _COMMANDS.get(name, lambda *paths: set())(run, other, folder)
            }
            said += [
                rlp_command([str(word) for word in command])
                for command in sorted(commands, key=str)
            ]
            (folder / "arm.yaml").unlink(missing_ok=True)
            said += (
                [_match(run, held["ledger.json"])]
                if any(name == "ledger.json" for name, _ in case)
                else []
            )
    finally:
        for name, _ in case:
            (run / name).write_bytes(in_file(name, held[name]))
    assert set(said) <= {0, 1, 2, 3}, said
    return "read by all" if set(said) <= {0, 1} else "refused by some"


def _match(run: Path, own: dict) -> int:
    """The other run's ledger as a matched run reads it."""
    config = load_config(
        GOOD_CONFIG
        | {
            "budget": {"flops": 6e9},
            "match": {"ledger": str(run / "ledger.json"), "by": "flops"},
        }
    )
    try:
        assert open_budget_match(config).table(own)
    except OURS:
        return 3
    return 0


def read_figure(folder: Path, case: tuple[list[float], list[float], str]) -> None:
    """Numbers that a run folder may hold, drawn."""
    x, values, label = case
    size = min(len(x), len(values))
    curve = Curve(
        np.array(x[:size], dtype=float),
        np.array([values[:size]], dtype=float),
        "#000000",
        "-",
        dots=False,
    )
    assert draw_curves([curve], [], unit="nats", x_label=label, size=(2, 1)).startswith("data:")
    assert draw_intervals(
        ["a"], [("#000000", {"a": Interval(values[0], min(values), max(values))})], x_label="nats"
    ).startswith("data:")


figure_numbers = st.lists(
    st.one_of(
        st.floats(-1e100, 1e100), st.sampled_from([0.0, 1e100, -1e100, 1e-300, float(2**63)])
    ),
    min_size=1,
    max_size=30,
)
figure_cases = st.tuples(figure_numbers, figure_numbers, st.sampled_from(["step", "FLOPs"]))
