"""Documents with the model's own best thoughts spliced into them, for the arm mixed SFT.

The control that costs no reinforcement: the starting checkpoint samples G thoughts at a position of
a document, the one with the largest information gain over its own no-think prediction is kept, and
the LM loss is taken on the document with that thought in it. Where no thought of a group helps, the
document stays as it is.

A folder of spliced documents holds
    documents.jsonl   {"tokens", "text" (to read), "document", "position", "reward",
                      "group_rewards"}: one line per position
    ledger.json       what making them has cost; a run on them begins with it (`data.ledger`)
    splice.json       counts, and the longest insert
    config.yaml       the config that they were made by

Dimensions
    M  positions;  G  thoughts per position
"""

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.config import Config, ConfigError, to_yaml
from rlp.data.batches import Batches
from rlp.data.documents import Document
from rlp.data.positions import Positions, choose_positions
from rlp.measure.frozen import load_frozen
from rlp.measure.ledger import Ledger
from rlp.measure.panel_scoring import ThinkingModel
from rlp.model.loading import choose_layout
from rlp.model.scoring import score
from rlp.model.setup import RunSetup
from rlp.model.thoughts import Thoughts
from rlp.objective import information_gain, log_evidence
from rlp.process.console import visible_text
from rlp.process.files import new_folder, refuse_existing, write_new
from rlp.process.json_files import write_json
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import NoiseKey
from rlp.step.micro_batch import MicroBatch, in_order
from rlp.step.packing import Cutter


def splice(config: Config, num_documents: int, out: Path, ranks: Ranks) -> dict:
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
        ConfigError: the folder exists, or the config chooses positions by the policy's own
            difficulty; or the model gives no numbers (`refuse_unusable`).
    """
    refuse_existing(out)
    if config.position.selector not in ("uniform", "marker"):
        raise ConfigError(
            "position.selector: documents are spliced at positions that do not depend on the"
            f" policy, got {config.position.selector}. Write position.selector=uniform or marker."
        )

    def say(text: str) -> None:
        if ranks.is_first:
            print(visible_text(text))

    setup = RunSetup(config, warn=say)
    for note in setup.marker_notes():
        say(note)
    splicer = Splicer(setup, load_frozen(setup, ranks), Ledger(setup.shapes), ranks)
    optim, lines = config.optim, []
    reading = Batches(setup.stream, optim.batch_size, ranks, together=optim.micro_batch_size)
    with closing(reading):
        for step, start in enumerate(range(0, num_documents, optim.batch_size), start=1):
            documents = reading.next_share(min(optim.batch_size, num_documents - start))
            spliced, unusable = zip(*ranks.gather(splicer.splice_step(step, documents)))
            refuse_unusable(config, [id for of_rank in unusable for id in of_rank])
            lines += [line for of_rank in spliced for line in of_rank]

    told = _counts(lines)
    if ranks.is_first:
        text = "".join(line.text for line in lines)
        with new_folder(out, point="splice.before_rename") as new:
            write_new(new / "config.yaml", to_yaml(config).encode(), point="splice.torn_config")
            write_new(new / "documents.jsonl", text.encode(), point="splice.torn_documents")
            write_json(new / "ledger.json", splicer.ledger.to_json(), point="splice.torn_ledger")
            write_json(new / "splice.json", told, point="splice.torn_counts")
    return told


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
    group_rewards: list[float]
    insert_tokens: int


@dataclass(frozen=True, slots=True)
class Splicer:
    """What documents are spliced with."""

    setup: RunSetup
    model: ThinkingModel
    ledger: Ledger
    ranks: Ranks

    @torch.no_grad()
    def splice_step(self, step: int, documents: list[Document]) -> tuple[list[Line], list[int]]:
        """The lines of this rank's documents of a step, of which there may be none, and the ids of
        documents that have none, as their rewards are not finite; what they cost is added to the
        ledger. A collective."""
        with self.ledger.time("decode"), self.model.sampler.phase():
            positions, thoughts = self._think(step, documents) if documents else (None, None)
        lines, unusable = [], []
        if documents:
            rewards = self._rewards(documents, positions, thoughts)
            for m, (d, t) in enumerate(positions.places()):
                if np.isfinite(rewards[m]).all():
                    group = thoughts[m : m + 1]
                    lines.append(_spliced(self.setup, documents[d], t, group, rewards[m]))
                else:
                    unusable.append(documents[d].id)
        self.ledger.add_documents(sum(len(document.tokens) for document in documents))
        self.ledger.close_step(self.ranks)
        return lines, unusable

    def _think(self, step: int, documents: list[Document]) -> tuple[Positions, Thoughts]:
        """The positions of some documents, and [M, G, L] a group of thoughts at each."""
        config = self.setup.config
        positions = choose_positions(
            documents,
            self.setup.candidates,
            config.position,
            horizon=config.target.horizon,
            seed=config.run.seed,
            step=step,
        )
        rollout = self.model.sampler.sample(
            documents,
            positions,
            self.setup.thought_format,
            NoiseKey(config.run.seed, step),
            group_size=config.thought.group_size,
            max_thought_tokens=config.thought.max_thought_tokens,
            prefill=lambda: self.ledger.time("prefill"),
        )
        self.ledger.add_rollout(rollout, max_thought_tokens=config.thought.max_thought_tokens)
        return positions, rollout.thoughts

    def _rewards(
        self, documents: list[Document], positions: Positions, thoughts: Thoughts
    ) -> np.ndarray:
        """[M, G] nats: the thoughts' information gain over the model's own no-think prediction,
        scored in the micro-batches of a run."""
        config = self.setup.config
        layout, _ = choose_layout(config, self.setup.architecture)
        cut = Cutter(config, layout, self.setup.thought_format, None, self.ranks)
        batches = cut.update(MicroBatch(documents, positions, thoughts))
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


def _spliced(
    setup: RunSetup, document: Document, position: int, thoughts: Thoughts, reward: np.ndarray
) -> Line:
    """The document with the best of a group's thoughts in it, if that
    one helps.

    Args:
        thoughts: of this position alone.
        reward: [G], of each of them.
    """
    tokens, best = document.tokens, int(reward.argmax())
    if reward[best] > 0:
        markers = setup.thought_format.markers
        thought = thoughts.tokens[0, best][thoughts.mask[0, best]].cpu().numpy()
        # A thought that ended by itself holds its close marker.
        close = markers.close if bool(thoughts.truncated[0, best]) else ()
        parts = [tokens[:position], markers.open, thought, close, tokens[position:]]
        tokens = np.concatenate(parts).astype(np.int64)
    row = {
        "tokens": tokens.tolist(),
        "text": setup.tokenizer.decode(tokens),
        "document": document.id,
        "position": position,
        "reward": float(reward[best]),
        "group_rewards": reward.tolist(),
    }
    text = json.dumps(row, allow_nan=False) + "\n"
    return Line(text, row["group_rewards"], len(tokens) - len(document.tokens))


def _counts(lines: list[Line]) -> dict:
    """What `splice.json` tells of the lines of documents.jsonl."""
    reward = np.array([line.group_rewards for line in lines], dtype=np.float32)
    return {
        "documents": len(lines),
        "with_thought_frac": float((reward.max(axis=1) > 0).mean()),
        "best_reward_mean_nats": float(reward.max(axis=1).mean()),
        "reward_mean_nats": float(reward.mean()),
        "group_size": reward.shape[1],
        "longest_insert_tokens": max(line.insert_tokens for line in lines),
    }
