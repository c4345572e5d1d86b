"""Matched arms: the run that a finished run is compared with, at the same tokens, FLOPs or seconds.

`write_match` turns a finished run into the config of an arm with the same budget; the arm asserts at its
end that the two ledgers agree to 1 % and shows them side by side.
"""

import copy
import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path

from rlp.config import Config, ConfigError, load_config, to_yaml
from rlp.files import write_atomically
from rlp.forms import WHOLE_LEDGER
from rlp.run_folder import DamagedFileError, RunFolder, read_json

TOLERANCE = 0.01
"""Largest relative difference of what two matched runs have spent."""

_RLP = {"objective.policy_weight": 1.0, "objective.predictor_weight": 0.0, "objective.kl_weight": 0.0, "objective.lm_weight": 0.0,
        "reward.kind": "information_gain", "reward.placebo": "none"}
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
"""What makes an arm of a run; everything else stays as it was. cpt: the LM loss on the same documents. mixed_sft: the LM loss on documents
with the start's own best thoughts in them (`rlp splice`). rpt: reward for the right greedy token. rlp: the paper. rlp_lm: with LM loss.
shuffled_reward, foreign_thought: placebos."""

AMOUNTS = {"tokens": "input_tokens", "flops": "flops", "paper_flops": "paper_flops", "seconds": "seconds"}
"""What two runs may spend alike, and its name in `ledger.json`."""


def write_match(run: RunFolder, arm: str, by: str, out: Path, data: Path | None, overrides: list[str]) -> Config:
    """Write the config of an arm that spends what a finished run has spent.

    Args:
        arm: in `ARMS`.
        by: in `AMOUNTS`.
        out: the YAML file to make; one that exists is refused.
        data: for the arm mixed_sft, the folder that `rlp splice` made.

    Raises:
        ConfigError: the run is not finished, or the arm and the data do not go together.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists and is never written over. Write another file.")
    if not run.summary_json.exists() or not run.ledger_json.exists():
        raise ConfigError(f"{run.path} is not finished: it has no summary.json and ledger.json, so what it spends is not known. Run it to its end first.")
    if (data is not None) != (arm == "mixed_sft"):
        raise ConfigError(f"--data goes with the arm mixed_sft, and it needs it. Make the data with: rlp splice {run.path} --out FOLDER")
    amount = _amount(read_json(run.ledger_json), by, run.ledger_json)
    tree = asdict(load_config(run.config_yaml))
    settings = {"run.dir": str(run.path.with_name(f"{run.name}_{arm}_{by}")), "run.arm": f"{arm}_{by}", "run.resume": "never",
                "match.ledger": str(run.ledger_json), "match.by": by, **ARMS[arm]}
    if data is not None:
        longest = tree["data"]["max_document_tokens"] + read_json(data / "splice.json")["longest_insert_tokens"]
        settings |= {"data.train": [str(data / "documents.jsonl")], "data.format": "jsonl", "data.tokens_field": "tokens", "data.ledger": str(data / "ledger.json"),
                     "data.weights": [], "data.max_document_tokens": longest}
    tree["budget"] = {name: None for name in tree["budget"]} | {by: int(amount) if by == "tokens" else amount}
    for key, value in settings.items():
        section, name = key.split(".")
        tree[section][name] = copy.copy(value)
    config = load_config(tree, overrides)
    write_atomically(out, to_yaml(config).encode(), point="match.torn_config")
    return config


def _amount(ledger: dict, by: str, path: Path | str) -> float:
    if by == "flops" and ledger.get("counted_without"):
        raise ConfigError(f"{path}: the FLOPs of this model are counted without {', '.join(ledger['counted_without'])}, whose cost is not known, so two runs can not be "
                          "matched by them. Write --by tokens or --by seconds (in a config: match.by and its budget).")
    amount = ledger.get(AMOUNTS[by])
    if amount is None or not amount > 0:
        raise ConfigError(f"{path}: {AMOUNTS[by]} is {amount!r}; expected what a finished run has spent.")
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
        rows = [(name, self.other[name], own[name]) for name in ("steps", "input_tokens", "flops", "paper_flops", "paper_flops_sampled", "seconds")]
        rows += [(f"{phase} flops", self.other["phases"][phase]["flops"], own["phases"][phase]["flops"]) for phase in own["phases"] if phase in self.other["phases"]]
        lines += [f"{name:<24}{theirs:>14.4g}{ours:>14.4g}{ours / theirs if theirs else float('nan'):>9.3f}" for name, theirs, ours in rows if theirs or ours]
        verdict = "matched" if self.holds(own) else "NOT MATCHED: the two are no comparison. Smaller steps (optim.batch_size) come nearer"
        return "\n".join([*lines, f"{AMOUNTS[self.by]}: ratio {self.ratio(own):.4f}, allowed 1 +- {TOLERANCE:g}: {verdict}"])


def open_match(config: Config) -> Match | None:
    """The match that a config asks for, or None.

    Raises:
        ConfigError: its ledger can not be read, or holds another amount than the budget.
    """
    path = config.match.ledger
    if path is None:
        return None
    try:
        other = read_json(Path(path).resolve(), WHOLE_LEDGER)  # whoever writes the path may name a link
    except (OSError, DamagedFileError) as error:
        raise ConfigError(f"match.ledger: {path} can not be read: {error}. Write the ledger.json of the finished run, or match.ledger=null.") from error
    amount, limit = _amount(other, config.match.by, f"match.ledger: {path}"), dataclasses.asdict(config.budget)[config.match.by]
    if abs(limit / amount - 1) > TOLERANCE:
        raise ConfigError(f"budget.{config.match.by}: must be what {path} says, {amount:.6g}, got {limit:.6g}.")
    return Match(config.match.by, other)
