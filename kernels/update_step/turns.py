"""The setting that contenders share, the check that they agree, and the turns that they take."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config

from rlp.model.layout import LAYOUTS
from rlp_kernels import choose_form
from update_step.contenders import Network, Ours, Peer, Stopwatch
from update_step.given import Given, Rows, Shape, make_given
from update_step.memory import peak_during

CAREFUL, NAIVE, CHECKPOINTED = "TRL careful", "TRL naive", "TRL careful, checkpointing"
NAIVE_MICRO_BATCH = 8
"""TRL's default per_device_train_batch_size."""
OTHERS_EVERY = 5
"""Turns: two of ten. A default run then takes 6 minutes of CPU time (measured on a busy Xeon at 2.8
GHz)."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The setting that all contenders share."""

    config: Qwen3Config
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    folder: Path
    micro_batch: int
    """Of the careful peer."""

    def build(self, name: str) -> Ours | Peer:
        """A contender with weights of its own, equal to those of the others."""
        network = Network(self.config, self.device, self.dtype)
        if name in (CAREFUL, CHECKPOINTED):
            return Peer(
                network,
                self.shape,
                self.folder,
                careful=True,
                micro_batch=self.micro_batch,
                checkpointing=name == CHECKPOINTED,
            )
        if name == NAIVE:
            return Peer(
                network,
                self.shape,
                self.folder,
                careful=False,
                micro_batch=min(NAIVE_MICRO_BATCH, self.shape.num_thoughts),
            )
        layout, _, plain = name.partition(", ")
        return Ours(network, LAYOUTS[layout], form="plain" if plain else "auto")

    def given(self) -> Given:
        return make_given(self.shape, self.config.vocab_size)

    def tiny(self) -> Given:
        """As many thoughts, all short.

        What a first step allocates for good, it allocates on these.
        """
        shape = replace(
            self.shape, document_tokens=2 * (self.shape.positions + 1), thought_tokens=2
        )
        return make_given(shape, self.config.vocab_size)


def contender_names(bench: Bench, checkpointing: bool) -> list[str]:
    """Ours first, then ours with features switched off in turn, then the peers."""
    names = ["tree", "repeated"]
    if log_probability_form(bench) == "chunked":
        names.append("repeated, plain log-probs")
    names.append(CAREFUL)
    if checkpointing:
        names.append(CHECKPOINTED)
    return [*names, NAIVE]


def log_probability_form(bench: Bench) -> str:
    """What `auto` takes for the thoughts and targets of a step."""
    rows = int(bench.given().thoughts.mask.sum()) + bench.shape.num_thoughts
    return choose_form(
        rows, bench.config.vocab_size, width=bench.config.hidden_size, dtype=bench.dtype
    )


def timed_step(
    contender: Ours | Peer, given: Given | Rows, device: torch.device
) -> dict[str, float]:
    """Seconds of the parts of one step."""
    watch = Stopwatch(device)
    with watch.part("step"):
        contender.gradient_of(given, watch)
        contender.network.update()
    return watch.seconds()


def fastest_micro_batch(bench: Bench) -> int:
    """Of the careful peer: completions per forward.

    From one group upwards until a larger one is slower or does not fit. One step each, after a
    short one.
    """
    best, best_seconds = bench.shape.group_size, float("inf")
    for size in _micro_batches(bench.shape):
        peer = replace(bench, micro_batch=size).build(CAREFUL)
        try:
            timed_step(peer, peer.prepare(bench.tiny()), bench.device)
            seconds = timed_step(peer, peer.prepare(bench.given()), bench.device)["step"]
        except torch.OutOfMemoryError:
            break
        if seconds > best_seconds:
            break
        best, best_seconds = size, seconds
    return best


def _micro_batches(shape: Shape) -> list[int]:
    # Half a group was slower than one, at 256,4,8,32 and 256,4,8,128 on a CPU core.
    group, num_thoughts = shape.group_size, shape.num_thoughts
    sizes = {group, 2 * group, 4 * group, num_thoughts}
    return sorted(size for size in sizes if num_thoughts % size == 0)


def check(bench: Bench, names: list[str]) -> tuple[float, float, dict[str, Ours | Peer]]:
    """Whether all contenders compute the same step, in float32.

    Returns:
        the largest error of rewards (relative to the largest reward) and of gradients (norms), both
        against the first name; and the contenders, unless they are wanted in another dtype.
    """
    contenders, reward_errors, gradient_errors = {}, [], []
    expected_reward = expected_gradient = None
    for name in names:
        contender = replace(bench, dtype=torch.float32).build(name)
        reward, gradient = _reward_and_gradient(contender, bench)
        if expected_reward is None:
            expected_reward, expected_gradient = reward, gradient

        largest = expected_reward.abs().max()
        reward_errors.append(float((reward - expected_reward).abs().max() / largest))
        norm = expected_gradient.norm()
        gradient_errors.append(float((gradient - expected_gradient).norm() / norm))

        contender.network.optimizer.zero_grad()
        if bench.dtype == torch.float32:
            contenders[name] = contender
    return max(reward_errors), max(gradient_errors), contenders


def _reward_and_gradient(contender: Ours | Peer, bench: Bench) -> tuple[Tensor, Tensor]:
    given = contender.prepare(bench.given())
    reward = contender.gradient_of(given, Stopwatch(bench.device))
    return reward.cpu().float(), contender.network.gradient()


def take_turns(
    bench: Bench, contenders: dict[str, Ours | Peer], warmups: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds by contender and part, A B A B; warm-up rounds are not kept.

    On a CPU only ours and the careful peer take every turn, the others one in `OTHERS_EVERY`.
    """
    ours = next(iter(contenders))
    given = {name: contender.prepare(bench.given()) for name, contender in contenders.items()}
    raw = {name: {"scoring": [], "update": [], "step": []} for name in contenders}

    for turn in range(-warmups, repeats):
        all_take_it = bench.device.type != "cpu" or (turn >= 0 and turn % OTHERS_EVERY == 0)
        for name, contender in contenders.items():
            if not all_take_it and name not in (ours, CAREFUL):
                continue
            seconds = timed_step(contender, given[name], bench.device)
            if turn < 0:
                continue
            for part, values in raw[name].items():
                values.append(seconds[part])
    return raw


def peak_bytes(bench: Bench, name: str) -> int | None:
    """Most that a step holds beyond weights, EMA and moments; its gradients are counted.

    As `peak_during` measures it.
    """
    contender = bench.build(name)
    timed_step(contender, contender.prepare(bench.tiny()), bench.device)
    given = contender.prepare(bench.given())

    return peak_during(lambda: timed_step(contender, given, bench.device), bench.device)
