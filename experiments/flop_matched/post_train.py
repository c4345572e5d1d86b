"""What every arm is given after pretraining, the same for all: supervised fine-tuning, then RL from
verifiable rewards, by TRL, with the model kept at several steps of each.

Both use questions of the block `base_train`, which the held-out block shares nothing with. The
examples of the first hold computing thoughts, so enough of them hand the strategy to every arm; how
many is what the curve shows, and RLVR goes on from a model that has seen few.
"""

import random
import shutil
from pathlib import Path

from lines import STEPS

from rlp.world.problems import CLOSE, OPEN, computed, problem_text, split_questions, turns_of

SFT_BATCH, SFT_LEARNING_RATE = 8, 3e-5
RLVR_PROMPTS, RLVR_GENERATIONS, RLVR_LEARNING_RATE = 8, 8, 1e-4
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


def supervise(model: Path, out: Path, seed: int) -> dict[int, Path]:
    """Fine-tune on computing thoughts and answers; the model at each of its
    `STEPS`."""
    import trl
    from datasets import Dataset

    steps = STEPS["sft"]
    if _is_kept(out, steps):
        return _kept(out, steps)
    rng = random.Random(f"sft {seed}")
    questions = rng.sample(split_questions(seed)["base_train"], SFT_BATCH * steps[-1])
    turns = [turns_of(question) for question in questions]
    args = trl.SFTConfig(
        output_dir=str(out / "unused"),
        max_length=64,
        max_steps=steps[-1],
        per_device_train_batch_size=SFT_BATCH,
        learning_rate=SFT_LEARNING_RATE,
        seed=seed,
        **_QUIET,
    )
    rows = {"text": [problem_text(one, computed(one)) for one in turns]}
    trainer = trl.SFTTrainer(model=str(model), args=args, train_dataset=Dataset.from_dict(rows))
    return _train(trainer, out, steps)


def reinforce(model: Path, out: Path, seed: int) -> dict[int, Path]:
    """GRPO with reward 1 for the right heading after the thought; the model at each of
    its `STEPS`."""
    import trl
    from datasets import Dataset

    steps = STEPS["rlvr"]
    if _is_kept(out, steps):
        return _kept(out, steps)
    rng = random.Random(f"rlvr {seed}")
    questions = rng.sample(split_questions(seed)["base_train"], RLVR_PROMPTS * steps[-1])
    problems = [problem_text(turns_of(question)).split() for question in questions]
    rows = {
        "prompt": [" ".join([*words[:-2], OPEN]) for words in problems],
        "heading": [words[-2] for words in problems],
    }

    def right_heading(
        completion_ids: list[list[int]], heading: list[str], **_: object
    ) -> list[float]:
        words = [
            [tokenizer.convert_ids_to_tokens(token) for token in ids] for ids in completion_ids
        ]
        return [float(answer_of(said) == right) for said, right in zip(words, heading)]

    args = trl.GRPOConfig(
        output_dir=str(out / "unused"),
        max_steps=steps[-1],
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
    return _train(trainer, out, steps)


def answer_of(words: list[str]) -> str | None:
    """The word after the close marker."""
    return words[words.index(CLOSE) + 1] if CLOSE in words[:-1] else None


def _kept(out: Path, steps: tuple[int, ...]) -> dict[int, Path]:
    return {step: out / f"step_{step}" for step in steps}


def _is_kept(out: Path, steps: tuple[int, ...]) -> bool:
    """Whether a stage is finished: its folder gets its name when all of its models are in it."""
    return all((path / "model.safetensors").is_file() for path in _kept(out, steps).values())


def _train(trainer: object, out: Path, steps: tuple[int, ...]) -> dict[int, Path]:
    """Train, and keep the model at some steps."""
    from transformers import TrainerCallback

    arriving = out.with_name(f".{out.name}")
    shutil.rmtree(arriving, ignore_errors=True)  # left by an interrupted call
    arriving.mkdir(parents=True)

    class Keep(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            if state.global_step in steps:
                place = arriving / f"step_{state.global_step}"
                trainer.model.save_pretrained(place)
                trainer.processing_class.save_pretrained(place)

    trainer.add_callback(Keep())
    trainer.train()
    shutil.rmtree(out, ignore_errors=True)
    arriving.replace(out)
    return _kept(out, steps)
