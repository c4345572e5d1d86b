"""What one update step costs when its thoughts are given: ours, and the same step done with TRL's
GRPOTrainer.

    python kernels/bench_step.py --shape 256,4,8,32 --json step.json

Every contender computes the same numbers: the reward of each thought (eq. 5), its advantage (eq.
7), the gradient of the clipped surrogate (eq. 8), one AdamW step, one EMA step. That is checked
first, in float32; contenders that differ are not compared, and the program exits with 1. Then they
take turns, A B A B, on one process and one thread.

    ours          train.py's composition without DeepSpeed: one teacher forward of the document, one
                  policy forward that gives rewards and thought log-probabilities, backward
    TRL careful   GRPOTrainer with a reward function that reads the last row only, pads to its own
                  micro-batch, and asks the teacher once per document; the fastest of several
                  micro-batches
    TRL naive     GRPOTrainer, micro-batch 8, with a reward function that computes all logits of
                  every completion, and asks the teacher once per completion

What is fair
    Same weights from a seed, document, positions, thoughts, dtype, temperature, AdamW, EMA teacher.
    The peers run TRL's own
    `training_step`: its preparing, rewards, advantages, loss and backward, with the given thoughts
    coming in through `rollout_func`. Eq. 7's factor is a reward weight of G / (G - 1), as TRL
    leaves it out; `loss_type="grpo"` is the mean over a thought's tokens, then over thoughts; the
    open marker is out of the peers' target softmax too. The careful peer is
    given more than TRL offers on a CPU: there TRL's fused head scores the prompt's tokens as well,
    and only where Triton runs does it keep to the completion; here it keeps to it everywhere.
    Gradient checkpointing, TRL's default, is off. On a CPU, ours and the careful peer take every
    turn; the others take two of ten.
What is not
    TRL pads all prompts of a step to the longest, and computes an entropy for its metrics: both are
    left as they are, and both are in its time. Our monitors (a few means per step) are left out of
    ours. Nobody clips gradients. Nothing is sampled, so nothing is said about sampling. On a GPU
    all run in bfloat16, weights, moments and EMA too, which nobody should train with, but which
    costs all of them the same; TRL rounds logits to bfloat16 there and ours does not.
Not driven by TRL
    `Trainer.train`'s loop: the optimizer step between `training_step`s is ours, and the same for
    all.

Dimensions
    P  document tokens;  K  positions of the document (M = K);  G  thoughts per position;  N = K * G
    L  longest thought;  T  tokens of a row;  V  vocabulary
"""

import argparse
import copy
import datetime
import functools
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import rlp

# isort: split
import numpy as np
import torch
import transformers
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

import rlp.model.layout
import rlp.model.policy
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.layout import LAYOUTS, Layout, repeated_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.scoring import score
from rlp.model.shapes import Work, causal_pairs, forward_flops, model_shapes
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.objective import (
    clipped_surrogate,
    group_relative_advantage,
    information_gain,
    log_evidence,
)
from rlp_kernels import choose_form, token_logprobs

