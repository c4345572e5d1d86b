"""Matched arms: the run that a finished run is compared with, at the same tokens, FLOPs or seconds.

`write_match` turns a finished run into the config of an arm with the same budget; the arm asserts
at its end that the two ledgers agree to 1 % and shows them side by side.
"""

import copy
import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path

from rlp.config import Config, ConfigError, load_config, to_yaml
from rlp.measure.verdict import TOLERANCE
from rlp.process.files import write_atomically
from rlp.process.json_files import DamagedFileError, read_json
from rlp.process.run_folder import RunFolder
from rlp.process.schemas import WHOLE_LEDGER

_RLP = {
    "objective.policy_weight": 1.0,
    "objective.predictor_weight": 0.0,
    "objective.kl_weight": 0.0,
    "objective.lm_weight": 0.0,
    "reward.kind": "information_gain",
    "reward.placebo": "none",
}

_LM = {**_RLP, "objective.policy_weight": 0.0, "objective.lm_weight": 1.0}

ARMS: dict[str, dict[str, object]] = {
    "cpt": _LM,
    "mixed_sft": _LM,
    "rpt": {**_RLP, "reward.kind": "greedy_match"},
    "rlp": _RLP,
    "rlp_lm": {**_RLP, "objective.lm_weight": 0.1},
    "shuffled_reward": {**_RLP, "reward.placebo": "shuffled_reward"},
    "foreign_thought": {**_RLP, "reward.placebo": "foreign_thought"},
}
"""What makes an arm of a run; everything else stays as it was. cpt: the LM loss on the same
documents. mixed_sft: the LM loss on documents with the start's own best thoughts in them (`rlp
splice`). rpt: reward for the right greedy token. rlp: the paper. rlp_lm: with LM loss.
shuffled_reward, foreign_thought: placebos."""

AMOUNTS = {
    "tokens": "input_tokens",
    "flops": "flops",
    "paper_flops": "paper_flops",
    "seconds": "seconds",
}
"""What two runs may spend alike, and its name in `ledger.json`."""


