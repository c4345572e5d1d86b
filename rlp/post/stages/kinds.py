"""The stages by their kinds."""

import inspect
from pathlib import Path

from rlp.post.pipeline_config import GenerateStage, OwnStage, RlvrStage, StageConfig
from rlp.post.stages.interface import Stage
from rlp.process.outside import open_part

STAGES = {
    "cpt": "rlp.post.stages.pretraining:pretrain",
    "rlp": "rlp.post.stages.pretraining:pretrain",
    "mixed_sft": "rlp.post.stages.pretraining:mix",
    "sft": "rlp.post.stages.sft:supervise",
    "spectrum": "rlp.post.stages.spectrum:tune",
    "redi": "rlp.post.stages.redi:contrast",
    "rlvr": "rlp.post.stages.rlvr:reinforce",
    "generate": "rlp.post.stages.generation:generate",
}
"""Those that come with this program."""


def open_stage(kind: str) -> Stage:
    """The function of a kind.

    Raises:
        ConfigError: it can not be imported.
    """
    return open_part("kind", STAGES.get(kind, kind), {}, ()).call


def code_of(settings: StageConfig) -> Path | None:
    """The file of the code that a stage brings along; None where it brings none."""
    name = settings.kind if isinstance(settings, OwnStage) else ""
    if isinstance(settings, RlvrStage) and ":" in settings.reward:
        name = settings.reward
    if isinstance(settings, GenerateStage):
        name = settings.filter
    if not name:
        return None
    found = inspect.getsourcefile(open_part("kind", name, {}, ()).call)
    return None if found is None else Path(found)
