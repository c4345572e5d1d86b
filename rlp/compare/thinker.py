"""A model that may think first, asked as benchmarks ask: to answer a prompt, to score an answer.

Thoughts are those of training: sampled by `rlp.sampling`, and scored over by a layout of
`rlp.model`. What differs is that what follows a thought is written here, or given.

Dimensions
    N  sequences decoded side by side;  L  thought tokens;  T  tokens in a row
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlp.config import ConfigError
from rlp.data.documents import Document
from rlp.data.noise import BENCHMARK_ANSWER_NOISE, BENCHMARK_THOUGHT_NOISE, keyed_noise
from rlp.data.positions import Positions
from rlp.model.layout import continuation_layout
from rlp.model.policy import Policy
from rlp.model.running_rows import ReadRows, RunningRows
from rlp.model.scoring import ask, unpack
from rlp.model.thoughts import ThoughtFormat
from rlp.process.progress import Progress
from rlp.sampling.draw import draw, nucleus
from rlp.sampling.rollout import NoiseKey
from rlp.sampling.sampler import Sampler

GREEDY = 1e-6
"""The sampling temperature that stands for 0: a token 2e-5 in logit below the best one is never
drawn."""


QUEUED = 4
"""Answers that are written after each other in one row of a chunk; it ends when the longest of all
does."""


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
    prompt_cut: bool
    thought: str = ""
    thought_tokens: int = 0
    thought_truncated: bool = False

    def reply(self, answer: str, answer_tokens: int, answer_truncated: bool) -> Reply:
        """An answer, with what stands before it."""
        return Reply(
            self.thought,
            self.thought_tokens,
            self.thought_truncated,
            answer,
            answer_tokens,
            answer_truncated,
            self.prompt_cut,
        )


class Thinker:
    """A policy that answers prompts, and scores continuations, after a thought or without one."""

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        thought_format: ThoughtFormat,
        *,
        thinks: bool,
        thought_tokens: int,
        answer_temperature: float = 0.0,
        answer_top_p: float = 1.0,
        barred: tuple[int, ...] | None = None,
        seed: int = 0,
        rows: int = 32,
    ) -> None:
        """
        Args:
            sampler: of the policy.
            thought_format: markers, instruction and the sampling temperature of thoughts.
            thought_tokens: budget of a thought, the close marker included.
            answer_temperature: of answer tokens, 0 is greedy.
            answer_top_p: the least mass, at that temperature, of the most probable tokens that one
                is drawn among; 1 is all of them.
            barred: tokens that no answer holds; None: what no target softmax of training holds, the
                first token of the open marker.
            rows: N; changes memory and speed, and in float32 no answer.
        """
        self._policy, self._sampler = policy, sampler
        self._tokenizer, self._thought_format = tokenizer, thought_format
        self._thinks, self._thought_tokens = thinks, thought_tokens
        self._answer_temperature, self._answer_top_p = answer_temperature, answer_top_p
        self._barred = [thought_format.markers.excluded] if barred is None else list(barred)
        self._seed, self._rows = seed, rows

        text_config = policy.lm.config.get_text_config()
        self._limit = getattr(text_config, "max_position_embeddings", None) or math.inf
        ends = getattr(policy.lm.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {tokenizer.eos_token_id, *ends} - {None}

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
            self._sampler,
            self._tokenizer,
            self._thought_format,
            thinks=False,
            thought_tokens=self._thought_tokens,
            answer_temperature=self._answer_temperature,
            answer_top_p=self._answer_top_p,
            barred=tuple(self._barred),
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
        found = dict(self.each_reply(prompts, samples, until=until, answer_tokens=answer_tokens))
        return [found[prompt] for prompt in prompts]

    def each_reply(
        self, prompts: list[str], samples: int, *, until: list[str], answer_tokens: int
    ) -> Iterator[tuple[str, list[Reply]]]:
        """As `replies`: each different prompt with its replies, some prompts at a time as they are
        answered, the longest first."""
        texts = list(dict.fromkeys(prompts))
        encoded = [self.encode(text) for text in texts]
        for chunk in self._chunks(encoded, samples, QUEUED):
            tokens = [encoded[index] for index in chunk]
            groups = self._contexts(tokens, samples, answer_tokens)
            contexts = [context for group in groups for context in group]
            keys = [(_key(prompt), sample) for prompt in tokens for sample in range(samples)]
            answers = iter(self._continue(contexts, keys, until, answer_tokens))
            for index, group in zip(chunk, groups):
                yield texts[index], [context.reply(*next(answers)) for context in group]

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
        names = [prompt.tobytes() for prompt, _ in pairs]
        prompts = {name: prompt for name, (prompt, _) in zip(names, pairs)}
        longest: Counter[bytes] = Counter()
        for name, (_, continuation) in zip(names, pairs):
            longest[name] = max(longest[name], len(continuation))

        contexts: dict[bytes, list[_Context]] = {}
        distinct, count = list(prompts), max(samples, default=0) + 1
        for chunk in self._chunks(list(prompts.values()), count):
            chosen = [distinct[index] for index in chunk]
            answer_tokens = max(longest[name] for name in chosen)
            groups = self._contexts([prompts[name] for name in chosen], count, answer_tokens)
            contexts |= zip(chosen, groups)

        asked = [
            (contexts[name][sample], continuation)
            for name, sample, (_, continuation) in zip(names, samples, pairs)
        ]
        found = []
        for start in range(0, len(asked), self._rows):
            found += self._score(asked[start : start + self._rows])
        return found

    def _chunks(
        self, prompts: list[np.ndarray], samples: int, queued: int = 1
    ) -> Iterator[list[int]]:
        """Indices of prompts that are worked on together, longest first, so many for each that goes
        through the model at a time; how far that is, is told."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        size = max(1, queued * self._rows // samples)
        title = "thinking and answering" if self._thinks else "answering"
        with Progress(title, len(order), "prompts") as progress:
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                yield chunk
                progress.advance(len(chunk))

    def _contexts(
        self, prompts: list[np.ndarray], samples: int, answer_tokens: int
    ) -> list[list[_Context]]:
        """What stands before each answer: the prompt, or the prompt and each of its thoughts."""
        room = self._room(answer_tokens)
        cut = [len(prompt) > room for prompt in prompts]
        documents = [
            Document(id=_key(prompt), tokens=prompt[-min(room, len(prompt)) :])
            for prompt in prompts
        ]
        if self._thinks:
            return self._think(documents, cut, samples)
        return [
            [_Context(document.tokens, shorter)] * samples
            for document, shorter in zip(documents, cut)
        ]

    def _room(self, answer_tokens: int) -> float:
        """Tokens of a prompt at most, so that thought and answer fit into the model's context."""
        overhead = 0
        if self._thinks:
            nothing = np.array([], dtype=np.int64)
            overhead = len(self._thought_format.prefix(nothing, 0)) + self._thought_tokens
            overhead += len(self._thought_format.markers.close)
        room = self._limit - overhead - answer_tokens
        if room < 1:
            raise ConfigError(
                f"{overhead} tokens of thought and {answer_tokens} of answer leave no room for a"
                f" prompt in the model's {self._limit}. Write a smaller --thought-budget or"
                " --answer-tokens."
            )
        return room

    def _think(
        self, documents: list[Document], cut: list[bool], samples: int
    ) -> list[list[_Context]]:
        """Each prompt with each of its thoughts."""
        with self._sampler.phase():
            thoughts = self._sampler.sample(
                documents,
                _ends_of(documents),
                self._thought_format,
                NoiseKey(self._seed, 0, BENCHMARK_THOUGHT_NOISE),
                group_size=samples,
                max_thought_tokens=self._thought_tokens,
            ).thoughts.to("cpu")

        close = np.array(self._thought_format.markers.close, dtype=np.int64)
        groups = []
        for m, document in enumerate(documents):
            prefix = self._thought_format.prefix(document.tokens, len(document.tokens))
            group = []
            for g in range(samples):
                thought = thoughts.tokens[m, g][thoughts.mask[m, g]].numpy()
                truncated = bool(thoughts.truncated[m, g])
                inner = thought if truncated else thought[: -len(close)]
                tokens = np.concatenate([prefix, inner, close])
                text = self._tokenizer.decode(inner)
                group.append(_Context(tokens, cut[m], text, len(thought), truncated))
            groups.append(group)
        return groups

    def _continue(
        self, contexts: list[_Context], keys: list[tuple[int, int]], until: list[str], budget: int
    ) -> list[tuple[str, int, bool]]:
        """Text, number of tokens and truncation of the answer after each context.

        Args:
            keys: (prompt, sample) of each, for the noise.
        """
        uniforms = self._uniforms(keys, budget) if self._answer_temperature > 0 else None
        written: list[list[int]] = [[] for _ in contexts]
        texts: list[str | None] = [None] * len(contexts)
        queue = list(range(len(contexts)))
        num_rows = min(self._rows, len(contexts))
        # [N], which answer is written in a row; -1 for none.
        rows, answer = RunningRows(self._policy, num_rows), np.full(num_rows, -1)

        with self._policy.sampling():
            while queue or (answer >= 0).any():
                self._begin_answers(rows, answer, queue, contexts)
                going = np.flatnonzero(answer >= 0)
                logits = self._next_logits(rows, answer, contexts, written)[going]
                if uniforms is None:
                    token = logits.argmax(dim=1)
                else:
                    places = [len(written[one]) for one in answer[going]]
                    uniform = uniforms[answer[going], places].to(logits.device)
                    logits = nucleus(logits, self._answer_temperature, self._answer_top_p)
                    token = draw(logits, uniform, self._answer_temperature)[0]

                ended = []
                for row, new in zip(going.tolist(), token.tolist()):
                    one = answer[row]
                    written[one].append(new)
                    texts[one] = self._ended(written[one], until)
                    if texts[one] is not None or len(written[one]) == budget:
                        ended.append(row)
                answer[ended] = -1
                if ended:
                    rows.end(ended)
                still = np.flatnonzero(answer >= 0)
                if not queue and 0 < 2 * len(still) <= len(answer):
                    rows.keep(still.tolist())
                    answer = answer[still]

        return [
            (self._text(tokens) if text is None else text, len(tokens), text is None)
            for tokens, text in zip(written, texts)
        ]

    def _begin_answers(
        self, rows: RunningRows, answer: np.ndarray, queue: list[int], contexts: list[_Context]
    ) -> None:
        """Put the next answers into the rows that are free, behind all of their contexts but the
        last token, which is run next. A context that several answers share is run once."""
        free = np.flatnonzero(answer < 0)
        if not queue or not len(free) or self._policy.why_together and len(free) < len(answer):
            return
        begun = queue[: len(free)]
        del queue[: len(free)]
        shared = {id(contexts[one]): contexts[one].tokens[:-1] for one in begun}
        read = ReadRows(self._policy, list(shared.values()))
        place = {key: index for index, key in enumerate(shared)}
        rows.begin(free[: len(begun)].tolist(), read, [place[id(contexts[one])] for one in begun])
        answer[free[: len(begun)]] = begun

    def _next_logits(
        self,
        rows: RunningRows,
        answer: np.ndarray,
        contexts: list[_Context],
        written: list[list[int]],
    ) -> Tensor:
        """[N, V], after one token more of each answer, or the last of its context."""
        token = np.zeros(len(answer), dtype=np.int64)
        for row in np.flatnonzero(answer >= 0):
            one = answer[row]
            token[row] = written[one][-1] if written[one] else contexts[one].tokens[-1]
        device = self._policy.device
        going = torch.from_numpy(answer >= 0).to(device)
        logits = rows.next(torch.from_numpy(token).to(device), going)
        logits[:, self._barred] = -torch.inf
        return logits

    def _uniforms(self, keys: list[tuple[int, int]], length: int) -> Tensor:
        """[N, length] float64 in [0, 1), one per answer token, by (prompt, sample)."""
        rows = [
            keyed_noise(
                seed=self._seed, purpose=BENCHMARK_ANSWER_NOISE, document=key, thought=sample
            ).random(length)
            for key, sample in keys
        ]
        return torch.from_numpy(np.stack(rows))

    def _ended(self, tokens: list[int], until: list[str]) -> str | None:
        """The whole answer, where these tokens end it."""
        if tokens[-1] in self._ends:
            return self._cut(self._text(tokens[:-1]), until)
        # No token of a vocabulary is an empty text, so a stop text lies within its number of bytes
        # of tokens; decoding all each time would be quadratic.
        longest = max((len(stop.encode()) for stop in until), default=0)
        tail = self._text(tokens[-1 - longest :])
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
            length = len(continuation)
            reply = context.reply(self._text(continuation.tolist()), length, False)
            found.append((float(logprob[n, :length].sum()), bool(greedy[n, :length].all()), reply))
        return found


def _ends_of(documents: list[Document]) -> Positions:
    """The place after the last token of each, where nothing is predicted."""
    return Positions(
        np.arange(len(documents)),
        np.array([len(document.tokens) for document in documents]),
        np.zeros((len(documents), 1), dtype=np.int64),
    )


def _key(tokens: np.ndarray) -> int:
    """A prompt's own number for the noise."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=7).digest(), "big")
