"""Documents with a model's own thoughts spliced into them, for the arms mixed SFT and CPT with
thought replay.

The control that costs no reinforcement: a model samples G thoughts at each position of a document,
the one with the largest information gain over its own no-think prediction is kept, and the LM loss
is taken on the document with those thoughts in it. Where no thought of a group helps, none is put
there. For thought replay one thought is sampled and kept whatever it is worth, in a part of the
documents: what a model trains on that it may not forget to think.

Every thought is sampled and rewarded in the document as it was, without the thoughts that are put
in before it: what a second thought is worth behind a first is not measured.

A folder of spliced documents holds
    documents.jsonl   a line for each document (or each position, `Splicing.lines`):
                      {"tokens", "text" (to read), "document", "positions", "with_thought",
                      "rewards", "group_rewards" (of each position; null where nothing is
                      rewarded), "loss_spans" (thoughts and their targets), "target_spans"}
    ledger.json       what making them has cost, and what was carried; a run on them begins with it
                      (`data.ledger`)
    splice.json       counts, the longest insert, how thoughts were kept, and the vocabulary
    config.yaml       the config that they were made by

`data.loss_field: loss_spans` takes the LM loss on thoughts and targets alone; what the model has
not written, the open marker and the close marker of a thought that reached its budget, is in
neither list.

Dimensions
    M  positions;  G  thoughts per position
"""

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.compare.inserts import Insert, spans_of, splice_in
from rlp.config import Config, ConfigError, require, require_one_of, to_yaml
from rlp.data.batches import Batches
from rlp.data.documents import Document
from rlp.data.noise import PLAIN_NOISE, keyed_noise
from rlp.data.positions import Positions, choose_positions
from rlp.data.selectors import open_selector
from rlp.measure.frozen import load_frozen
from rlp.measure.ledger import Ledger
from rlp.measure.panel_scoring import ThinkingModel
from rlp.model.loading import choose_layout
from rlp.model.scoring import by_document, difficulty, score
from rlp.model.setup import ModelSetup, RunSetup
from rlp.model.thoughts import Thoughts
from rlp.objective import information_gain, log_evidence
from rlp.process.console import visible_text
from rlp.process.files import new_folder, refuse_existing, write_new
from rlp.process.json_files import read_json, write_json
from rlp.process.outside import Part
from rlp.process.ranks import Ranks
from rlp.process.schemas import WHOLE_LEDGER
from rlp.sampling.rollout import NoiseKey
from rlp.step.micro_batch import MicroBatch, in_order
from rlp.step.packing import Cutter

KEEP, LINES = ("best", "random"), ("document", "position")


@dataclass(frozen=True, slots=True)
class Splicing:
    """Which thoughts of which model are put into which documents."""

    model: str | None = None
    """Hugging Face folder of the model that thinks, such as the export of an earlier round, with
    the tokenizer of the config's. None: the config's own."""
    skip: int = 0
    """Documents passed over first, so that a round reads others than the rounds before it."""
    keep: str = "best"
    """`best`: of G thoughts that with the largest reward, where that is above 0. `random`: the only
    one that is sampled; nothing is rewarded."""
    plain_share: float = 0.0
    """With `random`: the share of the documents that stay as they are, and cost nothing."""
    lines: str = "document"
    """`document`: all thoughts of a document in one line. `position`: a line for each position,
    with its thought alone."""
    ledger: Path | None = None
    """ledger.json of the round before, whose cost is counted on."""

    def __post_init__(self) -> None:
        require_one_of("--keep", self.keep, KEEP)
        require_one_of("--lines", self.lines, LINES)
        require(self.skip >= 0, "--skip", self.skip, "must be at least 0")
        require(
            0 <= self.plain_share < 1, "--plain-share", self.plain_share, "is a share from 0 to 1"
        )
        require(
            self.plain_share == 0 or self.keep == "random",
            "--plain-share",
            self.plain_share,
            "goes with --keep random; of the best thoughts those that do not help are left out",
        )


