"""One page about a pipeline: stages and arms with intervals over seeds, what may be claimed, curves
within a stage, and what each stage has cost."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from markupsafe import Markup

from rlp.config import ConfigError
from rlp.measure.figures import COLORS, Curve, draw_curves
from rlp.measure.metrics import EVALUATION
from rlp.measure.paired import claim_in_words, compare, t_interval
from rlp.measure.report import GENERATOR, page_template
from rlp.measure.report_tables import Cell, hours_and_minutes, number
from rlp.measure.results_file import Results
from rlp.post.pipeline_config import Pipeline, load_pipeline
from rlp.post.pipeline_results import COSTS, figures_of, open_results, results_path
from rlp.process.files import write_atomically

OWN = "its own stage"
"""The column of stages that one arm alone has, such as the pretraining of each."""

CLAIMED = ("accuracy_with_thought", "gain_over_start_nats")
"""Figures of which the page says what the test allows; those of other evaluations too."""

COST_WORDS = {
    "optimizer_steps": "steps",
    "input_tokens": "tokens read",
    "generated_tokens": "sampled",
    "scored_tokens": "scored",
    "rewarded_tokens": "rewarded",
    "flops": "FLOPs",
    "paper_flops": "the paper's T_flop",
    "seconds": "time",
}


@dataclass(frozen=True, slots=True)
class PipelineArm:
    """An arm, as the page shows it."""

    label: str
    color: str
    stages: tuple[str, ...]


def is_pipeline(path: Path) -> bool:
    """Whether a folder is that of a pipeline."""
    return (path / "pipeline.yaml").is_file()


def write_pipeline_report(folder: Path, out: Path) -> None:
    """Write the page about a pipeline, finished or not, over whatever is at `out`.

    Raises:
        ConfigError: it has no results yet.
    """
    pipeline = replace(load_pipeline(folder / "pipeline.yaml"), dir=str(folder))
    results = open_results(results_path(pipeline))
    if not results.lines:
        raise ConfigError(
            f"{folder} has no results.jsonl yet: no stage has ended, or its evaluation names"
            " neither panel nor others."
        )
    write_atomically(out, _render(pipeline, results).encode(), point="report.torn_page")


def _render(pipeline: Pipeline, results: Results) -> str:
    arms = [
        PipelineArm(label, COLORS[index % len(COLORS)], tuple(stages))
        for index, (label, stages) in enumerate(pipeline.arms.items())
    ]
    figures = figures_of(results)
    return page_template(Path(__file__).parent / "pipeline_report.html.j2").render(
        generator=Markup(GENERATOR),
        title=Path(pipeline.dir).name,
        main_plots=[],
        facts=_facts(pipeline, results),
        arms=arms,
        tables=[
            _table(figure, temperature, arms, results)
            for figure in figures
            for temperature in pipeline.evaluation.temperatures
        ],
        claims=_claims(arms, results, figures, pipeline.evaluation.temperatures),
        curves=_curves(arms, results, figures, pipeline.evaluation.temperatures),
        cost_heads=list(COST_WORDS.values()),
        costs=_costs(arms, results),
    )


def _facts(pipeline: Pipeline, results: Results) -> list[tuple[str, str]]:
    seeds = results.values("seed")
    return [
        ("Model", pipeline.model),
        ("Seeds", f"{', '.join(map(str, seeds))} ({len(seeds)} of {len(pipeline.seeds)})"),
        ("Stages", "; ".join(f"{name}: {one.kind}" for name, one in pipeline.stages.items())),
        ("Numbers", str(results.path)),
    ]


# Stages and arms


def columns_of(arms: list[PipelineArm]) -> list[str]:
    """Columns of a table: the start, what each arm has alone, and what arms share."""
    names = list(dict.fromkeys(stage for arm in arms for stage in arm.stages))
    alone = [name for name in names if sum(name in arm.stages for arm in arms) == 1]
    if len(arms) < 2 or any(sum(stage in alone for stage in arm.stages) > 1 for arm in arms):
        return ["start", *names]
    return ["start", *([OWN] if alone else []), *(name for name in names if name not in alone)]


def stage_in(arm: PipelineArm, column: str, columns: list[str]) -> str | None:
    """The stage of an arm that a column is about; None where it has none."""
    if column == OWN:
        return next((stage for stage in arm.stages if stage not in columns), None)
    return column if column in ("start", *arm.stages) else None


def ends(results: Results, arm: str, stage: str | None, temperature: float) -> dict[int, dict]:
    """The line of the last model of a stage, by seed."""
    found: dict[int, dict] = {}
    if stage is None:
        return found
    for line in results.where(arm=arm, stage=stage, temperature=temperature).lines:
        before = found.get(line["seed"])
        if before is None or line["stage_step"] > before["stage_step"]:
            found[line["seed"]] = line
    return found


def _values(lines: dict[int, dict], figure: str) -> dict[int, float]:
    return {seed: line[figure] for seed, line in lines.items() if line.get(figure) is not None}


def _table(
    figure: str, temperature: float, arms: list[PipelineArm], results: Results
) -> dict[str, object]:
    """A figure after every stage of every arm: mean, and 95 % t interval over seeds."""
    columns = columns_of(arms)
    rows = []
    for arm in arms:
        cells = []
        for column in columns:
            lines = ends(results, arm.label, stage_in(arm, column, columns), temperature)
            cells.append(_cell(list(_values(lines, figure).values()), figure))
        rows.append((arm, cells))
    return {"title": f"{words_of(figure)}, T {temperature:g}", "columns": columns, "rows": rows}


def words_of(figure: str) -> str:
    return figure.removesuffix("_nats").replace("_", " ")


def _cell(values: list[float], figure: str) -> Cell:
    if not values:
        return Cell("-")
    form = "+.3f" if figure.startswith("gain") else ".3f"
    low, high = t_interval(tuple(values))
    spread = "" if math.isnan(low) else f"{low:{form}} to {high:{form}}, {len(values)} seeds"
    return Cell(format(fmean(values), form), spread)


def _claims(
    arms: list[PipelineArm], results: Results, figures: list[str], temperatures: list[float]
) -> list[str]:
    """What may be said of the first arm beside the others, at the end of each stage: a family for
    each sentence."""
    if len(arms) < 2:
        return []
    reference, *others = arms
    columns, said = columns_of(arms), []
    claimed = [name for name in figures if name in CLAIMED or name not in EVALUATION]
    for figure in claimed:
        for column in columns[1:]:
            for temperature in temperatures:
                values = {
                    arm.label: _values(
                        ends(results, arm.label, stage_in(arm, column, columns), temperature),
                        figure,
                    )
                    for arm in arms
                }
                own = values.pop(reference.label)
                family = {arm.label: values[arm.label] for arm in others if values[arm.label]}
                if own and family:
                    sentence = claim_in_words(reference.label, compare(own, family))
                    said.append(f"{words_of(figure)} after {column}, T {temperature:g}: {sentence}")
    return said


# Curves and costs


def _curves(
    arms: list[PipelineArm], results: Results, figures: list[str], temperatures: list[float]
) -> list[dict[str, object]]:
    """Every figure over the steps of the stages that have kept several models; from the model that
    the stage began with, where that is one that was read."""
    drawn = []
    for stage in (name for name in results.values("stage") if name != "start"):
        for figure in figures:
            for temperature in temperatures:
                part = results.where(stage=stage, temperature=temperature)
                curves = [_curve(arm, part, figure) for arm in arms]
                curves = [curve for curve in curves if curve is not None]
                if curves:
                    picture = draw_curves(curves, [], unit="", x_label="step", size=(4.4, 2.6))
                    drawn.append(
                        {
                            "title": f"{stage}: {words_of(figure)}, T {temperature:g}",
                            "source": picture,
                        }
                    )
    return drawn


def _curve(arm: PipelineArm, part: Results, figure: str) -> Curve | None:
    """Of the seeds that have all steps; None where there are fewer than two steps."""
    lines = part.where(arm=arm.label).lines
    by_seed: dict[int, dict[int, float]] = {}
    for line in lines:
        if line.get(figure) is not None:
            by_seed.setdefault(line["seed"], {})[line["stage_step"]] = line[figure]
    if not by_seed:
        return None
    steps = sorted(set.intersection(*(set(one) for one in by_seed.values())))
    if len(steps) < 2:
        return None
    values = np.array([[one[step] for step in steps] for one in by_seed.values()], dtype=float)
    return Curve(np.array(steps, dtype=float), values, arm.color, "-", dots=True)


def _costs(arms: list[PipelineArm], results: Results) -> list[tuple[PipelineArm, str, list[str]]]:
    """What each stage of each arm has cost, the mean over seeds, and their sum."""
    temperature = results.values("temperature")[0]
    rows = []
    for arm in arms:
        sums: dict[str, list[float | None]] = {name: [] for name in COSTS}
        for stage in arm.stages:
            lines = list(ends(results, arm.label, stage, temperature).values())
            if not lines:
                continue
            means = {name: _mean([line[name] for line in lines]) for name in COSTS}
            for name, value in means.items():
                sums[name].append(value)
            rows.append((arm, stage, [_cost(name, means[name]) for name in COSTS]))
        if len(sums["flops"]) > 1:
            totals = {name: None if None in sums[name] else sum(sums[name]) for name in COSTS}
            rows.append((arm, "all", [_cost(name, totals[name]) for name in COSTS]))
    return rows


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else fmean(values)


def _cost(name: str, value: float | None) -> str:
    if name == "seconds":
        return hours_and_minutes(value)
    return number(value, ".3e" if "flops" in name else ",.0f")
