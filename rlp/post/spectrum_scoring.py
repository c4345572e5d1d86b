"""What a checkpoint says of the options of tasks, after none and after several pairs.

Questions of two kinds, each by tasks of its own that no row of the same seed was made of:

    told     the description says the distribution, and no pair stands before: is it followed?
    hidden   it does not, and k pairs stand before: how near does the model come to Bayes' rule?

The probability of an option is that of its tokens and its end, written as in training. An output
that spells an option in other tokens is not one of them: its mass counts as missing.

Dimensions
    O  options;  R  rows read side by side;  V  vocabulary
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from rlp.compare.asked_model import AskedModel
from rlp.config import ConfigError
from rlp.model.policy import Policy
from rlp.post.distributions import divergence
from rlp.post.spectrum_measures import excess_nats, expected_yield, mass_of, renormalized
from rlp.post.spectrum_rows import RowFormat, RowWriter
from rlp.post.spectrum_tasks import FAMILIES, Task, draw_tasks, require_families

TOLD_KEY, HIDDEN_KEY = 1, 2
"""Of `draw_tasks`; 0 is that of rows."""

ROWS = 256
"""Contexts, or options behind them, that are read side by side."""

Scorer = Callable[["Question"], np.ndarray]
"""A question -> [O] nats."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be predicted, and what is right."""

    family: str
    is_told: bool
    description: str
    history: tuple[tuple[str, str], ...]
    """The pairs before it."""
    given: str
    """Its input."""
    options: tuple[str, ...]
    truth: np.ndarray
    """[O], sums to 1: the distribution that is told, or Bayes' prediction."""

    @property
    def shots(self) -> int:
        return len(self.history)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of checkpoints: tasks, and pairs before a question."""

    families: tuple[str, ...] = tuple(FAMILIES)
    tasks: int = 16
    """Of each family; as many told ones as hidden ones."""
    shots: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    """Pairs before the questions of hidden tasks."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_families("families", self.families)
        if self.tasks < 1 or self.seed < 0:
            raise ConfigError(
                f"tasks must be at least 1, and seed 0, got {self.tasks} and {self.seed}."
            )
        shots = list(self.shots)
        if not shots or min(shots) < 0 or sorted(set(shots)) != shots:
            raise ConfigError(f"shots must be numbers from 0 on, ascending, got {shots}.")


def make_questions(asked: Asked) -> list[Question]:
    """Those of told tasks, and those of hidden ones after each number of pairs."""
    found = []
    count = asked.tasks * len(asked.families)
    for key, told, shots in ((TOLD_KEY, 1.0, (0,)), (HIDDEN_KEY, 0.0, asked.shots)):
        for task, noise in draw_tasks(asked.families, count, told=told, seed=asked.seed, key=key):
            pairs = task.draw(max(shots) + 1, noise)
            found += [_question(task, pairs, number) for number in shots]
    return found


def _question(task: Task, pairs: list[tuple[int, int]], shots: int) -> Question:
    history, given = pairs[:shots], pairs[shots][0]
    return Question(
        family=task.family.name,
        is_told=task.is_told,
        description=task.description,
        history=tuple(task.texts(history)),
        given=task.family.inputs[given],
        options=task.family.options,
        truth=task.predictive(history, given),
    )


# Oracles


def bayes(question: Question) -> np.ndarray:
    """The truth itself."""
    with np.errstate(divide="ignore"):
        return np.log(question.truth)


def uniform(question: Question) -> np.ndarray:
    """Every option alike."""
    return np.full(len(question.options), -math.log(len(question.options)))


# Scoring by a model


def option_logprobs(
    policy: Policy,
    writer: RowWriter,
    questions: Sequence[Question],
    temperatures: Sequence[float] = (1.0,),
    rows: int = ROWS,
) -> dict[float, list[np.ndarray]]:
    """By temperature, [O] nats of each question's options, in their order.

    A context is read once, and its options behind it. At a temperature T every token is drawn from
    the softmax of logits / T, and an option's probability is that of its tokens then.

    Args:
        rows: changes memory and speed.

    Raises:
        ConfigError: two options have the same tokens, or a context does not fit into the model.
    """
    limit = getattr(policy.lm.config.get_text_config(), "max_position_embeddings", None)
    contexts = [context_ids(writer, question) for question in questions]
    answers = [[writer.answer(option) for option in one.options] for one in questions]
    for question, context, options in zip(questions, contexts, answers):
        if len(set(map(tuple, options))) < len(options):
            raise ConfigError(
                f"{question.family}: two of its options have the same tokens, so that their"
                " probabilities are one. Write options that the tokenizer tells apart."
            )
        if limit is not None and len(context) + max(map(len, options)) > limit:
            raise ConfigError(
                f"{question.family}: a question after {question.shots} pairs has {len(context)}"
                f" tokens, and the model reads {limit}. Write fewer --shots."
            )
    found: dict[float, list] = {one: [None] * len(questions) for one in temperatures}
    order = sorted(range(len(questions)), key=lambda index: len(contexts[index]))
    for _, group in groupby(order, key=lambda index: len(contexts[index])):
        for part in _parts(list(group), [len(options) for options in answers], rows):
            told = _read(
                policy,
                torch.tensor([contexts[index] for index in part]),
                [answers[index] for index in part],
                temperatures,
            )
            for temperature, logprobs in told.items():
                for index, own in zip(part, logprobs):
                    found[temperature][index] = own
    return found


