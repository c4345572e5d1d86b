"""What every model of a pipeline is read by, by name.

An evaluation is a function `read(reading: Reading) -> dict[str, float | None]`: figures of one
model at one temperature. `panel` has its own section in the YAML; of the others those count that
`evaluation.others` names, with their settings, by a name of `EVALUATIONS` or as
`package.module:name`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.config import ConfigError, require_one_of
from rlp.post.pipeline_config import EvaluationConfig, PanelConfig
from rlp.process.outside import open_part

if TYPE_CHECKING:
    from rlp.config import Config
    from rlp.post.diversity_drawing import Drawing
    from rlp.post.diversity_samples import Prompt
    from rlp.post.pluralism_population import Question
    from rlp.post.spectrum_rows import RowFormat
    from rlp.post.spectrum_scoring import Asked
    from rlp.process.ranks import Ranks

PANEL_FIGURES = (
    "accuracy_with_thought",
    "accuracy_without_thought",
    "gain_over_start_nats",
    "gain_over_no_think_nats",
    "document_loss_nats",
    "thought_tokens_mean",
    "thought_duplicates_frac",
)


@dataclass(frozen=True, slots=True)
class Reading:
    """A model that is to be read."""

    model: Path
    seed: int
    temperature: float
    settings: dict
    """Of the evaluation, from the YAML, `{seed}` filled in."""
    start: str
    """The model that every arm begins with."""
    is_last: bool
    """Whether it is the last of its stage, not one of its curve."""
    folder: Path
    """Where an evaluation may keep what it draws; of this model at this temperature alone."""
    ranks: "Ranks"


Evaluation = Callable[[Reading], dict[str, float | None]]

EVALUATIONS: dict[str, str] = {
    "panel": "rlp.post.evaluations:read_panel",
    "benchmarks": "rlp.post.evaluations:read_benchmarks",
    "variety": "rlp.post.evaluations:read_variety",
    "language": "rlp.post.evaluations:read_language",
    "spectrum": "rlp.post.evaluations:read_spectrum",
    "pluralism": "rlp.post.evaluations:read_pluralism",
}
"""Those that come with this program."""


def open_evaluation(name: str) -> Evaluation:
    """The evaluation of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in EVALUATIONS and ":" not in name:
        raise ConfigError(
            f"evaluation.others.{name}: there is no such evaluation. There are"
            f" {', '.join(other for other in EVALUATIONS if other != 'panel')}, or one of yours as"
            " package.module:name."
        )
    return open_part("evaluation.others", EVALUATIONS.get(name, name), {}, ()).call


def asked_for(evaluation: EvaluationConfig) -> dict[str, dict]:
    """All evaluations of a pipeline, with the settings of each."""
    panel = evaluation.panel
    own = {} if panel is None else {"panel": {name: getattr(panel, name) for name in _PANEL}}
    return own | evaluation.others


_PANEL = ("config", "overrides", "curve_thoughts")


# The panel


def panel_config(panel: PanelConfig, start: str) -> "Config":
    """The config that a panel is drawn and read by."""
    from rlp.config import load_config

    config = load_config(panel.config, [*panel.overrides, f"model.path={json.dumps(start)}"])
    if not config.data.held_out:
        raise ConfigError(
            f"evaluation.panel: {panel.config} has no data.held_out, and a panel is made of"
            " held-out documents. Write data.held_out=[FILE] in evaluation.panel.overrides."
        )
    return config


def read_panel(reading: Reading) -> dict[str, float | None]:
    """Gain and accuracy at the positions of the held-out panel, over the start."""
    settings = json.dumps(reading.settings, sort_keys=True)
    return _panel_reader(settings, reading.start, reading.ranks).figures(reading)


@lru_cache(maxsize=2)
def _panel_reader(settings: str, start: str, ranks: "Ranks") -> "PanelReader":
    return PanelReader(PanelConfig(**json.loads(settings)), start, ranks)


class PanelReader:
    """Reads models at the same positions, whatever they were trained with."""

    def __init__(self, panel: PanelConfig, start: str, ranks: "Ranks") -> None:
        from rlp.measure.frozen import load_frozen
        from rlp.measure.panel import held_out_panel
        from rlp.measure.panel_scoring import no_think_logprob
        from rlp.model.setup import PanelSetup

        self._config, self._ranks = panel_config(panel, start), ranks
        self._curve_thoughts = panel.curve_thoughts
        setup = PanelSetup(self._config, lambda text: None)
        self._panel = held_out_panel(setup)
        base = load_frozen(setup, ranks)
        self._start_logprob = no_think_logprob(base, self._panel, self._config, ranks)

    def figures(self, reading: Reading) -> dict[str, float | None]:
        """What a model does at the positions."""
        from rlp.measure.frozen import load_frozen
        from rlp.measure.panel_scoring import measure_panel
        from rlp.model.setup import ModelSetup

        own, evaluation = self._config, self._config.evaluation
        thoughts = evaluation.thoughts_per_position
        if not reading.is_last and self._curve_thoughts is not None:
            thoughts = self._curve_thoughts
        config = replace(
            own,
            model=replace(own.model, path=str(reading.model), tokenizer=None, init="pretrained"),
            thought=replace(own.thought, temperature=reading.temperature),
            evaluation=replace(evaluation, thoughts_per_position=thoughts),
        )
        found = measure_panel(
            load_frozen(ModelSetup(config), self._ranks),
            self._panel,
            config,
            self._ranks,
            start_logprob=self._start_logprob,
        )
        counts = {"n": len(self._panel), "thoughts": thoughts}
        figures = {name: found.means.get(name) for name in PANEL_FIGURES}
        return counts | figures | {"thought_duplicates_frac": duplicates(found.thoughts.tokens)}


