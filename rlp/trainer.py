"""The trainer: a config and the parts that a user replaces, and the loop around Algorithm 1.

    from rlp import Trainer, load_config

    trainer = Trainer(load_config("configs/quickstart.yaml"), reward=my_reward)
    ending = trainer.fit()

`rlp train`, `train.py` and `python -m rlp.train` are the same from a command line.
"""

import torch

from rlp.algorithm import train_step
from rlp.config import Config, to_yaml
from rlp.data.selectors import Selector
from rlp.measure.machines import machine_named
from rlp.measure.plan import plan_run
from rlp.measure.plan_text import render_plan
from rlp.measure.top_thoughts import TopThoughts
from rlp.process.exit_codes import NOT_WRITTEN, PREEMPTED
from rlp.process.lock import RunLock
from rlp.process.preemption import Preemption, StopRequested
from rlp.process.ranks import Ranks, start_ranks
from rlp.process.watchdog import Watchdog
from rlp.run.budget import fraction_spent, is_due, is_spent, learning_rate_at
from rlp.run.checks import (
    Opened,
    plan_here,
    refuse_sizes,
    rehearse,
    run_dtype,
    slow_scans,
    speed_here,
)
from rlp.run.ending import Ending, already_complete, finish
from rlp.run.held_out import HeldOut
from rlp.run.opening import discard, open_run
from rlp.run.saved import is_complete, save
from rlp.run.state import Host, OpenRun
from rlp.run.telling import close_step, tell_mismatch
from rlp.run.trial import open_parts, try_parts
from rlp.step.baseline import Baseline
from rlp.step.loss import Loss
from rlp.step.record import StepRecord
from rlp.step.reward import Reward


