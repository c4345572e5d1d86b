"""How far the answers of models are from a population: what `rlp pluralism` says of samples.

Four questions (Sorensen et al., arXiv 2402.05070), each with what keeps its score honest beside it:

    Overton         does one answer hold the reasonable views?     precision, length
    distributional  do many answers come as in the population?     mass on options, floor of chance
    steerable       does a community's name move them towards it?  divergence with and without
    bounded         does the name of a disallowed one not move?    floor of chance

An answer counts for an option where it holds that one alone; others are no mass on options. A
made population validates the measurement, not anybody's values.

Dimensions
    Q  questions;  C  communities;  O  options of a question
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.post import pluralism_measures as measures
from rlp.post.diversity_drawing import Drawing, draw_answers
from rlp.post.diversity_measures import words
from rlp.post.diversity_samples import Sample, read_samples
from rlp.post.pluralism_measures import DISTANCES, Distance
from rlp.post.pluralism_population import Question
from rlp.post.resampling import as_number, interval, mean_over, resamples

Views = Callable[[str, str], Iterable[str]]
"""Prompt, answer -> the names of what the answer holds: options, and whatever else it holds."""

OF_ANSWERS = ("overton", "overton_weighted", "precision", "words")
OF_QUESTIONS = (*OF_ANSWERS, "distributional", "distributional_floor", "valid")
OF_COMMUNITIES = ("steerable", "named", "unnamed", "valid_named")
OF_DISALLOWED = ("moved", "moved_floor", "toward", "valid_disallowed")
FIGURES = (*OF_QUESTIONS, *OF_COMMUNITIES, *OF_DISALLOWED)


def pluralism_of(
    checkpoint: str,
    questions: Sequence[Question],
    *,
    samples: Path,
    drawing: Drawing | None = None,
    name: str | None = None,
    by: Distance = DISTANCES[0],
    views: Views | None = None,
) -> dict:
    """Draw answers of one checkpoint, and measure them: an evaluation after a stage.

    Args:
        checkpoint: a Hugging Face folder or Hub name.
        samples: the file that answers are kept in, and continued.
        drawing: None: as `Drawing` says, but from the whole distribution.
        name: of the model in the file.

    Returns:
        What `measure` gives.
    """
    prompts = [prompt for question in questions for prompt in question.prompts()]
    draw_answers(checkpoint, prompts, drawing or Drawing(top_p=1.0), samples, name=name)
    return measure(read_samples(samples), questions, by=by, views=views)


def measure(
    samples: Sequence[Sample],
    questions: Sequence[Question],
    *,
    by: Distance = DISTANCES[0],
    views: Views | None = None,
) -> dict:
    """All figures of some samples, as JSON holds them.

    Args:
        samples: at least one.
        views: None: by the patterns of the options.

    Returns:
        `measure`, the name of the distance; `models`, by name; and `notes`: in a sentence each, why
        something is not there, and what counts in none.

    Raises:
        DataError: a sample answers what no question asks.
        ConfigError: `views` gives something else than names.
    """
    of_model = _told(samples, questions, views)
    notes: list[str] = []
    figures = {}
    for name in sorted(of_model):
        read = [_read(question, of_model[name][q], by) for q, question in enumerate(questions)]
        figures[name] = _figures(read)
        notes += _notes(name, questions, of_model[name], figures[name])
    return {"measure": by, "questions": len(questions), "models": figures, "notes": notes}


@dataclass(slots=True)
class _Told:
    """The answers to a question, with one community's name or without any."""

    counts: np.ndarray
    """[O]: answers that hold one option alone, and nothing else."""
    answers: int = 0
    held: list[tuple[str, ...]] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    @property
    def valid(self) -> float:
        """NaN without an answer."""
        return self.counts.sum() / self.answers if self.answers else np.nan


_OfQuestion = dict[str | None, _Told]
"""By community; None: asked without a name."""


def _told(
    samples: Sequence[Sample], questions: Sequence[Question], views: Views | None
) -> dict[str, list[_OfQuestion]]:
    """Of each model its answers to each question."""
    place = {
        question.asked(name): (q, name)
        for q, question in enumerate(questions)
        for name in (None, *question.communities)
    }
    found: dict[str, list[_OfQuestion]] = defaultdict(
        lambda: [
            {name: _Told(np.zeros(len(one.options))) for name in (None, *one.communities)}
            for one in questions
        ]
    )
    for sample in samples:
        if sample.prompt.text not in place:
            raise DataError(
                f"no question of the population asks {sample.prompt.text!r}, which"
                f" {sample.model!r} answers. Write a line for it, with its options and shares, or"
                " leave the sample out."
            )
        q, name = place[sample.prompt.text]
        question, told = questions[q], found[sample.model][q][name]
        held = _held(question, sample.text, views)
        told.answers += 1
        told.held.append(tuple(held))
        told.words.append(len(words(sample.text)))
        if len(held) == 1 and held[0] in question.options:
            told.counts[list(question.options).index(held[0])] += 1
    return found


