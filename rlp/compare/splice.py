"""Documents with thoughts in them: the model's own best thoughts, spliced into plain text (mixed
SFT).

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
from rlp.model.layout import Layout, tree_layout
from rlp.model.scoring import score
from rlp.model.setup import RunSetup
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.objective import information_gain, log_evidence
from rlp.process.console import visible_text
from rlp.process.files import new_folder, write_new
from rlp.process.json_files import write_json
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import NoiseKey, Rollout, sample_thoughts


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
    if out.exists():
        raise ConfigError(f"--out: {out} exists and is never written over. Write another folder.")
    if config.position.selector in ("entropy", "surprisal"):
        raise ConfigError(
            "position.selector: documents are spliced at positions that do not depend on the"
            f" policy, got {config.position.selector}. Write position.selector=uniform or marker."
        )
    setup = RunSetup(config, warn=print)
    for note in setup.marker_notes():
        print(visible_text(note))
    lay_out, policy = load_frozen(setup, ranks)
    ledger = Ledger(setup.shapes)
    rewards, rows, longest = [], [], 0
    for step, start in enumerate(range(0, num_documents, config.optim.batch_size), start=1):
        documents = setup.stream.next_documents(min(config.optim.batch_size, num_documents - start))
        positions = choose_positions(
            documents,
            setup.candidates,
            config.position,
            horizon=config.target.horizon,
            seed=config.run.seed,
            step=step,
        )
        with ledger.time("decode"), torch.no_grad():
            rollout = sample_thoughts(
                policy,
                documents,
                positions,
                setup.thought_format,
                NoiseKey(config.run.seed, step),
                group_size=config.thought.group_size,
                max_thought_tokens=config.thought.max_thought_tokens,
                rows=config.thought.sampling_rows,
                shared=lay_out is tree_layout,
                prefill=lambda: ledger.time("prefill"),
            )
        with ledger.time("score"), torch.no_grad():
            layout = lay_out(
                documents,
                positions,
                rollout.thoughts,
                setup.thought_format,
                lm=False,
                no_think=True,
                device=policy.device,
            )
            scores = score(policy, layout)
        _count(ledger, documents, rollout, layout, config, ranks)
        reasoned_logprob = rearrange(
            log_evidence(scores.target), "(m g) -> m g", g=config.thought.group_size
        )
        reward = information_gain(reasoned_logprob, log_evidence(scores.no_think)).cpu().numpy()
        for m in range(len(reward)):
            tokens = _with_best_thought(
                documents[positions.document[m]],
                positions,
                m,
                rollout.thoughts,
                reward[m],
                setup.thought_format,
            )
            longest = max(longest, len(tokens) - len(documents[positions.document[m]].tokens))
            rows.append(
                {
                    "tokens": tokens.tolist(),
                    "text": setup.tokenizer.decode(tokens),
                    "document": documents[positions.document[m]].id,
                    "position": int(positions.position[m]),
                    "reward": float(reward[m].max()),
                    "group_rewards": reward[m].tolist(),
                }
            )
        rewards.append(reward)
    reward = np.concatenate(rewards)
    told = {
        "documents": len(reward),
        "with_thought_frac": float((reward.max(axis=1) > 0).mean()),
        "best_reward_mean_nats": float(reward.max(axis=1).mean()),
        "reward_mean_nats": float(reward.mean()),
        "group_size": config.thought.group_size,
        "longest_insert_tokens": longest,
    }
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with new_folder(out, point="splice.before_rename") as new:
        write_new(new / "config.yaml", to_yaml(config).encode(), point="splice.torn_config")
        write_new(new / "documents.jsonl", lines.encode(), point="splice.torn_documents")
        write_json(new / "ledger.json", ledger.to_json(), point="splice.torn_ledger")
        write_json(new / "splice.json", told, point="splice.torn_counts")
    return told


def _count(
    ledger: Ledger,
    documents: list[Document],
    rollout: Rollout,
    layout: Layout,
    config: Config,
    ranks: Ranks,
) -> None:
    sampled = int(rollout.thoughts.mask.sum())
    ledger.add("prefill", rollout.prefill_work, passes=1, tokens_in=rollout.prefill_work.tokens)
    ledger.add("decode", rollout.decode_work, passes=1, tokens_generated=sampled)
    ledger.add(
        "score",
        layout.thought_work + layout.document_work,
        passes=1,
        tokens_in=layout.thought_work.tokens + layout.document_work.tokens,
    )
    ledger.add_thoughts(
        rollout.thoughts.truncated.numel(),
        max_thought_tokens=config.thought.max_thought_tokens,
        sampled_tokens=sampled,
    )
    ledger.add_documents(sum(len(document.tokens) for document in documents))
    ledger.close_step(ranks)


def _with_best_thought(
    document: Document,
    positions: Positions,
    m: int,
    thoughts: Thoughts,
    reward: np.ndarray,
    thought_format: ThoughtFormat,
) -> np.ndarray:
    """[P + thought] int64: the document with the best of a group's thoughts in it, if that one
    helps."""
    best, t = int(reward.argmax()), int(positions.position[m])
    if not reward[best] > 0:
        return document.tokens
    close = (
        thought_format.markers.close if bool(thoughts.truncated[m, best]) else ()
    )  # a thought that ended by itself holds its own
    thought = thoughts.tokens[m, best][thoughts.mask[m, best]].cpu().numpy()
    return np.concatenate(
        [document.tokens[:t], thought_format.markers.open, thought, close, document.tokens[t:]]
    ).astype(np.int64)
