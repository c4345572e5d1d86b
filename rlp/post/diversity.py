"""How alike the answers of one model, and of several, are: what `rlp diversity` says of samples.

The headline is `inter_above_floor`: how much more alike two models answer one prompt than they
answer different ones. `intra` alone misleads: a model that has memorized several answers repeats
itself and agrees with nobody, and all answers of one style or length are a little alike.

A figure is a mean over prompts for each model (or pair of models), and then over those. Its
interval is that of the middle 95 % of `DRAWS` resamples of the prompts; models and answers are
taken as they are.

Dimensions
    M  models;  Q  prompts of a kind;  R  models, or pairs of them
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from rlp.post import diversity_measures as measures
from rlp.post.diversity_drawing import Drawing, draw_answers
from rlp.post.diversity_measures import Embedding
from rlp.post.diversity_samples import KINDS, Kind, Prompt, Sample, committed_panel, read_samples
from rlp.post.resampling import as_number, interval, mean_over, resamples

NEAREST = 10
"""Answers that `models_among_nearest` takes together, or as many as the model with the fewest
has."""

HEADLINE = "inter_above_floor"


def variety_of(
    checkpoint: str,
    prompts: Sequence[Prompt] | None = None,
    *,
    samples: Path,
    drawing: Drawing | None = None,
    name: str | None = None,
    embedding: Embedding | None = None,
) -> dict:
    """Draw answers of one checkpoint, and measure them: an evaluation after a stage.

    Args:
        checkpoint: a Hugging Face folder or Hub name.
        prompts: None: the committed panel.
        samples: the file that answers are kept in, and continued; of this checkpoint alone.
        drawing: None: as `Drawing` says.
        name: of the model in the file.
        embedding: None: TF-IDF.

    Returns:
        What `measure` gives.
    """
    prompts = list(committed_panel() if prompts is None else prompts)
    draw_answers(checkpoint, prompts, drawing or Drawing(), samples, name=name)
    return measure(read_samples(samples), embedding=embedding)


def measure(
    samples: list[Sample], *, embedding: Embedding | None = None, first_words: int | None = None
) -> dict:
    """All figures of some samples, as JSON holds them.

    Args:
        samples: at least one.
        embedding: None: TF-IDF, fitted on the different texts of a kind.
        first_words: measure no more of each text, so that lengths are alike; accuracy is of the
            whole text.

    Returns:
        `open` and `closed`, each None where there are no such samples, and `notes`: in a sentence
        each, why something is not there, and what was left out.
    """
    notes: list[str] = []
    found: dict[str, object] = {}
    for kind in KINDS:
        own = [sample for sample in samples if sample.prompt.kind == kind]
        if own:
            measured = _Measured(own, kind, embedding, first_words)
            found[kind] = measured.figures()
            notes += measured.notes()
        else:
            found[kind] = None
            notes.append(f"{kind}: no prompt is of this kind, so there is nothing to measure.")
    return found | {"notes": notes}


@dataclass(frozen=True, slots=True)
class _Table:
    """One figure of models or pairs, at each prompt."""

    values: np.ndarray
    """[R, Q]; NaN where it was not measured."""
    bent: bool = False
    """Whether it is a mean over pairs of prompts: its share of the interval is then twice what
    resampling one side of the pairs gives, to first order (Hoeffding)."""

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """[...]: means over prompts with weights [..., Q], then over rows; NaN where there is
        none."""
        return mean_over(self.values, weights)

    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """[DRAWS]: the figure of each resample, whose counts of prompts are `weights`."""
        found = self.mean(weights)
        return 2 * found - self.mean(np.ones(weights.shape[1])) if self.bent else found


class _Measured:
    """The samples of one kind, sorted, so that nothing depends on the order of their lines."""

    def __init__(
        self,
        samples: list[Sample],
        kind: Kind,
        embedding: Embedding | None,
        first_words: int | None,
    ) -> None:
        self._kind = kind
        prompts = {sample.prompt.text: sample.prompt for sample in samples}
        self._prompts = [prompts[text] for text in sorted(prompts)]
        self._models = sorted({sample.model for sample in samples})
        samples = sorted(samples, key=lambda one: (one.model, one.prompt.text, one.text))
        self._asked = self._counts(samples)
        # A text without a word or a mark has no place in any similarity.
        samples = [sample for sample in samples if sample.text.strip()]
        self._sizes = self._counts(samples)
        self._whole = [sample.text for sample in samples]
        self._texts = [_first(text, first_words) for text in self._whole]
        self._model = np.repeat(np.arange(len(self._models)), self._sizes.sum(axis=1))
        ends = self._sizes.cumsum().reshape(self._sizes.shape)
        self._cells = [
            [np.arange(end - size, end) for end, size in zip(*row)]
            for row in zip(ends, self._sizes)
        ]
        """[M][Q]: which texts are a model's at a prompt."""
        self._rows = measures.embedded(self._texts, embedding) if self._texts else None

    def _counts(self, samples: list[Sample]) -> np.ndarray:
        """[M, Q]: texts of each model at each prompt."""
        model = {name: m for m, name in enumerate(self._models)}
        prompt = {one.text: q for q, one in enumerate(self._prompts)}
        counts = np.zeros((len(model), len(prompt)), dtype=np.int64)
        for sample in samples:
            counts[model[sample.model], prompt[sample.prompt.text]] += 1
        return counts

    def figures(self) -> dict:
        """All of them; see `measure`."""
        tables = self._tables() if self._texts else {}
        every = np.ones(len(self._prompts))
        weights = resamples(len(self._prompts))
        named = {name: table.mean(every) for name, table in tables.items()}
        drawn = {name: table.drawn(weights) for name, table in tables.items()}
        for figures in (named, drawn):
            if tables:
                figures[HEADLINE] = figures["inter"] - figures["floor"]
        numbers = dict.fromkeys((*ALWAYS, HEADLINE)) | {
            name: as_number(value) for name, value in named.items()
        }
        asked, told = int(self._asked.sum()), int(self._sizes.sum())
        return {
            **{name: numbers[name] for name in ALWAYS},
            HEADLINE: numbers[HEADLINE],
            **numbers,
            "prompts": len(self._prompts),
            "texts": asked,
            "empty_frac": as_number(1 - told / asked),
            "intervals": {name: interval(values) for name, values in drawn.items()},
            "matrix": self._matrix(tables, "intra", "inter"),
            "floor_matrix": self._matrix(tables, "floor_within", "floor_between"),
            "models": {
                name: self._of_model(m, tables, every) for m, name in enumerate(self._models)
            },
            "categories": self._of_categories(tables),
            "by_prompt": [self._of_prompt(q, tables) for q in range(len(self._prompts))],
        }

    def notes(self) -> list[str]:
        """In a sentence each: why a figure is not there, and what counts in none."""
        said, kind = [], self._kind
        if len(self._models) == 1:
            said.append(
                f"{kind}: inter and verbatim are null, because all samples are of one model,"
                f" {self._models[0]!r}; they compare two. floor is that of its own answers."
            )
        if len(self._prompts) == 1:
            said.append(f"{kind}: floor is null, because there is one prompt; it compares two.")
        if empty := int((self._asked - self._sizes).sum()):
            said.append(
                f"{kind}: {empty} of {self._asked.sum()} texts are empty. They count in empty_frac"
                " and as wrong answers, and in no similarity."
            )
        if alone := int((self._sizes == 1).sum()):
            said.append(
                f"{kind}: {alone} times a model has one text alone to a prompt, which has no pair:"
                " it counts in inter and floor, and not in intra, duplicates, vendi or entropy."
            )
        if partly := int((self._asked == 0).any(axis=0).sum()):
            said.append(
                f"{kind}: {partly} of {len(self._prompts)} prompts are not answered by every model;"
                " two models are compared at those that both answered."
            )
        unnamed = [prompt.text for prompt in self._prompts if not prompt.answers]
        if kind == "closed" and unnamed:
            said.append(
                f"closed: {len(unnamed)} of {len(self._prompts)} prompts name no answer, such as"
                f' {unnamed[0]!r}: accuracy is of the others. Write "answer" in their lines.'
            )
        return said

    def _tables(self) -> dict[str, _Table]:
        """Every figure at every prompt."""
        has = self._sizes > 0
        pairs = list(combinations(range(len(self._models)), 2))
        means = [measures.cell_means(self._rows, row) for row in self._cells]
        intra = [measures.intra(own, own, sizes) for own, sizes in zip(means, self._sizes)]
        inter = [measures.inter(means[m], means[k], has[m] & has[k]) for m, k in pairs]
        within = [measures.floor(own, own, here, here) for own, here in zip(means, has)]
        between = [measures.floor(means[m], means[k], has[m], has[k]) for m, k in pairs]
        floors = {
            "floor_within": _Table(np.array(within), bent=True),
            "floor_between": _Table(self._stacked(between), bent=True),
        }
        tables = {
            "intra": _Table(np.array(intra)),
            "inter": _Table(self._stacked(inter)),
            "floor": floors["floor_between" if pairs else "floor_within"],
            **floors,
            **self._verbatim(pairs, has),
            **{name: _Table(self._each_cell(name)) for name in CELL_FIGURES},
            "vendi": _Table(self._each_cell("vendi")),
            "models_among_nearest": _Table(self._nearest()[None]),
        }
        if self._kind == "closed":
            tables["accuracy"] = _Table(self._accuracy())
        return tables

    def _stacked(self, rows: list[np.ndarray]) -> np.ndarray:
        """[R, Q], of R = 0 too."""
        return np.array(rows).reshape(len(rows), len(self._prompts))

    def _verbatim(self, pairs: list[tuple[int, int]], has: np.ndarray) -> dict[str, _Table]:
        """Shared runs of words, within a model and between two, both directions alike."""
        rows = measures.overlap_rows(self._texts, measures.VERBATIM_WORDS)
        share, holds = ([measures.cell_means(one, row) for row in self._cells] for one in rows)
        within = [measures.intra(share[m], holds[m], sizes) for m, sizes in enumerate(self._sizes)]
        between = []
        for m, k in pairs:
            both = has[m] & has[k]
            there, back = (measures.inter(share[a], holds[b], both) for a, b in ((m, k), (k, m)))
            between.append((there + back) / 2)
        return {
            "verbatim": _Table(self._stacked(between)),
            "verbatim_within": _Table(np.array(within)),
        }

    def _each_cell(self, name: str) -> np.ndarray:
        """[M, Q]: a figure of `CELL_FIGURES`, or vendi, of the texts of each cell with enough of
        them."""
        least, figure = CELL_FIGURES.get(name, (2, None))
        found = np.full(self._sizes.shape, np.nan)
        for m, q in np.argwhere(self._sizes >= least):
            cell = self._cells[m][q]
            found[m, q] = (
                measures.vendi(self._rows[cell])
                if figure is None
                else figure([self._texts[index] for index in cell])
            )
        return found

    def _accuracy(self) -> np.ndarray:
        """[M, Q]: the share of right answers, of empty ones none; NaN where no answer is named."""
        right = np.zeros(self._sizes.shape)
        for m, q in np.argwhere(self._sizes > 0):
            answers = self._prompts[q].answers
            right[m, q] = sum(measures.is_right(self._whole[i], answers) for i in self._cells[m][q])
        named = np.array([bool(prompt.answers) for prompt in self._prompts])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(named, right / self._asked, np.nan)

    def _nearest(self) -> np.ndarray:
        """[Q]: `models_among_nearest`; NaN where fewer than two models have two answers."""
        found = np.full(len(self._prompts), np.nan)
        for q in np.flatnonzero((self._sizes > 1).sum(axis=0) > 1):
            cells = [row[q] for row in self._cells if len(row[q]) > 1]
            which = np.concatenate(cells)
            found[q] = measures.models_among_nearest(
                self._rows[which], self._model[which], min(NEAREST, *map(len, cells))
            )
        return found

    def _matrix(self, tables: dict[str, _Table], own: str, other: str) -> dict[str, dict]:
        """Model x model: a figure of each alone, and of each two."""
        names = self._models
        found: dict[str, dict] = {name: dict.fromkeys(names) for name in names}
        if not tables:
            return found
        for name, row in zip(names, tables[own].values):
            found[name][name] = as_number(_mean(row))
        for (one, two), row in zip(combinations(names, 2), tables[other].values):
            found[one][two] = found[two][one] = as_number(_mean(row))
        return found

    def _of_model(self, m: int, tables: dict[str, _Table], every: np.ndarray) -> dict:
        """The figures of one model alone."""
        found = {
            name: as_number(_Table(table.values[m : m + 1]).mean(every))
            for name, table in tables.items()
            if len(table.values) == len(self._models) and name in OF_MODELS
        }
        asked = int(self._asked[m].sum())
        empty = as_number(1 - self._sizes[m].sum() / asked)
        return found | {"texts": asked, "empty_frac": empty}

    def _of_categories(self, tables: dict[str, _Table]) -> dict[str, dict]:
        """The figures of the prompts of each category, held against all prompts' floor."""
        category = np.array([prompt.category for prompt in self._prompts])
        found = {}
        for name in sorted(set(category) - {""}):
            inside = (category == name).astype(np.float64)
            found[name] = {"prompts": int(inside.sum())} | {
                figure: as_number(table.mean(inside)) for figure, table in tables.items()
            }
        return found

    def _of_prompt(self, q: int, tables: dict[str, _Table]) -> dict:
        prompt, only = self._prompts[q], np.zeros(len(self._prompts))
        only[q] = 1
        line = {"prompt": prompt.text, "category": prompt.category or None}
        line["texts"] = int(self._asked[:, q].sum())
        return line | {name: as_number(table.mean(only)) for name, table in tables.items()}


def _first(text: str, count: int | None) -> str:
    """The first words of a text; all of it where `count` is None."""
    return text if count is None else " ".join(measures.words(text)[:count])


def _words(texts: list[str]) -> float:
    return float(np.mean([len(measures.words(text)) for text in texts]))


CELL_FIGURES: dict[str, tuple[int, Callable[[list[str]], float]]] = {
    "duplicates": (2, measures.duplicates),
    "distinct_1": (2, lambda texts: measures.distinct(texts, 1)),
    "distinct_2": (2, lambda texts: measures.distinct(texts, 2)),
    "answer_entropy": (2, measures.answer_entropy),
    "words": (1, _words),
}
"""Figures of the texts of a model at a prompt: how many it takes, and what it is."""

OF_MODELS = ("intra", "floor_within", "verbatim_within", "vendi", "accuracy", *CELL_FIGURES)
"""Tables with a row for each model."""

ALWAYS = ("intra", "inter", "floor", "duplicates", "verbatim", "vendi")
"""Figures that are always named, null where there is nothing to measure."""


def _mean(row: np.ndarray) -> float:
    """Of what is there; NaN where nothing is."""
    there = row[np.isfinite(row)]
    return float(there.mean()) if len(there) else np.nan
