"""A whole step with its sampling: ours, and TRL's GRPOTrainer with its own generation.

Everything that a step with given thoughts does (`contenders`), and the thoughts themselves before
it. Their lengths are imposed as in a sampling phase (`sampling_phase.setting`), the same on both;
which tokens they have is each contender's own.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G
"""

import statistics
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from torch import Tensor

from rlp.model.layout import LAYOUTS
from rlp.sampling.native import NativeSampler
from sampling_phase.closing import Closing
from sampling_phase.setting import Setting, close_by_noise, make_setting
from update_step.contenders import Network, Ours, Peer, Stopwatch
from update_step.given import CLOSE, THOUGHT_FORMAT, Given, Rows, Shape
from update_step.turns import Bench, timed_step

OURS, TRL = "ours", "TRL careful"


class SamplingOurs:
    """Slots for all thoughts of the step, then the step by the tree."""

    def __init__(self, network: Network, setting: Setting) -> None:
        self.network, self._setting = network, setting
        self._step = Ours(network, LAYOUTS["tree"])
        self._sampler = NativeSampler(self._step.policy, slots=setting.lengths.size, shared=True)

    def gradient_of(self, setting: Setting, watch: Stopwatch) -> Tensor:
        """Leave the gradient in the weights; returns the rewards [M, G]."""
        with watch.part("sampling"), self._sampler.phase():
            rollout = self._sampler.sample(
                setting.documents,
                setting.positions,
                THOUGHT_FORMAT,
                setting.noise(),
                group_size=setting.group_size,
                max_thought_tokens=setting.max_thought_tokens,
            )
        given = Given(setting.documents, setting.positions, rollout.thoughts)
        require_lengths(given.thoughts.mask.sum(dim=2).flatten().tolist(), setting)
        return self._step.gradient_of(given, watch)


class SamplingPeer(Peer):
    """TRL generates all completions of the step in one batch, then trains on them."""

    def __init__(self, network: Network, shape: Shape, folder: Path, micro_batch: int) -> None:
        network.lm.generation_config.eos_token_id = CLOSE
        super().__init__(
            network, shape, folder, careful=True, micro_batch=micro_batch, samples=True
        )

    def gradient_of(self, setting: Setting, watch: Stopwatch) -> Tensor:
        """Leave the gradient in the weights; returns the rewards [M, G]."""
        self._setting = setting
        generate = self.network.lm.generate

        def timed(**inputs: object) -> Tensor:
            closing = Closing(setting.lengths, inputs["input_ids"], setting.max_thought_tokens)
            with watch.part("sampling"):
                return generate(**inputs, logits_processor=[closing])

        with mock.patch.object(self.network.lm, "generate", timed):
            return super().gradient_of(_rows(setting), watch)

    def _prompt(self, n: int) -> str:
        return " ".join(f"w{token}" for token in self._rows.prompts[n])

    def _reward(self, completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths = [len(completion) for completion in completion_ids]
        require_lengths(lengths, self._setting)
        closed = [
            [*prompt, *completion, *(() if completion[-1] == CLOSE else (CLOSE,))]
            for prompt, completion in zip(self._rows.prompts, completion_ids, strict=True)
        ]
        self._rows = replace(self._rows, completions=completion_ids, closed=closed)
        return super()._reward(completion_ids)


def _rows(setting: Setting) -> Rows:
    """What TRL is given before it has sampled."""
    group, positions = setting.group_size, setting.positions
    position_of = np.repeat(np.arange(len(positions.position)), group).tolist()
    prompts = setting.prompts()
    return Rows(
        setting.documents[0].tokens,
        positions.position,
        position_of,
        positions.target[position_of, 0],
        [prompts[m] for m in position_of],
        [],
        [],
    )


def require_lengths(lengths: list[int], setting: Setting) -> None:
    """Refuse thoughts that are not as long as they should be."""
    expected = setting.lengths.flatten().tolist()
    if lengths != expected:
        raise RuntimeError(f"thoughts should have {expected} tokens, and have {lengths}")


def measure_sampled(bench: Bench, warmups: int, repeats: int) -> dict:
    """Seconds of both, in turn, and their ratio."""
    setting = make_setting(bench.shape, 1, bench.config.vocab_size)

    def network() -> Network:
        return Network(bench.config, bench.device, bench.dtype, prepare=close_by_noise)

    contenders = {
        OURS: SamplingOurs(network(), setting),
        TRL: SamplingPeer(network(), bench.shape, bench.folder, bench.micro_batch),
    }
    raw = {name: {"sampling": [], "scoring": [], "update": [], "step": []} for name in contenders}
    for turn in range(-warmups, repeats):
        for name, contender in contenders.items():
            seconds = timed_step(contender, setting, bench.device)
            for part, values in raw[name].items():
                values += [seconds[part]] if turn >= 0 else []
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()}
        for name, parts in raw.items()
    }
    return {
        "shape": str(bench.shape),
        "tokens": setting.num_tokens,
        "careful_micro_batch": bench.micro_batch,
        "speedup_vs_trl": medians[TRL]["step"] / medians[OURS]["step"],
        "medians": medians,
        "ranges": {name: [min(parts["step"]), max(parts["step"])] for name, parts in raw.items()},
        "raw_seconds": raw,
    }


def sampled_table(result: dict) -> str:
    """One line per contender: medians, and the range of the whole step."""
    lines = [
        f"\nwith sampling, P,K,G,L {result['shape']}, {result['tokens']} tokens of thoughts",
        f"{'contender':14s}{'sampling':>10s}{'scoring':>10s}{'update':>10s}"
        f"{'whole step, s (min - max)':>30s}",
    ]
    for name, parts in result["medians"].items():
        low, high = result["ranges"][name]
        lines.append(
            f"{name:14s}{parts['sampling']:10.3f}{parts['scoring']:10.3f}{parts['update']:10.3f}"
            f"{parts['step']:12.3f} ({low:.3f} - {high:.3f})"
        )
    return "\n".join([*lines, f"speedup_vs_trl: {result['speedup_vs_trl']:.2f}"])