class Trainer:
    """One run, from a config to an exported model.

    A part that is handed over takes the place of the one that the config names, and the run folder
    and its checkpoints remember it as `module:name`.
    """

    def __init__(
        self,
        config: Config,
        *,
        reward: Reward | None = None,
        selector: Selector | None = None,
        baseline: Baseline | None = None,
        loss: Loss | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            reward, selector, baseline, loss: callables in place of those that the config names, or
                classes that make one (docs/extending.md).
            ranks: this process among those of the run; by default as the launcher says, or alone.

        Raises:
            ConfigError: a part can not be imported, or is none.
        """
        self.config, self._parts = open_parts(
            config, selector=selector, baseline=baseline, reward=reward, loss=loss
        )
        self._ranks = ranks or start_ranks(config.run.watchdog_s)

    def fit(self) -> Ending:
        """Run to the end of the budget, or until somebody asks to stop.

        Returns:
            how it ended, where everything is, and the summary.

        Raises:
            ConfigError, CheckpointError, DataError, NumericsError, NotWrittenError: it can not be
                run, or not go on; the message says what to write.
        """
        ranks, config = self._ranks, self.config
        with (
            Watchdog(ranks, config.run) as watchdog,
            Preemption(ranks, config.checkpoint.save_by) as preemption,
            RunLock(ranks) as lock,
        ):
            preemption.on_poll = lock.beat
            return self.fit_on(Host(ranks, preemption, watchdog, lock))

    def fit_on(self, host: Host) -> Ending:
        """`fit`, in a process that is watched already."""
        run = self.open_on(host)
        if is_complete(run):
            return already_complete(run)
        try:
            return loop(run)
        except StopRequested as asked:
            return stop(run, asked)
        except BaseException:
            discard(run.folder, host, run.state)
            raise
        finally:
            run.parts.batches.close()

    def open_on(self, host: Host) -> OpenRun:
        """The run, open and where it left off, before its next step."""
        return open_run(self.config, host, self._parts)

    def plan(self, machine: str = "", mean_thought_tokens: float | None = None) -> str:
        """What a run would read, hold and cost; nothing that it writes stays.

        Args:
            machine: `8xH100` plans for 8 of these, `8x80` for 8 devices of 80 GB; empty, for the
                ranks and devices of this process, whose speed is measured for a second or two.
            mean_thought_tokens: that seconds are planned with; None for the worst case.

        Raises:
            ConfigError, CheckpointError, DataError: what the run would raise.
        """
        asked = machine_named(machine) if machine else None
        config, ranks = self.config, self._ranks
        world_size = asked.devices if asked else ranks.world_size
        notes: list[str] = []
        if asked is None:
            refuse_sizes(config, world_size)
        try_parts(config, self._parts, config.thought.group_size)
        opened = Opened(config, world_size, 0, warn=lambda text: notes.append(f"data: {text}"))
        setup = opened.setup
        notes += setup.notes() + rehearse(config, opened, ranks)
        if asked is not None:
            plan = plan_run(
                config,
                setup.shapes,
                world_size,
                asked.memory_bytes,
                layout=opened.layout,
                format_tokens=opened.format_tokens,
                speed=asked.speed,
                mean_thought_tokens=mean_thought_tokens,
            )
        else:
            dtype = run_dtype(config, setup.shapes.width, ranks)
            speed = speed_here(config, setup.shapes, ranks, dtype[0])
            plan = plan_here(config, opened, ranks, dtype, speed, mean_thought_tokens)
            warning = slow_scans(setup.shapes, ranks.device, plan)
            notes += [warning] if warning else []
        return "\n\n".join([to_yaml(config), *notes, setup.show_example(), render_plan(plan)])


def loop(run: OpenRun) -> Ending:
    """Evaluate, take steps until the budget is spent, evaluate again, export."""
    config, state, ledger = run.config, run.state, run.parts.ledger
    held_out = HeldOut(run)
    if held_out.is_owed():
        held_out.evaluate()
    while not is_spent(config.budget, state.step, ledger):
        run.parts.pulse.safe_point()
        take_step(run)
        over = is_spent(config.budget, state.step, ledger)
        if is_due(config.evaluation.every_n_steps, state.step) and not over:
            held_out.evaluate()
        if is_due(config.checkpoint.every_n_steps, state.step) or over:
            save(run)
    after = held_out.evaluate()
    return finish(run, held_out.before(), after)


def take_step(run: OpenRun) -> None:
    """Make one optimizer step, and tell of it."""
    spent = fraction_spent(run.config.budget, run.state.step, run.parts.ledger)
    step = begin_step(run, spent)
    result = train_step(run.parts, step, run.judge)
    close_step(run, step, result, spent)


def begin_step(run: OpenRun, spent: float) -> StepRecord:
    """The record of the next step.

    Args:
        spent: fraction of the budget that is spent before it.
    """
    config, number = run.config, run.state.step + 1
    run.wall.enter("training")
    run.parts.pulse.begin(number)
    tells = number == 1 or is_due(config.logging.every_n_steps, number)
    if run.ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return StepRecord(
        number=number,
        learning_rate=learning_rate_at(config.optim, number, spent),
        say=lambda text: run.log.say(f"step {number}: {text}"),
        journal=run.journal,
        close_tokens=len(run.opened.setup.markers.close),
        max_thought_tokens=config.thought.max_thought_tokens,
        language_weight=config.reward.language_weight,
        on_ratios=lambda means: tell_mismatch(run, number, means),
        told=TopThoughts(config.logging.thoughts) if tells else None,
    )


def stop(run: OpenRun, asked: StopRequested) -> Ending:
    """Give up the step in the making, and save as after the last one that was made."""
    state, ledger = run.state, run.parts.ledger
    given_up = run.parts.pulse.step > state.step
    ledger.drop_step()
    saved = state.is_saved or save(run)
    where = f"step {state.step} is saved"
    if not saved:
        where = f"step {state.step} could not be saved, and the checkpoint before it stands"
    lost = "; the step begun after it is not counted" if given_up else ""
    run.log.say(f"asked to stop ({asked}): {where}{lost}; continue with run.resume=auto")
    run.log.close()
    return Ending(PREEMPTED if saved else NOT_WRITTEN, run.folder)
