"""What is measured of a contender: its turns, its steps, its operations, and its memory."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

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


@torch.no_grad()
def parting_distance(lm: PreTrainedModel, setting: Setting, ours: Sampled, other: Sampled) -> float:
    """Of all thoughts that two samplers with the same numbers do not share: how far, at the token
    at which they part, the number is from the boundary between the two tokens.

    In float64, from the probabilities of the tokens before. Rounding can part thoughts at a
    boundary and nowhere else; 0 where all thoughts are the same.
    """
    noise, farthest = setting.noise(), 0.0
    differs = (ours.tokens != other.tokens).any(axis=1)
    exact = copy.deepcopy(lm).double() if differs.any() else None
    for thought in np.flatnonzero(differs):
        m, g = divmod(int(thought), setting.group_size)
        u = int((ours.tokens[thought] != other.tokens[thought]).argmax())
        d, t = setting.positions.places()[m]
        prefix = THOUGHT_FORMAT.prefix(setting.documents[d].tokens, t)
        row = np.concatenate([prefix, ours.tokens[thought, :u]])
        logits = exact(input_ids=torch.from_numpy(row)[None].to(lm.device)).logits[0, -1]
        below = (logits / THOUGHT_FORMAT.temperature).softmax(dim=0).cumsum(dim=0)

        pair = (ours.tokens[thought, u], other.tokens[thought, u])
        ends = below[[min(pair), max(pair) - 1]]
        number = noise.uniforms(setting.documents[d], t, g, setting.max_thought_tokens)[u]
        farthest = max(farthest, float((ends - number).abs().max()))
    return farthest


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
