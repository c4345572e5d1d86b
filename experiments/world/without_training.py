"""What inference alone makes of a model of the small worlds: temperatures, votes, its own
confidence.

    python experiments/world/without_training.py rlp/world/base experiments/world/data

At each temperature eight thoughts are sampled at every held-out answer, and the answer is

    mean          that after one thought
    vote          the most frequent of the eight
    confident     that of which the model is surest after its thought
    likely        that after the thought which the model finds most likely (mean log-probability of
                  its tokens, at temperature 1)

beside the share of thoughts that compute (their second word is a heading) and the gain of a thought
over none, in nats. One line of JSON a temperature.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlp.world.problems import (
    CLOSE,
    CUE,
    HEADINGS,
    OPEN,
)  # rlp before torch: rlp/process/machine.py

# isort: split
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURES = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
MAX_THOUGHT_TOKENS = 16


class Sampled(NamedTuple):
    """G thoughts at each of M answers."""

    tokens: Tensor
    """[M, G, L] int64, padded after the close marker, which is forced at the end."""
    logprob: Tensor
    """[M, G] nats, mean over the tokens of a thought, at temperature 1."""


class Base:
    """A model with its words; every answer of a file, and how the model answers it."""

    def __init__(self, model: Path, held_out: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.open, self.close = self.tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
        self.headings = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(HEADINGS)))
        texts = [json.loads(line)["text"] for line in held_out.read_text().splitlines()]
        documents = torch.tensor([self.tokenizer(text).input_ids for text in texts])  # [B, P]
        (cue,) = self.tokenizer(CUE).input_ids
        self.ends = [t + 1 for t, token in enumerate(documents[0].tolist()) if token == cue]
        self.documents = documents

    @torch.no_grad()
    def logprob(self, rows: Tensor, last: Tensor) -> Tensor:
        """[N, V] of the token after index `last` [N] of each row, the open marker left out."""
        parts = [self.network(input_ids=part).logits for part in rows.split(512)]
        logits = torch.cat(parts)[torch.arange(len(rows)), last]
        logits[:, self.open] = float("-inf")
        return logits.log_softmax(dim=-1)

    @torch.no_grad()
    def think(self, prefix: Tensor, temperature: float, group_size: int) -> Sampled:
        """Sample thoughts after prefixes [M, P] of one length."""
        rows = torch.nn.functional.pad(prefix, (0, 1), value=self.open)
        step, past = rows.repeat_interleave(group_size, dim=0), None
        closed = torch.zeros(len(step), dtype=torch.bool)
        total, length, thought = torch.zeros(len(step)), torch.zeros(len(step)), []
        for _ in range(MAX_THOUGHT_TOKENS):
            found = self.network(input_ids=step, past_key_values=past, use_cache=True)
            logits, past = found.logits[:, -1], found.past_key_values
            step = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
            step[closed] = self.tokenizer.pad_token_id
            total += logits.log_softmax(dim=-1).gather(1, step)[:, 0] * ~closed
            length += ~closed
            closed |= step[:, 0] == self.close
            thought.append(step)
        tokens = torch.cat(thought, dim=1)
        tokens[~closed, -1] = self.close
        return Sampled(tokens.unflatten(0, (-1, group_size)), (total / length).view(-1, group_size))

    def answers(self, prefix: Tensor, thoughts: Sampled) -> Tensor:
        """[M, G, V] log-probability of the answer after each thought."""
        group_size = thoughts.tokens.shape[1]
        tokens = thoughts.tokens.flatten(0, 1)
        before = torch.nn.functional.pad(prefix, (0, 1), value=self.open)
        rows = torch.cat([before.repeat_interleave(group_size, dim=0), tokens], dim=1)
        last = before.shape[1] + (tokens == self.close).int().argmax(dim=1)
        return self.logprob(rows, last).unflatten(0, (-1, group_size))


def measure(base: Base, temperature: float, group_size: int) -> dict[str, float]:
    """The numbers of one temperature, over all answers."""
    torch.manual_seed(0)
    parts: dict[str, list[Tensor]] = {}
    for end in base.ends:
        prefix, target = base.documents[:, :end], base.documents[:, end]
        thoughts = base.think(prefix, temperature, group_size)
        after = base.answers(prefix, thoughts)
        alone = base.logprob(prefix, torch.full((len(prefix),), end - 1))
        guess = after.argmax(dim=-1)  # [M, G]
        right = guess == target[:, None]
        surest, likeliest = after.amax(dim=-1).argmax(dim=1), thoughts.logprob.argmax(dim=1)
        evidence = after.gather(2, target[:, None, None].expand(-1, group_size, 1))[..., 0]
        for name, values in {
            "mean": right.double().mean(dim=1),
            "vote": guess.mode(dim=1).values == target,
            "confident": right.gather(1, surest[:, None])[:, 0],
            "likely": right.gather(1, likeliest[:, None])[:, 0],
            "no_think": alone.argmax(dim=1) == target,
            "computing_frac": torch.isin(thoughts.tokens[..., 1], base.headings).double().mean(1),
            "gain_nats": evidence.mean(dim=1) - alone.gather(1, target[:, None])[:, 0],
        }.items():
            parts.setdefault(name, []).append(values.double())
    return {name: torch.cat(values).mean().item() for name, values in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder of the world")
    parser.add_argument("world", type=Path, help="its folder, for held_out.jsonl")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    options = parser.parse_args()
    base = Base(options.model, options.world / "held_out.jsonl")
    for temperature in options.temperatures:
        numbers = measure(base, temperature, options.group_size)
        print(
            json.dumps({"temperature": temperature} | {k: round(v, 4) for k, v in numbers.items()})
        )


if __name__ == "__main__":
    main()
