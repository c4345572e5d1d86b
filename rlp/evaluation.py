"""Benchmark accuracy with and without thoughts, through lm-evaluation-harness.

A question is answered as the model was trained: prompt, open marker, a sampled thought, close marker (forced where the
budget ends the thought), and then the answer, which continues the prompt. Without a thought the answer follows
the prompt. No chat template. Prompts, few-shot examples, filters and metrics are lm_eval's own; the decoding is
ours, and so is the check of mathematical answers (`answers`). lm_eval is imported where it is used.

Thoughts come from `rollout` and all noise is keyed by (seed, prompt, sample), so an answer does not depend on the
other questions, their order or the batch size. The open marker is left out of every answer's softmax, as it is of
every target's in training.

Dimensions
    N  sequences decoded side by side;  Q  scored tokens;  T  tokens in a row;  V  vocabulary
"""

import difflib
import hashlib
import io
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedTokenizerBase

from rlp.admission import check_model
from rlp.answers import AnswerPool
from rlp.config import BudgetConfig, Config, ConfigError, DataConfig, EngineConfig, ModelConfig, ThoughtConfig, first_line, read_yaml, refuse_mappings_for_lists, require, require_one_of
from rlp.data import BENCHMARK_ANSWER_NOISE, BENCHMARK_THOUGHT_NOISE, Document, Positions, keyed_noise, short
from rlp.export import known_ids, read_thought_format
from rlp.hub import settle_hub
from rlp.inputs import ModelInputs
from rlp.layout import ThoughtFormat
from rlp.metrics import Progress
from rlp.model import Markers, Policy, choose_dtype, load_policy, marker_notes, read_model_config
from rlp.rollout import ForkedBranches, NoiseKey, draw, sample_thoughts
from rlp.sources import BadDocument, DataError, Rows, open_rows

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

GREEDY = 1e-6
"""The sampling temperature that stands for 0: a token 2e-5 in logit below the best one is never drawn."""


MOST_SAMPLES, MOST_TOKENS = 10_000, 2 ** 24
"""Of a benchmark: more is a slip of the pen, and would be memory asked for."""

_FIELDS = re.compile(r"\{\{\s*([\w-]+(?:\s+or\s+[\w-]+)*)\s*\}\}")
"""One reference to fields of a row. It is all that stands for something in a prompt: a template engine would run what a stranger wrote."""


def _is_plain(template: str) -> bool:
    """Whether nothing but references to fields would be read as more than text."""
    rest = _FIELDS.sub("", template)
    return not any(opening in rest for opening in ("{{", "{%", "{#"))


def fill_fields(template: str, row: dict) -> str:
    """The template with the row's values in it. A value is text or a number, and is never looked at for references.

    Raises:
        BadDocument: the row has none of the fields of a reference, or it holds something else.
    """
    def value(reference: re.Match) -> str:
        names = reference[1].split(" or ")
        held = next((row[name.strip()] for name in names if row.get(name.strip()) is not None), None)
        if not isinstance(held, str | int | float):
            said = "no such field" if held is None else f"a {type(held).__name__}"
            raise BadDocument("no text", f"{reference[0]}: {said}; the row has {', '.join(map(str, row))}; expected text or a number")
        return str(held)

    return _FIELDS.sub(value, template)


