"""results.jsonl of a pipeline: a line for every arm, seed, stage, step and temperature, made from
what the stages have in their folders."""

import json
from dataclasses import asdict
from pathlib import Path

from rlp.config import ConfigError
from rlp.measure.results_file import Layout, Results, add_results, read_results
from rlp.post.evaluations import PANEL_FIGURES
from rlp.post.pipeline_config import Pipeline
from rlp.post.pipeline_folder import TaskFolder
from rlp.post.pipeline_task import models_of
from rlp.post.pipeline_tasks import Task, arms_of
from rlp.process.run_logs import read_json_lines
from rlp.process.schemas import NUMBER, Maybe

IDENTITY = ("arm", "seed", "stage", "stage_step", "temperature")

COSTS = (
    "optimizer_steps",
    "input_tokens",
    "generated_tokens",
    "scored_tokens",
    "rewarded_tokens",
    "flops",
    "paper_flops",
    "seconds",
)
"""Of the stage so far."""


def results_path(pipeline: Pipeline) -> Path:
    return Path(pipeline.dir) / "results.jsonl"


def layout_of(lines: list[dict]) -> Layout:
    """The layout of some lines: what their evaluations have measured, beside what all have."""
    known = {*IDENTITY, *COSTS}
    others = dict.fromkeys(name for line in lines for name in line if name not in known)
    return Layout(IDENTITY, COSTS, dict.fromkeys(others, Maybe(NUMBER)))


def open_results(path: Path) -> Results:
    """The results of a pipeline.

    Raises:
        ConfigError: there are none, or a line is none of a pipeline.
    """
    lines = read_json_lines(path) if path.exists() else []
    return read_results(path, layout_of(lines))


def figures_of(results: Results) -> list[str]:
    """Figures that were measured, those of the panel first."""
    there = dict.fromkeys(
        name
        for line in results.lines
        for name, value in line.items()
        if name not in {*IDENTITY, *COSTS, "n", "thoughts"} and value is not None
    )
    first = [name for name in PANEL_FIGURES if name in there]
    return [*first, *(name for name in there if name not in first)]


def lines_of(task: Task, pipeline: Pipeline) -> list[dict]:
    """The lines of a task whose models are read, for every arm that has it."""
    read = TaskFolder(task.folder(pipeline)).read_lines()
    lines = []
    for arm in arms_of(task, pipeline):
        for kept, _ in models_of(task, pipeline):
            spent = asdict(kept.spent)
            for temperature in pipeline.evaluation.temperatures:
                figures = {
                    name: value
                    for line in read
                    if (line["stage_step"], line["temperature"]) == (kept.step, temperature)
                    for name, value in line["figures"].items()
                }
                identity = (arm, task.seed, task.stage, kept.step, temperature)
                line = dict(zip(IDENTITY, identity)) | figures
                lines.append(line | {name: spent[name] for name in COSTS})
    return lines


def add_lines(task: Task, pipeline: Pipeline) -> None:
    """Add the lines of a task, where they are not there.

    Raises:
        ConfigError: a line is there that says something else.
    """
    if not pipeline.evaluation.is_asked_for:
        return
    path, lines = results_path(pipeline), lines_of(task, pipeline)
    before = read_json_lines(path) if path.exists() else []
    layout = layout_of([*before, *lines])
    there = {layout.key(line): line for line in before}
    new = []
    for line in json.loads(json.dumps(lines)):
        known = there.get(layout.key(line))
        if known is None:
            new.append(line)
        elif known != line:
            raise ConfigError(
                f"{path} has a line of {layout.in_words(layout.key(line))} that says other than the"
                f" folder of the stage, {task.folder(pipeline)}. Remove {path}: it is made again"
                " from the folders."
            )
    if new:
        add_results(path, layout, new)
