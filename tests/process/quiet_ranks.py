"""Ranks that are none, and a config of a run that never starts."""

from dataclasses import dataclass

import torch

from rlp.config import BudgetConfig, Config, DataConfig, LoggingConfig, ModelConfig, RunConfig


@dataclass
class FakeRanks:
    """One of several ranks, without a process group; `told` is what rank 0 broadcasts."""

    rank: int = 0
    told: object = None
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self):
        return self.rank == 0

    def gather(self, value):
        return [value, value]

    def broadcast(self, value):
        return value if self.is_first else self.told


def make_config(path, **logging_settings):
    return Config(
        run=RunConfig(dir=str(path)),
        model=ModelConfig(path="tiny"),
        data=DataConfig(train=["corpus.jsonl"]),
        budget=BudgetConfig(steps=4),
        logging=LoggingConfig(every_n_steps=2, **logging_settings),
    )