SEED, LEARNING_RATE, EMA_DECAY, CLIP, TEMPERATURE = 0, 1e-6, 0.999, 0.2, 0.7
PAD, EOS, OPEN, CLOSE, FIRST_WORD = 0, 1, 2, 3, 8
FORM = ThoughtFormat(
    markers=Markers(open=(OPEN,), close=(CLOSE,)),
    instruction=(),
    begin=None,
    temperature=TEMPERATURE,
    target_temperature=1.0,
    horizon=1,
)
LARGEST_ERROR = 1e-4
"""Relative, in float32: beyond it the contenders do not compute the same step, and the benchmark is
void."""
NAIVE_MICRO_BATCH = 8
"""TRL's default per_device_train_batch_size."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12}
"""Dense bfloat16 of the SXM boards, from the data sheet."""
OTHERS_EVERY = 5
"""Turns: two of ten. A default run then takes 6 minutes of CPU time (measured on a busy Xeon at 2.8
GHz)."""
CAREFUL, NAIVE, CHECKPOINTED = "TRL careful", "TRL naive", "TRL careful, checkpointing"
CAVEATS = (
    (
        "Equal-MFU ratios flatter nobody at L 2048: they are about 2x at most, because long"
        " thoughts leave little prefix to share."
    ),
    "Nothing is claimed against a vLLM-backed peer: none is measured here, and nothing is sampled.",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """P,K,G,L."""

    document_tokens: int
    positions: int
    group_size: int
    thought_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        numbers = [int(part) for part in text.split(",")]
        if (
            len(numbers) != 4
            or min(numbers) < 1
            or numbers[2] < 2
            or numbers[0] < 2 * (numbers[1] + 1)
        ):
            raise argparse.ArgumentTypeError(
                "--shape is P,K,G,L with G >= 2 and P >= 2 (K + 1), such as 256,4,8,32; got"
                f" {text!r}"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.document_tokens},{self.positions},{self.group_size},{self.thought_tokens}"

    @property
    def num_thoughts(self) -> int:
        return self.positions * self.group_size


@dataclass(frozen=True, slots=True)
class Given:
    """What a step is given."""

    documents: list[Document]
    positions: Positions
    thoughts: Thoughts

    def completion(self, n: int) -> list[int]:
        """The sampled tokens of thought n."""
        tokens, mask = (
            rearrange(part, "m g l -> (m g) l")[n]
            for part in (self.thoughts.tokens, self.thoughts.mask)
        )
        return tokens[mask].tolist()

    def prompt(self, n: int) -> list[int]:
        """What thought n continues."""
        m = self.position_of(n)
        return FORM.prefix(
            self.documents[self.positions.document[m]].tokens, self.positions.position[m]
        ).tolist()

    def closed(self, n: int) -> list[int]:
        """What the target of thought n is predicted from; a truncated thought is closed by
        force."""
        forced = FORM.markers.close if rearrange(self.thoughts.truncated, "m g -> (m g)")[n] else ()
        return [*self.prompt(n), *self.completion(n), *forced]

    def position_of(self, n: int) -> int:
        return n // self.thoughts.tokens.shape[1]

    def at(self, device: torch.device) -> "Given":
        """The same with the thoughts on a device, where a sampler leaves them."""
        parts = {
            name: getattr(self.thoughts, name).to(device)
            for name in ("tokens", "mask", "behavior_logprob", "entropy", "truncated")
        }
        return replace(self, thoughts=replace(self.thoughts, **parts))


@dataclass(frozen=True, slots=True)
class Rows:
    """What TRL is given: the same as lists of token ids, one for each of the N thoughts."""

    document: np.ndarray
    """[P] int64."""
    position: np.ndarray
    """[K] int64."""
    position_of: list[int]
    target: np.ndarray
    """[N] int64."""
    prompts: list[list[int]]
    completions: list[list[int]]
    closed: list[list[int]]

    @classmethod
    def of(cls, given: Given) -> "Rows":
        every = range(given.thoughts.truncated.numel())
        position_of = [given.position_of(n) for n in every]
        return cls(
            given.documents[0].tokens,
            given.positions.position,
            position_of,
            given.positions.target[position_of, 0],
            [given.prompt(n) for n in every],
            [given.completion(n) for n in every],
            [given.closed(n) for n in every],
        )


def make_given(shape: Shape, vocabulary: int) -> Given:
    """A random document, positions where K uniform draws fall on average, thoughts of L / 4 to L
    tokens.

    One thought of each position has all L tokens and is truncated; the others end with the close
    marker.
    """
    noise = np.random.default_rng(SEED)
    document = noise.integers(FIRST_WORD, vocabulary, size=shape.document_tokens)
    position = np.arange(1, shape.positions + 1) * shape.document_tokens // (shape.positions + 1)
    size = (shape.positions, shape.group_size, shape.thought_tokens)
    lengths = noise.integers(
        max(1, shape.thought_tokens // 4), shape.thought_tokens + 1, size=size[:2]
    )
    lengths[:, 0] = shape.thought_tokens
    truncated = lengths == shape.thought_tokens
    tokens, place = (
        noise.integers(FIRST_WORD, vocabulary, size=size),
        np.arange(shape.thought_tokens),
    )
    tokens = np.where(~truncated[..., None] & (place == lengths[..., None] - 1), CLOSE, tokens)
    mask = torch.from_numpy(place < lengths[..., None])
    thoughts = Thoughts(
        tokens=torch.from_numpy(tokens) * mask,
        mask=mask,
        behavior_logprob=torch.zeros(size),
        entropy=torch.zeros(size),
        truncated=torch.from_numpy(truncated),
    )
    return Given(
        [Document(0, document)],
        Positions(np.zeros_like(position), position, document[position][:, None]),
        thoughts,
    )


def useful_flops(shape: Shape, config: Qwen3Config) -> float:
    """The least that the step's log-probabilities and gradient take: each document token and each
    thought once, the LM head where a token is scored; three passes of the policy and one of the
    teacher."""
    given, shapes = make_given(shape, config.vocab_size), model_shapes(config)
    last = int(given.positions.position.max())
    document = Work(tokens=last, pairs=causal_pairs(last))
    policy = document
    for n in range(shape.num_thoughts):
        prefix = int(given.positions.position[given.position_of(n)])
        own = len(given.closed(n)) - prefix
        policy += Work(
            tokens=own, pairs=causal_pairs(own, prefix), head_rows=len(given.completion(n)) + 1
        )
    return 3 * forward_flops(shapes, policy) + forward_flops(
        shapes, document + Work(head_rows=shape.positions)
    )


class Stopwatch:
    """Seconds of the named parts of one step: CPU time of this process, or CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, object, object]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of `scoring`, of the whole `step`, and of the `update`, which is the rest."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        total = {"scoring": 0.0, "step": 0.0}
        for name, start, stop in self._spans:
            total[name] += (
                start.elapsed_time(stop) / 1000 if self._device.type == "cuda" else stop - start
            )
        return total | {"update": total["step"] - total["scoring"]}

    def _now(self) -> object:
        if self._device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Network:
    """The policy, its EMA and its optimizer: the same for every contender."""

    def __init__(self, config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(SEED)
        self.lm = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="sdpa", dtype=dtype
        ).to(device)
        self.teacher = copy.deepcopy(self.lm).eval().requires_grad_(False)
        # Fused on a GPU: the other form needs temporaries as large as the weights, which would hide
        # what a step needs.
        self.optimizer = torch.optim.AdamW(
            self.lm.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda"
        )

    @torch.no_grad()
    def update(self) -> None:
        """theta and phi."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        for phi, theta in zip(self.teacher.parameters(), self.lm.parameters(), strict=True):
            phi.lerp_(theta, 1 - EMA_DECAY)

    def gradient(self) -> Tensor:
        """All gradients as one vector."""
        return torch.cat([weight.grad.flatten() for weight in self.lm.parameters()])


class Ours:
    """`train_step` of train.py for one micro-batch of whole groups, given the thoughts."""

    def __init__(self, network: Network, lay_out: Callable, form: str = "auto") -> None:
        """
        Args:
            lay_out: one of `rlp.model.layout.LAYOUTS`.
            form: of the log-probabilities, as in `rlp_kernels.token_logprobs`.
        """
        self.network, self._lay_out, self._form = network, lay_out, form
        for lm in (network.lm, network.teacher) if lay_out is not repeated_layout else ():
            lm.set_attn_implementation(
                importlib.import_module("rlp.model.attention").register("sdpa")
            )
        self._policy, self._teacher = (
            Policy(network.lm, FORM.markers),
            Policy(network.teacher, FORM.markers),
        )

    def prepare(self, given: Given) -> Given:
        """The thoughts with the log-probabilities of the policy at hand, as if it had sampled
        them."""
        given = given.at(self._policy.device)
        with torch.no_grad():
            logprob = score(
                self._policy, self._layout(given, given.thoughts, no_think=False)
            ).thought
        logprob = rearrange(logprob, "(m g) l -> m g l", g=given.thoughts.tokens.shape[1])
        return replace(given, thoughts=replace(given.thoughts, behavior_logprob=logprob))

    def gradient_of(self, given: Given, watch: Stopwatch) -> Tensor:
        """Leave the gradient in the weights; returns the rewards [M, G]."""
        thoughts = given.thoughts
        with mock.patch.object(
            rlp.model.policy, "token_logprobs", functools.partial(token_logprobs, form=self._form)
        ):
            with watch.part("scoring"), torch.no_grad():
                baseline_logprob = log_evidence(
                    score(self._teacher, self._layout(given, None, no_think=True)).no_think
                )
            scores = score(self._policy, self._layout(given, thoughts, no_think=False))
        reasoned_logprob = rearrange(
            log_evidence(scores.target), "(m g) -> m g", g=thoughts.tokens.shape[1]
        )
        reward = information_gain(reasoned_logprob, baseline_logprob)
        advantage = group_relative_advantage(reward)
        mask, behavior_logprob = (
            rearrange(part, "m g l -> (m g) l")
            for part in (thoughts.mask, thoughts.behavior_logprob)
        )
        surrogate = clipped_surrogate(
            scores.thought,
            behavior_logprob,
            mask,
            rearrange(advantage, "m g -> (m g)"),
            clip_low=CLIP,
            clip_high=CLIP,
        )
        (surrogate.sum() / thoughts.truncated.numel()).backward()
        return reward.detach()

    def _layout(self, given: Given, thoughts: Thoughts | None, *, no_think: bool) -> Layout:
        return self._lay_out(
            given.documents,
            given.positions,
            thoughts,
            FORM,
            lm=False,
            no_think=no_think,
            device=self._policy.device,
        )


class Peer:
    """TRL's GRPOTrainer with the information gain as its reward function."""

    def __init__(
        self,
        network: Network,
        shape: Shape,
        folder: Path,
        *,
        careful: bool,
        micro_batch: int,
        checkpointing: bool = False,
    ) -> None:
        """
        Args:
            folder: for TRL's output, which stays empty.
            micro_batch: completions per forward; N is a multiple of it.
        """
        self.network, self._careful, self._micro_batch = network, careful, micro_batch
        self._num_micro_batches = shape.num_thoughts // micro_batch
        self._device = next(network.lm.parameters()).device
        self._trainer = make_trainer(
            network, shape, folder, micro_batch, checkpointing, self._give, self._reward
        )
        self._trainer.current_gradient_accumulation_steps = self._num_micro_batches

    def prepare(self, given: Given) -> Rows:
        """Lists of token ids, as a sampler returns them to TRL, which takes the policy at hand for
        the one that sampled."""
        return Rows.of(given)

    def gradient_of(self, rows: Rows, watch: Stopwatch) -> Tensor:
        """Leave the gradient in the weights; returns the rewards [M, G]."""
        self._rows, self._watch = rows, watch
        prompts = [{"prompt": str(m)} for m in rows.position_of]
        # On a CPU, TRL's fused head would score the prompts too: `compact` in
        # trl.trainer.utils.add_fused_lm_head.
        with (
            mock.patch("trl.trainer.utils._use_triton", lambda device: True)
            if self._careful
            else nullcontext()
        ):
            for _ in range(self._num_micro_batches):
                self._trainer.training_step(self._trainer.model, prompts, num_items_in_batch=None)
        return rearrange(torch.tensor(self._rewards), "(m g) -> m g", m=len(rows.position))

    def _give(self, prompts: list[str], trainer: object) -> dict:
        """TRL's `rollout_func`: the given thoughts in place of sampled ones."""
        return {
            "prompt_ids": self._rows.prompts,
            "completion_ids": self._rows.completions,
            "logprobs": None,
        }

    def _reward(self, completion_ids: list[list[int]], **_: object) -> list[float]:
        """TRL's reward function: log p(target | prefix, thought) - log p_teacher(target |
        prefix)."""
        assert completion_ids == self._rows.completions, (
            "rewards are asked for in the order in which thoughts were given"
        )
        with self._watch.part("scoring"), torch.no_grad():
            self._rewards = (
                self._evidence(self.network.lm, self._rows.closed) - self._baseline()
            ).tolist()
        return self._rewards

    def _baseline(self) -> Tensor:
        """[N] the teacher's log-probability of each completion's target, without the thought."""
        rows, teacher = self._rows, self.network.teacher
        if not self._careful:
            return self._evidence(
                teacher, [prompt[: -len(FORM.markers.open)] for prompt in rows.prompts]
            )
        document = torch.from_numpy(rows.document).to(self._device)
        hidden = teacher.base_model(input_ids=document[None], use_cache=False).last_hidden_state[
            0, rows.position - 1
        ]
        return target_logprob(teacher.lm_head(hidden), document[rows.position])[rows.position_of]

    def _evidence(self, lm: nn.Module, contexts: list[list[int]]) -> Tensor:
        """[N] log p(target | context), micro-batch by micro-batch."""
        target = torch.from_numpy(self._rows.target).to(self._device)
        parts = [
            slice(start, start + self._micro_batch)
            for start in range(0, len(contexts), self._micro_batch)
        ]
        return torch.cat(
            [target_logprob(self._last_logits(lm, contexts[part]), target[part]) for part in parts]
        )

    def _last_logits(self, lm: nn.Module, contexts: list[list[int]]) -> Tensor:
        """[R, V] the logits after each context. Causal rows padded on the right need no mask, and
        SDPA is faster without."""
        width = max(len(context) for context in contexts)
        tokens = torch.tensor(
            [context + [PAD] * (width - len(context)) for context in contexts], device=self._device
        )
        last = (
            torch.arange(len(contexts)),
            torch.tensor([len(context) - 1 for context in contexts]),
        )
        if self._careful:
            return lm.lm_head(
                lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state[last]
            )
        return lm(input_ids=tokens, use_cache=False).logits[last]


