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
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from rlp.config import Config, ConfigError, to_yaml
from rlp.data.documents import Document
from rlp.data.positions import Positions, choose_positions
from rlp.measure.frozen import load_frozen
from rlp.measure.ledger import Ledger
from rlp.measure.panel_scoring import ThinkingModel
from rlp.model.scoring import score
from rlp.model.setup import RunSetup
from rlp.model.thoughts import Thoughts
from rlp.objective import information_gain, log_evidence
from rlp.process.console import visible_text
from rlp.process.files import new_folder, refuse_existing, write_new
from rlp.process.json_files import write_json
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import NoiseKey


def splice(config: Config, num_documents: int, out: Path, ranks: Ranks) -> dict:
    """Make a folder of spliced documents with the model of a config, in this process alone.

    Args:
        config: of an RLP run; its model, training data, positions and thoughts count.
        num_documents: documents to read, in the order that a run reads them.
        out: folder to make; one that exists is refused.

    Returns:
        what `splice.json` holds.

    Raises:
        ConfigError: the folder exists, or the config chooses positions by the policy's own
            difficulty.
    """
    refuse_existing(out)
    if config.position.selector not in ("uniform", "marker"):
        raise ConfigError(
            "position.selector: documents are spliced at positions that do not depend on the"
            f" policy, got {config.position.selector}. Write position.selector=uniform or marker."
        )
    setup = RunSetup(config, warn=print)
    for note in setup.marker_notes():
        print(visible_text(note))
    frozen = load_frozen(setup, ranks)
    ledger = Ledger(setup.shapes)

    rows, longest = [], 0
    batch_size = config.optim.batch_size
    for step, start in enumerate(range(0, num_documents, batch_size), start=1):
        documents = setup.stream.next_documents(min(batch_size, num_documents - start))
        positions = choose_positions(
            documents,
            setup.candidates,
            config.position,
            horizon=config.target.horizon,
            seed=config.run.seed,
            step=step,
        )
        thoughts, reward = _rewarded_thoughts(
            setup, frozen, documents, positions, NoiseKey(config.run.seed, step), ledger
        )
        ledger.add_documents(sum(len(document.tokens) for document in documents))
        ledger.close_step(ranks)

        for m, d in enumerate(positions.document):
            position, group = int(positions.position[m]), thoughts[m : m + 1]
            row = _spliced(setup, documents[d], position, group, reward[m])
            longest = max(longest, len(row["tokens"]) - len(documents[d].tokens))
            rows.append(row)

    told = _counts(rows, longest)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with new_folder(out, point="splice.before_rename") as new:
        write_new(new / "config.yaml", to_yaml(config).encode(), point="splice.torn_config")
        write_new(new / "documents.jsonl", lines.encode(), point="splice.torn_documents")
        write_json(new / "ledger.json", ledger.to_json(), point="splice.torn_ledger")
        write_json(new / "splice.json", told, point="splice.torn_counts")
    return told


@torch.no_grad()
def _rewarded_thoughts(
    setup: RunSetup,
    frozen: ThinkingModel,
    documents: list[Document],
    positions: Positions,
    noise: NoiseKey,
    ledger: Ledger,
) -> tuple[Thoughts, np.ndarray]:
    """G thoughts at each position and their information gain over the policy's own no-think
    prediction, [M, G] nats; what they cost is added to the ledger."""
    thought = setup.config.thought
    with ledger.time("decode"), frozen.sampler.phase():
        rollout = frozen.sampler.sample(
            documents,
            positions,
            setup.thought_format,
            noise,
            group_size=thought.group_size,
            max_thought_tokens=thought.max_thought_tokens,
            prefill=lambda: ledger.time("prefill"),
        )
    with ledger.time("score"):
        layout = frozen.rows(documents, positions, rollout.thoughts, no_think=True)
        scores = score(frozen.policy, layout)

    scoring = layout.thought_work + layout.document_work
    ledger.add_rollout(rollout, max_thought_tokens=thought.max_thought_tokens)
    ledger.add("score", scoring, passes=1, tokens_in=scoring.tokens)

    reasoned_logprob = rearrange(log_evidence(scores.target), "(m g) -> m g", g=thought.group_size)
    reward = information_gain(reasoned_logprob, log_evidence(scores.no_think))
    return rollout.thoughts, reward.cpu().numpy()


def _spliced(
    setup: RunSetup, document: Document, position: int, thoughts: Thoughts, reward: np.ndarray
) -> dict:
    """A line of documents.jsonl: the document with the best of a group's thoughts in it, if that
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
    return {
        "tokens": tokens.tolist(),
        "text": setup.tokenizer.decode(tokens),
        "document": document.id,
        "position": position,
        "reward": float(reward[best]),
        "group_rewards": reward.tolist(),
    }


def _counts(rows: list[dict], longest: int) -> dict:
    """What `splice.json` tells of the lines of documents.jsonl.

    Args:
        longest: of the inserts, in tokens.
    """
    reward = np.array([row["group_rewards"] for row in rows], dtype=np.float32)
    return {
        "documents": len(rows),
        "with_thought_frac": float((reward.max(axis=1) > 0).mean()),
        "best_reward_mean_nats": float(reward.max(axis=1).mean()),
        "reward_mean_nats": float(reward.mean()),
        "group_size": reward.shape[1],
        "longest_insert_tokens": longest,
    }