def context_ids(writer: RowWriter, question: Question) -> list[int]:
    """All tokens before the output that is asked for."""
    ids = writer.begin(question.description)
    for given, output in question.history:
        ids += writer.ask(given) + writer.answer(output)
    return ids + writer.ask(question.given)


def _parts(indices: list[int], sizes: list[int], most: int) -> list[list[int]]:
    """Groups of questions with at most so many options together, each at least one."""
    parts, filled = [[]], 0
    for index in indices:
        if parts[-1] and filled + sizes[index] > most:
            parts.append([])
            filled = 0
        parts[-1].append(index)
        filled += sizes[index]
    return parts


def _read(
    policy: Policy,
    contexts: torch.Tensor,
    answers: list[list[list[int]]],
    temperatures: Sequence[float],
) -> dict[float, list[np.ndarray]]:
    """Contexts [R, T] of one length, and the options of each behind it, token by token."""
    owner = [row for row, options in enumerate(answers) for _ in options]
    written = [tokens for options in answers for tokens in options]
    contexts = contexts.to(policy.device)
    sums = {one: np.zeros(len(written)) for one in temperatures}
    with policy.sampling():
        mask = torch.ones_like(contexts, dtype=torch.bool)
        logits, cache = policy.prefill(contexts, mask)
        alive, rows = list(range(len(written))), torch.tensor(owner, device=policy.device)
        for depth in range(max(map(len, written))):
            going = [place for place, own in enumerate(alive) if len(written[own]) > depth]
            alive = [alive[place] for place in going]
            rows = rows if depth == 0 else torch.tensor(going, device=policy.device)
            token = torch.tensor([written[own][depth] for own in alive], device=policy.device)
            for one in temperatures:
                logprobs = (logits.double() / one).log_softmax(dim=-1)
                sums[one][alive] += logprobs[rows, token].cpu().numpy()
            if not any(len(written[own]) > depth + 1 for own in alive):
                break
            policy.fork(cache, rows)
            width = contexts.shape[1] + depth + 1
            mask = torch.ones(len(alive), width, dtype=torch.bool, device=policy.device)
            position = torch.full_like(token, width - 1)
            logits = policy.decode(token, mask, position, cache)
    ends = np.cumsum([len(options) for options in answers])[:-1]
    return {one: np.split(values, ends) for one, values in sums.items()}


# Figures


def figures_of(
    questions: Sequence[Question], logprobs: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """What the options' probabilities [O] of each question amount to: means over questions.

    Of told ones `told_jsd`, `told_mass`, `told_yield`, `told_accuracy`. Of hidden ones, after k
    pairs, `shots_K_jsd`, `shots_K_mass`, `shots_K_nll` (nats), `shots_K_excess` (of these, above
    Bayes' own) and `shots_K_accuracy`, that of always saying the model's most likely option. Nats
    and accuracies are what the truth expects of the next output, not of one draw.
    `undefined` counts questions whose options have no mass; they are in `mass` alone. None: not
    measured, or infinite.
    """
    from scipy.special import entr

    told: dict[str, list[float]] = {}
    undefined = 0
    for question, own in zip(questions, logprobs):
        prefix = "told" if question.is_told else f"shots_{question.shots}"
        mass = mass_of(own)
        told.setdefault(f"{prefix}_mass", []).append(mass)
        if not (own > -np.inf).any():
            undefined += 1
            continue
        figures = {
            "jsd": divergence(renormalized(own), question.truth),
            "accuracy": float(question.truth[own.argmax()]),
        }
        if question.is_told:
            figures["yield"] = expected_yield(question.truth, own)
        else:
            figures["excess"] = excess_nats(question.truth, own)
            figures["nll"] = figures["excess"] + float(entr(question.truth).sum())
        for name, value in figures.items():
            told.setdefault(f"{prefix}_{name}", []).append(value)
    means = {name: float(np.mean(values)) for name, values in told.items()}
    finite = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
    return finite | {"undefined": undefined}


def score_model(
    model: AskedModel,
    asked: Asked,
    row_format: RowFormat | None = None,
    temperatures: Sequence[float] = (1.0,),
) -> dict[float, dict]:
    """By temperature, `figures_of` of all questions (`all`), and of each family by its name.

    Raises:
        ConfigError: a bad setting, or a question that the model can not be asked.
    """
    if not temperatures or min(temperatures) <= 0:
        raise ConfigError(f"temperatures must be above 0, got {list(temperatures)}.")
    questions = make_questions(asked)
    writer = RowWriter(model.tokenizer, row_format)
    found = option_logprobs(model.policy, writer, questions, temperatures)
    return {one: by_family(questions, logprobs) for one, logprobs in found.items()}


def score_oracle(scorer: Scorer, asked: Asked) -> dict:
    """The same of an oracle, at its one temperature."""
    questions = make_questions(asked)
    return by_family(questions, [scorer(question) for question in questions])


def by_family(questions: Sequence[Question], logprobs: Sequence[np.ndarray]) -> dict:
    """Figures of all questions, and of each family."""
    found = {"all": figures_of(questions, logprobs)}
    for family in dict.fromkeys(question.family for question in questions):
        own = [place for place, question in enumerate(questions) if question.family == family]
        found[family] = figures_of([questions[i] for i in own], [logprobs[i] for i in own])
    return found
