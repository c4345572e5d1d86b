"""From a config to a run that is open: checks, folder, model, engine, teacher, logs, resume.

In this order, so that what can be refused is refused before a folder is made, and what takes long
comes last. A run that fails on its way leaves no folder of a run that made nothing.
"""

from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from rlp.compare.placebos import PLACEBOS
from rlp.config import Config, ConfigError, needs_copies
from rlp.data.batches import Batches
from rlp.learn.engine import Engine, shard_frozen, sharded_construction, start_deepspeed
from rlp.learn.guard import Guard
from rlp.learn.teacher import Teacher
from rlp.measure.journal import Journal, weights_digest
from rlp.measure.metrics_log import MetricsLog
from rlp.measure.plan import Plan
from rlp.measure.thought_language import ThoughtLanguage
from rlp.measure.thought_statistics import token_scripts
from rlp.model.admission import check_model
from rlp.model.layout import LAYOUTS
from rlp.model.loading import load_policy
from rlp.process.files import FolderLostError, remove, set_aside
from rlp.process.library_logs import quiet_libraries
from rlp.process.new_run_folder import create_run_folder
from rlp.process.progress import WallTime
from rlp.process.run_folder import RunFolder, open_run_folder
from rlp.process.run_logs import append_json_line
from rlp.run.budget import known_steps
from rlp.run.checks import (
    Opened,
    announce,
    begin_ledger,
    plan_here,
    refuse_sizes,
    run_dtype,
    slow_scans,
)
from rlp.run.saved import resume
from rlp.run.state import Host, OpenRun, Progression
from rlp.run.trial import ReplaceableParts, try_parts
from rlp.sampling.opening import longest_row, open_sampler
from rlp.sampling.sampler import Sampler
from rlp.step.packing import Cutter
from rlp.step.parts import StepParts
from rlp.step.pulse import Pulse
from rlp_kernels import choose_form


def open_run(config: Config, host: Host, replaceable: ReplaceableParts) -> OpenRun:
    """Open a new run, or the one in its folder where it left off.

    Raises:
        ConfigError, DataError, CheckpointError, NotWrittenError: it can not be run. The folder of a
            run that has made nothing is gone again.
    """
    wall, ranks = WallTime(), host.ranks
    refuse_sizes(config, ranks.world_size)
    try_parts(config, replaceable, config.thought.group_size)
    state = Progression(data={})
    opened = open_inputs(config, host, state)
    state.data = opened.setup.stream.state()
    millions = opened.setup.shapes.parameters / 1e6
    host.say(f"model: {config.model.path}, {millions:,.3g} million parameters")
    dtype, why_dtype = run_dtype(config, opened.setup.shapes.width, ranks)
    plan = plan_here(config, opened, ranks, (dtype, why_dtype))
    say_plan(plan, config, host)
    if warning := slow_scans(opened.setup.shapes, ranks.device, plan):
        host.say(warning)

    goes_on = config.run.resume == "auto" and ranks.broadcast(Path(config.run.dir).exists())
    if goes_on:
        folder, state.disposable = open_run_folder(config.run.dir), False
    else:
        folder = create_run_folder(config, ranks, host.lock)
    host.lock.claim(folder.path, host.say, host.watchdog.mark)
    try:
        run = build_run(config, host, opened, folder, dtype, replaceable, state, wall)
        say_what_is_run(run, why_dtype)
        with host.watchdog.working("resume"):
            resume(run, in_its_folder=goes_on)
        return run
    except BaseException:
        discard(folder, host, state)
        raise


def open_inputs(config: Config, host: Host, state: Progression) -> Opened:
    """What the config names, opened."""
    folder = RunFolder(Path(config.run.dir))

    def record_bad(entry: dict) -> None:
        """Write down a document of this step that was skipped."""
        if host.ranks.is_first:
            append_json_line(folder.bad_documents_jsonl, {"step": state.step + 1, **entry})

    with host.watchdog.working("data"):
        return Opened(
            config,
            host.ranks.world_size,
            host.ranks.rank,
            warn=lambda text: host.say(f"data: {text}"),
            record=record_bad,
            progress=host.progress,
        )


