"""Thoughts sampled by vLLM, which is handed the weights of the policy at every phase.

A request for each thought. vLLM schedules them: how many are run side by side, which of them share
a prefix, and when one takes the place of another. The thoughts are others than those of
`NativeSampler` under the same key, and of the same distribution.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G;  L  thought tokens
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.config import ConfigError, first_line
from rlp.data.documents import Document
from rlp.data.noise import THOUGHT_NOISE, keyed_noise
from rlp.data.positions import Positions
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.process.faults import fault, poisoned
from rlp.sampling.mismatch import mismatch_of
from rlp.sampling.rollout import NoiseKey, Rollout, decode_work
from rlp.sampling.vllm_engine import Answer, Request

TRIAL_ROWS, TRIAL_TOKENS = 4, 8
"""Of the first phase: what vLLM computes is compared with the policy on so many tokens."""


class Requests(Protocol):
    """What is asked of an engine: `VllmEngine`."""

    def wake(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    def add(
        self, request: Request, *, temperature: float, max_tokens: int, stop: tuple[int, ...]
    ) -> None: ...

    def is_busy(self) -> bool: ...

    def step(self) -> list[Answer]: ...

    def sleep(self) -> None: ...


class VllmSampler:
    """A `Sampler` that runs a copy of the policy in vLLM: an engine on each rank, for its own
    documents.

    The key
        A thought's requests carry 63 bits of its key as their seed, and vLLM draws by seed and
        position: alone, in another order or beside others the thought is the same. It holds for one
        version of vLLM on one kind of device.
    Log-probabilities
        Those of vLLM's forward, from a head in float32. Entropy is missing.
    Collectives
        `phase` alone: the engines start together, and under ZeRO stage 3 weights are gathered one
        by one. `sample` is none at any stage, whatever `engine.generation` says.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        start: Callable[[], Requests],
        weights: Callable[[], Iterator[tuple[str, Tensor]]] | None = None,
        lend: Callable[[], AbstractContextManager] = nullcontext,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            start: makes the engine, at the first phase.
            weights: gives each parameter of the policy as it is, whole, by its name in the Hugging
                Face model, tied ones once; None: the parameters themselves.
            lend: makes the context that `look` leaves.
            look: called at each step of the engine; it leaves `lend` where the run is to stop.
        """
        self._policy, self._start = policy, start
        self._weights = weights or policy.lm.named_parameters
        self._lend, self._look = lend, look
        self._engine: Requests | None = None

    @contextmanager
    def phase(self) -> Iterator[None]:
        """As `Sampler.phase`."""
        device = self._policy.device
        # On a CPU vLLM draws from torch's own generator besides, and uses none of that.
        with self._lend(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            is_first = self._engine is None
            self._engine = self._engine or self._start()
            try:
                self._engine.wake(self._with_head())
                if is_first:
                    self._refuse_other_model()
                yield
            finally:
                self._engine.sleep()

    def sample(
        self,
        documents: list[Document],
        positions: Positions,
        thought_format: ThoughtFormat,
        noise: NoiseKey,
        *,
        group_size: int,
        max_thought_tokens: int,
        beat: Callable[[], None] = lambda: None,
        prefill: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Rollout:
        """As `Sampler.sample`. vLLM runs prefixes and thoughts in the same forwards: `prefill` is
        not entered, and all its time is that of decoding."""
        fault("rollout")
        places = positions.places()
        prefixes = [thought_format.prefix(documents[d].tokens, t) for d, t in places]
        requests = [
            Request(m * group_size + g, prefixes[m], noise.seed_of(documents[d], t, g))
            for m, (d, t) in enumerate(places)
            for g in range(group_size)
        ]
        answers = self._answers(
            requests,
            lambda: (self._look(), beat()),
            temperature=thought_format.temperature,
            max_tokens=max_thought_tokens,
            stop=thought_format.markers.close,
        )
        thoughts = self._thoughts(answers, thought_format.markers, group_size)
        return Rollout(thoughts, _prefill_work(requests, answers), decode_work(prefixes, thoughts))

    def _answers(
        self, requests: list[Request], before_step: Callable[[], None], **options: object
    ) -> list[Answer]:
        """One for each request, in their order."""
        for request in requests:
            self._engine.add(request, **options)
        answers: dict[int, Answer] = {}
        while self._engine.is_busy():
            before_step()
            answers |= {answer.number: answer for answer in self._engine.step()}
        return [answers[request.number] for request in requests]

    def _thoughts(self, answers: list[Answer], markers: Markers, group_size: int) -> Thoughts:
        """[M, G, L] of N answers."""
        lengths = np.array([len(answer.tokens) for answer in answers])
        mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
        tokens, logprobs = np.zeros(mask.shape, np.int64), np.zeros(mask.shape, np.float32)
        tokens[mask] = [token for answer in answers for token in answer.tokens]
        logprobs[mask] = [logprob for answer in answers for logprob in answer.logprobs]
        closed = np.array([tuple(answer.tokens[-1:]) == markers.close for answer in answers], bool)

        def grouped(rows: np.ndarray) -> Tensor:
            rows = torch.from_numpy(rows).to(self._policy.device)
            return rearrange(rows, "(m g) ... -> m g ...", g=group_size)

        return Thoughts(
            tokens=grouped(tokens),
            mask=grouped(mask),
            behavior_logprob=poisoned("rollout.logprob", grouped(logprobs)),
            entropy=None,
            truncated=grouped(~closed),
        )

    def _with_head(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, and the head under its own name too where it is the embedding (tied): vLLM
        has a matrix of its own for it."""
        lm = self._policy.lm
        output = lm.get_output_embeddings()
        head = next(f"{name}.weight" for name, module in lm.named_modules() if module is output)
        shared = next(name for name, p in lm.named_parameters() if p is output.weight)
        for name, value in self._weights():
            yield name, value.detach()
            if name == shared != head:
                yield head, value.detach()

    def _refuse_other_model(self) -> None:
        """Sample some tokens after others, and score them with the policy itself. A collective
        where its forwards are.

        Raises:
            ConfigError: vLLM does not run the model, or the two are not one.
        """
        architecture, dtype = type(self._policy.lm).__name__, self._policy.head.dtype
        noise = keyed_noise(seed=0, purpose=THOUGHT_NOISE)
        vocabulary = self._policy.lm.config.get_text_config().vocab_size
        prompts = noise.integers(vocabulary, size=(TRIAL_ROWS, 2 * TRIAL_TOKENS))
        requests = [Request(n, prompt, seed=n) for n, prompt in enumerate(prompts)]
        options = {"temperature": 1.0, "max_tokens": TRIAL_TOKENS, "stop": ()}
        try:
            answers = self._answers(requests, lambda: None, **options)
        except Exception as error:  # a program of others: whatever it raises, it does not run it
            raise ConfigError(
                f"sampling.engine: vLLM does not run this {architecture} here:"
                f" {first_line(error)}. Write sampling.engine=native."
            ) from error

        theirs = torch.tensor([answer.logprobs for answer in answers], device=self._policy.device)
        log_ratio = (self._own_logprobs(prompts, answers) - theirs.flatten()).double()
        found = mismatch_of(
            {
                "policy/behavior_mismatch_kl": float((log_ratio.expm1() - log_ratio).mean()),
                "policy/behavior_mismatch_max": float(log_ratio.abs().max()),
            },
            dtype,
            1.0,
        )
        # Of so few tokens a large error alone says little where the dtype rounds coarsely.
        if found is not None and (found[1] or dtype == torch.float32):
            raise ConfigError(
                f"sampling.engine: from the weights of this {architecture} vLLM computes another"
                f" model: {found[0]}. Write sampling.engine=native."
            )

    @torch.no_grad()
    def _own_logprobs(self, prompts: np.ndarray, answers: list[Answer]) -> Tensor:
        """Of the tokens of the answers to prompts [R, P], under the policy, row by row."""
        found = []
        for prompt, answer in zip(prompts.tolist(), answers):
            row = torch.tensor([prompt + answer.tokens], device=self._policy.device)
            _, logits = self._policy("check", row)
            said = row[0, len(prompt) :, None]
            found.append(logits[len(prompt) - 1 : -1].log_softmax(dim=-1).gather(1, said)[:, 0])
        return torch.cat(found)


def _prefill_work(requests: list[Request], answers: list[Answer]) -> Work:
    """Of the tokens of prompts that were run: those that no other request had run before."""
    cached = np.array([answer.cached for answer in answers], dtype=np.int64)
    lengths = np.array([len(request.prompt) for request in requests], dtype=np.int64)
    return row_work(lengths - cached, len(requests), before=cached)
