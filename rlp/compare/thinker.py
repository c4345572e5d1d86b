"""Questions answered by a model that may think first, and answers scored, as benchmarks ask for
it."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlp.config import ConfigError
from rlp.data.documents import Document
from rlp.data.noise import BENCHMARK_ANSWER_NOISE, BENCHMARK_THOUGHT_NOISE, keyed_noise
from rlp.data.positions import Positions
from rlp.model.layout import continuation_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.scoring import ask, unpack
from rlp.model.thoughts import ThoughtFormat
from rlp.process.progress import Progress
from rlp.sampling.branches import ForkedBranches
from rlp.sampling.rollout import NoiseKey, draw, sample_thoughts

if TYPE_CHECKING:
    pass


GREEDY = 1e-6
"""The sampling temperature that stands for 0: a token 2e-5 in logit below the best one is never
drawn."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One thought and what the model wrote, or one scored continuation, after it."""

    thought: str
    """Empty without a thought; the close marker is left off."""
    thought_tokens: int
    thought_truncated: bool
    """The budget ended the thought, and its close marker is forced."""
    answer: str
    answer_tokens: int
    answer_truncated: bool
    """The budget ended the answer."""
    prompt_cut: bool
    """The prompt lost its first tokens, so that thought and answer fit into the model's context."""


@dataclass(frozen=True, slots=True)
class _Context:
    """All that stands before an answer."""

    tokens: np.ndarray
    """[T] int64: prompt, and where the model thinks instruction, open marker, thought and close
    marker."""
    thought: str
    thought_tokens: int
    thought_truncated: bool
    prompt_cut: bool


