"""Runs for the tests: a tiny base config, training in this process, and training in several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlp.config import Config, load_config
from rlp.process.ranks import Ranks
from rlp.process.watchdog import Watchdog
from rlp.run.state import Host, OpenRun
from rlp.trainer import Trainer
from tests import REPOSITORY

TINY = {
    "position.per_document": 2,
    "thought.group_size": 4,
    "thought.max_thought_tokens": 5,
    "thought.temperature": 0.7,
    "objective.lm_weight": 0.1,
    "optim.batch_size": 4,
    "optim.micro_batch_size": 2,
    "optim.learning_rate": 1e-2,
    "optim.epsilon": 1e-2,
    "budget.steps": 3,
    "baseline.ema_decay": 0.9,
    "engine.dtype": "float32",
    "evaluation.panel_positions": 6,
    "evaluation.thoughts_per_position": 2,
    "logging.every_n_steps": 1,
}
"""A run that takes a second. Large learning rate and fast EMA, so that mistakes show in three
steps; a large epsilon, because Adam otherwise turns the rounding of near-zero gradients into whole
steps."""


def write_corpus(path: Path, documents: list[str]) -> Path:
    """A JSON Lines file with one document a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def tiny_config(folder: Path, model: Path, corpus: Path, **overrides: object) -> Config:
    """The tiny run in `folder`; overrides are dotted keys with `__` for the dot."""
    base = folder.parent / "base.yaml"
    base.write_text(
        f"model: {{path: {model}}}\ndata: {{train: [{corpus}]}}\nrun: {{dir: {folder}}}\n"
    )
    settings = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(
        base, [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    )


def train(config: Config, ranks: Ranks) -> int:
    """Train to the end; the exit code."""
    return Trainer(config, ranks=ranks).fit().code


def open_run(config: Config, ranks: Ranks, watchdog: Watchdog | None = None) -> OpenRun:
    """A run that is open, in a process that nobody watches, for tests that make its steps."""
    return Trainer(config, ranks=ranks).open_on(Host.unwatched(config, ranks, watchdog))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


CURVE = (
    "reward/mean",
    "optim/grad_norm",
    "thought/tokens_mean",
    "lm/loss",
    "policy/reasoned_logprob",
)


def curve(folder: Path) -> list[list[float]]:
    """The numbers of each step that depend on everything before it."""
    return [[line[name] for name in CURVE] for line in read_lines(folder / "metrics.jsonl")]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    """The numbers of every step agree."""
    torch.testing.assert_close(
        torch.tensor(curve(one)), torch.tensor(curve(other)), rtol=tolerance, atol=tolerance
    )


def masters(run: OpenRun) -> dict[str, torch.Tensor]:
    """Copies of the float32 master weights; one rank owns them all."""
    return {
        fragment.name: fragment.view(fragment.flat).clone()
        for fragment in run.parts.engine.shards.fragments()
    }


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher sets."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(REPOSITORY),
    }


def launch(command: list[str], world_size: int, port: int, timeout: float = 240) -> list[str]:
    """Run a Python script as `world_size` ranks; their outputs, or an AssertionError with them."""
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env=rank_environment(rank, world_size, port),
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(outputs)
    return outputs
