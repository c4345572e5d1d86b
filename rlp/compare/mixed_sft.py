"""Mixed SFT in rounds (expert iteration): the model of each round thinks about the next documents,
the best thoughts are spliced in, and the LM loss on them makes the model of the next round.

All rounds together spend what a finished RLP run has spent: each ends at its share of that amount,
thoughts that were sampled and thrown away included, as the ledger is carried from round to round.

Every round begins with a fresh AdamW: a round is a training of its own on other data, its moments
of the round before would be those of another loss, and an export is all that has to be kept. The
schedule of the learning rate is the round's own too.

A folder of rounds holds
    mixed_sft.json      what was asked for
    round_R/spliced     what `rlp splice` makes, with the model of the round before
    round_R/run         the run on it; `export` of the last round is the arm's model, and its
                        ledger.json the whole cost
    rounds.jsonl        the held-out panel of the RLP run after each round, against the model that
                        the first round began with, and what had been spent by then

Started again, it keeps each finished round, goes on with a run that was interrupted, and makes
anew what was spliced in half.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlp.compare.arms import (
    ARMS,
    data_settings,
    read_spliced,
    refuse_coarse,
    refuse_unfinished,
    step_cost,
    with_settings,
)
from rlp.compare.budget import AMOUNTS, amount_spent
from rlp.compare.splice import Splicing, splice
from rlp.config import Config, ConfigError, load_config, require, require_one_of
from rlp.measure.frozen import measure_model
from rlp.model.setup import PanelSetup
from rlp.process.exit_codes import DONE, NOT_MATCHED
from rlp.process.files import new_folder, write_atomically
from rlp.process.json_files import read_json, write_json
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder
from rlp.process.schemas import PLAIN, WHOLE_LEDGER, Table

LOSSES = {"all": None, "thought_and_target": "loss_spans"}
"""What a round takes its loss on, and `data.loss_field` for it."""


@dataclass(frozen=True, slots=True)
class MixedSft:
    """What is asked for."""

    run: str
    """The folder of the finished RLP run whose cost is spent."""
    documents: int
    """That each round thinks about."""
    learning_rate: float
    rounds: int = 3
    loss: str = "thought_and_target"
    """In `LOSSES`."""
    by: str = "flops"
    """What the two spend alike; in `rlp.compare.budget.AMOUNTS`."""
    overrides: tuple[str, ...] = ()
    """Settings of all rounds, `section.key=value`."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "--rounds", self.rounds, "must be at least 1")
        require(self.documents >= 1, "--documents", self.documents, "must be at least 1")
        require(self.learning_rate > 0, "--learning-rate", self.learning_rate, "must be above 0")
        require_one_of("--loss", self.loss, tuple(LOSSES))
        require_one_of("--by", self.by, tuple(AMOUNTS))


def iterate(
    asked: MixedSft, out: Path, ranks: Ranks, train: Callable[[Config], int]
) -> tuple[int, RunFolder]:
    """Make the rounds that are not made yet. A collective.

    Args:
        out: the folder of the rounds; one of the same asking is continued.
        train: runs a config to its end, or continues it; its exit code.

    Returns:
        the exit code, and the run of the last round that was made: where the code is 0, the arm.

    Raises:
        ConfigError: the run is not finished, the folder is another's, or splicing leaves nothing to
            train with.
    """
    iteration = Iteration.of(asked, out)
    iteration.refuse_taken()
    _open_folder(asked, out, ranks)
    for number in range(1, asked.rounds + 1):
        run = iteration.run(number)
        if number == asked.rounds or not _is_there(run.summary_json, ranks):
            code = train(iteration.spliced_config(number, ranks))
            if code not in (DONE, NOT_MATCHED):
                return code, run
        iteration.measure(number, ranks)
    return code, run