def target_logprob(logits: Tensor, target: Tensor) -> Tensor:
    """[R, V], [R] -> [R] log-probability at temperature 1, the open marker out of the softmax."""
    logits = logits.float()
    logits[:, FORM.markers.excluded] = float("-inf")
    return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]


def make_trainer(
    network: Network,
    shape: Shape,
    folder: Path,
    micro_batch: int,
    checkpointing: bool,
    give: Callable,
    reward: Callable,
):
    """A `trl.GRPOTrainer` whose loss is eq. 8 with eq. 7's advantage."""
    import trl
    from datasets import Dataset

    on_cpu = next(network.lm.parameters()).device.type == "cpu"
    args = trl.GRPOConfig(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=False,
        seed=SEED,
        learning_rate=LEARNING_RATE,
        num_generations=shape.group_size,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=shape.num_thoughts // micro_batch,
        loss_type="grpo",
        scale_rewards="none",
        reward_weights=[shape.group_size / (shape.group_size - 1)],
        beta=0.0,
        epsilon=CLIP,
        temperature=TEMPERATURE,
        max_completion_length=shape.thought_tokens,
        gradient_checkpointing=checkpointing,
    )
    dataset = Dataset.from_dict({"prompt": [str(m) for m in range(shape.positions)]})
    return trl.GRPOTrainer(
        model=network.lm,
        reward_funcs=reward,
        args=args,
        train_dataset=dataset,
        processing_class=word_tokenizer(network.lm.config.vocab_size),
        optimizers=(network.optimizer, None),
        rollout_func=give,
    )


