"""The base, and what every arm is trained with: RLVR and SFT by TRL, RLP by this framework."""

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from world import (
    BASE_BATCH,
    CLOSE,
    OPEN,
    THOUGHT_TOKENS,
    VOCABULARY,
    answer_of,
    asked,
    base_problems,
    problem,
    questions_of,
)

from rlp import Trainer
from rlp.config import load_config
from rlp.post.language import language_reward
from rlp.post.stages.trl_training import QUIET
from rlp.process.exit_codes import DONE
from rlp.process.ranks import Ranks
from rlp.world.folder import make_model_config, make_tokenizer

BASE_RATE = 3e-3
SCRIPT, WEIGHT = "latin", 1.0
"""Of the reward term; lambda of RLVR, beside a reward of 0 or 1."""

RLVR_STEPS, RLVR_PROMPTS, RLVR_GENERATIONS, RLVR_RATE = 60, 8, 8, 3e-4
SFT_STEPS, SFT_BATCH, SFT_RATE = 60, 16, 3e-4
RLP_STEPS, RLP_DOCUMENTS, RLP_THOUGHTS, RLP_RATE = 60, 8, 8, 3e-4

_QUIET = {**QUIET, "use_cpu": True, "save_strategy": "no"}


def make_base(out: Path, seed: int) -> None:
    """Train two layers on the base's documents, every word of them."""
    words = make_tokenizer(VOCABULARY)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_model_config(VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.95))
    problems = list(base_problems(seed))
    steps = len(problems) // BASE_BATCH
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = BASE_RATE * min(1, (step + 1) / 50, (steps - step) / 100)
        texts = problems[step * BASE_BATCH : (step + 1) * BASE_BATCH]
        batch = words(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(out)
    words.save_pretrained(out)


@torch.no_grad()
def completions(folder: Path, questions: list[int], count: int, seed: int) -> list[tuple[int, str]]:
    """`count` thoughts and answers after each question, at temperature 1: question and text."""
    words = make_tokenizer(VOCABULARY)
    words.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    prompts = [" ".join([*asked(question), OPEN]) for question in questions for _ in range(count)]
    batch = words(prompts, return_tensors="pt", padding=True)
    ids = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=THOUGHT_TOKENS + 2,
        pad_token_id=words.pad_token_id,
    )
    said = words.batch_decode(ids[:, batch.input_ids.shape[1] :])
    return list(zip([q for q in questions for _ in range(count)], said))


def said_answer(text: str) -> str | None:
    """The word after the close marker."""
    words = text.split()
    return words[words.index(CLOSE) + 1] if CLOSE in words[:-1] else None


def reinforce(base: Path, out: Path, seed: int, *, with_language: bool) -> None:
    """RLVR: GRPO with 1 for a right answer, alone or with the share of the script in the
    thought."""
    import trl
    from datasets import Dataset

    words, rng = make_tokenizer(VOCABULARY), random.Random(f"language rlvr {seed}")
    questions = [rng.choice(questions_of(seed)["train"]) for _ in range(RLVR_PROMPTS * RLVR_STEPS)]
    rows = {
        "prompt": [" ".join([*asked(question), OPEN]) for question in questions],
        "expected": [answer_of(question) for question in questions],
    }

    def right_answer(
        completion_ids: list[list[int]], expected: list[str], **_: object
    ) -> list[float]:
        said = [said_answer(words.decode(ids)) for ids in completion_ids]
        return [float(one == right) for one, right in zip(said, expected)]

    rewards = [right_answer]
    if with_language:
        rewards.append(language_reward(SCRIPT, weight=WEIGHT, decode=words.decode))
    args = trl.GRPOConfig(
        output_dir=str(out.parent / "unused"),
        max_steps=RLVR_STEPS,
        per_device_train_batch_size=RLVR_PROMPTS * RLVR_GENERATIONS,
        num_generations=RLVR_GENERATIONS,
        max_completion_length=THOUGHT_TOKENS + 2,
        learning_rate=RLVR_RATE,
        temperature=1.0,
        top_k=0,
        seed=seed,
        **_QUIET,
    )
    trainer = trl.GRPOTrainer(
        model=str(base), reward_funcs=rewards, args=args, train_dataset=Dataset.from_dict(rows)
    )
    trainer.train()
    trainer.model.save_pretrained(out)
    words.save_pretrained(out)


def supervise(base: Path, kept: Path, out: Path, seed: int) -> None:
    """SFT on the traces that `rlp traces` has kept, as it wrote them."""
    import trl
    from datasets import load_dataset

    args = trl.SFTConfig(
        output_dir=str(out.parent / "unused"),
        max_length=64,
        max_steps=SFT_STEPS,
        per_device_train_batch_size=SFT_BATCH,
        learning_rate=SFT_RATE,
        seed=seed,
        **_QUIET,
    )
    cache = str(out.parent / "cache")
    rows = load_dataset("json", data_files=str(kept), split="train", cache_dir=cache)
    trainer = trl.SFTTrainer(model=str(base), args=args, train_dataset=rows)
    trainer.train()
    trainer.model.save_pretrained(out)
    make_tokenizer(VOCABULARY).save_pretrained(out)


def think_ahead(
    base: Path, corpus: Path, run: Path, seed: int, ranks: Ranks, *, weight: float
) -> Path:
    """RLP on documents without thoughts, with or without the term; the model."""
    config = {
        "run": {"dir": str(run), "seed": seed, "resume": "auto"},
        "model": {"path": str(base)},
        "data": {"train": [str(corpus)], "max_document_tokens": 64},
        "position": {"selector": "marker", "marker": "faces"},
        "thought": {
            "group_size": RLP_THOUGHTS,
            "max_thought_tokens": THOUGHT_TOKENS + 2,
            "temperature": 1.0,
        },
        "reward": {"script": SCRIPT, "language_weight": weight},
        "objective": {"lm_weight": 0.0},
        "optim": {
            "batch_size": RLP_DOCUMENTS,
            "micro_batch_size": RLP_DOCUMENTS,
            "learning_rate": RLP_RATE,
        },
        "engine": {"dtype": "float32"},
        "budget": {"steps": RLP_STEPS},
        "checkpoint": {"every_n_steps": 0},
        "logging": {"every_n_steps": 20},
    }
    ended = Trainer(load_config(config), ranks=ranks).fit()
    if ended.code != DONE:
        raise RuntimeError(f"the run in {run} ended with exit code {ended.code}")
    return run / "export"


def plain_documents(seed: int) -> list[str]:
    """RLP's documents: the train questions with their answers, no thought in them."""
    questions, rng = questions_of(seed)["train"], random.Random(f"language documents {seed}")
    return [problem(question) for question in rng.sample(questions, len(questions))]