def _held(question: Question, text: str, views: Views | None) -> list[str]:
    if views is None:
        return measures.held_by_patterns(text, question.options)
    found = views(question.prompt, text)
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise ConfigError(
            f"the function of views gave {found!r} for {text!r:.60}, expected the names of what it"
            " holds, such as a list of texts."
        )
    return list(dict.fromkeys(found))


def _read(question: Question, told: _OfQuestion, by: Distance) -> dict:
    """Figures of one question: numbers, and those of communities by their names."""
    plain = told[None]
    found = _read_plain(question, plain, by)
    communities = {}
    for name, shares in question.communities.items():
        own = told[name]
        both = np.array([own.counts, plain.counts])
        named, unnamed = map(float, measures.distance(both, shares, by))
        if not np.isfinite(named - unnamed):  # of the same questions, or the means do not fit
            named = unnamed = np.nan
        if name in question.disallowed:
            communities[name] = {
                "moved": float(measures.distance(own.counts, plain.counts, by)),
                "moved_floor": measures.floor_between(own.counts, plain.counts, by),
                "toward": named - unnamed,
                "valid_disallowed": own.valid,
            }
        else:
            communities[name] = {
                "steerable": named - unnamed,
                "named": named,
                "unnamed": unnamed,
                "valid_named": own.valid,
            }
    return found | {"prompt": question.prompt, "communities": communities}


def _read_plain(question: Question, told: _Told, by: Distance) -> dict:
    """Of the answers without a name."""
    weights = dict(zip(question.options, question.population))
    reasonable = {name: weights[name] for name in question.reasonable}
    each = [measures.overton(held, reasonable) for held in told.held]
    weighted = [measures.overton_weighted(held, reasonable) for held in told.held]
    precise = [precision for _, precision in each if np.isfinite(precision)]
    return {
        "answers": told.answers,
        "counts": dict(zip(question.options, map(int, told.counts))),
        "overton": _mean([coverage for coverage, _ in each]),
        "overton_weighted": _mean(weighted),
        "precision": _mean(precise),
        "words": _mean(told.words),
        "distributional": float(measures.distance(told.counts, question.population, by)),
        "distributional_floor": measures.floor_of(question.population, int(told.counts.sum()), by),
        "valid": told.valid,
        "without_mass": int(((question.population > 0) & (told.counts == 0)).sum())
        if told.answers
        else 0,
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _figures(read: list[dict]) -> dict:
    """Of one model: means over questions, and over communities."""
    tables = {name: np.array([[one[name] for one in read]]) for name in OF_QUESTIONS}
    names = sorted({name for one in read for name in one["communities"]})
    for figure in (*OF_COMMUNITIES, *OF_DISALLOWED):
        rows = [
            [one["communities"].get(name, {}).get(figure, np.nan) for one in read] for name in names
        ]
        tables[figure] = np.array(rows).reshape(len(names), len(read))
    every, drawn = np.ones(len(read)), resamples(len(read))
    return {
        **{name: as_number(mean_over(tables[name], every)) for name in FIGURES},
        "answers": sum(one["answers"] for one in read),
        "without_mass": sum(one["without_mass"] for one in read),
        "intervals": {name: interval(mean_over(tables[name], drawn)) for name in FIGURES},
        "communities": {
            name: {
                figure: as_number(mean_over(tables[figure][[row]], every))
                for figure in (*OF_COMMUNITIES, *OF_DISALLOWED)
                if np.isfinite(tables[figure][row]).any()
            }
            for row, name in enumerate(names)
        },
        "by_question": [_as_json(one) for one in read],
    }


def _as_json(one: dict) -> dict:
    numbers = {
        name: as_number(value) if isinstance(value, float) else value for name, value in one.items()
    }
    communities = {
        name: {figure: as_number(value) for figure, value in own.items()}
        for name, own in one["communities"].items()
    }
    return numbers | {"communities": communities}


def _notes(
    model: str, questions: Sequence[Question], told: list[_OfQuestion], figures: dict
) -> list[str]:
    """In a sentence each: what counts in no figure, and why one is null."""
    said = []
    plain = [one[None] for one in told]
    if lacking := sum(not one.answers for one in plain):
        said.append(
            f"{model}: {lacking} of {len(questions)} questions have no answer without a name, and"
            " count in no figure."
        )
    if empty := sum(one.answers > 0 and not one.counts.any() for one in plain):
        said.append(
            f"{model}: {empty} questions have no answer that holds one option alone: they count in"
            " Overton and valid, and have no distribution."
        )
    if figures["without_mass"]:
        said.append(
            f"{model}: {figures['without_mass']} options that somebody holds are in no answer (mass"
            " 0): they count as such."
        )
    asked = [(name, own) for one in told for name, own in one.items() if name is not None]
    if not asked:
        said.append(f"{model}: no community has shares, so nothing is steered or bounded.")
    elif lacking := sum(not own.answers for _, own in asked):
        said.append(
            f"{model}: {lacking} of {len(asked)} questions with a community's name have no answer,"
            " and count in no figure of steering."
        )
    return said
