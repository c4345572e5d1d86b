"""Arms: the config of a run to compare another one with, at the same tokens, FLOPs or seconds.

`rlp match` writes it from a finished run. The arm itself asserts at its end that both have spent
the same (`rlp.compare.budget`).
"""

import copy
from dataclasses import asdict
from pathlib import Path

from rlp.compare.budget import AMOUNTS, amount_spent
from rlp.config import Config, ConfigError, load_config, to_yaml
from rlp.measure.verdict import TOLERANCE
from rlp.process.files import refuse_existing, write_atomically
from rlp.process.json_files import read_json
from rlp.process.run_folder import RunFolder
from rlp.process.schemas import WHOLE_LEDGER

_RLP = {
    "objective.policy_weight": 1.0,
    "objective.predictor_weight": 0.0,
    "objective.kl_weight": 0.0,
    "objective.lm_weight": 0.0,
    "reward.kind": "information_gain",
    "reward.placebo": "none",
    "reward.language_weight": 0.0,
}

_ENTROPY = {"position.selector": "entropy", "position.marker": None}

_UNIFORM = {"position.selector": "uniform", "position.marker": None}

_LM = {**_RLP, "objective.policy_weight": 0.0, "objective.lm_weight": 1.0}

ARMS: dict[str, dict[str, object]] = {
    "cpt": _LM,
    "cpt_replay": _LM,
    "mixed_sft": _LM,
    "greedy_match": {**_RLP, "reward.kind": "greedy_match"},
    "rpt": {**_RLP, **_ENTROPY, "reward.kind": "prefix_match"},
    "rlvr": {**_RLP, "reward.kind": "exact_match"},
    "rlp": _RLP,
    "rlp_lm": {**_RLP, "objective.lm_weight": 0.1},
    "rlp_entropy": {**_RLP, **_ENTROPY},
    "rlp_uniform": {**_RLP, **_UNIFORM},
    "rlp_paper": {
        **_RLP,
        **_UNIFORM,
        "position.per_document": 1,
        "thought.group_size": 16,
        "thought.temperature": 0.7,
        "baseline.kind": "ema",
        "baseline.ema_decay": 0.999,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
    },
    "shuffled_reward": {**_RLP, "reward.placebo": "shuffled_reward"},
    "other_thought": {**_RLP, "reward.placebo": "other_thought"},
    "foreign_thought": {**_RLP, "reward.placebo": "foreign_thought"},
}
"""What makes an arm of a run; everything else stays as it was. cpt: the LM loss on the same
documents. cpt_replay: the same, where some of them hold thoughts of the start, whatever these are
worth. mixed_sft: the LM loss on documents with the start's own best thoughts in them (`rlp splice`
makes both). greedy_match: 1 where the greedy next token is right. rpt: reinforcement pre-training
as published (arXiv 2506.08007): a generated prediction, rewarded for a prefix match and trained, at
the positions of largest entropy. rlvr: the same for the whole target, at the run's own positions.
rlp: the paper's objective, without the LM loss. rlp_lm: with it. rlp_entropy, rlp_uniform: at other
positions. rlp_paper: the paper's positions, group, temperature, teacher and schedule too; its
learning rate (1e-6), batch (512) and budget of a thought (2048) are for models of billions, and
stay the run's. shuffled_reward, other_thought, foreign_thought: placebos."""

KEPT = {"mixed_sft": "best", "cpt_replay": "random"}
"""Arms that read a folder of `rlp splice`, and how its thoughts were kept."""

OTHER_DOCUMENTS, OTHER_SECONDS = 1.1, 1.5
"""How much more a step may spend than the steps of the run did on average: on longer documents and
thoughts; on a busier machine."""


