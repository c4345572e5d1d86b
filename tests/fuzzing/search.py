"""A search with each reader: how many inputs ended how."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from rlp.data import unpacked
from tests.fuzzing.checkpoints import checkpoint_cases, read_checkpoint, read_resume, resume_cases
from tests.fuzzing.config_and_data import config_cases, data_cases, read_config, read_data
from tests.fuzzing.ingredients import OURS
from tests.fuzzing.run_folder_files import (
    figure_cases,
    read_figure,
    read_run_folder,
    run_folder_cases,
)
from tests.fuzzing.thinking import benchmark_cases, read_benchmarks, read_thoughts, thought_cases

READERS: dict[str, tuple[Callable, st.SearchStrategy, float]] = {
    "config": (read_config, config_cases, 0.15),
    "data": (read_data, data_cases, 0.15),
    "checkpoint": (read_checkpoint, checkpoint_cases, 0.3),
    "resume": (read_resume, resume_cases, 0.12),
    "run folder": (read_run_folder, run_folder_cases, 0.1),
    "figures": (read_figure, figure_cases, 0.01),
    "thought format": (read_thoughts, thought_cases, 0.08),
    "benchmarks": (read_benchmarks, benchmark_cases, 0.09),
}
"""How each kind of input is read and made, and its share of a search."""


class Case:
    """An input that is shown in short, where it breaks a reader."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)[-4000:]


def search(name: str, inputs: int, key: int = 0) -> Counter:
    """Try a reader on so many inputs; how they ended. The same key gives the same inputs."""
    read, cases, _ = READERS[name]
    ends: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        unpacked.UNPACKED = Path(folder) / "unpacked"

        @seed(key)
        @settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            verbosity=Verbosity.normal,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(cases.map(Case))
        def attempt(case: Case) -> None:
            try:
                ends[read(Path(folder), case.value) or "read"] += 1
            except OURS as error:
                assert str(error).strip(), "an error says something"
                ends[type(error).__name__] += 1

        attempt()
    return ends
