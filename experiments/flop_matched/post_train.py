"""What every arm is given after pretraining, the same for all: supervised fine-tuning, then RL from
verifiable rewards, by TRL.

Both use questions of the block `base_train`, which the held-out block shares nothing with. The
sizes were chosen on the base of seed 0 alone, before any arm was post-trained: enough to move it,
too little to reach the ceiling.
"""

import random
from pathlib import Path

from rlp.world.problems import (
    CLOSE,
    HEADINGS,
    OPEN,
    headings_after,
    problem_text,
    split_questions,
    turns_of,
)

SFT_EXAMPLES, SFT_STEPS, SFT_BATCH, SFT_LEARNING_RATE = 256, 32, 8, 3e-5
RLVR_STEPS, RLVR_PROMPTS, RLVR_GENERATIONS, RLVR_LEARNING_RATE = 30, 8, 8, 3e-5
MAX_COMPLETION_TOKENS = 16
"""12 words of thought, the close marker, the answer, and two to spare."""

_QUIET = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1000,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
}


def supervise(model: Path, out: Path, seed: int) -> Path:
    """Fine-tune on right thoughts and answers; the folder of the result. One that is there is
    taken."""
    import trl
    from datasets import Dataset

    if (out / "model.safetensors").is_file():
        return out
    rng = random.Random(f"sft {seed}")
    questions = rng.sample(split_questions(0)["base_train"], SFT_EXAMPLES)
    texts = [problem_text(turns_of(question), turns_of(question)) for question in questions]
    args = trl.SFTConfig(
        output_dir=str(out),
        max_length=64,
        max_steps=SFT_STEPS,
        per_device_train_batch_size=SFT_BATCH,
        learning_rate=SFT_LEARNING_RATE,
        seed=seed,
        **_QUIET,
    )
    trainer = trl.SFTTrainer(
        model=str(model), args=args, train_dataset=Dataset.from_dict({"text": texts})
    )
    return _trained(trainer, out)


def reinforce(model: Path, out: Path, seed: int) -> Path:
    """GRPO with reward 1 for the right heading after the thought; the folder of the result. One
    that is there is taken."""
    import trl
    from datasets import Dataset

    if (out / "model.safetensors").is_file():
        return out
    rng = random.Random(f"rlvr {seed}")
    questions = rng.sample(split_questions(0)["base_train"], RLVR_STEPS * RLVR_PROMPTS)
    rows = {
        "prompt": [prompt(question) for question in questions],
        "heading": [HEADINGS[headings_after(turns_of(question))[-1]] for question in questions],
    }

    def right_heading(
        completion_ids: list[list[int]], heading: list[str], **_: object
    ) -> list[float]:
        words = [
            [tokenizer.convert_ids_to_tokens(token) for token in ids] for ids in completion_ids
        ]
        return [float(answer_of(said) == right) for said, right in zip(words, heading)]

    args = trl.GRPOConfig(
        output_dir=str(out),
        max_steps=RLVR_STEPS,
        per_device_train_batch_size=RLVR_PROMPTS * RLVR_GENERATIONS,
        num_generations=RLVR_GENERATIONS,
        max_completion_length=MAX_COMPLETION_TOKENS,
        learning_rate=RLVR_LEARNING_RATE,
        temperature=1.0,
        top_k=0,
        seed=seed,
        **_QUIET,
    )
    trainer = trl.GRPOTrainer(
        model=str(model),
        reward_funcs=right_heading,
        args=args,
        train_dataset=Dataset.from_dict(rows),
    )
    tokenizer = trainer.processing_class
    return _trained(trainer, out)


def prompt(question: int) -> str:
    """A question up to the open marker."""
    return problem_text(turns_of(question)).rsplit(" ", 2)[0] + f" {OPEN}"


def answer_of(words: list[str]) -> str | None:
    """The word after the close marker."""
    return words[words.index(CLOSE) + 1] if CLOSE in words[:-1] else None


def _trained(trainer: object, out: Path) -> Path:
    trainer.train()
    trainer.save_model(str(out))
    trainer.processing_class.save_pretrained(out)
    return out