@functools.cache
def word_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """One token per word: TRL decodes completions, whatever the reward reads."""
    from tokenizers import Tokenizer, models

    words = {f"w{token}": token for token in range(vocabulary)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w4")),
        pad_token=f"w{PAD}",
        eos_token=f"w{EOS}",
    )


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

    def build(self, name: str) -> "Ours | Peer":
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
        """As many thoughts, all short: what a first step allocates for good, it allocates on
        these."""
        shape = self.shape
        return make_given(
            Shape(2 * (shape.positions + 1), shape.positions, shape.group_size, 2),
            self.config.vocab_size,
        )


def contender_names(bench: Bench, checkpointing: bool) -> list[str]:
    """Ours first, then ours with features switched off in turn, then the peers."""
    names = ["tree", "repeated"]
    if log_probability_form(bench) == "chunked":
        names.append("repeated, plain log-probs")
    return [*names, CAREFUL, *([CHECKPOINTED] if checkpointing else []), NAIVE]


def log_probability_form(bench: Bench) -> str:
    """What `auto` takes for the thoughts and targets of a step."""
    rows = int(bench.given().thoughts.mask.sum()) + bench.shape.num_thoughts
    return choose_form(
        rows, bench.config.vocab_size, width=bench.config.hidden_size, dtype=bench.dtype
    )