def write_arm(
    run: RunFolder, arm: str, by: str, out: Path, data: Path | None, overrides: list[str]
) -> Config:
    """Write the config of an arm that spends what a finished run has spent.

    Args:
        arm: in `ARMS`.
        by: in `AMOUNTS`.
        out: the YAML file to make; one that exists is refused.
        data: for the arms in `KEPT`, the folder that `rlp splice` made.

    Raises:
        ConfigError: the run is not finished, the arm and the data do not go together, or its steps
            are so large that the nearest number of them may spend more than 1 % more or less.
    """
    refuse_existing(out)
    refuse_unfinished(run)
    if (data is not None) != (arm in KEPT):
        raise ConfigError(
            f"--data goes with the arms {' and '.join(KEPT)}, and they need it. Make the data with:"
            f" rlp splice {run.path} --keep {KEPT.get(arm, 'best')} --out FOLDER"
        )
    amount = amount_spent(read_json(run.ledger_json), by, run.ledger_json)
    ledger, own = read_json(run.ledger_json, WHOLE_LEDGER), load_config(run.config_yaml)

    settings = {
        "run.dir": str(run.path.with_name(f"{run.name}_{arm}_{by}")),
        "run.arm": f"{arm}_{by}",
        "run.resume": "never",
        "match.ledger": str(run.ledger_json),
        "match.by": by,
        **ARMS[arm],
    }
    carried, longer = 0.0, 0
    if data is not None:
        longer = read_spliced(data, KEPT[arm], own)["longest_insert_tokens"]
        carried = read_json(data / "ledger.json", WHOLE_LEDGER)[AMOUNTS[by]]
        settings |= data_settings(data, own.data.max_document_tokens + longer)

    config = with_settings(
        own, settings, {by: int(amount) if by == "tokens" else amount}, overrides
    )
    _refuse_all_positions(arm, config)
    step = step_cost(ledger, own, config, by, longer)
    refuse_coarse(step, amount, carried, by, config.optim.batch_size)
    write_atomically(out, to_yaml(config).encode(), point="match.torn_config")
    return config


def _refuse_all_positions(arm: str, config: Config) -> None:
    """Refuse a selector that has nothing to select."""
    chosen = {**_ENTROPY, **_UNIFORM}.keys() <= ARMS[arm].keys()
    if chosen and config.position.per_document == "all":
        raise ConfigError(
            f"the arm {arm} chooses positions ({config.position.selector}), and the run has"
            " position.per_document: all. Write position.per_document=K behind the command."
        )


def refuse_unfinished(run: RunFolder) -> None:
    """Refuse to match a run that has not come to its end.

    Raises:
        ConfigError: it has not.
    """
    if not run.summary_json.exists() or not run.ledger_json.exists():
        raise ConfigError(
            f"{run.path} is not finished: it has no summary.json and ledger.json, so what it spends"
            " is not known. Run it to its end first."
        )


def read_spliced(data: Path, keep: str, run: Config) -> dict:
    """What a folder that `rlp splice` made tells of itself (`splice.json`).

    Args:
        keep: how its thoughts are to have been kept.
        run: the config of the run that reads it, whose tokens its documents are to be.

    Raises:
        ConfigError: it is none, or half of one; its thoughts were kept otherwise; or its token ids
            are another tokenizer's.
    """
    from rlp.model.setup import ModelSetup  # takes seconds, and the command line reads `ARMS`

    for name in ("documents.jsonl", "ledger.json", "splice.json"):
        if not (data / name).is_file():
            raise ConfigError(
                f"--data: {data} has no {name}; expected a folder that rlp splice made, whole. Make"
                " it again: rlp splice RUN --out FOLDER"
            )
    told = read_json(data / "splice.json")
    if told["keep"] != keep:
        raise ConfigError(
            f"--data: {data} was made with --keep {told['keep']}, and this arm reads thoughts that"
            f" were kept by --keep {keep}. Make its own with: rlp splice RUN --keep {keep} --out"
            " FOLDER"
        )
    if told["vocabulary"] != ModelSetup(run).vocabulary_checksum():
        raise ConfigError(
            f"--data: the token ids of {data} are those of another tokenizer than that of"
            f" {run.model.path}. Splice with a model of the same tokenizer and the same markers."
        )
    return told


def data_settings(data: Path, max_document_tokens: int) -> dict[str, object]:
    """What makes a run read a folder of spliced documents, and carry what they have cost."""
    return {
        "data.train": [str(data / "documents.jsonl")],
        "data.format": "jsonl",
        "data.tokens_field": "tokens",
        "data.append_eos": False,  # the rows are whole documents
        "data.ledger": str(data / "ledger.json"),
        "data.weights": [],
        "data.max_document_tokens": max_document_tokens,
    }