def write_match(
    run: RunFolder, arm: str, by: str, out: Path, data: Path | None, overrides: list[str]
) -> Config:
    """Write the config of an arm that spends what a finished run has spent.

    Args:
        arm: in `ARMS`.
        by: in `AMOUNTS`.
        out: the YAML file to make; one that exists is refused.
        data: for the arm mixed_sft, the folder that `rlp splice` made.

    Raises:
        ConfigError: the run is not finished, the arm and the data do not go together, or its steps
            are so large that the nearest number of them may spend more than 1 % more or less.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists and is never written over. Write another file.")
    if not run.summary_json.exists() or not run.ledger_json.exists():
        raise ConfigError(
            f"{run.path} is not finished: it has no summary.json and ledger.json, so what it spends"
            " is not known. Run it to its end first."
        )
    if (data is not None) != (arm == "mixed_sft"):
        raise ConfigError(
            "--data goes with the arm mixed_sft, and it needs it. Make the data with: rlp splice"
            f" {run.path} --out FOLDER"
        )
    amount = _amount(read_json(run.ledger_json), by, run.ledger_json)
    ledger, own = read_json(run.ledger_json, WHOLE_LEDGER), load_config(run.config_yaml)
    tree = asdict(own)
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
        carried, longer = (
            read_json(data / "ledger.json", WHOLE_LEDGER)[AMOUNTS[by]],
            read_json(data / "splice.json")["longest_insert_tokens"],
        )
        longest = tree["data"]["max_document_tokens"] + longer
        settings |= {
            "data.train": [str(data / "documents.jsonl")],
            "data.format": "jsonl",
            "data.tokens_field": "tokens",
            "data.ledger": str(data / "ledger.json"),
            "data.weights": [],
            "data.max_document_tokens": longest,
        }
    tree["budget"] = dict.fromkeys(tree["budget"]) | {by: int(amount) if by == "tokens" else amount}
    for key, value in settings.items():
        section, name = key.split(".")
        tree[section][name] = copy.copy(value)
    config = load_config(tree, overrides)
    _refuse_coarse(
        step_cost(ledger, own, config, by, longer), amount, carried, by, config.optim.batch_size
    )
    write_atomically(out, to_yaml(config).encode(), point="match.torn_config")
    return config


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
    steps, shared = max(ledger["steps"], 1), arm.optim.batch_size / run.optim.batch_size
    document_tokens = ledger["input_tokens"] / steps / run.optim.batch_size
    input_tokens = ledger["input_tokens"] / steps * shared
    same = arm.optim.batch_size == run.optim.batch_size and arm.data == run.data
    longest = input_tokens + arm.optim.batch_size * longer
    if by == "tokens":
        return (
            (input_tokens, input_tokens) if same else (input_tokens / 2, longest * OTHER_DOCUMENTS)
        )
    per_document = (
        run.data.max_document_tokens
        if arm.position.per_document == "all"
        else arm.position.per_document
    )
    thoughts = (
        arm.optim.batch_size * per_document * arm.thought.group_size if arm.objective.thinks else 0
    )
    if by == "paper_flops":
        return 0.0, longest * OTHER_DOCUMENTS + thoughts * arm.thought.max_thought_tokens
    spent, phases = ledger[AMOUNTS[by]] / steps * shared, ledger["phases"]
    share = 1.0
    if (
        run.objective.thinks and not arm.objective.thinks
    ):  # its documents alone; their pass back costs twice the one forward
        passes = phases["lm"]["flops"] or 3.5 * phases["teacher"]["flops"]
        share = min(1.0, passes / ledger["flops"]) if passes else 1.0
    elif (
        arm.objective.thinks and not run.objective.thinks
    ):  # every thought with its document, sampled and trained
        share = (
            1
            + 4
            / 3
            * thoughts
            * (1 + arm.thought.max_thought_tokens / document_tokens)
            / arm.optim.batch_size
        )
    return (
        0.0,
        spent
        * share
        * (longest / input_tokens)
        * {"flops": OTHER_DOCUMENTS, "seconds": OTHER_SECONDS}[by],
    )


OTHER_DOCUMENTS, OTHER_SECONDS = 1.1, 1.5
"""How much more a step may spend than the steps of the run did on average: on longer documents and
thoughts; on a busier machine."""


def _refuse_coarse(
    step: tuple[float, float], amount: float, carried: float, by: str, batch_size: int
) -> None:
    """Refuse an arm that may end more than 1 % beside its amount: it ends at the nearest step,
    which is half a step away at most.

    Args:
        step: bounds of what a step spends.
        carried: what making the arm's data has spent.
    """
    low, high = step
    missed = high / 2 / amount
    if low == high:
        missed = abs(carried + max(1, round((amount - carried) / high)) * high - amount) / amount
    if missed <= TOLERANCE:
        return
    fitting = int(batch_size * 2 * TOLERANCE * amount / high)
    advice = (
        f"Write optim.batch_size={fitting} behind the command"
        if fitting
        else (
            "Not even optim.batch_size=1 comes near enough: match a longer run, or by another"
            " amount (--by tokens)"
        )
    )
    raise ConfigError(
        f"an arm of optim.batch_size={batch_size} can not be sure to spend what the run has ({by}"
        f" {amount:.4g}): a step spends up to {high:.3g}, so it would make some"
        f" {max(1, round((amount - carried) / high))} steps, and the nearest may be {missed:.1%}"
        f" off, where {TOLERANCE:.0%} is allowed. {advice}."
    )


def _amount(ledger: dict, by: str, path: Path | str) -> float:
    if by == "flops" and ledger.get("counted_without"):
        raise ConfigError(
            f"{path}: the FLOPs of this model are counted without"
            f" {', '.join(ledger['counted_without'])}, whose cost is not known, so two runs can not"
            " be matched by them. Write --by tokens or --by seconds (in a config: match.by and its"
            " budget)."
        )
    amount = ledger.get(AMOUNTS[by])
    if amount is None or not amount > 0:
        raise ConfigError(
            f"{path}: {AMOUNTS[by]} is {amount!r}; expected what a finished run has spent."
        )
    return amount


@dataclass(frozen=True, slots=True)
class Match:
    """What this run is to spend, and the ledger it is taken from."""

    by: str
    other: dict

    def ratio(self, own: dict) -> float:
        """What this run has spent over what the other one has."""
        return own[AMOUNTS[self.by]] / self.other[AMOUNTS[self.by]]

    def holds(self, own: dict) -> bool:
        """Whether the two agree to 1 %."""
        return abs(self.ratio(own) - 1) <= TOLERANCE

    def table(self, own: dict) -> str:
        """Both ledgers, line by line."""
        lines = [f"{'ledger':<24}{'matched run':>14}{'this run':>14}{'ratio':>9}"]
        rows = [
            (name, self.other[name], own[name])
            for name in (
                "steps",
                "input_tokens",
                "flops",
                "paper_flops",
                "paper_flops_sampled",
                "seconds",
            )
        ]
        rows += [
            (f"{phase} flops", self.other["phases"][phase]["flops"], own["phases"][phase]["flops"])
            for phase in own["phases"]
            if phase in self.other["phases"]
        ]
        lines += [
            f"{name:<24}{theirs:>14.4g}{ours:>14.4g}{ours / theirs if theirs else float('nan'):>9.3f}"
            for name, theirs, ours in rows
            if theirs or ours
        ]
        verdict = (
            "matched"
            if self.holds(own)
            else (
                "NOT MATCHED: the two are no comparison. Smaller steps (optim.batch_size) come"
                " nearer"
            )
        )
        return "\n".join(
            [
                *lines,
                (
                    f"{AMOUNTS[self.by]}: ratio {self.ratio(own):.4f}, allowed 1 +- {TOLERANCE:g}:"
                    f" {verdict}"
                ),
            ]
        )


def open_match(config: Config) -> Match | None:
    """The match that a config asks for, or None.

    Raises:
        ConfigError: its ledger can not be read, or holds another amount than the budget.
    """
    path = config.match.ledger
    if path is None:
        return None
    try:
        other = read_json(
            Path(path).resolve(), WHOLE_LEDGER
        )  # whoever writes the path may name a link
    except (OSError, DamagedFileError) as error:
        raise ConfigError(
            f"match.ledger: {path} can not be read: {error}. Write the ledger.json of the finished"
            " run, or match.ledger=null."
        ) from error
    amount, limit = (
        _amount(other, config.match.by, f"match.ledger: {path}"),
        dataclasses.asdict(config.budget)[config.match.by],
    )
    if abs(limit / amount - 1) > TOLERANCE:
        raise ConfigError(
            f"budget.{config.match.by}: must be what {path} says, {amount:.6g}, got {limit:.6g}."
        )
    return Match(config.match.by, other)
