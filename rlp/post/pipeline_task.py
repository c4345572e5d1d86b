"""One task from start to end: its inputs, its stage, its manifest, and what is read of its models.

Each part is kept as soon as it is there, so that a task that was killed goes on where it was.
"""

import json
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.compare.budget import AMOUNTS, amount_spent
from rlp.config import ConfigError, load_config
from rlp.post.evaluations import Reading, asked_for, open_evaluation
from rlp.post.pipeline_config import (
    Pipeline,
    PretrainingStage,
    StageConfig,
    fill,
)
from rlp.post.pipeline_folder import (
    TaskFolder,
    checksum_of_file,
    checksum_of_model,
    checksum_of_text,
    checksums_of_data,
)
from rlp.post.pipeline_tasks import Task, matched
from rlp.post.run_settings import settings_of
from rlp.post.stages.interface import Kept, Made, Spent, StageError, Work
from rlp.post.stages.kinds import code_of, open_stage
from rlp.process.console import printed_to
from rlp.process.environment import device_name, environment
from rlp.process.files import make_folder, open_log
from rlp.process.json_files import read_json
from rlp.process.schemas import WHOLE_LEDGER

if TYPE_CHECKING:
    from rlp.process.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Model:
    """What a stage begins with."""

    path: str
    checksum: str


def start_model(pipeline: Pipeline, seed: int) -> Model:
    """What every arm begins with on a seed."""
    path = fill(pipeline.model, {"seed": seed})
    return Model(path, checksum_of_model(Path(path)) if Path(path).is_dir() else path)


def handed_on(task: Task, pipeline: Pipeline) -> Model:
    """The model that a finished task hands to the next one."""
    if not task.chain:
        return start_model(pipeline, task.seed)
    kept = TaskFolder(task.folder(pipeline)).kept()
    if not kept:
        return handed_on(task.before, pipeline)  # it makes data
    step = task.settings(pipeline).hand_on
    for one, checksum in kept:
        if one.step == step:
            return Model(str(one.path), checksum)
    if step is not None:
        raise ConfigError(
            f"stages.{task.stage}.hand_on: it has kept no model of step {step}; there are those of"
            f" {', '.join(str(one.step) for one, _ in kept)}."
        )
    return Model(str(kept[-1][0].path), kept[-1][1])


def asked_of(task: Task, pipeline: Pipeline) -> dict:
    """Settings and checksums of the inputs of a task, all of whose needs are finished."""
    if not task.chain:
        checksum = start_model(pipeline, task.seed).checksum
        asked = {"settings": {}, "inputs": {"model": checksum}}
        return {"stage": task.stage, "seed": task.seed} | asked
    settings = task.settings(pipeline)
    own = fill(settings, {"seed": task.seed})  # folders of stages stay names: they may be moved
    return {
        "stage": task.stage,
        "seed": task.seed,
        "settings": {name: value for name, value in asdict(own).items() if name != "hand_on"},
        "inputs": _inputs(task, pipeline, settings),
    }


def _inputs(task: Task, pipeline: Pipeline, settings: StageConfig) -> dict:
    inputs: dict[str, object] = {"model": handed_on(task.before, pipeline).checksum}
    places = task.places(pipeline)
    for source in settings.sources():
        named = fill(source, {"seed": task.seed})
        files = checksums_of_data([fill(source, places)])
        inputs |= {f"data {named}: {Path(file).name}": checksum for file, checksum in files.items()}
    if code := code_of(settings):
        inputs[f"code {code.name}"] = checksum_of_file(code)
    match = matched(settings)
    if match is not None:
        run = reference_run(task, pipeline)
        ledger = read_json(run / "ledger.json", WHOLE_LEDGER)
        amount_spent(ledger, match.by, run)
        inputs[f"match {AMOUNTS[match.by]}"] = ledger[AMOUNTS[match.by]]
    elif isinstance(settings, PretrainingStage):
        inputs |= _inputs_of_run(task, pipeline)
    return inputs


def _inputs_of_run(task: Task, pipeline: Pipeline) -> dict:
    """Of a run with a config of its own: what that says, and the data that it names."""
    settings = fill(task.settings(pipeline), task.places(pipeline))
    config = load_config(settings.config, [*settings.overrides, "run.dir=unused"])
    files = checksums_of_data([*config.data.train, *config.data.held_out])
    return {"config": settings_of(config)} | {
        f"data {Path(file).name}": sha for file, sha in files.items()
    }


