"""The models of the experiment, and the rows that they are tuned on.

`tiny`: two layers that know words alone, which have read rows of all tasks. `single`: the same, but
what it has read are rows of one pair. `smollm2`: SmolLM2-135M (`experiments/smollm2`), tuned on
some families and asked for others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rlp.post.spectrum_rows import Row, RowFormat, RowWriter, make_rows, row_example, write_rows
from rlp.world.folder import make_model_config, make_tokenizer
from rlp.world.problems import CLOSE, OPEN


@dataclass(frozen=True, slots=True)
class World:
    """One of them."""

    tuned: tuple[str, ...]
    """Families of the rows."""
    asked: tuple[str, ...]
    """Families of the questions."""
    pairs: int
    """Of a row of Spectrum tuning."""
    steps: int
    rows: int
    """Of a step; SFT on one draw at equal draws has `pairs` times as many, of one pair each."""
    rate: float
    tasks: int
    shots: tuple[int, ...]
    format: RowFormat


ALL = ("urn", "coin", "coins", "die", "numbers_10", "weekday", "month", "prime")

WORLDS = {
    "tiny": World(
        tuned=ALL,
        asked=ALL,
        pairs=12,
        steps=60,
        rows=8,
        rate=1e-3,
        tasks=12,
        shots=(0, 1, 2, 4, 8),
        format=RowFormat(description="task %s ", input="in %s ", output="out", end=" ;"),
    ),
    "smollm2": World(
        tuned=("coin", "coins", "die", "weekday", "month", "prime"),
        asked=("numbers_10", "urn"),
        pairs=8,
        steps=24,
        rows=4,
        rate=5e-5,
        tasks=8,
        shots=(0, 2, 8),
        format=RowFormat(),
    ),
}

WORLDS["single"] = replace(WORLDS["tiny"], steps=100)

BASE_STEPS, BASE_BATCH, BASE_RATE, BASE_SEED = 600, 16, 3e-3, 1000
"""Of the tiny base; its rows are of the seed plus BASE_SEED."""

SPECIAL = ("<pad>", "<unk>", "<eos>", OPEN, CLOSE, "task", "in", "out", ";")


def vocabulary() -> list[str]:
    """All words of the tasks: of so many rows that no filling, coin or face is missing."""
    words = dict.fromkeys(SPECIAL)
    for count, pairs, told in ((8000, 1, 0.9), (400, 40, 1.0)):
        for row in make_rows(ALL, count, pairs=pairs, told=told):
            texts = [row.description, *(text for pair in row.pairs for text in pair)]
            words.update(dict.fromkeys(" ".join(texts).split()))
    return list(words)


SINGLE_BATCH = 48
"""Rows of one pair, of about as many tokens."""


def make_base(out: Path, seed: int, pairs: int, steps: int = BASE_STEPS) -> None:
    """Train two layers on rows of so many pairs, every token of them, half of them told."""
    words, world = make_tokenizer(vocabulary()), WORLDS["tiny"]
    writer = RowWriter(words, world.format)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_model_config(vocabulary()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.95))
    batch_size = BASE_BATCH if pairs > 1 else SINGLE_BATCH
    count = steps * batch_size
    rows = make_rows(ALL, count, pairs=pairs, told=0.5, seed=seed + BASE_SEED)
    ids = [row_example(r, writer, dropped=False, max_tokens=256)["input_ids"] for r in rows]
    order = torch.randperm(count).reshape(steps, batch_size)
    for step, chosen in enumerate(order.tolist()):
        for group in optimizer.param_groups:
            group["lr"] = BASE_RATE * min(1, (step + 1) / 50, (steps - step) / 200)
        batch = [torch.tensor(ids[index]) for index in chosen]
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(out)
    words.save_pretrained(out)


def write_all_rows(folder: Path, world: World, seed: int) -> None:
    """A file of rows for each kind of tuning. SFT on one draw at equal draws has the very draws of
    Spectrum tuning, one in a row; at equal steps the first of each row."""
    count = world.steps * world.rows
    rows = list(make_rows(world.tuned, count, pairs=world.pairs, told=0.5, seed=seed))
    modes = make_rows(world.tuned, count, pairs=1, told=1.0, answers="mode", seed=seed)
    split = [Row(row.description, (pair,)) for row in rows for pair in row.pairs]
    first = split[:: world.pairs]
    for name, made in made_rows(modes, rows, split, first):
        if not (folder / f"{name}.jsonl").exists():
            write_rows(folder / f"{name}.jsonl", made)


def made_rows(modes: Iterator[Row], *others: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """By the names of the stages."""
    yield from zip(("mode", "spectrum", "one_draws", "one_steps"), (list(modes), *others))
