"""What a pipeline refuses before its first task: everything that can be seen from here."""

from pathlib import Path

from rlp.compare.arms import ARMS, with_settings
from rlp.config import Config, ConfigError, load_config
from rlp.post.evaluations import CHECKS, asked_for, open_evaluation, panel_config
from rlp.post.pipeline_config import (
    GenerateStage,
    MixedSftStage,
    PanelConfig,
    Pipeline,
    PretrainingStage,
    RlvrStage,
    TrlStage,
    fill,
    places,
)
from rlp.post.pipeline_folder import TaskFolder, checksums_of_data
from rlp.post.pipeline_tasks import Task, every_task, matched
from rlp.post.stages.generation import refuse_bad_generation
from rlp.post.stages.kinds import code_of, open_stage
from rlp.post.stages.rlvr import open_reward
from rlp.post.stages.rows import read_rows, refuse_few
from rlp.post.stages.trl_training import require_trl


def refuse_bad(pipeline: Pipeline) -> list[Task]:
    """All tasks of a pipeline, once nothing that can be seen before the first of them is wrong.

    Raises:
        ConfigError, DataError: something is; where, and what to write.
    """
    tasks = every_task(pipeline)
    for name, settings in asked_for(pipeline.evaluation).items():
        open_evaluation(name)
        if name in CHECKS:
            CHECKS[name](fill(settings, {"seed": pipeline.seeds[0]}))
    for seed in pipeline.seeds:
        _refuse_start(pipeline, seed)
    for task in tasks:
        if task.chain:
            try:
                _refuse_stage(task, pipeline)
            except ConfigError as error:
                raise ConfigError(f"stages.{task.stage}, seed {task.seed}: {error}") from error
    return tasks


def _refuse_start(pipeline: Pipeline, seed: int) -> None:
    model = fill(pipeline.model, {"seed": seed})
    if not Path(model).is_dir() and (Path(model).is_absolute() or len(Path(model).parts) != 2):
        raise ConfigError(
            f"model: there is no folder {model}. Write the Hugging Face folder that the arms begin"
            " with, or a name on the Hub, OWNER/NAME."
        )
    panel = pipeline.evaluation.panel
    if panel is not None:
        panel = fill(panel, {"seed": seed})
        config = panel_config(PanelConfig(panel.config, panel.overrides), model)
        checksums_of_data(config.data.held_out)


def _refuse_stage(task: Task, pipeline: Pipeline) -> None:
    """What is wrong with a stage of an arm on a seed, without the stages before it."""
    settings = fill(task.settings(pipeline), {"seed": task.seed})
    open_stage(settings.kind)
    code_of(settings)
    own_data = [source for source in settings.sources() if not places(source)]
    checksums_of_data(own_data)
    if isinstance(settings, TrlStage):
        require_trl()
        if isinstance(settings, RlvrStage):
            open_reward(settings)
        if len(own_data) == len(settings.data):
            rows = read_rows(settings)
            if isinstance(settings, RlvrStage):
                refuse_few(settings, len(rows))
    elif isinstance(settings, GenerateStage):
        if not places(settings.prompts):
            refuse_bad_generation(settings)
    elif isinstance(settings, PretrainingStage | MixedSftStage):
        config = planned_config(task, pipeline)
        if matched(settings) is None and not places(config.data.train):
            checksums_of_data([*config.data.train, *config.data.held_out])


def planned_config(task: Task, pipeline: Pipeline) -> Config:
    """The config that a run of a stage will have, as far as that is known before anything has run:
    of a match, without its budget.

    Raises:
        ConfigError: it can not be one.
    """
    settings = fill(task.settings(pipeline), {"seed": task.seed})
    match = matched(settings)
    if match is None:
        model = fill(pipeline.model, {"seed": task.seed})
        named = [f"model.path={model!r}", f"run.dir={str(task.folder(pipeline))!r}"]
        return load_config(settings.config, [*settings.overrides, *named])
    reference = task.reference(pipeline)
    own = planned_config(reference, pipeline)
    if matched(reference.settings(pipeline)) is not None:
        raise ConfigError(f"match.stage: {reference.stage} is matched itself; write what that is.")
    arm = "mixed_sft" if isinstance(settings, MixedSftStage) else settings.arm
    return with_settings(own, ARMS[arm], {"steps": 1}, settings.overrides)


def refuse_changed(task: Task, pipeline: Pipeline, asked: dict) -> None:
    """Refuse a task whose folder was begun with other inputs.

    Args:
        asked: as `asked_of` says.

    Raises:
        ConfigError: it was; says what differs.
    """
    folder = TaskFolder(task.folder(pipeline))
    if folder.path.exists():
        folder.refuse_other(asked)
