"""A run: its parts put together from a config, and everything around the algorithm.

`train.py` holds the algorithm; this module loads, resumes, evaluates, saves, tells and exports for
it.
"""

import math
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlp.checks import (
    Opened,
    announce,
    begin_ledger,
    budget_spent,
    plan_here,
    refuse_checkpoint,
    refuse_new_start,
    refuse_sizes,
    rehearse,
    run_dtype,
)
from rlp.config import Config, ConfigError, OptimConfig, needs_copies, to_yaml
from rlp.data.documents import Document
from rlp.data.positions import Positions, choose_positions
from rlp.learn.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    newest_name,
    open_checkpoint,
    refuse_other_inputs,
    restore,
    save_checkpoint,
)
from rlp.learn.engine import (
    Engine,
    StepResult,
    shard_frozen,
    sharded_construction,
    start_deepspeed,
)
from rlp.learn.export import export_model, model_card
from rlp.learn.guard import MAX_REFUSED_IN_A_ROW, Guard, NumericsError, require_sound
from rlp.learn.teacher import Teacher
from rlp.measure.journal import Journal, weights_digest
from rlp.measure.metrics_log import MetricsLog
from rlp.measure.monitor import Watch, mismatch_of
from rlp.measure.panel_scoring import measure_panel, no_think_logprob
from rlp.measure.plan import Plan, plan_run, render_plan
from rlp.measure.report import write_report
from rlp.measure.thought_statistics import combine_parts, token_scripts
from rlp.measure.top_thoughts import TopThoughts
from rlp.measure.verdict import verdict
from rlp.model.admission import check_model
from rlp.model.layout import LAYOUTS
from rlp.model.loading import load_policy
from rlp.model.scoring import difficulty
from rlp.model.shapes import Work
from rlp.model.thoughts import Thoughts
from rlp.process.console import format_duration, say_line
from rlp.process.faults import fault
from rlp.process.files import FolderLostError, NotWrittenError, remove, set_aside
from rlp.process.json_files import DamagedFileError, write_json
from rlp.process.library_logs import quiet_libraries
from rlp.process.lock import RunLock
from rlp.process.new_run_folder import create_run_folder
from rlp.process.preemption import Preemption, StopRequested
from rlp.process.progress import Pace, Progress, WallTime
from rlp.process.ranks import Ranks
from rlp.process.run_folder import open_run_folder
from rlp.process.run_logs import (
    append_json_line,
    cut_logs,
    json_lines,
    mark_logs,
    refused_logs,
    remove_unfinished,
    settle_logs,
)
from rlp.process.tally import Tally
from rlp.process.watchdog import Watchdog
from rlp.sampling.rollout import Rollout
from rlp_kernels import choose_form

T = TypeVar("T")