def splice(
    config: Config, num_documents: int, out: Path, ranks: Ranks, how: Splicing = Splicing()
) -> dict:
    """Make a folder of spliced documents with the model of a config. A collective: each rank thinks
    about its documents of each batch, and the first one writes.

    The folder is the same for any number of ranks: documents that are scored together in one
    process are so in several.

    Args:
        config: of an RLP run; its model, training data, positions, thoughts and micro-batches
            count.
        num_documents: documents to read, in the order that a run reads them.
        out: folder to make; one that exists is refused.

    Returns:
        what `splice.json` holds.

    Raises:
        ConfigError: the folder exists, or the model reads other tokens, or gives no numbers
            (`refuse_unusable`).
        PartError: a selector from outside chooses what may not be chosen.
    """
    refuse_existing(out)

    def say(text: str) -> None:
        if ranks.is_first:
            print(visible_text(text))

    config = with_model(config, how.model)
    setup = RunSetup(config, warn=say)
    for note in setup.marker_notes():
        say(note)
    ledger = _begin_ledger(setup, how.ledger)
    selector = open_selector(config.position.selector)
    splicer = Splicer(setup, load_frozen(setup, ranks), selector, ledger, ranks, how)
    lines = splicer.splice(num_documents)

    told = {**_counts(lines, how), "vocabulary": setup.vocabulary_checksum()}
    if ranks.is_first:
        text = "".join(line.text for line in lines)
        with new_folder(out, point="splice.before_rename") as new:
            write_new(new / "config.yaml", to_yaml(config).encode(), point="splice.torn_config")
            write_new(new / "documents.jsonl", text.encode(), point="splice.torn_documents")
            write_json(new / "ledger.json", splicer.ledger.to_json(), point="splice.torn_ledger")
            write_json(new / "splice.json", told, point="splice.torn_counts")
    return told


def with_model(config: Config, path: str | None) -> Config:
    """The config with another model, which brings its tokenizer.

    Raises:
        ConfigError: it reads other tokens than that of the config.
    """
    if path is None:
        return config
    model = replace(config.model, path=path, tokenizer=None, init="pretrained")
    changed = replace(config, model=model)
    if ModelSetup(changed).tokenizer.get_vocab() != ModelSetup(config).tokenizer.get_vocab():
        raise ConfigError(
            f"--model: the tokenizer of {path} is not that of {config.model.path}, so its thoughts"
            " are other tokens. Write a model that was trained from that one, such as the export of"
            " an earlier round."
        )
    return changed


def _begin_ledger(setup: RunSetup, before: Path | None) -> Ledger:
    """A ledger that begins with what earlier rounds have cost."""
    ledger = Ledger(setup.shapes)
    if before is not None:
        try:
            ledger.carry(read_json(before.resolve(), WHOLE_LEDGER))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--ledger: {before} can not be read: {error}. Write the ledger.json of the round"
                " before."
            ) from error
    return ledger


def refuse_unusable(config: Config, documents: list[int]) -> None:
    """Refuse a model that gives rewards that are not finite.

    Args:
        documents: ids of those for which it does.

    Raises:
        ConfigError: there are some.
    """
    if documents:
        more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
        raise ConfigError(
            f"model.path: {config.model.path!r} gives rewards that are not finite, for documents"
            f" {documents[:8]}{more}. Its weights, or the logits they lead to, are of no use; write"
            " another checkpoint."
        )


@dataclass(frozen=True, slots=True)
class Line:
    """A line of documents.jsonl, and what is counted of it."""

    text: str
    num_thoughts: int
    """That are put in."""
    group_rewards: list[list[float]] | None
    """[M, G] nats, of each position; None where nothing is rewarded."""
    num_positions: int
    insert_tokens: int