def say_plan(plan: Plan, config: Config, host: Host) -> None:
    """Say what the run takes; all ranks refuse what the first one refuses."""
    said, refusal = [], None
    if host.ranks.is_first:
        try:
            said = announce(plan, Path(config.run.dir))
        except ConfigError as error:
            refusal = str(error)
    if refusal := host.ranks.broadcast(refusal):
        raise ConfigError(refusal)
    for line in said:
        host.say(line)


def build_run(
    config: Config,
    host: Host,
    opened: Opened,
    folder: RunFolder,
    dtype: torch.dtype,
    replaceable: ReplaceableParts,
    state: Progression,
    wall: WallTime,
) -> OpenRun:
    """The parts of a run, in the order in which each needs the one before."""
    ranks, setup = host.ranks, opened.setup
    with host.watchdog.working("model"):
        engine, twin, start = build_model(config, host, opened, folder, dtype)
        checksums = setup.checksums()
        for copy in (start, twin if config.baseline.kind == "frozen" else None):
            if copy is not None:  # read from model.path in every life of the run
                checksums["the weights in model.path"] = weights_digest(engine, copy, ranks)

    log = MetricsLog(folder, config, ranks, known_steps(config.budget))
    thought_format = setup.thought_format.predicting("prediction" in replaceable.reward.needs)
    language = build_language(config, opened)
    parts = StepParts(
        config=config,
        ranks=ranks,
        setup=setup,
        thought_format=thought_format,
        batches=Batches(setup.stream, config.optim.batch_size, ranks),
        engine=engine,
        teacher=build_teacher(config, replaceable, engine, twin, start, host),
        start=start,
        guard=Guard(config.optim, ranks),
        ledger=begin_ledger(config, setup.shapes, on_phase=host.watchdog.mark),
        pulse=Pulse(host.preemption, host.watchdog, log.still),
        cut=Cutter(config, opened.layout, thought_format, engine, ranks),
        lay_out=LAYOUTS[opened.layout],
        sampler=build_sampler(config, opened, engine),
        scripts=language and language.scripts.on(ranks.device),
        language=language,
        selector=replaceable.selector,
        baseline=replaceable.baseline,
        reward=replaceable.reward,
        loss=replaceable.loss,
    )
    return OpenRun(
        config=config,
        host=host,
        opened=opened,
        folder=folder,
        dtype=dtype,
        parts=parts,
        judge=PLACEBOS[config.reward.placebo](),
        log=log,
        journal=Journal(folder, config, ranks, engine),
        state=state,
        checksums=checksums,
        wall=wall,
    )


def build_model(
    config: Config, host: Host, opened: Opened, folder: RunFolder, dtype: torch.dtype
) -> tuple[Engine, nn.Module | None, nn.Module | None]:
    """The engine with the policy in it, the teacher's copy and the copy that stays, sharded as they
    are built under stage 3."""
    ranks, setup = host.ranks, opened.setup
    start_deepspeed(ranks)
    quiet_libraries(folder, ranks)
    with sharded_construction(config, ranks, dtype) as whole:
        policy, twin, start = (
            load_policy(config, setup.tokenizer, setup.markers, dtype, ranks.device, whole)
            if needed
            else None
            for needed in (True, *needs_copies(config))
        )
    engine = Engine(policy, config, ranks, dtype, host.preemption, host.watchdog)
    check_model(
        policy,
        agree=lambda refusal: next((found for found in ranks.gather(refusal) if found), None),
    )
    twin, start = (copy and shard_frozen(copy, config, ranks, dtype) for copy in (twin, start))
    return engine, twin, start