class Run:
    """Everything a run holds. Its parts are built in the order of the design: config, data, model,
    engine, teacher."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        preemption: Preemption | None = None,
        watchdog: Watchdog | None = None,
        lock: RunLock | None = None,
    ) -> None:
        self.config, self.ranks, self.lock = config, ranks, lock or RunLock(ranks)
        self.preemption, self.watchdog = (
            preemption or Preemption(ranks),
            watchdog or Watchdog(ranks, config.run),
        )
        self.step = 0
        self.seconds = 0.0
        self.wall, self.pace = WallTime(), Pace()
        self.guard = Guard(config.optim, ranks)
        self.start_logprob: list[float] = []
        self.changes: list[dict] = []
        self.watch = Watch()
        refuse_sizes(config, ranks.world_size)
        with self.watchdog.working("data"):
            opened = Opened(
                config,
                ranks.world_size,
                ranks.rank,
                warn=self._warn,
                record=self._record_bad,
                progress=self._progress,
            )
        self._opened, self.setup, self.share, self.match, self.panel = (
            opened,
            opened.setup,
            opened.share,
            opened.match,
            opened.panel,
        )
        self._data_state, self._made_step, self._began_at = self.setup.stream.state(), 0, 0
        self._weights_moved = False
        self._step_started = time.perf_counter()
        self._saved_step: int | None = None
        self._say(
            f"model: {config.model.path}, {self.setup.shapes.parameters / 1e6:,.3g} million"
            " parameters"
        )
        dtype = run_dtype(config, self.setup.shapes.width, ranks)
        self.dtype, self._why_dtype = dtype
        self._announce(plan_here(config, opened, ranks, dtype))
        resumes = config.run.resume == "auto" and ranks.broadcast(Path(config.run.dir).exists())
        self.lay_out, self.shares_prefixes = (
            LAYOUTS[opened.layout],
            opened.layout == "tree",
        )
        self.folder = (
            open_run_folder(config.run.dir)
            if resumes
            else create_run_folder(config, ranks, self.lock)
        )
        self.lock.claim(self.folder.path, self._say, self.watchdog.mark)
        self._is_new = not resumes
        try:
            with self.watchdog.working("model"):
                self._build_model()
            self.log = MetricsLog(self.folder, config, ranks, self._known_steps())
            self.journal = Journal(self.folder, config, ranks, self.engine)
            for note in self.setup.notes():
                self.log.say(note)
            self.log.say(
                f"layout {opened.layout}: {opened.why_layout}; log-probabilities:"
                f" {self._logprob_form()}"
            )
            self.log.say(
                f"{str(self.dtype).removeprefix('torch.')}: {self._why_dtype}"
                + (
                    f"; threads a rank: {torch.get_num_threads()}"
                    if ranks.device.type == "cpu"
                    else ""
                )
            )
            if self.setup.shapes.uncounted:
                self.log.say(
                    f"FLOPs are counted without {', '.join(self.setup.shapes.uncounted)}, whose"
                    " cost is not known: a lower bound, by which nothing is matched"
                )
            with self.watchdog.working("resume"):
                self._resume(resumes)
            self._first, self._last = self._on_first_rank(
                self._logged_evaluations, "its evaluations could not be read"
            )
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """After an error: remove the folder of a new run that has made no step. It was made a
        moment ago, and without it the corrected command works as it stands."""
        if (
            self._is_new
            and self._made_step == self._began_at
            and self._saved_step is None
            and self.ranks.is_first
        ):
            with suppress(OSError, FolderLostError):
                remove(
                    set_aside(
                        self.folder.path, f".tmp.{self.folder.name}", point="folder.before_discard"
                    )
                )

    def _on_first_rank(self, act: Callable[[], T], words: str) -> T:
        """What the first rank reads or changes in the run folder, on every rank. A collective.

        Raises:
            NotWrittenError, DamagedFileError: on every rank, where the first one could not.
        """
        answer, failure = None, None
        if self.ranks.is_first:
            try:
                answer = act()
            except DamagedFileError as error:
                failure = error
            except (OSError, SafetensorError) as error:
                failure = NotWrittenError(
                    f"{self.folder.path}: {words}: {error}. Make room there, and continue with"
                    " run.resume=auto."
                )
        answer, failure = self.ranks.broadcast((answer, failure))
        if failure is not None:
            raise failure
        return answer

    def _build_model(self) -> None:
        """Policy, engine and teacher, sharded as they are built under stage 3."""
        config, ranks = self.config, self.ranks
        start_deepspeed(ranks)
        quiet_libraries(self.folder, ranks)
        dtype = self.dtype
        with sharded_construction(config, ranks, dtype) as whole:
            policy, twin, start = (
                (
                    load_policy(
                        config,
                        self.setup.tokenizer,
                        self.setup.markers,
                        dtype,
                        ranks.device,
                        whole,
                    )
                    if needed
                    else None
                )
                for needed in (True, *needs_copies(config))
            )
        self.engine = Engine(policy, config, ranks, dtype, self.preemption, self.watchdog)
        check_model(
            policy,
            agree=lambda refusal: next((found for found in ranks.gather(refusal) if found), None),
        )
        twin, self.start = (
            copy and shard_frozen(copy, config, ranks, dtype) for copy in (twin, start)
        )
        self._input_checksums = self.setup.checksums()
        for copy in (self.start, twin if config.baseline.kind == "frozen" else None):
            if copy is not None:  # read from model.path in every life of the run
                self._input_checksums["the weights in model.path"] = weights_digest(
                    self.engine, copy, ranks
                )
        self.teacher = Teacher(
            config.baseline.kind if config.objective.thinks else "none", twin, self.engine, ranks
        )
        self.ledger = begin_ledger(config, self.setup.shapes, on_phase=self.watchdog.mark)
        self.scripts = (
            token_scripts(self.setup.tokenizer, self.setup.shapes.vocabulary, ranks.device)
            if config.objective.thinks
            else None
        )

    def _announce(self, plan: Plan) -> None:
        """Say what the run takes; all ranks refuse what the first one refuses."""
        said, refusal = [], None
        if self.ranks.is_first:
            try:
                said = announce(plan, Path(self.config.run.dir))
            except ConfigError as error:
                refusal = str(error)
        if refusal := self.ranks.broadcast(refusal):
            raise ConfigError(refusal)
        for line in said:
            self._say(line)

    def _logprob_form(self) -> str:
        """What computes log-probabilities, for a micro-batch of average thoughts and documents of
        full length."""
        config, shapes = self.config, self.setup.shapes
        if config.engine.logprob_form != "auto":
            return config.engine.logprob_form
        positions = 1 if config.position.per_document == "all" else config.position.per_document
        thoughts = (
            positions * config.thought.group_size * config.thought.max_thought_tokens // 2
            if config.objective.thinks
            else 0
        )
        rows = config.optim.micro_batch_size * (thoughts + config.data.max_document_tokens)
        return choose_form(
            rows,
            shapes.vocabulary,
            width=shapes.width,
            dtype=self.dtype,
            device=self.ranks.device.type,
        )

    def _warn(self, text: str) -> None:
        self._say(f"data: {text}")

    def _say(self, text: str) -> None:
        """`MetricsLog.say`, also before there is a log."""
        if self.ranks.is_first:
            say_line(text)

    def _progress(self, what: str, total: int | None, unit: str) -> Progress:
        """A `Progress` that the first rank tells."""
        return Progress(
            what,
            total,
            unit,
            shown=self.ranks.is_first,
            say=self._say,
            on_advance=self.watchdog.mark,
        )

    def _known_steps(self) -> int | None:
        """Steps of the whole run, where nothing else limits it."""
        others = [limit for name, limit in asdict(self.config.budget).items() if name != "steps"]
        return self.config.budget.steps if not any(others) else None

    def _record_bad(self, entry: dict) -> None:
        """Write down a document of this step that was skipped."""
        if self.ranks.is_first:
            append_json_line(self.folder.bad_documents_jsonl, {"step": self.step, **entry})

    # The data of a step

    def next_documents(self) -> list[Document]:
        """This rank's share of the next batch."""
        documents = self.setup.stream.next_documents(self.config.optim.batch_size)[self.share]
        self.ledger.add_documents(sum(len(document.tokens) for document in documents))
        return documents

    def choose_positions(self, documents: list[Document]) -> Positions:
        """The positions of this step."""
        return choose_positions(
            documents,
            self.setup.candidates,
            self.config.position,
            horizon=self.config.target.horizon,
            seed=self.config.run.seed,
            step=self.step,
            scores=self._difficulty(documents),
        )

    def _difficulty(self, documents: list[Document]) -> list | None:
        if self.config.position.selector not in ("entropy", "surprisal"):
            return None
        with self.ledger.time("score"):
            scores, size = [], self.config.optim.micro_batch_size
            for start in range(0, len(documents), size):
                layout = self.lay_out(
                    documents[start : start + size],
                    None,
                    None,
                    self.setup.thought_format,
                    lm=True,
                    no_think=False,
                    device=self.ranks.device,
                )
                scores += difficulty(self.engine.policy, layout, self.config.position.selector)
                self.count("score", layout.document_work, passes=1)
        return scores

    # Budget

    def progress(self) -> float:
        """Largest fraction spent of any limit of the budget."""
        return budget_spent(self.config.budget, self.step, self.ledger)

    def is_spent(self) -> bool:
        """Whether the run ends: its steps are made, or the next step would leave another limit
        farther behind than this one is before it."""
        spent, step = (
            {"steps": self.step, **self.ledger.spent()},
            {
                "steps": 0.0,
                **self.ledger.mean_step(),
            },
        )
        return any(
            spent[name] + step[name] / 2 >= limit
            for name, limit in asdict(self.config.budget).items()
            if limit is not None
        )

    def learning_rate(self) -> float:
        """Learning rate of this step."""
        return learning_rate_at(self.config.optim, self.step, self.progress_before)

    @property
    def asks_for_matches(self) -> bool:
        """Whether the reward needs to know that the targets are the most probable tokens."""
        return self.config.reward.kind == "greedy_match"

    def begin_step(self) -> None:
        self.wall.enter("training")
        self.progress_before = self.progress()
        self.step += 1
        self._step_started = time.perf_counter()
        tells = self.step == 1 or self.due(self.config.logging.every_n_steps)
        self._top_thoughts = TopThoughts(self.config.logging.thoughts) if tells else None
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    # Stopping

    def owes_evaluation(self) -> bool:
        """Whether the evaluation of the step that the run begins with is still to be made: it was
        stopped, or the run is new."""
        due = self.step == 0 or (
            self.due(self.config.evaluation.every_n_steps) and not self.is_spent()
        )
        return due and not self._is_evaluated()

    def _is_evaluated(self) -> bool:
        """Whether the newest evaluation is that of this step."""
        return self._last is not None and self._last["step"] == self.step

    def agree(self, claim: bool) -> bool:
        """`Engine.agree`, once for each token of all thoughts."""
        self._tell_that_it_goes_on()
        return self.engine.agree(claim)

    def _tell_that_it_goes_on(self) -> None:
        self.log.still(self.step, self.watchdog.phase, time.perf_counter() - self._step_started)

    def safe_point(self) -> None:
        """Between micro-batches: a step from which nothing has moved is given up here where any
        rank was asked to stop.

        Raises:
            StopRequested: on all ranks.
        """
        self.watchdog.mark()
        self._tell_that_it_goes_on()
        if not self._weights_moved:
            self.preemption.safe_point()

    def stop(self, asked: StopRequested) -> bool:
        """Give up the step in progress, and save as after the last one that was made; whether that
        is on disk."""
        given_up = self.step > self._made_step
        self.step = self._made_step
        self.ledger.drop_step()
        saved = self._saved_step == self.step or self.save()
        where = (
            f"step {self.step} is saved"
            if saved
            else f"step {self.step} could not be saved, and the checkpoint before it stands"
        )
        self.log.say(
            f"asked to stop ({asked}):"
            f" {where}{'; the step begun after it is not counted' if given_up else ''}; continue"
            " with run.resume=auto"
        )
        self.log.close()
        return saved

    # Updates

    def update(self, tally: Tally, documents: list[Document]) -> StepResult:
        """Make the update from the gradient that the engine holds, unless it is refused
        (`Guard`)."""
        self.watchdog.mark("optimizer")
        self._weights_moved = True
        result = self.guard.update(
            self.engine,
            self.learning_rate(),
            tally,
            documents,
            lambda text: self.log.say(f"step {self.step}: {text}"),
        )
        self.teacher.refresh()
        return result

    # Telling

    def end_step(self, tally: Tally, result: StepResult, documents: list[Document]) -> None:
        """Close the ledger's step, record its metrics, and stop a run whose updates are refused
        again and again."""
        fault("step.before_log")
        self.watchdog.mark("log")
        self._data_state, self._made_step, self._weights_moved = (
            self.setup.stream.state(),
            self.step,
            False,
        )
        cost = self.ledger.close_step(self.ranks)
        seconds = time.perf_counter() - self._step_started
        self.seconds += seconds
        values = tally.reduce(self.ranks)
        combine_parts(values)
        sampling = cost["phases"]["prefill"]["seconds"] + cost["phases"]["decode"]["seconds"]
        sampled = cost["phases"]["decode"]["tokens_generated"]
        done = self.progress()
        values |= {
            "optim/grad_norm": result.grad_norm,
            "optim/learning_rate": self.learning_rate(),
            "optim/skipped": self.guard.skipped,
            "optim/spikes": self.guard.spikes if self.config.optim.spike_factor else None,
            "teacher/distance": self.teacher.distance(),
            "data/bad_documents": sum(self.setup.stream.bad.values()),
            "budget/tokens": self.ledger.input_tokens,
            "budget/flops": self.ledger.flops,
            "perf/step_s": seconds,
            "perf/thought_tokens_per_s": sampled / sampling if sampled else None,
            "perf/peak_memory_bytes": self._peak_memory(),
            "perf/tokens_per_s": (cost["input_tokens"] + sampled) / seconds,
            "perf/left_s": self.pace.left_s(done - self.progress_before, seconds, 1 - done),
        }
        unusable = sorted(
            name for name, value in values.items() if value is not None and not math.isfinite(value)
        )
        self.log.step(
            self.step, {name: value for name, value in values.items() if name not in unusable}
        )
        self._tell_thoughts()
        self.journal.close_step(
            self.step,
            documents,
            values,
            applied=result.applied,
            tokens=self.ledger.input_tokens,
            flops=self.ledger.flops,
        )
        if waiting := refused_logs(self.folder):
            self.log.say(
                f"step {self.step}: the disk refuses {', '.join(waiting)}; lines wait in memory,"
                f" and no checkpoint is made without them. Make room in {self.folder.path}"
            )
        for alarm in self.watch.see(
            {name: value for name, value in values.items() if value is not None},
            has_baseline=self.config.baseline.kind != "none",
        ):
            self.log.alarm(self.step, alarm)
        self._watch_mismatch(values)
        self._stop_without_updates()

    def _stop_without_updates(self) -> None:
        """Save, and end a run of which several steps in a row have made no update.

        Raises:
            NumericsError: it ends.
        """
        self.guard.close_step()
        if self.guard.in_a_row < MAX_REFUSED_IN_A_ROW:
            return
        self.save()
        raise NumericsError(
            f"{self.guard.in_a_row} steps in a row made no update (the last is step {self.step});"
            f" the weights are those from before. {self._where_to_go_on()} Lower"
            " optim.learning_rate, or look at the documents named above."
        )

    def _where_to_go_on(self) -> str:
        """The newest checkpoint, in words."""
        newest = self.ranks.broadcast(
            newest_name(self.folder.checkpoints) if self.ranks.is_first else None
        )
        return (
            f"The newest sound checkpoint is {newest}."
            if newest
            else f"There is no checkpoint in {self.folder.checkpoints} yet."
        )

    def _watch_mismatch(self, values: dict[str, float | None]) -> None:
        """Say loudly where sampler and trainer are two policies, and end a run that can not be
        trained like that.

        Raises:
            NumericsError: it ends.
        """
        found = mismatch_of(values, self.dtype, self.config.thought.temperature)
        if found is None:
            return
        mismatch, ends = found
        advice = "Compare with engine.layout=repeated and engine.dtype=float32, and report it."
        if ends:
            raise NumericsError(
                f"step {self.step}: {mismatch}. The thoughts are not those of the policy that is"
                f" trained. {self._where_to_go_on()} {advice}"
            )
        self.log.alarm(self.step, f"{mismatch}. {advice}")

    def _peak_memory(self) -> float:
        local = (
            torch.cuda.max_memory_allocated()
            if self.ranks.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return float(max(self.ranks.gather(local)))

    def due(self, every_n_steps: int) -> bool:
        """Whether something done every n steps is done at this step; never for 0."""
        return every_n_steps > 0 and self.step % every_n_steps == 0

    def offer_thoughts(
        self,
        documents: list[Document],
        positions: Positions,
        thoughts: Thoughts,
        values: dict[str, Tensor],
    ) -> None:
        """`TopThoughts.offer`, on steps that tell thoughts."""
        if self._top_thoughts is not None:
            self._top_thoughts.offer(
                documents, positions, thoughts, values, len(self.setup.markers.close)
            )

    def _tell_thoughts(self) -> None:
        """Write the most and the least helpful thoughts of the step, at logging intervals. A
        collective."""
        told = self._top_thoughts.gather(self.ranks) if self._top_thoughts is not None else []
        for thought in told if self.ranks.is_first else []:
            texts = {
                name: self.setup.tokenizer.decode(thought[name])
                for name in ("prefix_tail", "thought", "target")
            }
            append_json_line(self.folder.thoughts_jsonl, {"step": self.step} | thought | texts)

    # Counting

    def scores_baseline(self) -> bool:
        """Whether this step scores the baseline (`baseline.every_n_steps`)."""
        return (self.step - 1) % self.config.baseline.every_n_steps == 0

    def count(self, phase: str, work: Work, *, passes: int, tokens_trained: int = 0) -> None:
        """Count a pass over given tokens; `tokens_trained` of them have a gradient through their
        log-probability."""
        self.ledger.add(
            phase, work, passes=passes, tokens_in=work.tokens, tokens_trained=tokens_trained
        )

    def count_rollout(self, rollout: Rollout) -> None:
        """Count the prefill and the decoding of a step's thoughts."""
        sampled = int(rollout.thoughts.mask.sum())
        self.count("prefill", rollout.prefill_work, passes=1)
        self.ledger.add("decode", rollout.decode_work, passes=1, tokens_generated=sampled)
        self.ledger.add_thoughts(
            rollout.thoughts.truncated.numel(),
            max_thought_tokens=self.config.thought.max_thought_tokens,
            sampled_tokens=sampled,
        )

    # Evaluation

    def evaluate(self) -> dict | None:
        """Score the held-out panel; the first time, also without thoughts by the starting
        checkpoint."""
        if self.panel is None:
            return None
        if self._is_evaluated():  # by an end that was interrupted
            return _values(self._last)
        with self.wall.during("evaluation"):
            return self._evaluate()

    def _evaluate(self) -> dict:
        self.watchdog.mark("evaluation")
        fault("evaluation")
        if not self.start_logprob:
            self.start_logprob = no_think_logprob(
                self.lay_out,
                self.engine.policy,
                self.panel,
                self.setup.thought_format,
                self.config,
                self.ranks,
            )
        values = measure_panel(
            self.lay_out,
            self.panel,
            self.engine.policy,
            self.teacher.model,
            self.start_logprob,
            self.setup.thought_format,
            self.config,
            self.ranks,
            generation=self.engine.generation,
            agree=self.engine.agree,
            progress=self._progress,
        ).numbers()
        unusable = sorted(name for name, value in values.items() if not math.isfinite(value))
        if unusable:
            raise NumericsError(
                f"held-out evaluation at step {self.step}: not finite: {', '.join(unusable)}. The"
                f" weights are of no use. {self._where_to_go_on()}"
            )
        self.log.evaluation(self.step, values)
        self._last = {"step": self.step, **values}
        self._first = self._first or self._last
        self.log.say(
            f"held-out at step {self.step}: "
            + ", ".join(f"{words} {values[name]:.3f}" for name, words in HEADLINE.items())
        )
        return values

    # Checkpoints

    def save(self) -> bool:
        """Write a checkpoint of all that changes, as after the last step that was made; whether it
        could be written.

        Raises:
            NumericsError: what it would hold is not finite.
        """
        self.watchdog.mark("save")
        require_sound(
            self.engine,
            self.ranks,
            f"step {self.step} is not saved. {self._where_to_go_on()} Continue with run.resume=auto"
            " and a lower optim.learning_rate.",
        )
        state = {
            "config": asdict(self.config),
            "data": self._data_state,
            "ledger": self.ledger.state(),
            "seconds": self.seconds,
            "guard": self.guard.state(),
            "start_logprob": self.start_logprob,
            "watch": self.watch.state(),
            "dtype": str(self.dtype),
            "inputs": self._input_checksums,
            "changes": self.changes,
            "logs": mark_logs(self.folder, self.step),
        }
        with self.watchdog.working("save"), self.wall.during("saving"):
            saved = save_checkpoint(
                self.folder.checkpoints,
                self.step,
                self.engine,
                self.ranks,
                state,
                self.config.checkpoint.keep,
                settle=lambda: settle_logs(self.folder),
                say=self.log.say,
            )
        self._saved_step = self.step if saved else self._saved_step
        return saved is not None

    def _resume(self, resumes: bool) -> None:
        """Continue this run (`auto`), or start from another run's checkpoint (a path)."""
        if resumes:
            checkpoint = newest_checkpoint(self.folder.checkpoints, self.ranks, self.log.say)
            if checkpoint is None:
                self._start_again()
                return
        elif self.config.run.resume not in ("auto", "never"):
            checkpoint = open_checkpoint(Path(self.config.run.resume), self.ranks)
        else:
            return
        changes = self._load(checkpoint)
        if resumes and self.is_complete():
            # What it has logged after its last checkpoint, which may be an early one, stays.
            self._on_first_rank(
                lambda: remove_unfinished(self.folder), "what a crash left could not be removed"
            )
            return
        if resumes:
            lost = self._on_first_rank(
                lambda: cut_logs(self.folder, self.step, checkpoint.state["logs"]),
                "its logs could not be cut back",
            )
            for words in lost:
                self.log.alarm(self.step, words)
        self._note_changes(checkpoint.state["changes"], changes, written=resumes)
        self.log.say(f"continuing from {checkpoint.path} at step {self.step}")

    def _start_again(self) -> None:
        """Begin at step 0 in the folder of a run that was killed before its first checkpoint
        (`refuse_new_start`)."""
        if self.is_complete():
            return
        steps, changes = refuse_new_start(self.folder, self.config, self.ranks)
        self._on_first_rank(lambda: cut_logs(self.folder, -1, {}), "its logs could not be cut back")
        self._note_changes([], changes)
        self.log.say(
            f"{self.folder.path} has no checkpoint yet: it was stopped in its first {steps} steps,"
            " and begins again at step 0"
        )

    def _note_changes(
        self, earlier: list[dict], changes: list[dict], *, written: bool = True
    ) -> None:
        """Say and write down the settings that the run is continued with otherwise.

        Args:
            earlier: those of earlier lives, which stand in the run folder where it was theirs
                (`written`).
        """
        new = [{"step": self.step + 1, **change} for change in changes]
        self.changes = [*earlier, *new]
        for change in new if written else self.changes:
            if self.ranks.is_first:
                append_json_line(self.folder.config_changes_jsonl, change)
        for change in new:
            self.log.say(
                f"from step {change['step']} on: {change['key']} is {change['to']!r}, was"
                f" {change['from']!r}"
            )

    def _load(self, checkpoint: Checkpoint) -> list[dict]:
        """Take over what a checkpoint holds; the settings that differ from its own."""
        changes = refuse_checkpoint(checkpoint, self.config, self._opened, self.dtype)
        state = checkpoint.state
        refuse_other_inputs(state["inputs"], self._input_checksums, checkpoint.path)
        self._input_checksums = state[
            "inputs"
        ]  # a panel that is not read in this life may be read in the next
        restore(checkpoint, self.engine, self.ranks)
        self.teacher.refresh()
        self.setup.stream.load_state(state["data"])
        try:
            self.ledger.load_state(state["ledger"])
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        self.step, self.seconds = checkpoint.step, state["seconds"]
        self.guard.load_state(state["guard"])
        self._data_state, self._made_step, self._began_at = (
            self.setup.stream.state(),
            self.step,
            self.step,
        )
        self.start_logprob = state["start_logprob"]
        self.watch.load_state(state["watch"])
        return changes

    def is_complete(self) -> bool:
        """Whether this run folder already holds the end of its run."""
        return self.ranks.broadcast(self.folder.summary_json.exists())

    # The end

    def finish(self, after: dict | None) -> bool:
        """Export the model, write ledger, summary and report, and tell where everything is.

        Returns:
            False where the run does not match the one that its `match` section names.
        """
        match, spent = self.match, self.ledger.to_json()
        self.wall.enter("export and report")
        self.watchdog.mark("export")
        # A run that starts from another run's checkpoint has no evaluation before its first step.
        before = (
            _values(self._first) if self._first is not None and self._first["step"] == 0 else None
        )
        card = model_card(
            self.config, before, after, self.step, self.engine.policy.stock_time_step_limit
        )
        if self.ranks.is_first:
            for left in (self.folder.export, *self.folder.path.glob(".tmp.export.*")):
                remove(left)  # by an end that was interrupted: a complete run does not come here
        with self.watchdog.working("export"):
            export_model(
                self.folder.export,
                self.engine,
                self.setup.tokenizer,
                self.ranks,
                self.config,
                self.setup.thought_format,
                card,
            )
        summary = {
            "before": before,
            "after": after,
            "steps": self.step,
            "seconds": self.seconds,
            "wall_s": self.wall.so_far(),
            "flops": self.ledger.flops,
            "counted_without": list(self.setup.shapes.uncounted),
            "bad_documents": self.setup.stream.bad,
            "verdict": verdict([before or {}], [after or {}]),
            "match": match and {"by": match.by, "ratio": match.ratio(spent)},
        }
        self._on_first_rank(
            lambda: self._write_end(summary), "the end of the run could not be written"
        )
        self.log.say(self._closing_words(before, after))
        if match:
            self.log.say(match.table(spent))
        self.log.close()
        return match is None or match.holds(spent)

    def _write_end(self, summary: dict) -> None:
        settle_logs(self.folder)
        fault("summary")
        write_json(self.folder.ledger_json, self.ledger.to_json(), point="end.torn_ledger")
        write_json(self.folder.summary_json, summary, point="end.torn_summary")
        self._write_report()

    def owe_report(self) -> None:
        """Make the report of a complete run that has none. A collective."""
        if self.ranks.is_first and not self.folder.report_html.exists():
            self._write_report()

    def _write_report(self) -> None:
        """Rank 0's: the page, which is made from the other files; a run does not fail for it."""
        try:
            write_report([self.folder.path], self.folder.report_html)
        except (OSError, DamagedFileError, ConfigError) as error:
            self.log.say(
                f"the report could not be written: {error}. Write it with: rlp report"
                f" {self.folder.path}"
            )

    def _closing_words(self, before: dict | None, after: dict | None) -> str:
        lines = [
            "",
            f"{self.step} steps in {format_duration(self.seconds)}, {self.ledger.flops:.3g} FLOPs",
            f"this process took {self.wall.told()}",
        ]
        if before and after:
            lines += [
                f"held-out panel of {after['panel_positions']} positions      before    after"
            ]
            lines += [
                f"  {HEADLINE[name]:<34}{before[name]:>8.3f} {after[name]:>8.3f}"
                for name in HEADLINE
            ]
        lines += verdict([before or {}], [after or {}])
        places = {
            "run folder": self.folder.path,
            "report": self.folder.report_html,
            "model": self.folder.export,
        }
        return "\n".join(lines + [f"{what:<12}{path}" for what, path in places.items()])

    def _logged_evaluations(self) -> tuple[dict | None, dict | None]:
        """The first and the newest evaluation of the run so far."""
        first = last = None
        if self.folder.evaluation_jsonl.exists():
            for last in json_lines(self.folder.evaluation_jsonl):
                first = first or last
        return first, last


def _values(evaluation: dict) -> dict:
    """The numbers of a line of evaluation.jsonl."""
    return {name: value for name, value in evaluation.items() if name != "step"}


HEADLINE = {
    "gain_over_start_nats": "gain over start (nats)",
    "positive_gain_frac": "positions with positive gain",
    "accuracy_with_thought": "accuracy with a thought",
    "accuracy_without_thought": "accuracy without a thought",
    "thought_tokens_mean": "thought length (tokens)",
}
"""The numbers that a run is told by."""


def learning_rate_at(config: OptimConfig, step: int, progress: float) -> float:
    """Learning rate of a step: linear warm-up, then the schedule over the budget.

    Args:
        step: 1 for the first.
        progress: fraction of the budget that is spent before the step.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * min(progress, 1.0))) / 2,
    }[config.schedule]
    if config.schedule == "constant":
        return config.learning_rate * warmup
    return (
        config.learning_rate
        * warmup
        * (config.final_fraction + (1 - config.final_fraction) * shape)
    )


def dry_run(config: Config, machine: str, ranks: Ranks) -> str:
    """What a run would read, hold and cost.

    Args:
        machine: `8x80` plans for 8 devices of 80 GB; empty, for the ranks and devices of this
            process.
    """
    if machine and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", machine):
        raise ConfigError(
            f"--machine {machine!r}: expected RANKSxGIGABYTES, such as 8x80; leave it out for this"
            " machine."
        )
    world_size, gigabytes = map(int, machine.split("x")) if machine else (ranks.world_size, 0)
    notes: list[str] = []
    if not machine:
        refuse_sizes(config, world_size)
    opened = Opened(config, world_size, 0, warn=lambda text: notes.append(f"data: {text}"))
    setup = opened.setup
    if machine:
        plan = plan_run(
            config,
            setup.shapes,
            world_size,
            gigabytes * 10**9,
            layout=opened.layout,
            format_tokens=opened.format_tokens,
        )
    else:
        plan = plan_here(config, opened, ranks, run_dtype(config, setup.shapes.width, ranks))
    notes += setup.notes() + rehearse(config, opened, ranks)
    return "\n\n".join([to_yaml(config), *notes, setup.show_example(), render_plan(plan)])
