"""What is measured of a contender: its turns, its steps, its operations, and its memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rlp.model.shapes import forward_flops, model_shapes, row_work
from sampling_phase.contenders import Contender, Sampled
from sampling_phase.setting import Setting
from update_step.given import THOUGHT_FORMAT


@dataclass(frozen=True, slots=True)
class Audit:
    """A phase that is not timed, looked at from within."""

    sampled: Sampled
    decode_steps: int
    """Forwards of one token in each row."""
    flops: int
    """Of all matrix products and attentions that were run, padding and idle rows included."""


class Steps:
    """Counts forwards of one token a row; all others run prefixes, of many tokens a row."""

    def __init__(self, rows: int) -> None:
        self.count, self._rows = 0, rows

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        hook = network.register_forward_pre_hook(self._look, with_kwargs=True)
        yield
        hook.remove()

    def _look(self, network: nn.Module, arguments: tuple, named: dict) -> None:
        self.count += named["input_ids"].numel() <= self._rows


def audit(contender: Contender, network: nn.Module, rows: int) -> Audit:
    """Run a phase, step by step in Python: no recorded step may be replayed.

    Args:
        network: that all forwards go through (`base_model`).
        rows: the most that are decoded side by side.
    """
    steps = Steps(rows)
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flops = FlopCounterMode(display=False, custom_mapping={cpu_attention: _attention_flops})
    with steps.of(network), flops:
        sampled = contender.run()
    return Audit(sampled, steps.count, flops.get_total_flops())


def _attention_flops(query, key, value, *_, out_shape=None, **__) -> int:
    """As torch counts its other attentions; it has no entry for this one."""
    return sdpa_flop_count(query, key, value)


def useful_flops(setting: Setting, config) -> float:
    """The least that a phase takes: each document once, each thought behind its prefix once, the
    head where a token is drawn."""
    opening = len(THOUGHT_FORMAT.markers.open)
    last = [setting.positions.last_of(d) for d in range(len(setting.documents))]
    prefix = setting.positions.position[:, None]
    run = setting.lengths + opening - 1  # the last token of a thought is drawn and not run
    work = row_work(last, 0) + row_work(run, setting.num_tokens, before=prefix)
    return forward_flops(model_shapes(config), work)


def seconds(contender: Contender, device: torch.device) -> float:
    """Of one phase: CPU time of this process, or what passes on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        contender.run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    contender.run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(
    contenders: dict[str, Contender], device: torch.device, repeats: int, seldom: set[str]
) -> dict[str, list[float]]:
    """Seconds by contender, A B A B.

    Args:
        seldom: those that take every fifth turn.
    """
    raw = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, contender in contenders.items():
            if turn % 5 == 0 or name not in seldom:
                raw[name].append(seconds(contender, device))
    return raw