@dataclass(frozen=True, slots=True)
class Splicer:
    """What documents are spliced with."""

    setup: RunSetup
    model: ThinkingModel
    selector: Part
    """Of positions, by the difficulty for this model where it needs one."""
    ledger: Ledger
    ranks: Ranks
    how: Splicing

    def splice(self, num_documents: int) -> list[Line]:
        """The lines of so many documents, behind those that are passed over."""
        config, lines = self.setup.config, []
        size, skip = config.optim.batch_size, self.how.skip
        stream = self.setup.stream
        reading = Batches(stream, size, self.ranks, together=config.optim.micro_batch_size)
        with closing(reading):
            for start in range(0, skip, size):
                reading.next_share(min(size, skip - start))
            first = 1 - -skip // size  # noise is keyed by the step: no two rounds share one
            for step, start in enumerate(range(0, num_documents, size), start=first):
                documents = reading.next_share(min(size, num_documents - start))
                spliced, unusable = zip(*self.ranks.gather(self.splice_step(step, documents)))
                refuse_unusable(config, [id for of_rank in unusable for id in of_rank])
                lines += [line for of_rank in spliced for line in of_rank]
        return lines

    @torch.no_grad()
    def splice_step(self, step: int, documents: list[Document]) -> tuple[list[Line], list[int]]:
        """The lines of this rank's documents of a step, of which there may be none, and the ids of
        documents that have none, as their rewards are not finite; what they cost is added to the
        ledger. A collective."""
        thinking = [document for document in documents if not self._is_plain(step, document)]
        positions = thoughts = rewards = None
        if thinking:
            positions = self._choose(step, thinking)
        with self.ledger.time("decode"), self.model.sampler.phase():
            if thinking:
                thoughts = self._think(step, thinking, positions)
        if thinking and self.how.keep == "best":
            rewards = self._rewards(thinking, positions, thoughts)

        lines, unusable, number = [], [], 0
        for document in documents:
            found: list[Found] = []
            if number < len(thinking) and document is thinking[number]:
                found = self._found(positions, thoughts, rewards, number)
                number += 1
            if all(at.is_finite for at in found):
                lines += self._lines(document, found)
            else:
                unusable.append(document.id)
        self.ledger.add_documents(sum(len(document.tokens) for document in documents))
        self.ledger.close_step(self.ranks)
        return lines, unusable

    def _is_plain(self, step: int, document: Document) -> bool:
        """Whether a document stays as it is."""
        noise = keyed_noise(
            seed=self.setup.config.run.seed,
            purpose=PLAIN_NOISE,
            step=step,
            document=document.id,
            occurrence=document.occurrence,
        )
        return bool(noise.random() < self.how.plain_share)

    def _found(
        self, positions: Positions, thoughts: Thoughts, rewards: np.ndarray | None, number: int
    ) -> list["Found"]:
        """What the positions of a document that was thought about have got."""
        here = positions.slice_of_documents(number, number + 1)
        return [
            Found(
                int(positions.position[m]),
                thoughts[m : m + 1],
                None if rewards is None else rewards[m],
            )
            for m in range(here.start, here.stop)
        ]

    def _lines(self, document: Document, found: list["Found"]) -> list[Line]:
        """The lines of a document."""
        if self.how.lines == "document" or not found:
            return [_spliced(self.setup, document, found)]
        return [_spliced(self.setup, document, [at]) for at in found]

    def _choose(self, step: int, documents: list[Document]) -> Positions:
        """[M] the positions of some documents."""
        config = self.setup.config
        statistics = {name: self._difficulty(documents, name) for name in self.selector.needs}
        return choose_positions(
            documents,
            self.setup.candidates,
            config.position,
            horizon=config.target.horizon,
            seed=config.run.seed,
            step=step,
            selector=self.selector,
            statistics=statistics,
        )

    def _difficulty(self, documents: list[Document], statistic: str) -> list[np.ndarray]:
        """A [P] array of each document, from a pass of the documents alone."""
        found: dict[int, np.ndarray] = {}
        with self.ledger.time("score"):
            for some in self._cutter().documents(MicroBatch(documents), lm=True, no_think=False):
                layout = self.model.rows(some.documents, None, None, lm=True)
                work = layout.document_work
                self.ledger.add("score", work, passes=1, tokens_in=work.tokens)
                of_tokens = difficulty(self.model.policy, layout, statistic)
                lengths = [len(document.tokens) for document in some.documents]
                found |= zip(map(id, some.documents), by_document(of_tokens, lengths))
        return [found[id(document)] for document in documents]

    def _cutter(self) -> Cutter:
        """Cuts documents as a run does, but for collectives: nothing is trained."""
        config = self.setup.config
        layout, _ = choose_layout(config, self.setup.architecture)
        return Cutter(config, layout, self.setup.thought_format, None, self.ranks)

    def _think(self, step: int, documents: list[Document], positions: Positions) -> Thoughts:
        """[M, G, L] a group of thoughts at each position."""
        config = self.setup.config
        rollout = self.model.sampler.sample(
            documents,
            positions,
            self.setup.thought_format,
            NoiseKey(config.run.seed, step),
            group_size=config.thought.group_size if self.how.keep == "best" else 1,
            max_thought_tokens=config.thought.max_thought_tokens,
            prefill=lambda: self.ledger.time("prefill"),
        )
        self.ledger.add_rollout(rollout, max_thought_tokens=config.thought.max_thought_tokens)
        return rollout.thoughts

    def _rewards(
        self, documents: list[Document], positions: Positions, thoughts: Thoughts
    ) -> np.ndarray:
        """[M, G] nats: the thoughts' information gain over the model's own no-think prediction,
        scored in the micro-batches of a run."""
        batches = self._cutter().update(MicroBatch(documents, positions, thoughts))
        with self.ledger.time("score"):
            rewards = [self._rewards_of(batch) for batch in batches]
        return in_order(batches, rewards).cpu().numpy()

    def _rewards_of(self, batch: MicroBatch) -> Tensor:
        """[M, G] of a micro-batch, in the parts that are run by themselves."""
        reasoned_logprob, no_think = [], None
        for part in batch.slices():
            layout = self.model.rows(
                part.documents, part.positions, part.thoughts, no_think=part.is_first_slice
            )
            scores = score(self.model.policy, layout)
            work = layout.thought_work + layout.document_work
            self.ledger.add("score", work, passes=1, tokens_in=work.tokens)
            evidence = log_evidence(scores.target)
            reasoned_logprob.append(
                rearrange(evidence, "(m g) -> m g", m=len(part.positions.position))
            )
            no_think = log_evidence(scores.no_think) if part.is_first_slice else no_think
        return information_gain(torch.cat(reasoned_logprob, dim=1), no_think)


