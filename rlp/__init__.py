"""RLP: reinforcement as a pretraining objective (arXiv 2510.01265).

from rlp import Trainer, load_config

Trainer(load_config("configs/quickstart.yaml")).fit()
"""

from typing import TYPE_CHECKING

from rlp.process.machine import let_waiting_threads_sleep

if TYPE_CHECKING:
    from rlp.config import Config, load_config
    from rlp.step.reward import Evidence
    from rlp.trainer import Trainer

let_waiting_threads_sleep()  # torch, which comes next, reads it once

__all__ = ["Config", "Evidence", "Trainer", "load_config"]

HOMES = {
    "Config": "rlp.config",
    "Evidence": "rlp.step.reward",
    "Trainer": "rlp.trainer",
    "load_config": "rlp.config",
}
"""Where the public names live: imported when they are asked for, for some take seconds."""


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'rlp' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(HOMES[name]), name)
