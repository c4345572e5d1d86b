"""What a step waits for: how often it reads the device and meets the other ranks does not depend on
how many micro-batches it has."""

import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlp.step.pulse import Pulse
from rlp.trainer import take_step
from tests.training import open_run, tiny_config

READS = {
    "item",
    "tolist",
    "cpu",
    "nonzero",
    "masked_select",
    "unique",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
}
"""Methods of a tensor that wait for the device that it is on."""

SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "_local_scalar_dense",
    "_unique2",
    "unique_dim",
}
"""Operators whose result, or its size, is known when the device has come to them."""

ON_THE_HOST = ("layout.py", "top_thoughts.py")
"""Work with a copy that was made for the whole step."""


def is_on_the_host() -> bool:
    """Whether who reads is one of these."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(ON_THE_HOST):
            return True
        frame = frame.f_back
    return False


class Reads(TorchFunctionMode):
    """Counts what Python asks of tensors."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        super().__init__()

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        if name in READS and not is_on_the_host():
            self.found[name] += 1
        return function(*arguments, **(options or {}))


class Waits(TorchDispatchMode):
    """Counts the operators that wait for the device, those of backward passes too, and
    collectives."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        super().__init__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.partition("::")
        is_mask = name[2] in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        waits = name[0] == "c10d" or name[2] in SIZED_BY_VALUES or is_mask
        if waits and not is_on_the_host():
            self.found[function._schema.name] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {
            "reward__kind": "greedy_match",
            "logging__every_n_steps": 1,
            "optim__thoughts_per_forward": 2,
        },
        {"position__selector": "surprisal", "reward__placebo": "foreign_thought"},
        {"engine__zero_stage": 0, "objective__kl_weight": 0.5, "optim__updates_per_rollout": 2},
    ],
)
def test_a_step_waits_as_often_however_many_micro_batches_it_has(
    tmp_path, model_folder, corpus, ranks, setting
):
    """One or four; ranks meet, and numbers are read, when all passes are made."""
    found = []
    for size in (4, 1):
        config = tiny_config(
            tmp_path / f"of_{size}", model_folder, corpus, optim__micro_batch_size=size, **setting
        )
        run = open_run(config, ranks)
        with Reads() as reads, Waits() as waits:
            take_step(run)
        found.append((reads.found, waits.found))
    assert found[0] == found[1]
    assert found[0][0]["tolist"] > 0 and found[0][1]["c10d::allreduce_"] > 0


def test_ranks_whose_passes_are_collectives_vote_every_few_seconds(monkeypatch):
    """Passes of a second: after the first, whose seconds nobody knows, and then after five each. Of
    a minute, which they are not expected to take: after five more, and then after each."""
    now, votes, clock = [0.0], [], "rlp.step.pulse.time.perf_counter"
    monkeypatch.setattr(clock, lambda: now[0])
    preemption = SimpleNamespace(
        leaving_early=nullcontext, vote=lambda ms: votes.append(now[0]) or ms
    )
    watchdog = SimpleNamespace(mark=lambda *phase: None, phase="")
    pulse = Pulse(preemption, watchdog, lambda *told: None)
    with pulse.may_be_left():
        for seconds in [1] * 16 + [60] * 7:
            now[0] += seconds
            pulse.between_passes(True)
    assert votes == [1, 6, 11, 16, 316, 376, 436]