def timed_step(
    contender: "Ours | Peer", given: Given | Rows, device: torch.device
) -> dict[str, float]:
    """Seconds of the parts of one step."""
    watch = Stopwatch(device)
    with watch.part("step"):
        contender.gradient_of(given, watch)
        contender.network.update()
    return watch.seconds()


def fastest_micro_batch(bench: Bench) -> int:
    """Of the careful peer: completions per forward, from one group upwards until a larger one is
    slower or does not fit. One step each, after a short one."""
    # Half a group was slower than one, at 256,4,8,32 and 256,4,8,128 on a CPU core.
    group, best, best_seconds = bench.shape.group_size, bench.shape.group_size, float("inf")
    for size in sorted(
        {
            size
            for size in (group, 2 * group, 4 * group, bench.shape.num_thoughts)
            if bench.shape.num_thoughts % size == 0
        }
    ):
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


def check(bench: Bench, names: list[str]) -> tuple[float, float, dict]:
    """Whether all contenders compute the same step, in float32.

    Returns:
        the largest error of rewards (relative to the largest reward) and of gradients (norms), both
        against the first name; and the contenders, unless they are wanted in another dtype.
    """
    contenders, errors = {}, []
    for name in names:
        contender = replace(bench, dtype=torch.float32).build(name)
        reward = (
            contender.gradient_of(contender.prepare(bench.given()), Stopwatch(bench.device))
            .cpu()
            .float()
        )
        gradient = contender.network.gradient()
        if not errors:
            expected_reward, expected_gradient = reward, gradient
        errors.append(
            (
                float((reward - expected_reward).abs().max() / expected_reward.abs().max()),
                float((gradient - expected_gradient).norm() / expected_gradient.norm()),
            )
        )
        contender.network.optimizer.zero_grad()
        if bench.dtype == torch.float32:
            contenders[name] = contender
    return *(max(column) for column in zip(*errors)), contenders