def build_language(config: Config, opened: Opened) -> ThoughtLanguage | None:
    """What tells the language of thoughts; None in a run that does not think."""
    setup, target = opened.setup, config.reward.script
    if not config.objective.thinks:
        return None
    scripts = token_scripts(setup.tokenizer, setup.shapes.vocabulary, target=target)
    return ThoughtLanguage(setup.tokenizer, scripts, target, len(setup.markers.close))


def build_sampler(config: Config, opened: Opened, engine: Engine) -> Sampler:
    """What thinks: in training and on the panel."""
    return open_sampler(
        config.sampling,
        engine.policy,
        shared=opened.layout == "tree",
        lend=engine.generation,
        agree=engine.agree,
        together=engine.decodes_together,
        weights=engine.weights,
        apart=engine.apart,
        look=engine.look,
        longest=longest_row(config, opened.setup.thought_format),
    )


def build_teacher(
    config: Config,
    replaceable: ReplaceableParts,
    engine: Engine,
    twin: nn.Module | None,
    start: nn.Module | None,
    host: Host,
) -> Teacher:
    """The networks that the baseline needs."""
    ema = twin if engine.shards.keeps_ema else None
    by_statistic = {
        "ema_logprob": ema,
        "start_logprob": twin if config.baseline.kind == "frozen" else start,
        "policy_logprob": engine.policy,
    }
    needs = replaceable.baseline.needs if config.objective.thinks else ()
    networks = {need: by_statistic[need] for need in needs}
    return Teacher(networks, ema, engine, host.ranks)


def say_what_is_run(run: OpenRun, why_dtype: str) -> None:
    """How log-probabilities are computed, in which numbers, and what is not counted."""
    setup, opened, say = run.opened.setup, run.opened, run.log.say
    for note in setup.notes():
        say(note)
    say(f"layout {opened.layout}: {opened.why_layout}; log-probabilities: {logprob_form(run)}")
    together = run.parts.engine.policy.why_together
    if opened.layout != "tree" and together:
        say(f"thoughts are sampled in whole blocks, none begins before all have ended: {together}")
    on_cpu = run.ranks.device.type == "cpu"
    threads = f"; threads a rank: {torch.get_num_threads()}" if on_cpu else ""
    say(f"{str(run.dtype).removeprefix('torch.')}: {why_dtype}{threads}")
    for part in (run.parts.selector, run.parts.baseline, run.parts.reward, run.parts.loss):
        if part.is_outside:
            needs = f", which needs {', '.join(part.needs)}" if part.needs else ""
            say(f"{part.key}: {part.name}, from outside{needs}")
    if setup.shapes.uncounted:
        say(
            f"FLOPs are counted without {', '.join(setup.shapes.uncounted)}, whose cost is not"
            " known: a lower bound, by which nothing is matched"
        )


def logprob_form(run: OpenRun) -> str:
    """What computes log-probabilities, for a micro-batch of average thoughts and documents of full
    length."""
    config, shapes = run.config, run.opened.setup.shapes
    if config.engine.logprob_form != "auto":
        return config.engine.logprob_form
    positions = 1 if config.position.per_document == "all" else config.position.per_document
    thoughts = positions * config.thought.group_size * config.thought.max_thought_tokens // 2
    thoughts = thoughts if config.objective.thinks else 0
    queries = config.optim.micro_batch_size * (thoughts + config.data.max_document_tokens)
    return choose_form(
        config.optim.tokens_per_micro_batch or queries,
        shapes.vocabulary,
        width=shapes.width,
        dtype=run.dtype,
        device=run.ranks.device.type,
    )


def discard(folder: RunFolder, host: Host, state: Progression) -> None:
    """After an error: remove the folder of a new run that has made no step. It was made a moment
    ago, and without it the corrected command works as it stands."""
    if state.disposable and host.ranks.is_first:
        with suppress(OSError, FolderLostError):
            remove(set_aside(folder.path, f".tmp.{folder.name}", point="folder.before_discard"))