@dataclass(frozen=True, slots=True)
class Iteration:
    """The rounds of a folder."""

    asked: MixedSft
    own: Config
    """Of the RLP run, with the settings that were asked for."""
    reference: Path
    """The RLP run's ledger.json."""
    amount: float
    """What it has spent."""
    out: Path

    @classmethod
    def of(cls, asked: MixedSft, out: Path) -> "Iteration":
        run = RunFolder(Path(asked.run))
        refuse_unfinished(run)
        own = load_config(run.config_yaml, list(asked.overrides))
        amount = amount_spent(read_json(run.ledger_json), asked.by, run.ledger_json)
        return cls(asked, own, run.ledger_json, amount, out)

    def run(self, number: int) -> RunFolder:
        """Of a round."""
        return RunFolder(self.out / f"round_{number}" / "run")

    def model(self, number: int) -> str | None:
        """That a round begins with; None for the RLP run's own start."""
        return None if number == 1 else str(self.run(number - 1).export)

    def spliced_config(self, number: int, ranks: Ranks) -> Config:
        """The config of the run of a round, whose data is made where it is not there."""
        data = self.out / f"round_{number}" / "spliced"
        if not _is_there(data, ranks):
            before = None if number == 1 else self.run(number - 1).ledger_json
            skip = (number - 1) * self.asked.documents
            how = Splicing(model=self.model(number), skip=skip, ledger=before)
            splice(self.own, self.asked.documents, data, ranks, how)
        told = read_spliced(data, "best", self.own)
        spent = read_json(data / "ledger.json", WHOLE_LEDGER)[AMOUNTS[self.asked.by]]
        config = self._config(number, data, told["longest_insert_tokens"])
        self._refuse_spent(number, spent)
        if number == 1:
            reference = read_json(self.reference, WHOLE_LEDGER)
            longer = told["longest_insert_tokens"]
            step = step_cost(reference, self.own, config, self.asked.by, longer)
            refuse_coarse(step, self.amount, spent, self.asked.by, config.optim.batch_size)
        return config

    def share(self, number: int) -> float:
        """What is spent by the end of a round."""
        return self.amount * number / self.asked.rounds

    def _config(self, number: int, data: Path, longer: int) -> Config:
        """Of the run of a round.

        Args:
            longer: tokens by which its documents may be longer than those of the RLP run.
        """
        share, by = self.share(number), self.asked.by
        budget = {by: int(share) if by == "tokens" else share}
        return with_settings(self.own, self._settings(number, data, longer), budget, [])

    def _settings(self, number: int, data: Path, longer: int) -> dict[str, object]:
        """What a round sets: its data with all that this says, and no panel, which is measured for
        all rounds alike (`measure`)."""
        asked, last = self.asked, number == self.asked.rounds
        settings: dict[str, object] = {
            **ARMS["mixed_sft"],
            **data_settings(data, self.own.data.max_document_tokens + longer),
            "data.held_out": [],
            "data.loss_field": LOSSES[asked.loss],
            "run.dir": str(self.run(number).path),
            "run.arm": "mixed_sft",
            "run.resume": "auto",
            "optim.learning_rate": asked.learning_rate,
            "match.ledger": str(self.reference) if last else None,
            "match.by": asked.by,
        }
        if model := self.model(number):
            settings |= {"model.path": model, "model.tokenizer": None, "model.init": "pretrained"}
        return settings

    def refuse_taken(self) -> None:
        """Refuse overrides of what the rounds set themselves.

        Raises:
            ConfigError: there is one.
        """
        given = {override.partition("=")[0] for override in self.asked.overrides}
        ours = self._settings(2, self.out, 0).keys() - {"data.held_out"}
        if taken := sorted(name for name in given if name in ours or name.startswith("budget.")):
            raise ConfigError(
                f"{taken[0]} is set by the rounds themselves. Leave it out, or use the option for"
                " it (--learning-rate, --loss, --by, --out)."
            )

    def _refuse_spent(self, number: int, spent: float) -> None:
        """Refuse documents whose thoughts cost as much as a round may."""
        asked, share = self.asked, self.share(number)
        if spent >= share:
            raise ConfigError(
                f"--documents {asked.documents}: with their thoughts {spent:.4g} {asked.by} are"
                f" spent before round {number} trains, and it may end at {share:.4g}, {number} of"
                f" {asked.rounds} parts of what {self.reference.parent} has spent. Write fewer"
                " documents, and another --out."
            )

    def measure(self, number: int, ranks: Ranks) -> None:
        """Add a round to rounds.jsonl: the panel with its model, if the RLP run has one."""
        path = self.out / "rounds.jsonl"
        lines = ranks.broadcast(path.read_text().splitlines() if path.is_file() else [])
        if not self.own.data.held_out or len(lines) >= number:
            return
        model = replace(
            self.own.model, path=str(self.run(number).export), tokenizer=None, init="pretrained"
        )
        setup = PanelSetup(replace(self.own, model=model), lambda text: None)
        means = measure_model(setup, ranks, start=self.own.model.path).means
        ledger = read_json(self.run(number).ledger_json, WHOLE_LEDGER)
        amounts = {name: ledger[name] for name in AMOUNTS.values()}
        lines = [*lines, json.dumps({"round": number, **amounts, **means})]
        if ranks.is_first:
            text = "".join(f"{line}\n" for line in lines)
            write_atomically(path, text.encode(), point="mixed_sft.torn_rounds")


def _open_folder(asked: MixedSft, out: Path, ranks: Ranks) -> None:
    """Make the folder of the rounds, or find that it is of the same asking."""
    told = out / "mixed_sft.json"
    wanted = {**asdict(asked), "overrides": list(asked.overrides)}
    if not _is_there(out, ranks):
        if ranks.is_first:
            with new_folder(out, point="mixed_sft.before_rename") as new:
                write_json(new / "mixed_sft.json", wanted, point="mixed_sft.torn_asked")
        return
    if not told.is_file():
        raise ConfigError(
            f"--out: {out} is there and is no folder of rlp mixed-sft: it has no mixed_sft.json."
            " Write another path."
        )
    before = read_json(told, Table(PLAIN))
    for name, value in wanted.items():
        if before.get(name) != value:
            raise ConfigError(
                f"--out: {out} was begun with {name} {before.get(name)!r}, got {value!r}. Write"
                " what it was begun with to continue it, or another path."
            )


def _is_there(path: Path, ranks: Ranks) -> bool:
    """Whether the first rank sees it, on every rank."""
    return ranks.broadcast(path.exists())
