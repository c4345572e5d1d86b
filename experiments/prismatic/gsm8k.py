"""Subsets of GSM8K of one size, scored under a real model, and a small student trained on each;
adds a line to gsm8k.jsonl for each subset and seed, and goes on where it was stopped.

    python experiments/prismatic/gsm8k.py --model MODEL --data GSM8K

MODEL is the folder that experiments/smollm2/prepare.py makes; GSM8K has train.jsonl and test.jsonl.
"""

import argparse
import json
import random
import time
from pathlib import Path

from rlp.measure.results_file import add_result, read_results  # rlp before torch
from rlp.post.diversity_measures import tfidf, vendi
from rlp.post.selection import g_vendi, gradient_features, sparse_clusters, unit_rows
from rlp.post.selection_documents import document_of

# isort: split
import numpy as np
import torch
from layouts import GSM8K, GSM8K_LAYOUT, SUBSETS
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

POOL, SUBSET, HELD_OUT, MOST_TOKENS = 96, 32, 64, 128
CLUSTERS = 12
WORDS = 1500
"""Most frequent tokens of the train problems; a student knows no others."""
STEPS, BATCH, RATE = 60, 8, 2e-3


def problems(path: Path, tokenizer, key: str, count: int) -> list[dict]:
    """So many of a file, none longer than `MOST_TOKENS`; chosen by a key."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"prompt": f"Question: {row['question']}\nAnswer: "} for row in rows]
    random.Random(key).shuffle(rows)
    found = []
    for row in rows:
        whole = row["prompt"] + row["answer"]
        if len(tokenizer(whole)["input_ids"]) > MOST_TOKENS:
            continue
        document = document_of(
            row["prompt"], row["answer"], tokenizer, most_tokens=MOST_TOKENS, vocabulary=2**20
        )
        found.append(row | {"document": document})
        if len(found) == count:
            break
    return found


@torch.no_grad()
def hidden_and_nats(model, pool: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """([n, D] mean last hidden states of length 1, centred; [n] nats per token of the answer)."""
    hidden, nats = [], []
    for row in pool:
        tokens = torch.from_numpy(row["document"].tokens)[None]
        states = model.base_model(input_ids=tokens).last_hidden_state
        logits = model.get_output_embeddings()(states)[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        nats.append(float(loss[torch.from_numpy(row["document"].predicted)].mean()))
        hidden.append(states[0].mean(dim=0))
    rows = torch.stack(hidden)
    return unit_rows((rows - rows.mean(dim=0)).numpy()), np.array(nats)


def subset(name: str, pool: list[dict], features: np.ndarray, seed: int) -> list[int]:
    """`SUBSET` rows of the pool, of which some kinds hold several times."""
    rng = random.Random(f"prismatic gsm8k {name} {seed}")
    everyone = list(range(len(pool)))
    if name.startswith("repeated"):
        distinct = rng.sample(everyone, int(name.split("_")[1]))
        return [distinct[place % len(distinct)] for place in range(SUBSET)]
    if name == "random":
        return rng.sample(everyone, SUBSET)
    if name in ("short", "long"):
        by_length = sorted(everyone, key=lambda row: len(pool[row]["document"].tokens))
        those = by_length if name == "short" else by_length[::-1]
        return rng.sample(those[: SUBSET + SUBSET // 4], SUBSET)
    if name in ("words_near", "gradients_near"):
        texts = [row["question"] for row in pool]
        rows = tfidf(texts).toarray() if name == "words_near" else features
        near = np.argsort(-(rows @ rows[rng.choice(everyone)]), kind="stable")
        return near[:SUBSET].tolist()
    found = sparse_clusters(features, CLUSTERS, keep=1, seed=seed)
    if name == "gradients_sparse":
        return np.flatnonzero(found.first(SUBSET)).tolist()
    order = np.lexsort((-found.similarity, -found.size[found.label]))
    return order[:SUBSET].tolist()


class Students:
    """Small models that know the most frequent tokens."""

    def __init__(self, texts: list[dict]) -> None:
        tokens = np.concatenate([row["document"].tokens for row in texts])
        frequent = np.argsort(-np.bincount(tokens), kind="stable")[: WORDS - 2]
        self.number = {int(token): place + 2 for place, token in enumerate(frequent)}

    def batch(self, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [R, T], 0 for padding and 1 for unknown; and which are predicted [R, T - 1]."""
        longest = max(len(row["document"].tokens) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        counts = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
        for place, row in enumerate(rows):
            own = [self.number.get(int(token), 1) for token in row["document"].tokens]
            tokens[place, : len(own)] = torch.tensor(own)
            counts[place, : len(own) - 1] = torch.from_numpy(row["document"].predicted)
        return tokens, counts

    def trained(self, rows: list[dict], seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
        config = Qwen3Config(vocab_size=WORDS, initializer_range=0.1, **sizes, **heads)
        model = AutoModelForCausalLM.from_config(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
        rng = random.Random(f"prismatic gsm8k student {seed}")
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 10, 1.05 - step / STEPS)
            loss, _ = self.loss(model, rng.choices(rows, k=BATCH))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return model

    def loss(self, model, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats per token of the answers, and the share of them that are the most probable."""
        tokens, counts = self.batch(rows)
        logits, wanted = model(input_ids=tokens).logits[:, :-1][counts], tokens[:, 1:][counts]
        right = (logits.argmax(-1) == wanted).float().mean()
        return torch.nn.functional.cross_entropy(logits, wanted), right

    @torch.no_grad()
    def held_out(self, model, rows: list[dict]) -> dict[str, float]:
        loss, right = self.loss(model, rows)
        return {"held_out_nats": float(loss), "held_out_right": float(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=GSM8K)
    asked_for = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked_for.model)
    pool = problems(asked_for.data / "train.jsonl", tokenizer, "prismatic pool", POOL)
    others = problems(asked_for.data / "test.jsonl", tokenizer, "prismatic held out", HELD_OUT)
    model = AutoModelForCausalLM.from_pretrained(asked_for.model, dtype=torch.float32).eval()
    start = time.process_time()
    features = gradient_features(model, [row["document"] for row in pool])
    hidden, nats = hidden_and_nats(model, pool)
    print(f"scored in {time.process_time() - start:.0f} CPU-seconds", flush=True)
    students = Students(pool)
    for seed in range(asked_for.seeds):
        for name in SUBSETS:
            if read_results(asked_for.results, GSM8K_LAYOUT).has(arm=name, seed=seed):
                continue
            start = time.process_time()
            chosen = subset(name, pool, features, seed)
            rows = [pool[row] for row in chosen]
            line = {
                "arm": name,
                "seed": seed,
                "g_vendi": g_vendi(features[chosen]),
                "hidden_vendi": g_vendi(hidden[chosen]),
                "word_vendi": vendi(tfidf([row["question"] + row["answer"] for row in rows])),
                "nats": float(nats[chosen].mean()),
                "tokens": float(np.mean([len(row["document"].tokens) for row in rows])),
                **students.held_out(students.trained(rows, seed), others),
            }
            line["seconds"] = time.process_time() - start
            add_result(asked_for.results, GSM8K_LAYOUT, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