def duplicates(thoughts: list[list]) -> float | None:
    """Pairs of siblings that are the same thought, over all pairs of a position: the mean over
    positions.

    Args:
        thoughts: of each position, the token ids of each thought.

    Returns:
        None where a position has one thought.
    """
    shares = []
    for group in thoughts:
        told = [tuple(thought.tolist()) for thought in group]
        pairs = len(told) * (len(told) - 1)
        if not pairs:
            return None
        shares.append(sum(told.count(one) - 1 for one in told) / pairs)
    return sum(shares) / len(shares)


# Answers to prompts


def read_variety(reading: Reading) -> dict[str, float | None]:
    """How alike the answers of the model are (`rlp diversity`), open prompts and closed ones.

    Settings: those of a drawing (`rlp.post.diversity_drawing.Drawing`), and `prompts`, a JSON Lines
    file in place of the committed panel. `inter` needs two models, and is not there.
    """
    from rlp.post.diversity import variety_of
    from rlp.post.diversity_samples import KINDS

    prompts, drawing = open_variety(reading.settings)
    found = variety_of(
        str(reading.model),
        prompts,
        samples=_samples(reading),
        drawing=replace(drawing, temperature=reading.temperature, seed=reading.seed),
        name=f"seed {reading.seed}",
    )
    return {
        f"{kind}_{name}": value
        for kind in KINDS
        for name, value in (found[kind] or {}).items()
        if value is None or isinstance(value, int | float)
    }


def open_variety(settings: dict) -> tuple[list["Prompt"] | None, "Drawing"]:
    """Its prompts, None for the committed panel, and how answers are drawn.

    Raises:
        ConfigError: there is no such setting, or no such file.
    """
    from rlp.post.diversity_samples import read_prompts

    prompts, drawing = _open_drawing("variety", settings, "prompts")
    return None if prompts is None else read_prompts(Path(prompts)), drawing


def _open_drawing(name: str, settings: dict, own: str) -> tuple[str | None, "Drawing"]:
    """A setting of an evaluation's own, None where it is not there, and how answers are drawn.

    Raises:
        ConfigError: there is no such setting.
    """
    from rlp.post.diversity_drawing import Drawing

    known = [item.name for item in fields(Drawing) if item.name not in ("temperature", "seed")]
    _refuse_unknown(name, settings, [own, *known])
    drawn = {key: value for key, value in settings.items() if key != own}
    return settings.get(own), Drawing(**drawn)


def read_pluralism(reading: Reading) -> dict[str, float | None]:
    """How far the answers of the model are from a population (`rlp pluralism`), by divergence.

    Settings: `population`, its file, and those of a drawing, which is from the whole distribution
    where `top_p` is not among them.
    """
    from rlp.post.pluralism import FIGURES, pluralism_of

    questions, drawing = open_pluralism(reading.settings)
    name = f"seed {reading.seed}"
    found = pluralism_of(
        str(reading.model),
        questions,
        samples=reading.folder / "pluralism.jsonl",
        drawing=replace(drawing, temperature=reading.temperature, seed=reading.seed),
        name=name,
    )
    return {f"pluralism_{figure}": found["models"][name][figure] for figure in FIGURES}


def open_pluralism(settings: dict) -> tuple[list["Question"], "Drawing"]:
    """What the population is asked, and how answers are drawn.

    Raises:
        ConfigError: there is no such setting, or no such file.
        DataError: the file has a line that is no question.
    """
    from rlp.post.pluralism_population import read_population

    population, drawing = _open_drawing("pluralism", {"top_p": 1.0} | settings, "population")
    if population is None:
        raise ConfigError(
            "evaluation.others.pluralism: there is no population. Write the path of its file."
        )
    return read_population(Path(population)), drawing


def read_language(reading: Reading) -> dict[str, float | None]:
    """In which scripts the model answers the prompts of `variety`, which stands before it.

    Settings: `script`, whose share is wanted, and `of`, `text` (its answers) or `thought`.
    """
    from rlp.measure.language import language_of_texts
    from rlp.post.diversity_samples import read_samples

    samples = _samples(reading)
    if not samples.exists():
        raise ConfigError(
            "evaluation.others.language: it reads the answers that variety draws. Write variety"
            " before it."
        )
    texts = [one.text for one in read_samples(samples, field=reading.settings.get("of", "text"))]
    told = language_of_texts(texts, reading.settings.get("script"))
    return {f"language_{name}": value for name, value in told.items()}