def take_turns(
    bench: Bench, contenders: dict, warmups: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds by contender and part, A B A B; warm-up rounds are not kept. On a CPU only ours and
    the careful peer take every turn, the others one in `OTHERS_EVERY`."""
    ours = next(iter(contenders))
    given = {name: contender.prepare(bench.given()) for name, contender in contenders.items()}
    raw = {name: {"scoring": [], "update": [], "step": []} for name in contenders}
    for turn in range(-warmups, repeats):
        for name, contender in contenders.items():
            if (
                bench.device.type == "cpu"
                and name not in (ours, CAREFUL)
                and (turn < 0 or turn % OTHERS_EVERY)
            ):
                continue
            seconds = timed_step(contender, given[name], bench.device)
            for part, values in raw[name].items() if turn >= 0 else ():
                values.append(seconds[part])
    return raw


def peak_bytes(bench: Bench, name: str) -> int | None:
    """Most that a step holds beyond weights, EMA and moments (its gradients are counted), in this
    process, which on a CPU should have done nothing else. None where the system can not forget its
    high-water mark."""
    contender = bench.build(name)
    timed_step(contender, contender.prepare(bench.tiny()), bench.device)
    given = contender.prepare(bench.given())
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed_step(contender, given, bench.device)
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    timed_step(contender, given, bench.device)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_bytes_alone(bench: Bench, name: str, options: argparse.Namespace) -> int | None:
    """`peak_bytes` in a process of its own. Its malloc returns every tensor at once, so that free
    memory is not counted."""
    if bench.device.type == "cuda":
        return peak_bytes(bench, name)
    command = [
        sys.executable,
        __file__,
        "--shape",
        str(bench.shape),
        "--d",
        options.d,
        "--layers",
        options.layers,
        "--vocabulary",
        options.vocabulary,
        "--memory-of",
        name,
        "--micro-batch",
        bench.micro_batch,
    ]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | malloc,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the memory of {name} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(bench: Bench, options: argparse.Namespace) -> dict | None:
    """Everything about one shape; None if the contenders do not compute the same step."""
    names = contender_names(bench, options.checkpointing)
    bench = replace(bench, micro_batch=fastest_micro_batch(bench))
    reward_error, gradient_error, contenders = check(bench, names)
    print(
        f"\nP {bench.shape.document_tokens}  K {bench.shape.positions}  G {bench.shape.group_size} "
        f" L {bench.shape.thought_tokens}: reward_max_rel_err {reward_error:.1e}, grad_rel_err"
        f" {gradient_error:.1e} (float32, all {len(names)} contenders)"
    )
    if not max(reward_error, gradient_error) <= LARGEST_ERROR:
        print(f"void: the contenders do not compute the same step (allowed: {LARGEST_ERROR:g})")
        return None
    # In float32 the check was everybody's first warm-up.
    warmups = options.warmups - 1 if contenders else options.warmups
    contenders = contenders or {name: bench.build(name) for name in names}
    raw = take_turns(bench, contenders, warmups, options.repeats)
    # Each costs a process and its imports.
    memory_of = set() if options.quick else {names[0], "repeated", CAREFUL, CHECKPOINTED}
    peak = {name: peak_bytes_alone(bench, name, options) for name in names if name in memory_of}
    return summary(bench, names, raw, peak, reward_error, gradient_error)


def summary(
    bench: Bench,
    names: list[str],
    raw: dict,
    peak: dict[str, int | None],
    reward_error: float,
    gradient_error: float,
) -> dict:
    """The numbers of one shape, as JSON holds them. Ours is the first name."""
    ours = names[0]
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()}
        for name, parts in raw.items()
    }
    flops = useful_flops(bench.shape, bench.config)
    top = peak_flops(bench.device)
    return {
        "shape": str(bench.shape),
        "ours": ours,
        "careful_micro_batch": bench.micro_batch,
        "log_probability_form": log_probability_form(bench),
        "reward_max_rel_err": reward_error,
        "grad_rel_err": gradient_error,
        "speedup_vs_trl_careful": medians[CAREFUL]["step"] / medians[ours]["step"],
        "speedup_vs_trl_naive": medians[NAIVE]["step"] / medians[ours]["step"],
        "peak_memory_ratio": (
            peak[ours] / peak[CAREFUL] if peak.get(ours) and peak.get(CAREFUL) else None
        ),
        "medians": medians,
        "ranges": {
            name: {part: [min(values), max(values)] for part, values in parts.items()}
            for name, parts in raw.items()
        },
        "peak_bytes_beyond_state": peak,
        "useful_flops": flops,
        "useful_flops_per_s": {name: flops / medians[name]["step"] for name in names},
        "mfu": {name: flops / medians[name]["step"] / top for name in names} if top else None,
        "raw_seconds": raw,
    }


def peak_flops(device: torch.device) -> float | None:
    """Of the device, where it is known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for board, flops in PEAK_FLOPS.items() if board in name), None)