@dataclass(frozen=True, slots=True)
class Found:
    """What a position has got."""

    position: int
    thoughts: Thoughts
    """Of this position alone."""
    reward: np.ndarray | None
    """[G] nats; None where nothing is rewarded."""

    @property
    def is_finite(self) -> bool:
        return self.reward is None or bool(np.isfinite(self.reward).all())

    @property
    def best(self) -> int:
        """Which thought is kept."""
        return 0 if self.reward is None else int(self.reward.argmax())

    @property
    def is_kept(self) -> bool:
        """Whether it is: the best one helps, or nobody has asked."""
        return self.reward is None or bool(self.reward[self.best] > 0)

    def insert(self, setup: ModelSetup) -> Insert:
        """The thought that is kept, with its markers."""
        markers = setup.thought_format.markers
        thought = self.thoughts.tokens[0, self.best][self.thoughts.mask[0, self.best]]
        # A thought that ended by itself holds its close marker.
        close = markers.close if bool(self.thoughts.truncated[0, self.best]) else ()
        opening, forced = (np.array(ids, dtype=np.int64) for ids in (markers.open, close))
        return Insert(self.position, opening, thought.cpu().numpy(), forced)


def _spliced(setup: RunSetup, document: Document, found: list[Found]) -> Line:
    """The document with a thought at each of some positions that has one to be kept."""
    kept = [at for at in found if at.is_kept]
    inserts = [at.insert(setup) for at in kept]
    spliced = splice_in(document.tokens, inserts, setup.config.target.horizon)
    rewarded = [at.reward for at in found if at.reward is not None]
    group_rewards = [reward.tolist() for reward in rewarded] if rewarded else None

    row = {
        "tokens": spliced.tokens.tolist(),
        "text": setup.tokenizer.decode(spliced.tokens),
        "document": document.id,
        "positions": [at.position for at in found],
        "with_thought": [at.is_kept for at in found],
        "rewards": [float(reward.max()) for reward in rewarded] if rewarded else None,
        "group_rewards": group_rewards,
        "loss_spans": spans_of(spliced.is_thought | spliced.is_target),
        "target_spans": spans_of(spliced.is_target),
    }
    text = json.dumps(row, allow_nan=False) + "\n"
    longer = len(spliced.tokens) - len(document.tokens)
    return Line(text, len(kept), group_rewards, len(found), longer)


def _counts(lines: list[Line], how: Splicing) -> dict:
    """What `splice.json` tells of the lines of documents.jsonl."""
    groups = [group for line in lines for group in line.group_rewards or []]
    reward = np.array(groups, dtype=np.float32)
    positions = sum(line.num_positions for line in lines)
    thoughts = sum(line.num_thoughts for line in lines)
    return {
        "lines": len(lines),
        "positions": positions,
        "thoughts": thoughts,
        "lines_with_thought": sum(line.num_thoughts > 0 for line in lines),
        "with_thought_frac": thoughts / max(positions, 1),
        "best_reward_mean_nats": float(reward.max(axis=1).mean()) if groups else None,
        "reward_mean_nats": float(reward.mean()) if groups else None,
        "group_size": reward.shape[1] if groups else 1,
        "keep": how.keep,
        "plain_share": how.plain_share,
        "skip": how.skip,
        "longest_insert_tokens": max(line.insert_tokens for line in lines),
    }