def with_settings(
    run: Config, settings: dict[str, object], budget: dict[str, float], overrides: list[str]
) -> Config:
    """The config of a run with other values (`section.key`), and no budget but the given one."""
    tree = asdict(run)
    tree["budget"] = dict.fromkeys(tree["budget"]) | budget
    for key, value in settings.items():
        section, name = key.split(".")
        tree[section][name] = copy.copy(value)
    return load_config(tree, overrides)


def step_cost(
    ledger: dict, run: Config, arm: Config, by: str, longer: int = 0
) -> tuple[float, float]:
    """Bounds of what a step of an arm will spend, from what the steps of the run have spent: equal
    where that is sure.

    Args:
        ledger: of the run.
        by: in `AMOUNTS`.
        longer: tokens by which a document of the arm may be longer than one of the run.
    """
    batch_size, steps = arm.optim.batch_size, max(ledger["steps"], 1)
    scale = batch_size / run.optim.batch_size
    input_tokens = ledger["input_tokens"] / steps * scale
    longest = input_tokens + batch_size * longer

    if by == "tokens":
        if batch_size == run.optim.batch_size and arm.data == run.data:
            return input_tokens, input_tokens
        return input_tokens / 2, longest * OTHER_DOCUMENTS

    thoughts = _thoughts_of_a_step(arm)
    more_thoughts = thoughts / max(_thoughts_of_a_step(run), 1) / scale
    if by == "paper_flops":
        return 0.0, longest * OTHER_DOCUMENTS + thoughts * arm.thought.max_thought_tokens

    work = max(1.0, more_thoughts)
    if run.objective.thinks and not arm.objective.thinks:
        work = _documents_share(ledger)
    elif arm.objective.thinks and not run.objective.thinks:
        # Every thought with its document, sampled and trained.
        thought_tokens = thoughts * (input_tokens / batch_size + arm.thought.max_thought_tokens)
        work = 1 + 4 / 3 * thought_tokens / input_tokens
    more = {"flops": OTHER_DOCUMENTS, "seconds": OTHER_SECONDS}[by]
    return 0.0, ledger[AMOUNTS[by]] / steps * scale * work * (longest / input_tokens) * more


def _thoughts_of_a_step(config: Config) -> int:
    """At most; 0 where none are sampled."""
    if not config.objective.thinks:
        return 0
    positions = config.position.per_document
    if positions == "all":
        positions = config.data.max_document_tokens
    return config.optim.batch_size * positions * config.thought.group_size


def _documents_share(ledger: dict) -> float:
    """The part of a thinking run's FLOPs that its documents alone would cost: the pass back costs
    twice the one forward."""
    phases = ledger["phases"]
    passes = phases["lm"]["flops"] or 3.5 * phases["teacher"]["flops"]
    return min(1.0, passes / ledger["flops"]) if passes else 1.0


def refuse_coarse(
    step: tuple[float, float], amount: float, carried: float, by: str, batch_size: int
) -> None:
    """Refuse an arm that may end more than 1 % beside its amount: it ends at the nearest step,
    which is half a step away at most.

    Args:
        step: bounds of what a step spends.
        carried: what making the arm's data has spent.
    """
    low, high = step
    steps = max(1, round((amount - carried) / high))
    missed = high / 2 / amount
    if low == high:
        missed = abs(carried + steps * high - amount) / amount
    if missed <= TOLERANCE:
        return

    fitting = int(batch_size * 2 * TOLERANCE * amount / high)
    advice = f"Write optim.batch_size={fitting} behind the command"
    if not fitting:
        advice = (
            "Not even optim.batch_size=1 comes near enough: match a longer run, or by another"
            " amount (--by tokens)"
        )
    raise ConfigError(
        f"an arm of optim.batch_size={batch_size} can not be sure to spend what the run has ({by}"
        f" {amount:.4g}): a step spends up to {high:.3g}, so it would make some"
        f" {steps} steps, and the nearest may be {missed:.1%} off, where {TOLERANCE:.0%} is"
        f" allowed. {advice}."
    )