def reference_run(task: Task, pipeline: Pipeline) -> Path:
    """The run folder of the stage that a task is matched with."""
    from rlp.post.stages.pretraining import last_run

    reference = task.reference(pipeline)
    folder = TaskFolder(reference.folder(pipeline))
    return last_run(reference.settings(pipeline), folder.work)


# Doing it


def perform(task: Task, pipeline: Pipeline, ranks: "Ranks") -> None:
    """Do what is left of a task, what is printed going to its log.

    Raises:
        StageError, StageStopped, ConfigError: it can not be done.
    """
    folder = TaskFolder(task.folder(pipeline))
    asked = asked_of(task, pipeline)
    folder.open(asked)
    with open_log(folder.log) as log, printed_to(log):
        try:
            if not folder.is_finished:
                began = time.monotonic()
                made = _make(task, pipeline, folder, ranks)
                # Of this process; those of a stage that has ranks are told in its run folder.
                here = environment([device_name(ranks.device)])
                folder.finish(asked, made, here, round(time.monotonic() - began, 2))
            read_models(task, pipeline, folder, ranks)
        except BaseException:
            traceback.print_exc()
            raise


def _make(task: Task, pipeline: Pipeline, folder: TaskFolder, ranks: "Ranks") -> Made:
    if not task.chain:
        return Made()
    settings = task.settings(pipeline)
    work = Work(
        settings=fill(settings, task.places(pipeline)),
        seed=task.seed,
        model=handed_on(task.before, pipeline).path,
        folder=folder.work,
        ranks=ranks,
        is_first=len(task.chain) == 1,
        matched=None if matched(settings) is None else reference_run(task, pipeline),
    )
    made = open_stage(settings.kind)(work)
    if not isinstance(made, Made):
        raise StageError(
            f"stages.{task.stage}: {settings.kind} gave {type(made).__name__}; expected Made"
            " (rlp.post.stages.interface)."
        )
    return made


def models_of(task: Task, pipeline: Pipeline) -> list[tuple[Kept, str]]:
    """The models of a finished task, with their checksums; of the start the one that it is."""
    if task.chain:
        return TaskFolder(task.folder(pipeline)).kept()
    model = start_model(pipeline, task.seed)
    nothing = Spent(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)
    return [(Kept(0, Path(model.path), nothing), model.checksum)]


def left_to_read(task: Task, pipeline: Pipeline) -> list[tuple[tuple[Kept, str], float, str, dict]]:
    """Readings of a finished task that are not there: model, temperature, evaluation and its
    settings.

    Raises:
        ConfigError: one was made of another model, or with other settings.
    """
    folder = TaskFolder(task.folder(pipeline))
    there = {
        (line["stage_step"], line["temperature"], line["evaluation"]): line
        for line in folder.read_lines()
    }
    left = []
    for kept, checksum in models_of(task, pipeline):
        for temperature in pipeline.evaluation.temperatures:
            for name, settings in _evaluations(task, pipeline).items():
                line = there.get((kept.step, temperature, name))
                if line is None:
                    left.append(((kept, checksum), temperature, name, settings))
                elif (line["settings"], line["model"]) != (checksum_of_text(settings), checksum):
                    what = "another model" if line["model"] != checksum else "other settings"
                    raise ConfigError(
                        f"{folder.evaluation_json}: {name} was read with {what}. Write evaluation"
                        " as it was, or remove the evaluation.json of every stage, and"
                        " results.jsonl, to have all models read again."
                    )
    return left


def _evaluations(task: Task, pipeline: Pipeline) -> dict[str, dict]:
    return fill(asked_for(pipeline.evaluation), {"seed": task.seed})


def read_models(task: Task, pipeline: Pipeline, folder: TaskFolder, ranks: "Ranks") -> None:
    """Read the models of a finished stage, as far as that is not done."""
    models = models_of(task, pipeline)
    start = start_model(pipeline, task.seed).path
    for (kept, checksum), temperature, name, settings in left_to_read(task, pipeline):
        began = time.perf_counter()
        reading = Reading(
            model=kept.path,
            seed=task.seed,
            temperature=temperature,
            settings=settings,
            start=start,
            is_last=kept.step == models[-1][0].step,
            folder=folder.readings(kept.step, temperature),
            ranks=ranks,
        )
        make_folder(reading.folder, exist_ok=True)
        figures = open_evaluation(name)(reading)
        line = {
            "stage_step": kept.step,
            "temperature": temperature,
            "evaluation": name,
            "settings": checksum_of_text(settings),
            "model": checksum,
            "seconds": round(time.perf_counter() - began, 2),
            "figures": json.loads(json.dumps(figures)),
        }
        folder.write_lines([*folder.read_lines(), line])