def table(result: dict) -> str:
    """One line per contender: medians with range, ratio of whole steps to ours, memory, useful
    FLOPs."""
    lines = [
        f"{'contender':28s}{'scoring':>10s}{'update':>10s}{'whole step, s (min - max)':>30s}{'x ours':>8s}{'peak MiB':>10s}{'GFLOP/s':>9s}{'MFU':>7s}"
    ]
    for name, medians in result["medians"].items():
        low, high = result["ranges"][name]["step"]
        peak, mfu = result["peak_bytes_beyond_state"].get(name), result["mfu"]
        lines.append(
            f"{name:28s}{medians['scoring']:10.4f}{medians['update']:10.4f}{medians['step']:12.4f}"
            f" ({low:.4f} -"
            f" {high:.4f}){medians['step'] / result['medians'][result['ours']]['step']:8.2f}"
            f"{f'{peak / 2**20:.0f}' if peak else '-':>10s}{result['useful_flops_per_s'][name] / 1e9:9.1f}{f'{mfu[name]:.1%}' if mfu else '-':>7s}"
        )
    form, micro = result["log_probability_form"], result["careful_micro_batch"]
    lines.append(
        f"log-probs of ours: {form} form; careful peer: micro-batch {micro}, the fastest; peak:"
        " beyond weights, EMA and moments; GFLOP/s: useful ones"
    )
    return "\n".join(lines)


