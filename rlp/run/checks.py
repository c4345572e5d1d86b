"""What a run refuses before its first step: the same checks, with the same messages, for the run
and for its dry run.

`Opened` holds what a config names, opened and found good. The functions after it ask what can only
be asked with a folder,
a checkpoint or the weights in hand. Nothing is written here.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from rlp.compare.budget import open_budget_match
from rlp.config import Config, ConfigError, first_line, load_config
from rlp.data.stream import share_of_rank
from rlp.learn.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    open_checkpoint,
    peek,
    refuse_other_model,
)
from rlp.learn.continuing import changed_settings, refuse_other_inputs
from rlp.measure.frozen import load_frozen
from rlp.measure.ledger import Ledger
from rlp.measure.machines import Speed
from rlp.measure.panel import held_out_panel
from rlp.measure.plan import Plan, fits, plan_run
from rlp.measure.plan_work import FormatTokens, positions_per_document
from rlp.measure.speed_here import measure_speed
from rlp.measure.wandb_log import require_wandb
from rlp.model.loading import choose_dtype, choose_layout
from rlp.model.scans import how_to_install, missing_packages
from rlp.model.setup import RunSetup
from rlp.model.shapes import ModelShapes
from rlp.process.console import format_bytes
from rlp.process.files import folder_bytes
from rlp.process.json_files import read_json
from rlp.process.machine import available_memory_bytes
from rlp.process.new_run_folder import why_no_run_folder
from rlp.process.preemption import Deadline
from rlp.process.progress import Progress, Tell
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder, open_run_folder
from rlp.process.run_logs import json_lines
from rlp.process.schemas import STATE, WHOLE_LEDGER
from rlp.run.budget import fraction_spent
from rlp.sampling.opening import refuse_vllm

CHECKED_PARAMETERS = 400_000_000
"""Of the largest model whose weights a dry run loads, to check them: 1.6 GB in float32, and some
seconds."""


class Opened:
    """What a config names, opened: data, tokenizer, panel, the run to match. It is in order, as far
    as can be seen without weights."""

    def __init__(
        self,
        config: Config,
        world_size: int,
        rank: int,
        *,
        warn: Callable[[str], None],
        record: Callable[[dict], None] = lambda entry: None,
        progress: Tell = Progress,
    ) -> None:
        """
        Args:
            warn, record, progress: as `RunSetup`.

        Raises:
            ConfigError, DataError: something is not there or does not fit.
        """
        share_of_rank(config.optim.batch_size, rank, world_size)
        require_wandb(config.logging.wandb)
        if config.checkpoint.save_by is not None:
            Deadline(config.checkpoint.save_by)  # one that is past
        self.match = open_budget_match(config)
        self.setup = RunSetup(config, warn, record, progress)
        self.layout, self.why_layout = choose_layout(config, self.setup.architecture)
        if config.objective.thinks or self.setup.held_out is not None:
            refuse_vllm(config.sampling, self.setup.markers)
        begin_ledger(config, self.setup.shapes)
        thought_format = self.setup.thought_format
        self.format_tokens = FormatTokens(
            open=len(thought_format.markers.open),
            close=len(thought_format.markers.close),
            instruction=len(thought_format.instruction),
        )
        self.panel = None if self.setup.held_out is None else held_out_panel(self.setup)


def begin_ledger(
    config: Config, shapes: ModelShapes, on_phase: Callable[[str], None] = lambda phase: None
) -> Ledger:
    """A ledger that begins with what the data cost (`data.ledger`).

    Raises:
        ConfigError: that can not be read, or is the whole budget.
    """
    ledger, path = Ledger(shapes, on_phase=on_phase), config.data.ledger
    if path is None:
        return ledger
    try:
        ledger.carry(read_json(Path(path).resolve(), WHOLE_LEDGER))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.ledger: {path} can not be read: {error}. Write the ledger.json "
            "that lies beside the data."
        ) from error
    if fraction_spent(config.budget, 0, ledger) >= 1:
        raise ConfigError(
            f"budget: making the data has spent it already ({path}): "
            f"{ledger.spent()} of {asdict(config.budget)}. Make fewer documents, or "
            "write a larger budget."
        )
    return ledger


def run_dtype(config: Config, width: int, ranks: Ranks) -> tuple[torch.dtype, str]:
    """As `choose_dtype`; under `auto` a run that goes on keeps the dtype that it began in. The
    first rank decides for all."""
    chosen = choose_dtype(config, ranks.device, width)
    saved = (
        _saved_dtype(config)
        if ranks.is_first and config.engine.dtype == "auto" and config.engine.zero_stage > 0
        else None
    )
    return ranks.broadcast(
        (saved, "so the run began") if saved is not None and saved != chosen[0] else chosen
    )


def _saved_dtype(config: Config) -> torch.dtype | None:
    """Of the checkpoint that the run would go on from; None where there is none, or it does not
    say."""
    resume, own = config.run.resume, Path(config.run.dir)
    path = own / "checkpoints" if resume == "auto" else None if resume == "never" else Path(resume)
    state = peek(path) if path is not None and path.is_dir() else None
    names = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    return names.get(str(state.get("dtype"))) if state else None


BYTES_OF_A_THOUGHT_TOKEN, BYTES_OF_A_DOCUMENT_TOKEN = 25, 8
"""In memory on its rank for the whole step: its noise, id, mask, log-probability and entropy; and
an id."""


def refuse_sizes(config: Config, world_size: int) -> None:
    """Refuse a step, or a panel, whose tokens alone are more than this machine's memory.

    Raises:
        ConfigError: naming the settings that multiply.
    """
    available = available_memory_bytes()
    documents, thinks = -(-config.optim.batch_size // world_size), config.objective.thinks
    thoughts = (
        documents * positions_per_document(config) * config.thought.group_size if thinks else 0
    )
    panel = (
        config.evaluation.panel_positions * config.evaluation.thoughts_per_position
        if config.data.held_out
        else 0
    )
    for what, num_thoughts, num_documents, settings in (
        (
            "a step",
            thoughts,
            documents,
            "optim.batch_size, position.per_document, thought.group_size or"
            " thought.max_thought_tokens",
        ),
        (
            "the held-out panel",
            panel,
            0,
            "evaluation.panel_positions, evaluation.thoughts_per_position or"
            " thought.max_thought_tokens",
        ),
    ):
        tokens = config.thought.max_thought_tokens
        held = num_thoughts * tokens * BYTES_OF_A_THOUGHT_TOKEN
        held += num_documents * config.data.max_document_tokens * BYTES_OF_A_DOCUMENT_TOKEN
        if available is not None and held > available:
            raise ConfigError(
                f"{what} has {num_thoughts:,} thoughts of {tokens:,} tokens"
                f" on each rank: {format_bytes(held)} for their tokens alone, and this machine has"
                f" {format_bytes(available)}. Write a smaller {settings}."
            )


def announce(plan: Plan, run_dir: Path) -> list[str]:
    """What the run takes of memory and disk, in a few lines; what does not fit stands out.

    Raises:
        ConfigError: the disk has no room for a checkpoint and the export, without which a new run
            leaves nothing.
    """
    held = folder_bytes(run_dir / "checkpoints")
    free, least = plan.disk_free_bytes + held, plan.checkpoint_bytes + plan.export_bytes
    if free < least and not run_dir.exists():
        raise ConfigError(
            f"run.dir: {run_dir} is on a disk with {format_bytes(free)} for this run, and it needs"
            f" {format_bytes(least)}: {format_bytes(plan.checkpoint_bytes)} for a checkpoint and"
            f" {format_bytes(plan.export_bytes)} for the export. Make room there, or write"
            " run.dir=OTHER."
        )
    room = plan.device_bytes or plan.available_bytes
    said = [
        f"planned at most: {format_bytes(plan.peak_bytes)} of memory a rank"
        + (f", which has {format_bytes(room)}" if room else "")
        + f"; {format_bytes(plan.disk_bytes)} of disk, where {format_bytes(free)} are free"
    ]
    if not fits(plan):
        settings = ", ".join(setting for setting, _ in plan.relief)
        said.append(
            "WARNING: that may be more memory than there is. "
            + (
                f"Write, in this order, as many as it takes: {settings}."
                if settings
                else "Write shorter documents or thoughts."
            )
        )
    if free < plan.disk_bytes:
        said.append(
            "WARNING: that is more disk than there is. Write a smaller checkpoint.keep, or make"
            " room; a checkpoint that can not be written is said, and the one before it stays."
        )
    return said


def speed_here(config: Config, shapes: ModelShapes, ranks: Ranks, dtype: torch.dtype) -> Speed:
    """Of the ranks' devices, measured by all of them at once; the first rank's for all."""
    return ranks.broadcast(measure_speed(shapes, dtype, ranks.device, Path(config.run.dir)))


def plan_here(
    config: Config,
    opened: Opened,
    ranks: Ranks,
    dtype: tuple[torch.dtype, str],
    speed: Speed | None = None,
    mean_thought_tokens: float | None = None,
) -> Plan:
    """The plan of a run on the devices of its ranks.

    Args:
        speed, mean_thought_tokens: as `plan_run`.
    """
    on_gpu = ranks.device.type == "cuda"
    device_bytes = torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else None
    missing = missing_packages(opened.setup.shapes.scan_packages) if on_gpu else {}
    return plan_run(
        config,
        opened.setup.shapes,
        ranks.world_size,
        device_bytes,
        layout=opened.layout,
        format_tokens=opened.format_tokens,
        dtype=dtype,
        missing_packages=tuple(missing),
        speed=speed,
        mean_thought_tokens=mean_thought_tokens,
    )


def slow_scans(shapes: ModelShapes, device: torch.device, plan: Plan) -> str | None:
    """A sentence for a model whose state-space layers run without the packages that are made for
    them; None where they are there, or on a CPU, which they do not run on."""
    missing = missing_packages(shapes.scan_packages) if device.type == "cuda" else {}
    if not missing:
        return None
    held = f" and hold {format_bytes(plan.plain_scan_bytes)} each" if plan.plain_scan_bytes else ""
    why = "; ".join(f"{first_line(error)}" for error in missing.values())
    return (
        f"WARNING: {shapes.scan_layers} state-space layers run in plain torch, slowly{held}, as"
        f" their packages can not be imported ({why}). Write"
        f" `{how_to_install(tuple(missing))}`."
    )


def refuse_checkpoint(
    checkpoint: Checkpoint, config: Config, opened: Opened, dtype: torch.dtype
) -> list[dict]:
    """Refuse a checkpoint that a run of this config would not continue to the digit; its tensors
    are not looked at.

    Returns:
        settings that differ from its own and may (`changed_settings`).

    Raises:
        CheckpointError, ConfigError, DataError: made by another version, other settings, another
        dtype, tokenizer or data.
    """
    state, setup = checkpoint.state, opened.setup
    lacking = sorted(STATE.optional.keys() - state.keys())
    lacking += sorted(asdict(config).keys() - state.get("config", {}).keys())
    if lacking:
        raise CheckpointError(
            f"{checkpoint.path} was written by another version of this program: "
            f"it has no {', '.join(lacking)}. Resume with that version, or start "
            "a new run with model.path set to its export."
        )
    changes = changed_settings(state["config"], asdict(config), checkpoint.path)
    if state["dtype"] != str(dtype):
        raise ConfigError(
            f"run.resume: {checkpoint.path} was computed in {state['dtype']}, this "
            f"run computes in {dtype}. Write "
            f"engine.dtype={state['dtype'].removeprefix('torch.')}."
        )
    refuse_other_inputs(state["inputs"], setup.checksums(), checkpoint.path)
    setup.stream.refuse_state(state["data"])
    known, panel = len(state["start_logprob"]), opened.panel
    if known and panel is not None and known != len(panel):
        raise CheckpointError(
            f"{checkpoint.path} holds start_logprob of {known} positions, and "
            f"the held-out panel has {len(panel)}. It was made with another "
            "panel, or somebody has changed it."
        )
    return changes


def refuse_new_start(folder: RunFolder, config: Config, ranks: Ranks) -> tuple[int, list[dict]]:
    """Refuse to begin again, at step 0, in the folder of a run without a checkpoint, unless nothing
    that a checkpoint held is lost.

    Returns:
        steps that it has logged, and settings that differ from its own and may.

    Raises:
        ConfigError: other settings, or the run is past its first checkpoint, so there was one, or
        it could not be written.
    """
    every = config.checkpoint.every_n_steps
    before = asdict(load_config(folder.config_yaml))
    changes = changed_settings(before, asdict(config), folder.path)
    steps = ranks.broadcast(_logged_steps(folder) if ranks.is_first else None)
    if 0 < every < steps:
        raise ConfigError(
            f"run.resume: {folder.path} has made {steps} steps, with a checkpoint "
            f"every {every}, and {folder.checkpoints} holds none. "
            "Put one back there, or write run.dir=OTHER run.resume=never for a new "
            "run."
        )
    return steps, changes


def _logged_steps(folder: RunFolder) -> int:
    """The last step in the metrics of a run."""
    step = 0
    if folder.metrics_jsonl.exists():
        for line in json_lines(folder.metrics_jsonl):
            step = line["step"]
    return step


def rehearse(config: Config, opened: Opened, ranks: Ranks) -> list[str]:
    """Ask of folder, weights and checkpoint what a run would, and leave all of them as they are.

    Returns:
        what the run would do, and what was not looked at.

    Raises:
        ConfigError, CheckpointError, DataError: what the run would raise.
    """
    said: list[str] = []
    checkpoint = _checkpoint(config, ranks, said)
    if checkpoint is not None:
        refuse_checkpoint(
            checkpoint, config, opened, run_dtype(config, opened.setup.shapes.width, ranks)[0]
        )
        said.append(f"the run continues from {checkpoint.path} at step {checkpoint.step}")
    if opened.setup.shapes.parameters > CHECKED_PARAMETERS:
        return [
            *said,
            (
                f"weights: not loaded, {opened.setup.shapes.parameters / 1e9:.1f} billion "
                "parameters are too many for a dry run; what only they show is seen when the run "
                "starts"
            ),
        ]
    frozen = load_frozen(opened.setup, ranks)
    lm = frozen.policy.lm
    if checkpoint is not None:
        refuse_other_model(checkpoint, {name: list(p.shape) for name, p in lm.named_parameters()})
    said.append("weights: loaded and checked")
    if config.sampling.engine == "vllm" and config.objective.thinks:
        with frozen.sampler.phase():  # its first: it starts, and is compared with the policy
            said.append("vLLM: started with these weights, and computes the same model")
    return said


def _checkpoint(config: Config, ranks: Ranks, said: list[str]) -> Checkpoint | None:
    """What the run would continue from; `said` gets what the run would say."""
    path = Path(config.run.dir)
    if config.run.resume == "auto" and path.exists():
        folder = open_run_folder(path)
        found = newest_checkpoint(folder.checkpoints, ranks, said.append, changes=False)
        if folder.summary_json.exists():
            said.append(f"{path} is complete: the run would do nothing")
        elif found is None:
            steps, _ = refuse_new_start(folder, config, ranks)
            said.append(
                f"the run begins again at step 0: {path} has no checkpoint and {steps} steps"
            )
        return found
    if obstacle := why_no_run_folder(path):
        raise ConfigError(obstacle)
    return (
        None
        if config.run.resume in ("auto", "never")
        else open_checkpoint(Path(config.run.resume), ranks)
    )