class Thinker:
    """A policy that answers prompts, and scores continuations, after a thought or without one."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        thought_format: ThoughtFormat,
        *,
        thinks: bool,
        thought_tokens: int,
        answer_temperature: float = 0.0,
        seed: int = 0,
        rows: int = 32,
    ) -> None:
        """
        Args:
            thought_format: markers, instruction and the sampling temperature of thoughts.
            thought_tokens: budget of a thought, the close marker included.
            answer_temperature: of answer tokens, 0 is greedy.
            rows: N, sequences decoded side by side; changes memory and speed, never an answer.
        """
        self._policy, self._tokenizer, self._thought_format = policy, tokenizer, thought_format
        self._thinks, self._thought_tokens, self._answer_temperature = (
            thinks,
            thought_tokens,
            answer_temperature,
        )
        self._seed, self._rows = seed, rows
        self._plain = replace(
            thought_format,
            markers=Markers(open=(), close=thought_format.markers.close),
            instruction=(),
        )
        self._limit = (
            getattr(policy.lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
        )
        ends = getattr(policy.lm.generation_config, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {
            None
        }

    @property
    def first_token(self) -> int:
        """What an empty prompt is replaced by: the beginning of a sequence, or else the end of the
        one before."""
        begin = self._tokenizer.bos_token_id
        return self._tokenizer.eos_token_id if begin is None else begin

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence that the model was built for; None where its config gives none."""
        return None if self._limit == math.inf else int(self._limit)

    def without_thoughts(self) -> "Thinker":
        """The same model, which does not think."""
        return Thinker(
            self._policy,
            self._tokenizer,
            self._thought_format,
            thinks=False,
            thought_tokens=self._thought_tokens,
            answer_temperature=self._answer_temperature,
            seed=self._seed,
            rows=self._rows,
        )

    def encode(self, text: str) -> np.ndarray:
        """[T] int64, as documents are encoded in training."""
        return np.array(self._tokenizer(text)["input_ids"] or [self.first_token], dtype=np.int64)

    def replies(
        self, prompts: list[str], samples: int, *, until: list[str], answer_tokens: int
    ) -> list[list[Reply]]:
        """`samples` replies to each prompt.

        Args:
            until: texts that end an answer; they are left off. After a thought, white space in
                front of the answer is not searched for them.
        """
        encoded = {prompt: self.encode(prompt) for prompt in prompts}
        texts, found = list(encoded), {}
        for chunk in self._chunks(list(encoded.values()), samples):
            here = [texts[index] for index in chunk]
            groups = self._contexts([encoded[text] for text in here], samples, answer_tokens)
            keys = [(_key(encoded[text]), sample) for text in here for sample in range(samples)]
            contexts = [context for group in groups for context in group]
            replies = [
                Reply(
                    context.thought,
                    context.thought_tokens,
                    context.thought_truncated,
                    *answer,
                    context.prompt_cut,
                )
                for context, answer in zip(
                    contexts, self._continue(contexts, keys, until, answer_tokens)
                )
            ]
            found |= {
                text: replies[place * samples : (place + 1) * samples]
                for place, text in enumerate(here)
            }
        return [found[prompt] for prompt in prompts]

    def scores(
        self, pairs: list[tuple[np.ndarray, np.ndarray]], samples: list[int]
    ) -> list[tuple[float, bool, Reply]]:
        """Log-probability of a continuation, nats at temperature 1, whether it is what greedy
        decoding would write, and the thought before it.

        All continuations of a prompt are scored after the same thoughts.

        Args:
            pairs: (prompt, continuation), each [T] int64.
            samples: which thought of its prompt each pair is scored after.
        """
        prompts = {prompt.tobytes(): prompt for prompt, _ in pairs}
        longest = Counter()
        for prompt, continuation in pairs:
            longest[prompt.tobytes()] = max(longest[prompt.tobytes()], len(continuation))
        count = max(samples, default=0) + 1
        contexts: dict[bytes, list[_Context]] = {}
        names = list(prompts)
        for chunk in self._chunks(list(prompts.values()), count):
            chosen = [names[index] for index in chunk]
            contexts |= zip(
                chosen,
                self._contexts(
                    [prompts[name] for name in chosen], count, max(longest[name] for name in chosen)
                ),
            )
        found = []
        for start in range(0, len(pairs), self._rows):
            some = [
                (contexts[prompt.tobytes()][sample], continuation)
                for (prompt, continuation), sample in zip(
                    pairs[start : start + self._rows], samples[start : start + self._rows]
                )
            ]
            found += self._score(some)
        return found

    def _chunks(self, prompts: list[np.ndarray], samples: int) -> Iterator[list[int]]:
        """Indices of prompts that are worked on together, longest first; how far that is, is
        told."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        size = max(1, self._rows // samples)
        with Progress(
            "thinking and answering" if self._thinks else "answering", len(order), "prompts"
        ) as progress:
            for start in range(0, len(order), size):
                yield order[start : start + size]
                progress.advance(len(order[start : start + size]))

    def _contexts(
        self, prompts: list[np.ndarray], samples: int, answer_tokens: int
    ) -> list[list[_Context]]:
        """What stands before each answer: the prompt, or the prompt and each of its thoughts."""
        overhead = (
            len(self._thought_format.prefix(np.array([], dtype=np.int64), 0))
            + self._thought_tokens
            + len(self._thought_format.markers.close)
            if self._thinks
            else 0
        )
        room = self._limit - overhead - answer_tokens
        if room < 1:
            raise ConfigError(
                f"{overhead} tokens of thought and {answer_tokens} of answer leave no room for a"
                f" prompt in the model's {self._limit}. Write a smaller --thought-budget or"
                " --answer-tokens."
            )
        cut = [len(prompt) > room for prompt in prompts]
        kept = [
            prompt[-int(room) :] if shorter else prompt for prompt, shorter in zip(prompts, cut)
        ]
        if not self._thinks:
            return [
                [_Context(prompt, "", 0, False, shorter)] * samples
                for prompt, shorter in zip(kept, cut)
            ]
        documents = [
            Document(id=_key(prompt), tokens=tokens) for prompt, tokens in zip(prompts, kept)
        ]
        ends = Positions(
            np.arange(len(kept)),
            np.array([len(prompt) for prompt in kept]),
            np.zeros((len(kept), 1), dtype=np.int64),
        )
        thoughts = sample_thoughts(
            self._policy,
            documents,
            ends,
            self._thought_format,
            NoiseKey(self._seed, 0, BENCHMARK_THOUGHT_NOISE),
            group_size=samples,
            max_thought_tokens=self._thought_tokens,
            rows=self._rows,
        ).thoughts
        tokens, mask, truncated = (
            part.cpu().numpy() for part in (thoughts.tokens, thoughts.mask, thoughts.truncated)
        )
        close = np.array(self._thought_format.markers.close, dtype=np.int64)
        groups = []
        for m, prompt in enumerate(kept):
            prefix = self._thought_format.prefix(prompt, len(prompt))
            groups.append([])
            for g in range(samples):
                thought = tokens[m, g][mask[m, g]]
                inner = thought if truncated[m, g] else thought[: -len(close)]
                groups[-1].append(
                    _Context(
                        np.concatenate([prefix, inner, close]),
                        self._tokenizer.decode(inner),
                        len(thought),
                        bool(truncated[m, g]),
                        cut[m],
                    )
                )
        return groups

    def _continue(
        self, contexts: list[_Context], keys: list[tuple[int, int]], until: list[str], budget: int
    ) -> list[tuple[str, int, bool]]:
        """Text, number of tokens and truncation of the answer after each context.

        Args:
            keys: (prompt, sample) of each, for the noise.
        """
        device = self._policy.device
        documents = [
            Document(id=key, tokens=context.tokens) for context, (key, _) in zip(contexts, keys)
        ]
        ends = Positions(
            np.arange(len(contexts)),
            np.array([len(context.tokens) for context in contexts]),
            np.zeros((len(contexts), 1), dtype=np.int64),
        )
        uniforms = None
        if self._answer_temperature > 0:
            uniforms = torch.from_numpy(
                np.stack(
                    [
                        keyed_noise(
                            seed=self._seed,
                            purpose=BENCHMARK_ANSWER_NOISE,
                            document=key,
                            thought=sample,
                        ).random(budget)
                        for key, sample in keys
                    ]
                )
            ).to(device)
        written: list[list[int]] = [[] for _ in contexts]
        texts: list[str | None] = [None] * len(contexts)
        going = list(range(len(contexts)))
        with self._policy.sampling():
            branches = ForkedBranches(self._policy, documents, ends, self._plain, 1)
            logits = branches.first()
            for step in range(budget):
                logits[:, self._thought_format.markers.excluded] = -torch.inf
                rows = torch.tensor(going, device=device)
                token = (
                    logits.argmax(dim=1)
                    if uniforms is None
                    else draw(logits, uniforms[rows, step], self._answer_temperature)[0]
                )
                for row, one in zip(going, token.tolist()):
                    written[row].append(one)
                    texts[row] = self._ended(written[row], until)
                still = [place for place, row in enumerate(going) if texts[row] is None]
                going = [going[place] for place in still]
                if not going or step + 1 == budget:
                    break
                logits = branches.next(
                    torch.tensor(going, device=device), token[torch.tensor(still, device=device)]
                )
        return [
            (self._text(tokens) if text is None else text, len(tokens), text is None)
            for tokens, text in zip(written, texts)
        ]

    def _ended(self, tokens: list[int], until: list[str]) -> str | None:
        """The whole answer, where these tokens end it."""
        if tokens[-1] in self._ends:
            return self._cut(self._text(tokens[:-1]), until)
        # No token of a vocabulary is an empty text, so a stop text lies within its number of bytes
        # of tokens; decoding all each time would be quadratic.
        tail = self._text(tokens[-1 - max((len(stop.encode()) for stop in until), default=0) :])
        if not any(stop in tail for stop in until):
            return None
        text = self._text(tokens)
        cut = self._cut(text, until)
        return None if cut == text else cut

    def _cut(self, text: str, until: list[str]) -> str:
        """The text before the first stop text."""
        lead = len(text) - len(text.lstrip()) if self._thinks else 0
        places = [place for stop in until if (place := text.find(stop, lead)) >= 0]
        return text[: min(places)] if places else text

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _score(self, some: list[tuple[_Context, np.ndarray]]) -> list[tuple[float, bool, Reply]]:
        """One forward over rows of context and continuation, padded on the right."""
        contexts, continuations = zip(*((context.tokens, tokens) for context, tokens in some))
        layout = continuation_layout(
            contexts, continuations, self._thought_format, self._policy.device
        )
        with self._policy.sampling():
            logprob, greedy = (
                unpack(layout, answers).thought.cpu().numpy()
                for answers in ask(self._policy, "logprob_and_greedy", layout)
            )

        found = []
        for n, (context, continuation) in enumerate(some):
            here = slice(len(continuation))
            reply = Reply(
                context.thought,
                context.thought_tokens,
                context.thought_truncated,
                self._text(continuation.tolist()),
                len(continuation),
                False,
                context.prompt_cut,
            )
            found.append((float(logprob[n, here].sum()), bool(greedy[n, here].all()), reply))
        return found


def _key(tokens: np.ndarray) -> int:
    """A prompt's own number for the noise."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=7).digest(), "big")