def refuse_language(settings: dict) -> None:
    """
    Raises:
        ConfigError: there is no such setting, or no such script.
    """
    from rlp.measure.language import require_script

    _refuse_unknown("language", settings, ["script", "of"])
    require_one_of("evaluation.others.language.of", settings.get("of", "text"), OF)
    if (script := settings.get("script")) is not None:
        require_script("evaluation.others.language.script", script)


OF = ("text", "thought")
"""What `read_language` reads of a sample."""


def _samples(reading: Reading) -> Path:
    return reading.folder / "samples.jsonl"


def _refuse_unknown(name: str, settings: dict, known: list[str]) -> None:
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(
            f"evaluation.others.{name}: unknown key {unknown[0]}. There are {', '.join(known)}."
        )


# Tasks of known distributions


def read_spectrum(reading: Reading) -> dict[str, float | None]:
    """How near the model comes to the right distribution of tasks, told or shown by pairs
    (`rlp spectrum score`): `spectrum_FIGURE` over all, `spectrum_FAMILY_FIGURE` of each family.

    Settings: `families`, `tasks`, `shots`, and `format`, as the stage `spectrum` has it.
    """
    from rlp.compare.asked_model import open_asked_model
    from rlp.post.spectrum_scoring import score_model

    asked, row_format = open_spectrum(reading.settings)
    model = open_asked_model(str(reading.model), device=reading.ranks.device, dtype="float32")
    temperature = reading.temperature
    asked = replace(asked, seed=reading.seed)
    found = score_model(model, asked, row_format, [temperature])[temperature]
    return {
        f"spectrum_{name}" if family == "all" else f"spectrum_{family}_{name}": value
        for family, figures in found.items()
        for name, value in figures.items()
    }


def open_spectrum(settings: dict) -> tuple["Asked", "RowFormat"]:
    """What is asked, and in which words.

    Raises:
        ConfigError: there is no such setting, or a wrong value.
    """
    from rlp.post.spectrum_rows import RowFormat
    from rlp.post.spectrum_scoring import Asked

    _refuse_unknown("spectrum", settings, ["families", "tasks", "shots", "format"])
    words = settings.get("format", {})
    _refuse_unknown("spectrum.format", words, [item.name for item in fields(RowFormat)])
    asked = {name: settings[name] for name in ("families", "tasks", "shots") if name in settings}
    asked = Asked(**{k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()})
    return asked, RowFormat(**words)


# Benchmarks


def read_benchmarks(reading: Reading) -> dict[str, float | None]:
    """Accuracy on benchmarks, thoughts at the temperature, answers greedy.

    Settings: `tasks`, as `rlp eval --tasks` has them, and the other keys of `BENCHMARKS`.
    """
    from rlp.compare.asked_model import open_asked_model
    from rlp.compare.benchmarks import run_benchmarks
    from rlp.compare.evaluate import benchmarks_by_name
    from rlp.compare.tasks import load_tasks

    settings = BENCHMARKS | reading.settings
    named = benchmarks_by_name(
        settings["tasks"],
        question_field=settings["question_field"],
        answer_field=settings["answer_field"],
        examples=None,
    )
    lengths = {name: settings[name] for name in ("thought_tokens", "answer_tokens")}
    benchmarks = {
        name: replace(one, thought_temperature=reading.temperature, **lengths)
        for name, one in named.items()
    }
    asked = run_benchmarks(
        benchmarks,
        load_tasks(benchmarks),
        open_asked_model(str(reading.model), device=reading.ranks.device),
        modes=tuple(settings["modes"]),
        limit=settings["limit"],
        seed=reading.seed,
        rows=settings["batch_size"],
    )
    return {f"{result.benchmark}_{result.mode}": result.accuracy for result, _ in asked}


def refuse_benchmarks(settings: dict) -> None:
    """
    Raises:
        ConfigError: there is no such setting.
    """
    _refuse_unknown("benchmarks", settings, list(BENCHMARKS))


BENCHMARKS = {
    "tasks": "",
    "question_field": "question",
    "answer_field": "answer",
    "modes": ["think", "no_think"],
    "thought_tokens": None,
    "answer_tokens": None,
    "limit": None,
    "batch_size": 8,
}
"""Settings of `read_benchmarks`, and what they are where the YAML does not say."""

CHECKS: dict[str, Callable[[dict], object]] = {
    "variety": open_variety,
    "language": refuse_language,
    "benchmarks": refuse_benchmarks,
    "spectrum": open_spectrum,
    "pluralism": open_pluralism,
}
"""What refuses the settings of an evaluation before anything runs."""