@dataclass
class Benchmark:
    """One row of the results: where questions come from, how they are asked, how answers are checked."""

    task: str | None = None
    """A task or group of lm_eval, such as gsm8k or mmlu_pro. Either this or `data`."""
    data: str | None = None
    """Questions of your own: a JSON Lines file, or `hub:OWNER/NAME` or `hub:OWNER/NAME@CONFIG`."""
    split: str = "test"
    """Split of a Hub data set, for `data`."""
    prompt: str = "Question: {{question}}\nAnswer:"
    """The prompt, for `data`: text in which `{{field}}` stands for a field of the row, `{{field or other}}` for the first that it has."""
    reference: str = "{{answer}}"
    """The right answer in the same way, for `data`; few-shot examples show it whole, and the check reads what stands after its last `####`."""
    examples: str | None = None
    """A JSON Lines file of few-shot examples, for `data`."""
    until: list[str] = field(default_factory=lambda: ["Question:"])
    """Texts that end an answer, for `data`; an lm_eval task has its own."""
    shots: int | None = None
    """Few-shot examples in the prompt; None: as the task says."""
    check: str = "task"
    """`task`: the task's own filter and metric. `math`: math-verify on the whole answer (always for `data`)."""
    metric: str | None = None
    """For check `task`: the metric to report; None: the task's first."""
    filter: str | None = None
    """For check `task`: the filter to report; None: the task's first."""
    samples: int = 1
    """k answers to each question; accuracy is pass@1, the mean over them. More than one needs sampled thoughts or answers."""
    thought_tokens: int | None = None
    """Budget of a thought, close marker included; None: as the checkpoint was trained."""
    thought_temperature: float | None = None
    """Of thought tokens; 0 is greedy; None: as the checkpoint was trained."""
    answer_tokens: int | None = None
    """Tokens of an answer at most; None: as the task says, or 256 as in lm_eval."""
    answer_temperature: float = 0.0
    """Of answer tokens; 0 is greedy."""

    def __post_init__(self) -> None:
        require((self.task is None) != (self.data is None), "task", self.task, "and data: exactly one of them names the questions")
        self.check = "math" if self.data else self.check
        require_one_of("check", self.check, ("task", "math"))
        require(self.shots is None or self.shots >= 0, "shots", self.shots, "must be at least 0")
        require(not (self.data and self.shots and not self.examples), "shots", self.shots, "needs examples: a JSON Lines file that they come from")
        require(1 <= self.samples <= MOST_SAMPLES, "samples", self.samples, f"must be at least 1 and at most {MOST_SAMPLES:,}")
        for name in ("thought_tokens", "answer_tokens"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= MOST_TOKENS, name, value, f"must be at least 1 and at most {MOST_TOKENS:,}")
        for name in ("prompt", "reference"):
            require(_is_plain(getattr(self, name)), name, getattr(self, name),
                    "is text with {{field}} or {{field or other}} in it, where names are of letters, digits, _ and -; no other template is read")
        require(all(self.until), "until", self.until, "must hold texts that are not empty")
        for name in ("thought_temperature", "answer_temperature"):
            require(getattr(self, name) is None or 0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must be finite and at least 0 (0 is greedy)")


def load_benchmarks(path: Path) -> dict[str, Benchmark]:
    """Read a YAML file of benchmarks, strictly.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type or an impossible value.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict) or set(tree) != {"benchmarks"} or not isinstance(tree["benchmarks"], dict) or not tree["benchmarks"]:
        raise ConfigError(f"{path} must hold one section, `benchmarks:`, with a mapping from name to settings; got {list(tree) if isinstance(tree, dict) else tree!r}.")
    for name in tree["benchmarks"]:
        require(isinstance(name, str) and name.isprintable(), f"{path}: benchmarks", name, "needs names that can be printed")
    return {name: _read_benchmark(f"{path}: benchmarks.{name}", content) for name, content in tree["benchmarks"].items()}


def _read_benchmark(where: str, content: object) -> Benchmark:
    known = list(Benchmark.__dataclass_fields__)
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping with keys such as task and samples, got {content!r}.")
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}. {_did_you_mean(str(key), known) or 'The keys are ' + ', '.join(known) + '.'}")
    refuse_mappings_for_lists(Benchmark, content, f"{where}.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Benchmark(task="unset")), {"task": None} | content))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error.__cause__ if isinstance(error.__cause__, ConfigError) else f'{error.full_key}: {str(error).splitlines()[0]}'}") from error


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    return f"Did you mean {' or '.join(near)}?" if near else ""


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
    """[T] int64: prompt, and where the model thinks instruction, open marker, thought and close marker."""
    thought: str
    thought_tokens: int
    thought_truncated: bool
    prompt_cut: bool


class Thinker:
    """A policy that answers prompts, and scores continuations, after a thought or without one."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, form: ThoughtFormat, *, thinks: bool, thought_tokens: int,
                 answer_temperature: float = 0.0, seed: int = 0, rows: int = 32) -> None:
        """
        Args:
            form: markers, instruction and the sampling temperature of thoughts.
            thought_tokens: budget of a thought, the close marker included.
            answer_temperature: of answer tokens, 0 is greedy.
            rows: N, sequences decoded side by side; changes memory and speed, never an answer.
        """
        self._policy, self._tokenizer, self._form = policy, tokenizer, form
        self._thinks, self._thought_tokens, self._answer_temperature = thinks, thought_tokens, answer_temperature
        self._seed, self._rows = seed, rows
        self._plain = replace(form, markers=Markers(open=(), close=form.markers.close), instruction=())
        self._limit = getattr(policy.lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
        ends = getattr(policy.lm.generation_config, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @property
    def first_token(self) -> int:
        """What an empty prompt is replaced by: the beginning of a sequence, or else the end of the one before."""
        begin = self._tokenizer.bos_token_id
        return self._tokenizer.eos_token_id if begin is None else begin

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence that the model was built for; None where its config gives none."""
        return None if self._limit == math.inf else int(self._limit)

    def without_thoughts(self) -> "Thinker":
        """The same model, which does not think."""
        return Thinker(self._policy, self._tokenizer, self._form, thinks=False, thought_tokens=self._thought_tokens,
                       answer_temperature=self._answer_temperature, seed=self._seed, rows=self._rows)

    def encode(self, text: str) -> np.ndarray:
        """[T] int64, as documents are encoded in training."""
        return np.array(self._tokenizer(text)["input_ids"] or [self.first_token], dtype=np.int64)

    def replies(self, prompts: list[str], samples: int, *, until: list[str], answer_tokens: int) -> list[list[Reply]]:
        """`samples` replies to each prompt.

        Args:
            until: texts that end an answer; they are left off. After a thought, white space in front of the answer is not searched for them.
        """
        encoded = {prompt: self.encode(prompt) for prompt in prompts}
        texts, found = list(encoded), {}
        for chunk in self._chunks(list(encoded.values()), samples):
            here = [texts[index] for index in chunk]
            groups = self._contexts([encoded[text] for text in here], samples, answer_tokens)
            keys = [(_key(encoded[text]), sample) for text in here for sample in range(samples)]
            contexts = [context for group in groups for context in group]
            replies = [Reply(context.thought, context.thought_tokens, context.thought_truncated, *answer, context.prompt_cut)
                       for context, answer in zip(contexts, self._continue(contexts, keys, until, answer_tokens))]
            found |= {text: replies[place * samples : (place + 1) * samples] for place, text in enumerate(here)}
        return [found[prompt] for prompt in prompts]

    def scores(self, pairs: list[tuple[np.ndarray, np.ndarray]], samples: list[int]) -> list[tuple[float, bool, Reply]]:
        """Log-probability of a continuation, nats at temperature 1, whether it is what greedy decoding would write, and the thought before it.

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
            contexts |= zip(chosen, self._contexts([prompts[name] for name in chosen], count, max(longest[name] for name in chosen)))
        found = []
        for start in range(0, len(pairs), self._rows):
            some = [(contexts[prompt.tobytes()][sample], continuation)
                    for (prompt, continuation), sample in zip(pairs[start : start + self._rows], samples[start : start + self._rows])]
            found += self._score(some)
        return found

    def _chunks(self, prompts: list[np.ndarray], samples: int) -> Iterator[list[int]]:
        """Indices of prompts that are worked on together, longest first; how far that is, is told."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        size = max(1, self._rows // samples)
        with Progress("thinking and answering" if self._thinks else "answering", len(order), "prompts") as progress:
            for start in range(0, len(order), size):
                yield order[start : start + size]
                progress.advance(len(order[start : start + size]))

    def _contexts(self, prompts: list[np.ndarray], samples: int, answer_tokens: int) -> list[list[_Context]]:
        """What stands before each answer: the prompt, or the prompt and each of its thoughts."""
        overhead = len(self._form.prefix(np.array([], dtype=np.int64), 0)) + self._thought_tokens + len(self._form.markers.close) if self._thinks else 0
        room = self._limit - overhead - answer_tokens
        if room < 1:
            raise ConfigError(f"{overhead} tokens of thought and {answer_tokens} of answer leave no room for a prompt in the model's {self._limit}. "
                              "Write a smaller --thought-budget or --answer-tokens.")
        cut = [len(prompt) > room for prompt in prompts]
        kept = [prompt[-int(room):] if shorter else prompt for prompt, shorter in zip(prompts, cut)]
        if not self._thinks:
            return [[_Context(prompt, "", 0, False, shorter)] * samples for prompt, shorter in zip(kept, cut)]
        documents = [Document(id=_key(prompt), tokens=tokens) for prompt, tokens in zip(prompts, kept)]
        ends = Positions(np.arange(len(kept)), np.array([len(prompt) for prompt in kept]), np.zeros((len(kept), 1), dtype=np.int64))
        thoughts = sample_thoughts(self._policy, documents, ends, self._form, NoiseKey(self._seed, 0, BENCHMARK_THOUGHT_NOISE),
                                   group_size=samples, max_thought_tokens=self._thought_tokens, rows=self._rows).thoughts
        tokens, mask, truncated = (part.cpu().numpy() for part in (thoughts.tokens, thoughts.mask, thoughts.truncated))
        close = np.array(self._form.markers.close, dtype=np.int64)
        groups = []
        for m, prompt in enumerate(kept):
            prefix = self._form.prefix(prompt, len(prompt))
            groups.append([])
            for g in range(samples):
                thought = tokens[m, g][mask[m, g]]
                inner = thought if truncated[m, g] else thought[: -len(close)]
                groups[-1].append(_Context(np.concatenate([prefix, inner, close]), self._tokenizer.decode(inner), len(thought), bool(truncated[m, g]), cut[m]))
        return groups

    def _continue(self, contexts: list[_Context], keys: list[tuple[int, int]], until: list[str], budget: int) -> list[tuple[str, int, bool]]:
        """Text, number of tokens and truncation of the answer after each context.

        Args:
            keys: (prompt, sample) of each, for the noise.
        """
        device = self._policy.device
        documents = [Document(id=key, tokens=context.tokens) for context, (key, _) in zip(contexts, keys)]
        ends = Positions(np.arange(len(contexts)), np.array([len(context.tokens) for context in contexts]), np.zeros((len(contexts), 1), dtype=np.int64))
        uniforms = None
        if self._answer_temperature > 0:
            uniforms = torch.from_numpy(np.stack([
                keyed_noise(seed=self._seed, purpose=BENCHMARK_ANSWER_NOISE, document=key, thought=sample).random(budget) for key, sample in keys])).to(device)
        written: list[list[int]] = [[] for _ in contexts]
        texts: list[str | None] = [None] * len(contexts)
        going = list(range(len(contexts)))
        with self._policy.sampling():
            branches = ForkedBranches(self._policy, documents, ends, self._plain, 1)
            logits = branches.first()
            for step in range(budget):
                logits[:, self._form.markers.excluded] = -torch.inf
                rows = torch.tensor(going, device=device)
                token = logits.argmax(dim=1) if uniforms is None else draw(logits, uniforms[rows, step], self._answer_temperature)[0]
                for row, one in zip(going, token.tolist()):
                    written[row].append(one)
                    texts[row] = self._ended(written[row], until)
                still = [place for place, row in enumerate(going) if texts[row] is None]
                going = [going[place] for place in still]
                if not going or step + 1 == budget:
                    break
                logits = branches.next(torch.tensor(going, device=device), token[torch.tensor(still, device=device)])
        return [(self._text(tokens) if text is None else text, len(tokens), text is None) for tokens, text in zip(written, texts)]

    def _ended(self, tokens: list[int], until: list[str]) -> str | None:
        """The whole answer, where these tokens end it."""
        if tokens[-1] in self._ends:
            return self._cut(self._text(tokens[:-1]), until)
        # No token of a vocabulary is an empty text, so a stop text lies within its number of bytes of tokens; decoding all each time would be quadratic.
        tail = self._text(tokens[-1 - max((len(stop.encode()) for stop in until), default=0):])
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
        device = self._policy.device
        rows = [np.concatenate([context.tokens, continuation[:-1]]) for context, continuation in some]
        tokens = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
        for line, row in zip(tokens, rows):
            line[: len(row)] = row
        lengths = np.array([len(continuation) for _, continuation in some])
        row = np.repeat(np.arange(len(some)), lengths)
        column = np.concatenate([len(context.tokens) - 1 + np.arange(len(continuation)) for context, continuation in some])
        target = np.concatenate([continuation for _, continuation in some])
        queries = [torch.from_numpy(part).to(device) for part in (row, column, target, np.ones(len(row), dtype=np.float32), np.full(len(row), self._form.markers.excluded))]
        ids = torch.from_numpy(tokens).to(device)
        with self._policy.sampling():
            logprob, greedy = (self._policy(statistic, ids, None, None, *queries).cpu().numpy() for statistic in ("logprob", "greedy"))
        found, ends = [], np.cumsum(lengths)
        for (context, continuation), start, end in zip(some, ends - lengths, ends):
            reply = Reply(context.thought, context.thought_tokens, context.thought_truncated, self._text(continuation.tolist()), len(continuation), False, context.prompt_cut)
            found.append((float(logprob[start:end].sum()), bool(greedy[start:end].all()), reply))
        return found


def _key(tokens: np.ndarray) -> int:
    """A prompt's own number for the noise."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=7).digest(), "big")


def thinking_lm(thinker: Thinker, *, answer_tokens: int | None = None) -> "LM":
    """The thinker as a model of lm_eval, for `lm_eval.evaluator.evaluate` or for `run_benchmark`.

    A request that comes k times is answered k times, with other thoughts. `replies` holds what the last call saw, request by request.
    `loglikelihood_rolling` never thinks: a text's perplexity has no place where a thought would stand.

    Args:
        answer_tokens: longest answer; None: as the request says, or 256 as in lm_eval.
    """
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class ThinkingLM(LM):
        """See `thinking_lm`."""

        def __init__(self) -> None:
            super().__init__()
            self.replies: list[Reply] = []

        def generate_until(self, requests: list["Instance"], disable_tqdm: bool = True) -> list[str]:
            groups: dict[tuple, list[int]] = {}
            for index, request in enumerate(requests):
                settings = request.args[1]
                until = settings.get("until") or []
                longest = answer_tokens or settings.get("max_gen_toks") or 256
                groups.setdefault((longest, *([until] if isinstance(until, str) else until)), []).append(index)
            sample = _sample_numbers(requests)
            self.replies = [None] * len(requests)
            for (longest, *until), members in groups.items():
                count = max(sample[index] for index in members) + 1
                answered = thinker.replies([requests[index].args[0] for index in members], count, until=until, answer_tokens=longest)
                for index, replies in zip(members, answered):
                    self.replies[index] = replies[sample[index]]
            return [reply.answer for reply in self.replies]

        def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            scored = thinker.scores([_split(thinker, *request.args) for request in requests], _sample_numbers(requests))
            self.replies = [reply for _, _, reply in scored]
            return [(logprob, greedy) for logprob, greedy, _ in scored]

        def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = True) -> list[float]:
            silent, totals = thinker.without_thoughts(), []
            for request in requests:
                windows = map(make_disjoint_window, get_rolling_token_windows(
                    token_list=silent.encode(request.args[0]).tolist(), prefix_token=silent.first_token, max_seq_len=(silent.context_tokens or 2049) - 1, context_len=1))
                pairs = [(np.array(context, dtype=np.int64), np.array(continuation, dtype=np.int64)) for context, continuation in windows]
                totals.append(sum(logprob for logprob, _, _ in silent.scores(pairs, [0] * len(pairs))))
            return totals

    return ThinkingLM()


def _sample_numbers(requests: list["Instance"]) -> list[int]:
    """How often each request came before: lm_eval repeats the same object."""
    seen: Counter[int] = Counter()
    numbers = []
    for request in requests:
        numbers.append(seen[id(request)])
        seen[id(request)] += 1
    return numbers


def _split(thinker: Thinker, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of both, split where the context's tokens end; white space between them belongs to the continuation, as in lm_eval."""
    kept = context.rstrip()
    whole = thinker.encode(kept + context[len(kept):] + continuation)
    if not kept:
        return np.array([thinker.first_token]), whole[1:] if whole[0] == thinker.first_token and len(whole) > 1 else whole
    head = thinker.encode(kept)
    return head, whole[len(head):]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A checkpoint, ready to be asked."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    form: ThoughtFormat
    thought: ThoughtConfig
    """As the checkpoint was trained, or the paper's: its budget counts where a benchmark names
    none."""

    def marker_notes(self) -> list[str]:
        """`marker_notes` of the checkpoint."""
        return marker_notes(self.tokenizer, self.form.markers, self.thought)

    def thinker(self, benchmark: Benchmark, *, thinks: bool, seed: int, rows: int) -> Thinker:
        """What answers a benchmark."""
        temperature = self.form.temperature if benchmark.thought_temperature is None else max(benchmark.thought_temperature, GREEDY)
        return Thinker(self.policy, self.tokenizer, replace(self.form, temperature=temperature), thinks=thinks, seed=seed, rows=rows,
                       thought_tokens=benchmark.thought_tokens or self.thought.max_thought_tokens,
                       answer_temperature=benchmark.answer_temperature)


def open_evaluator(checkpoint: str, *, device: torch.device, dtype: str = "auto") -> Evaluator:
    """Load a Hugging Face folder or Hub name. The `thought_format.json` of a folder says how it thinks; without one it thinks as the paper's configs do.

    Raises:
        ConfigError: no model there, or markers that its tokenizer writes otherwise than in training.
    """
    path = Path(checkpoint) / "thought_format.json"
    manifest = read_thought_format(path)
    try:
        thought = ThoughtConfig(**{key: manifest[key] for key in ("open_marker", "close_marker", "temperature", "max_thought_tokens")}) if manifest else ThoughtConfig()
    except (ConfigError, KeyError) as error:
        raise ConfigError(f"{path} is no thought format: {error!r}. Export the checkpoint again with `rlp export`.") from error
    # A config is the recipe of a run; of its training sections nothing is used here.
    config = Config(model=ModelConfig(path=checkpoint), thought=thought, data=DataConfig(train=["unused"]), budget=BudgetConfig(steps=1), engine=EngineConfig(dtype=dtype, layout="repeated"))
    inputs = ModelInputs(config)
    ids = {"open_marker_ids": inputs.markers.open, "close_marker_ids": inputs.markers.close}
    for name, own in ids.items():
        if tuple(manifest.get(name, own)) != own:
            raise ConfigError(f"{path}: {name} is {manifest[name]}, and the tokenizer of the folder writes {list(own)}. Write a folder with the tokenizer that the run used.")
    form = replace(inputs.form, instruction=known_ids(manifest.get("instruction_ids", ()), inputs.tokenizer))
    dtype, _ = choose_dtype(config, device, read_model_config(config.model).get_text_config().hidden_size)
    policy = load_policy(config, inputs.tokenizer, inputs.markers, dtype, device).to(device).eval()
    check_model(policy)
    return Evaluator(policy, inputs.tokenizer, form, thought)


def load_tasks(benchmarks: dict[str, Benchmark]) -> dict[str, list["Task"]]:
    """The lm_eval tasks of each benchmark, with their data.

    Raises:
        ConfigError: lm_eval is not installed, or has no task of that name, or it would run code that a model wrote.
        DataError: data that can not be read or downloaded.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed. Write: pip install 'rlp-pretraining[eval]'.")
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if any(benchmark.task or str(benchmark.data).startswith("hub:") for benchmark in benchmarks.values()):
        settle_hub()  # lm_eval asks for each file, and again and again
    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=any(benchmark.task for benchmark in benchmarks.values()))
    specs = {name: own_task(name, benchmark) if benchmark.data else _known_task(name, benchmark.task, manager.all_tasks) for name, benchmark in benchmarks.items()}
    loaded = {}
    for name, spec in specs.items():
        with _data_errors(name, benchmarks[name]):
            tasks = list(manager.load([spec])["tasks"].values())
        for task in tasks:
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(f"{name}: the task {task.task_name} runs code that the model writes, which is not done here.")
            if benchmarks[name].shots is not None:
                task.set_config("num_fewshot", benchmarks[name].shots)
            task.set_fewshot_seed(1234)  # lm_eval's own
        loaded[name] = tasks
    return loaded


def _known_task(name: str, task: str, known: list[str]) -> str:
    if task not in known:
        raise ConfigError(f"{name}: lm_eval has no task {task!r}. {_did_you_mean(task, known) or 'See its list with: lm-eval ls tasks.'} A file of your own needs a name that ends in .jsonl.")
    return task


@contextmanager
def _data_errors(name: str, benchmark: Benchmark) -> Iterator[None]:
    """Around lm_eval's reading of a task's rows: what goes wrong there is a DataError."""
    import datasets
    from jinja2 import TemplateError

    try:
        yield
    # What a download raises, or a task of lm_eval on a row that it does not expect, depends on library, cache and network.
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, AssertionError, SyntaxError, MemoryError,
            TemplateError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: the data of {benchmark.task} can not be loaded: {type(error).__name__}: {first_line(error)}. "
                        "Run it where the Hugging Face Hub can be reached (some sets need a login), or write --tasks FILE.jsonl.") from error


class _Questions(list):
    """Rows as lm_eval takes them: finished prompts and references."""

    features = {"prompt": str, "reference": str}


def own_task(name: str, benchmark: Benchmark) -> dict:
    """The lm_eval config of questions that are no task of lm_eval. What it gets is finished text, and no template to fill."""
    sources = {"test": benchmark.data} | ({"examples": benchmark.examples} if benchmark.examples else {})
    rows = {split: _finished(source, benchmark, name) for split, source in sources.items()}
    return {
        "task": name, "output_type": "generate_until", "custom_dataset": lambda **_: rows, "test_split": "test",
        "doc_to_text": itemgetter("prompt"), "doc_to_target": itemgetter("reference"),
        "fewshot_split": "examples" if benchmark.examples else None, "fewshot_config": {"sampler": "first_n"}, "num_fewshot": benchmark.shots or 0,
        "generation_kwargs": {"until": list(benchmark.until), "do_sample": False}, "metric_list": [{"metric": "exact_match"}],
    }


def _finished(source: str, benchmark: Benchmark, name: str) -> _Questions:
    """All questions of a file or a Hub data set.

    Raises:
        DataError: it can not be read, or a row lacks a field; with its line.
    """
    try:
        rows, finished = open_rows([source], DataConfig(train=[source]), benchmark.split, name), _Questions()
        for index in range(len(rows)):
            row = _row(rows, index)
            if row is not None:
                finished.append({key: fill_fields(getattr(benchmark, key), row) for key in _Questions.features})
    except BadDocument as error:
        raise DataError(f"{name}: {rows.where(index)}: {error.args[0]} ({short(error.args[1])}). Mend the line, or the prompt and reference of the benchmark.") from error
    except DataError as error:
        raise DataError(f"{name}: the data of {source} can not be loaded: {error}") from error
    if not finished:
        raise DataError(f"{name}: {source} holds no question. Write a file with one JSON object on each line.")
    return finished


def _row(rows: Rows, index: int) -> dict | None:
    """A row, or None for an empty line."""
    try:
        return rows.read(index)
    except BadDocument as error:
        if error.args[0] == "empty line":
            return None
        raise


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark in one mode."""

    benchmark: str
    mode: str
    """`think` or `no_think`."""
    metric: str
    """What accuracy is the mean of."""
    questions: int
    samples: int
    accuracy: float
    """pass@1: the mean over questions of the mean over samples."""
    standard_error: float | None
    """Of accuracy, over questions; None for a single question."""
    thought_tokens_mean: float
    thought_truncated_frac: float
    answer_tokens_mean: float
    answer_truncated_frac: float
    unparseable_frac: float
    """Answers in which the check found nothing to read; they count as wrong."""
    check_timeouts: int
    """Answers that took too long to check; they count as wrong."""
    check_crashes: int
    """Answers whose check died; they count as wrong."""
    prompts_cut: int
    """Prompts that lost their beginning."""
    seconds: float


def mean_and_error(scores: np.ndarray) -> tuple[float, float | None]:
    """pass@1 of scores [questions, samples], and its standard error: samples of a question are no new questions, so questions are what is resampled."""
    per_question = scores.mean(axis=1)
    return float(per_question.mean()), float(per_question.std(ddof=1) / math.sqrt(len(per_question))) if len(per_question) > 1 else None


def run_benchmark(name: str, benchmark: Benchmark, tasks: list["Task"], thinker: Thinker, pool: AnswerPool, *, mode: str, limit: int | None) -> tuple[Result, list[dict]]:
    """Ask all questions of a benchmark `samples` times each.

    Args:
        limit: at most so many questions of each task; None: all.

    Returns:
        The result, and one mapping per question and sample with all that was written.
    """
    start = time.monotonic()
    scores, rows, metrics = [], [], set()
    for task in tasks:
        with redirect_stderr(io.StringIO()), _data_errors(name, benchmark):  # lm_eval draws a bar for each task
            task.build_all_requests(limit=limit)
        lm = thinking_lm(thinker, answer_tokens=benchmark.answer_tokens)
        responses, replies = _ask(lm, task.instances, benchmark.samples)
        if benchmark.check == "math":
            scored, outcomes, metric = _check_mathematics(task, responses, pool)
        else:
            scored, outcomes, metric = _check_by_task(task, responses, benchmark)
        metrics.add(metric)
        scores.append(scored)
        questions = _by_question(task.instances)
        for q, members in enumerate(questions):
            for sample in range(benchmark.samples):
                said = [replies[index][sample] for index in members]
                rows.append({
                    "benchmark": name, "mode": mode, "task": task.task_name, "question": int(task.instances[members[0]].doc_id), "sample": sample,
                    "prompt": task.instances[members[0]].args[0], "reference": str(task.doc_to_target(task.instances[members[0]].doc)),
                    **asdict(said[0]), "score": float(scored[q, sample]), "outcome": outcomes[q][sample],
                } | ({"choices": [[reply.answer, responses[index][sample][0]] for reply, index in zip(said, members)]} if len(said) > 1 else {}))
    scores = np.concatenate(scores)
    accuracy, error = mean_and_error(scores)

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    outcomes = Counter(row["outcome"] for row in rows)
    return Result(
        benchmark=name, mode=mode, metric=", ".join(sorted(metrics)), questions=len(scores), samples=benchmark.samples, accuracy=accuracy, standard_error=error,
        thought_tokens_mean=mean("thought_tokens"), thought_truncated_frac=mean("thought_truncated"), answer_tokens_mean=mean("answer_tokens"),
        answer_truncated_frac=mean("answer_truncated"), unparseable_frac=outcomes["unparseable"] / len(rows), check_timeouts=outcomes["timeout"],
        check_crashes=outcomes["crash"], prompts_cut=sum(row["prompt_cut"] for row in rows if row["sample"] == 0), seconds=time.monotonic() - start), rows


def _ask(lm: "LM", instances: list["Instance"], samples: int) -> tuple[list[list], list[list[Reply]]]:
    """Responses and replies [instances][samples], each kind of request in one call as lm_eval makes it."""
    responses: list[list] = [[] for _ in instances]
    replies: list[list[Reply]] = [[] for _ in instances]
    for kind in sorted({instance.request_type for instance in instances}):
        if kind == "loglikelihood_rolling":
            raise ConfigError(f"{instances[0].task_name} measures perplexity, not answers. Write a task of questions.")
        members = [index for index, instance in enumerate(instances) if instance.request_type == kind for _ in range(samples)]
        said = getattr(lm, kind)([instances[index] for index in members])
        for index, response, reply in zip(members, said, lm.replies):
            responses[index].append(response)
            replies[index].append(reply)
    return responses, replies


def _by_question(instances: list["Instance"]) -> list[list[int]]:
    """Indices of the requests of each question, in order; a multiple choice makes one of each choice."""
    groups: dict[int, list[int]] = {}
    for index, instance in enumerate(instances):
        groups.setdefault(instance.doc_id, []).append(index)
    return [sorted(members, key=lambda index: instances[index].idx) for members in groups.values()]


def _check_mathematics(task: "Task", responses: list[list], pool: AnswerPool) -> tuple[np.ndarray, list[list[str]], str]:
    """Scores [questions, samples] and outcomes by math-verify."""
    questions = _by_question(task.instances)
    if any(len(members) > 1 or task.instances[members[0]].request_type != "generate_until" for members in questions):
        raise ConfigError(f"{task.task_name} is no task of written answers, so math-verify can not check it. Write check: task.")
    pairs = [(response, str(task.doc_to_target(task.instances[index].doc))) for (index,) in questions for response in responses[index]]
    verdicts = pool.verdicts(pairs)
    samples = len(verdicts) // len(questions)
    scores = np.array([verdict.right for verdict in verdicts], dtype=np.float64).reshape(len(questions), samples)
    outcomes = [[verdict.outcome for verdict in verdicts[q * samples : (q + 1) * samples]] for q in range(len(questions))]
    return scores, outcomes, "math_verify"


def _check_by_task(task: "Task", responses: list[list], benchmark: Benchmark) -> tuple[np.ndarray, list[list[str]], str]:
    """Scores [questions, samples] and outcomes by the task's own filter and metric, sample by sample: lm_eval itself would look at the first alone."""
    questions = _by_question(task.instances)
    scores = np.zeros((len(questions), benchmark.samples))
    outcomes = [["checked"] * benchmark.samples for _ in questions]
    metric = benchmark.metric
    for sample in range(benchmark.samples):
        for instance, said in zip(task.instances, responses):
            instance.resps, instance.filtered_resps = [said[sample]], {}
        task.apply_filters()
        filters = list(task.instances[0].filtered_resps)
        chosen = benchmark.filter or filters[0]
        if chosen not in filters:
            raise ConfigError(f"{task.task_name} has no filter {chosen!r}. Write one of {', '.join(filters)}.")
        for q, members in enumerate(questions):
            filtered = [task.instances[index].filtered_resps[chosen] for index in members]
            measured = task.process_results(task.instances[members[0]].doc, filtered)
            metric = metric or next(iter(measured))
            if not isinstance(measured.get(metric), (bool, int, float, np.number)):
                raise ConfigError(f"{task.task_name} gives no number {metric!r} for a question. Write metric: one of {', '.join(measured)}.")
            scores[q, sample] = measured[metric]
            if filtered[0] == "[invalid]":  # what lm_eval's filters leave where they find nothing
                outcomes[q][sample] = "unparseable"
    return scores, outcomes, metric if chosen == "none" else f"{metric} ({chosen})"


def run_benchmarks(benchmarks: dict[str, Benchmark], tasks: dict[str, list["Task"]], evaluator: Evaluator, *, modes: tuple[str, ...], limit: int | None, seed: int, rows: int,
                   timeout_s: float = 10.0) -> Iterator[tuple[Result, list[dict]]]:
    """Each benchmark in each mode.

    Without a thought and with greedy answers all samples would be the same, so there is one.
    """
    with AnswerPool(timeout_s=timeout_s) as pool:
        for name, benchmark in benchmarks.items():
            for mode in modes:
                thinker = evaluator.thinker(benchmark, thinks=mode == "think", seed=seed, rows=rows)
                yield run_benchmark(name, settle_samples(benchmark, mode), tasks[name], thinker, pool, mode=mode, limit=limit)


def settle_samples(benchmark: Benchmark, mode: str) -> Benchmark:
    """One sample where nothing is drawn."""
    drawn = benchmark.answer_temperature > 0 or (mode == "think" and benchmark.thought_temperature != 0)
    return benchmark if drawn else replace(benchmark, samples=1)


def thought_gain(think: list[dict], no_think: list[dict]) -> tuple[float, float | None]:
    """Accuracy with thoughts minus accuracy without, and its standard error, paired by question."""
    def per_question(rows: list[dict]) -> dict[tuple, float]:
        scores: dict[tuple, list[float]] = {}
        for row in rows:
            scores.setdefault((row["task"], row["question"]), []).append(row["score"])
        return {key: float(np.mean(values)) for key, values in scores.items()}

    with_thoughts, without = per_question(think), per_question(no_think)
    return mean_and_error(np.array([[with_thoughts[key] - without[key]] for key in with_thoughts]))


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    return {name: version(name) for name in ("lm_eval", "math-verify", "transformers", "torch", "datasets")}