def provenance(device: torch.device) -> dict:
    """Hardware, versions, commit, date, command."""
    import trl

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        ).stdout.strip()

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    hardware = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{cpu}, {torch.get_num_threads()} thread"
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    commit = git("rev-parse", "--short", "HEAD") + (
        "-dirty" if git("status", "--porcelain") else ""
    )
    return {
        "hardware": hardware,
        "versions": versions,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def over_shapes(results: list[dict]) -> dict:
    """The headline numbers: over several shapes, the least flattering of each."""
    ratios = [result["peak_memory_ratio"] for result in results]
    return {
        "speedup_vs_trl_careful": min(result["speedup_vs_trl_careful"] for result in results),
        "speedup_vs_trl_naive": min(result["speedup_vs_trl_naive"] for result in results),
        "reward_max_rel_err": max(result["reward_max_rel_err"] for result in results),
        "grad_rel_err": max(result["grad_rel_err"] for result in results),
        "peak_memory_ratio": None if None in ratios else max(ratios),
        "medians": {result["shape"]: result["medians"] for result in results},
        "ranges": {result["shape"]: result["ranges"] for result in results},
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape",
        type=Shape.parse,
        action="append",
        metavar="P,K,G,L",
        help=(
            "document tokens, positions, thoughts per position, longest thought; may be repeated"
            " (256,4,8,32 and 256,4,8,128)"
        ),
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything measured there")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--d", type=int, default=256, help="width of the Qwen3 architecture")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="add the careful peer with gradient checkpointing",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny shape and two rounds: does it run, and do the contenders agree?",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.repeats, options.warmups = [Shape(48, 2, 4, 12)], 2, 1
        options.d, options.layers, options.vocabulary = 64, 2, 512
    options.shape = options.shape or [Shape(256, 4, 8, 32), Shape(256, 4, 8, 128)]
    return options


def architecture(options: argparse.Namespace) -> Qwen3Config:
    """Qwen3 in the proportions of its 1.7B: intermediate 3 d, half as many key heads as heads, tied
    embeddings."""
    head_dim = 128 if options.d >= 1024 else min(64, options.d // 4)
    heads = options.d // head_dim
    return Qwen3Config(
        hidden_size=options.d,
        num_hidden_layers=options.layers,
        vocab_size=options.vocabulary,
        intermediate_size=3 * options.d,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where the contenders do not compute the same step."""
    options = parse(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # TRL uses a name of transformers that is deprecated there: a warning for each trainer.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        benches = [
            Bench(
                architecture(options),
                shape,
                device,
                dtype,
                Path(folder),
                options.micro_batch or shape.group_size,
            )
            for shape in options.shape
        ]
        if options.memory_of:
            print(json.dumps(peak_bytes(benches[0], options.memory_of)))
            return 0
        report = provenance(device)
        print("\n".join(f"{key}: {value}" for key, value in report.items()))
        print(
            f"model: Qwen3 architecture, d {options.d}, {options.layers} layers, V"
            f" {options.vocabulary}, random, {dtype}; {options.warmups} warm-ups, {options.repeats}"
            " repeats"
        )
        results = []
        for bench in benches:
            result = measure(bench, options)
            if result is None:
                return 1
            print(table(result), flush=True)
            results.append(result)
    print("\n" + "\n".join(CAVEATS))
    if options.json:
        options.json.write_text(
            json.dumps(
                report | over_shapes(results) | {"caveats": CAVEATS, "shapes": results}, indent=1
            )
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
