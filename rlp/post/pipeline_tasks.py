"""The tasks of a pipeline: a stage on a seed, behind the stages that stand before it in its arm.

Arms that begin with the same stages share them: a task is known by its chain of stages, and done
once. Its folder is DIR/seed_S/STAGE+STAGE+...; that of the empty chain, `start`, holds what was
read of the model that every arm begins with.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

from rlp.config import ConfigError
from rlp.post.pipeline_config import Match, Pipeline, StageConfig

START = "start"
WORK = "work"
"""The folder, in that of a task, that its stage writes to."""


@dataclass(frozen=True, slots=True)
class Task:
    """A stage of a chain of stages, on a seed."""

    seed: int
    chain: tuple[str, ...]
    """Stages from the first of the arm on; this one is the last. Empty: the start."""

    @property
    def stage(self) -> str:
        return self.chain[-1] if self.chain else START

    @property
    def before(self) -> "Task":
        """Whose model it begins with; of the first stage the start."""
        return Task(self.seed, self.chain[:-1])

    @property
    def name(self) -> str:
        """Of its folder, below that of the pipeline."""
        return f"seed_{self.seed}/{'+'.join(self.chain) or START}"

    @classmethod
    def named(cls, name: str) -> "Task":
        """The task of a `name`."""
        seed, _, chain = name.partition("/")
        stages = () if chain == START else tuple(chain.split("+"))
        return cls(int(seed.removeprefix("seed_")), stages)

    def folder(self, pipeline: Pipeline) -> Path:
        return Path(pipeline.dir) / self.name

    def settings(self, pipeline: Pipeline) -> StageConfig:
        """Of its stage, as the YAML has them."""
        return pipeline.stages[self.stage]

    def reference(self, pipeline: Pipeline) -> "Task | None":
        """Whose cost it spends."""
        match = matched(self.settings(pipeline)) if self.chain else None
        return match and Task(self.seed, (*self.chain[:-1], match.stage))

    def needs(self, pipeline: Pipeline) -> list["Task"]:
        """What has to be finished before it."""
        own = [self.before] if len(self.chain) > 1 else []
        reference = self.reference(pipeline)
        return own if reference is None else [*own, reference]

    def places(self, pipeline: Pipeline) -> dict[str, object]:
        """What `{seed}` and the names of stages before it stand for."""
        ends = {name: self.chain[: end + 1] for end, name in enumerate(self.chain[:-1])}
        folders = {name: Task(self.seed, chain) for name, chain in ends.items()}
        return {"seed": self.seed} | {name: task.folder(pipeline) for name, task in folders.items()}


def matched(settings: StageConfig) -> Match | None:
    """The match of a stage, where it has one."""
    return getattr(settings, "match", None)


def every_task(pipeline: Pipeline) -> list[Task]:
    """All tasks, each after those that it needs: seed by seed, arm by arm.

    Raises:
        ConfigError: a stage is to spend what another one spends that no arm has at that place.
    """
    chains: list[tuple[str, ...]] = [()] if pipeline.evaluation.is_asked_for else []
    for stages in pipeline.arms.values():
        chains += [tuple(stages[: end + 1]) for end in range(len(stages))]
    asked = list(dict.fromkeys(chains))
    tasks = [Task(seed, chain) for seed in pipeline.seeds for chain in asked]
    known = set(tasks)
    for task in tasks:
        reference = task.reference(pipeline)
        if reference is not None and reference not in known:
            raise ConfigError(
                f"stages.{task.stage}.match: it spends what {reference.stage} spends, and no arm"
                f" has {reference.stage} where {task.stage} stands, behind"
                f" {' and '.join(task.chain[:-1]) or 'the start'}. Write an arm with"
                f" {list(reference.chain)}, or another match.stage."
            )
    return _in_order(tasks, pipeline)


def _in_order(tasks: list[Task], pipeline: Pipeline) -> list[Task]:
    """Each after what it needs, and else as they are."""
    ordered: list[Task] = []
    while len(ordered) < len(tasks):
        ready = [
            task
            for task in tasks
            if task not in ordered and all(need in ordered for need in task.needs(pipeline))
        ]
        if not ready:
            ring = next(task for task in tasks if task not in ordered)
            raise ConfigError(
                f"stages.{ring.stage}.match: {ring.stage} and what it is matched with wait for each"
                " other. Match with a stage that has no match."
            )
        first = ready[0]
        ordered.append(first)
    return ordered


def arms_of(task: Task, pipeline: Pipeline) -> list[str]:
    """Names of the arms that have it."""
    length = len(task.chain)
    return [arm for arm, stages in pipeline.arms.items() if tuple(stages[:length]) == task.chain]


def run_tasks(
    waiting: list[Task],
    done: set[Task],
    workers: int,
    needs: Callable[[Task], list[Task]],
    begin: Callable[[Task], Future],
) -> Iterator[tuple[Task, Future]]:
    """Do tasks side by side, in their order as far as their needs allow; what needs a task that
    failed is left out.

    Args:
        done: tasks whose work is there.
        begin: starts a task.

    Yields:
        each task that was begun, when it ends.
    """
    waiting, running, done = [task for task in waiting if task not in done], {}, set(done)
    while True:
        ready = [task for task in waiting if all(need in done for need in needs(task))]
        for task in ready[: workers - len(running)]:
            waiting.remove(task)
            running[begin(task)] = task
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            if future.exception() is None:
                done.add(task)
            yield task, future
