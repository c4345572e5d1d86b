"""The base, and what every arm is trained with: SFT and GRPO by TRL."""

import random
from pathlib import Path

import numpy as np

from experiments.pluralism.world import (
    NAMES,
    PEOPLE,
    TRAINED,
    TREES,
    VOCABULARY,
    WEIGHTS,
    World,
    prompt_of,
)
from rlp.post.spectrum_rows import NO_LOSS, Row, RowFormat, RowWriter, row_example
from rlp.post.stages.trl_training import QUIET
from rlp.world.folder import make_model_config, make_tokenizer

BASE_STEPS, BASE_BATCH, BASE_RATE = 500, 128, 3e-3

STEPS = 60
"""Of every arm."""
RATE = 1e-3
ROWS = 16
"""Of an SFT step: one pair each, or `PAIRS` of them."""
PAIRS = 8
RLVR_PROMPTS, RLVR_GENERATIONS = 8, 8

ASKED = {PEOPLE: 0.4, **dict.fromkeys(NAMES, 0.15)}
"""Who answers, in what the arms are trained on."""
DROPPED = 0.3
"""Rows of `spectrum` that do not say which community answers."""

FORM = RowFormat(description="%s", input="%s", output=":", end=".")
"""`north q7 : elm . q3 : oak .`, as the base has read it, but for the pairs behind the first."""
MAX_TOKENS = 128

SFT_ARMS = {
    "mode_sft": (1, ROWS),
    "spectrum": (PAIRS, ROWS),
    "one_draw": (1, ROWS),
    "one_draw_8": (1, PAIRS * ROWS),
}
"""Pairs of a row, and rows of a step."""

_QUIET = {**QUIET, "use_cpu": True, "save_strategy": "no"}


def make_base(world: World, out: Path) -> None:
    """Train two layers on what the population writes, every word of it."""
    import torch
    from transformers import AutoModelForCausalLM

    words = make_tokenizer(VOCABULARY)
    torch.manual_seed(world.seed)
    model = AutoModelForCausalLM.from_config(make_model_config(VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.95))
    documents = list(world.documents(BASE_STEPS * BASE_BATCH))
    for step in range(BASE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = BASE_RATE * min(1, (step + 1) / 50, (BASE_STEPS - step) / 200)
        texts = documents[step * BASE_BATCH : (step + 1) * BASE_BATCH]
        batch = words(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, NO_LOSS)
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(out)
    words.save_pretrained(out)


def sft_rows(world: World, arm: str) -> list[dict[str, list[int]]]:
    """What an arm reads, in order: tokens, and labels on answers and their ends alone."""
    pairs, rows = SFT_ARMS[arm]
    rng = random.Random(f"pluralism {arm} {world.seed}")
    writer = RowWriter(make_tokenizer(VOCABULARY), FORM)
    return [_row(world, arm, pairs, rng, writer) for _ in range(STEPS * rows)]


def _row(
    world: World, arm: str, pairs: int, rng: random.Random, writer: RowWriter
) -> dict[str, list[int]]:
    """One row. Without the name its first answer has no loss: nothing tells it."""
    name = rng.choices(list(ASKED), list(ASKED.values()))[0]
    dropped = arm == "spectrum" and rng.random() < DROPPED
    if dropped:
        name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    found = []
    for _ in range(pairs):
        topic = rng.choice(TRAINED)
        if arm == "mode_sft":
            answer = world.majority(name, topic)
        else:
            answer = rng.choices(TREES, world.wanted(name, topic))[0]
        found.append((topic, answer))
    return row_example(Row(name, tuple(found)), writer, dropped=dropped, max_tokens=MAX_TOKENS)


def supervise(world: World, arm: str, base: Path, out: Path) -> None:
    """SFT on the rows of an arm."""
    import trl
    from datasets import Dataset

    args = trl.SFTConfig(
        output_dir=str(out.parent / "unused"),
        max_length=MAX_TOKENS,
        max_steps=STEPS,
        per_device_train_batch_size=SFT_ARMS[arm][1],
        learning_rate=RATE,
        seed=world.seed,
        **_QUIET,
    )
    rows = Dataset.from_list(sft_rows(world, arm))
    trainer = trl.SFTTrainer(model=str(base), args=args, train_dataset=rows)
    trainer.train()
    trainer.model.save_pretrained(out)
    make_tokenizer(VOCABULARY).save_pretrained(out)


def reinforce(world: World, base: Path, out: Path) -> None:
    """RLVR: GRPO with 1 for the answer that most of those asked give."""
    import trl
    from datasets import Dataset

    words, rng = make_tokenizer(VOCABULARY), random.Random(f"pluralism rlvr {world.seed}")
    asked = [
        (rng.choices(list(ASKED), list(ASKED.values()))[0], rng.choice(TRAINED))
        for _ in range(RLVR_PROMPTS * STEPS)
    ]
    rows = {
        "prompt": [prompt_of(*one) for one in asked],
        "expected": [world.majority(*one) for one in asked],
    }

    def right(completion_ids: list[list[int]], expected: list[str], **_: object) -> list[float]:
        said = [words.decode(ids).split()[:1] for ids in completion_ids]
        return [float(one == [wanted]) for one, wanted in zip(said, expected)]

    args = trl.GRPOConfig(
        output_dir=str(out.parent / "unused"),
        max_steps=STEPS,
        per_device_train_batch_size=RLVR_PROMPTS * RLVR_GENERATIONS,
        num_generations=RLVR_GENERATIONS,
        max_completion_length=1,
        learning_rate=RATE,
        temperature=1.0,
        top_k=0,
        seed=world.seed,
        **_QUIET,
    )
    trainer = trl.GRPOTrainer(
        model=str(base), reward_funcs=right, args=args, train_dataset=Dataset.from_dict(rows)
    )
    trainer.train()
    trainer.model.save_pretrained(out)
    words.save_pretrained(out)


class Asked:
    """A model that is asked."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._words = make_tokenizer(VOCABULARY)
        self._words.padding_side = "left"
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._trees = self._words.convert_tokens_to_ids(list(TREES))

    def masses(self, prompts: list[str]) -> np.ndarray:
        """[prompts, TREES]: probability of each tree as the next word, exactly; what is missing to
        1 is on words that are no answer."""
        import torch

        found = []
        for start in range(0, len(prompts), 256):
            batch = self._words(prompts[start : start + 256], return_tensors="pt", padding=True)
            with torch.no_grad():
                logits = self._model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask
                ).logits[:, -1]
            found.append(logits.softmax(dim=-1)[:, self._trees].double().numpy())
        return np.concatenate(found)

    def texts(self, prompts: list[str], seed: int) -> list[str]:
        """A continuation of each at temperature 1, up to the full stop."""
        import torch

        torch.manual_seed(seed)
        batch = self._words(prompts, return_tensors="pt", padding=True)
        ids = self._model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=len(TREES) + 2,
            pad_token_id=self._words.pad_token_id,
        )
        said = self._words.batch_decode(ids[:, batch.input_ids.shape[1] :])
        return [text.partition(".")[0].strip() for text in said]
