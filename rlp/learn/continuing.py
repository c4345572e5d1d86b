"""What a run may be continued with: which settings may be others than those that it was made with,
and that what it reads is the same."""

from pathlib import Path

from rlp.config import ConfigError

MAY_CHANGE = {
    "run",
    "engine",
    "sampling",
    "budget",
    "evaluation",
    "checkpoint",
    "logging",
    "model.attention",
    "data.max_bad_fraction",
    "data.held_out",
    "optim.micro_batch_size",
    "optim.thoughts_per_forward",
    "optim.tokens_per_micro_batch",
    "optim.learning_rate",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.final_fraction",
    "optim.grad_clip",
    "optim.spike_factor",
    "optim.spike_window",
}
"""Sections and settings that a continued run may have otherwise: where it runs and how long, how it
is sharded, measured and told, which rows it puts up with, and how large its updates are from here
on."""

MUST_STAY = {
    "run.seed",
    "evaluation.panel_positions",
    "evaluation.selector",
    "evaluation.marker",
    "evaluation.per_document",
    "evaluation.cold_temperature",
}
"""In spite of their section. The dtype that a run computes in must stay too, whatever
`engine.dtype` calls it: it is in the state."""

NOT_TOLD = {"run.dir", "run.resume"}
"""Others in every continued run."""


def changed_settings(saved: dict, config: dict, path: Path) -> list[dict]:
    """The settings of a continued run that are others than those it was made with: `key`, `from`
    and `to` of each.

    What was done stays done; what would make it another run is refused.

    Args:
        saved, config: nested mappings of the two configs.
        path: of the run or checkpoint that is continued.

    Raises:
        ConfigError: a setting that must stay is another one.
    """
    changes = []
    for section, values in config.items():
        for name, value in values.items():
            before = saved.get(section, {}).get(name)
            if before != value:
                changes.append({"key": f"{section}.{name}", "from": before, "to": value})

    refused = [
        f"{change['key']} was {change['from']!r}, is {change['to']!r}"
        for change in changes
        if not _may_change(change["key"])
    ]
    if refused:
        raise ConfigError(
            f"run.resume: {path} was made with other settings: {'; '.join(refused)}. Write the same"
            " values, or start a new run with model.path set to its export."
        )
    return [change for change in changes if change["key"] not in NOT_TOLD]


def _may_change(key: str) -> bool:
    section = key.partition(".")[0]
    return key not in MUST_STAY and (key in MAY_CHANGE or section in MAY_CHANGE)


def refuse_other_inputs(saved: dict[str, str], inputs: dict[str, str], path: Path) -> None:
    """Refuse to continue a run on other inputs than those that its numbers come from.

    Args:
        saved, inputs: checksums by what they are of. What is no longer read need not be there; what
            is read now was there from the start.
        path: of the checkpoint.
    """
    other = [name for name, checksum in inputs.items() if saved.get(name) != checksum]
    if other:
        raise ConfigError(
            f"run.resume: {path} was made with other inputs than those that the config names:"
            f" {', '.join(other)} changed since, or came later. Put them back as they were, or"
            " start a new run with model.path set to its export."
        )
