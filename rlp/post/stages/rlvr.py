"""`rlvr`: RL from verifiable rewards, by TRL's GRPO.

The reward is `exact_match`, or a function of one's own:

    def reward(*, prompts, completions, completion_ids, tokenizer, **fields) -> list[float]

for all completions of a step: their prompts, their text with every token spelled out (thought
markers too; not those that end or pad it), their token ids, the tokenizer, and each field of the
rows as a list.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlp.model.shapes import row_work
from rlp.post.pipeline_config import RlvrStage
from rlp.post.stages.interface import Made, StageError, Work
from rlp.post.stages.rows import read_rows, refuse_few
from rlp.post.stages.trl_training import Account, train, trl_arguments
from rlp.process.files import append, read_bytes
from rlp.process.outside import open_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

Reward = Callable[..., list[float]]


def reinforce(work: Work) -> Made:
    """GRPO: groups of completions of a prompt, each rewarded on its own."""
    account = Account(work)
    return train(account, lambda: _trainer(work, account))


def open_reward(settings: RlvrStage) -> Reward:
    """The reward that a stage names.

    Raises:
        ConfigError: it can not be imported, or is none.
    """
    ours = {
        "exact_match": lambda: partial(
            exact_match,
            field=settings.answer_field,
            after=settings.after,
            pattern=settings.pattern,
        )
    }
    return open_part("reward", settings.reward, ours, ()).call


def exact_match(
    *, completions: list[str], field: str, after: str, pattern: str, **fields: list
) -> list[float]:
    """1 where what `pattern` finds right behind `after` is the row's answer, else 0."""
    found = []
    for text, answer in zip(completions, fields[field]):
        _, marker, rest = text.partition(after) if after else ("", "all", text)
        said = re.match(pattern, rest) if marker else None
        found.append(float(said is not None and said[1] == str(answer)))
    return found


def _trainer(work: Work, account: Account) -> "Trainer":
    import trl
    from datasets import Dataset

    settings: RlvrStage = work.settings
    rows = read_rows(settings)
    refuse_few(settings, len(rows))
    reward = open_reward(settings)
    kept = Rollouts(work.folder / "rollouts.jsonl", account.resumed)

    class Counted(trl.GRPOTrainer):
        """Its steps are in the ledger."""

        def _prepare_inputs(self, batch: object) -> object:
            with account.ledger.time("decode"):
                return super()._prepare_inputs(batch)

    def rewarded(
        prompts: list[str], completion_ids: list[list[int]], **fields: object
    ) -> list[float]:
        tokenizer = trainer.processing_class
        _count(account, tokenizer, prompts, completion_ids)
        columns = {name: value for name, value in fields.items() if name in rows[0]}
        completions = [spelled(tokenizer, ids) for ids in completion_ids]
        given = reward(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids,
            tokenizer=tokenizer,
            **columns,
        )
        given = checked(given, len(prompts), settings.reward)
        if settings.keep_rollouts:
            is_cut = [tokenizer.eos_token_id not in ids for ids in completion_ids]
            kept.add(trainer.state.global_step + 1, prompts, completions, given, is_cut)
        return given

    trainer = Counted(
        model=work.model,
        reward_funcs=rewarded,
        args=trl.GRPOConfig(
            per_device_train_batch_size=settings.batch_size * settings.generations,
            num_generations=settings.generations,
            max_completion_length=settings.max_completion_tokens,
            temperature=settings.temperature,
            top_k=0,
            **trl_arguments(work, settings),
        ),
        train_dataset=Dataset.from_list(rows),
    )
    return trainer


class Rollouts:
    """A file of what was sampled, step by step; a step that is made again stands there once."""

    def __init__(self, path: Path, resumed: int) -> None:
        """
        Args:
            resumed: the last step whose rollouts stand.
        """
        self.path, self._size = path, 0
        content = read_bytes(path) if path.exists() else b""
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > resumed:
                break
            self._size += len(line)

    def add(
        self,
        step: int,
        prompts: list[str],
        completions: list[str],
        rewards: list[float],
        is_cut: list[bool],
    ) -> None:
        """Lines that `rlp.post.traces.read_traces` reads."""
        lines = [
            {"step": step, "prompt": prompt, "completion": text, "right": right, "truncated": cut}
            for prompt, text, right, cut in zip(prompts, completions, rewards, is_cut)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        append(self.path, content, point="stage.torn_rollouts", size=self._size)
        self._size += len(content)


def spelled(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """A completion as text, but for tokens that end or pad it."""
    silent = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return tokenizer.decode([token for token in ids if token not in silent])


def checked(given: object, number: int, name: str) -> list[float]:
    """What a reward gave for so many completions.

    Raises:
        StageError: it is no list of as many numbers.
    """
    if not isinstance(given, list) or len(given) != number:
        came = f"{len(given)} of them" if isinstance(given, list) else type(given).__name__
        raise StageError(
            f"reward: {name} gave {came}; expected a list of {number} numbers, one for each"
            " completion."
        )
    return [float(value) for value in given]


def _count(
    account: Account,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    completion_ids: list[list[int]],
) -> None:
    """Prompts read, completions sampled, and a forward and a backward pass over both."""
    ledger, settings = account.ledger, account.work.settings
    before = np.array([len(tokenizer(prompt).input_ids) for prompt in prompts])
    sampled = np.array([len(ids) for ids in completion_ids])
    read, generated = int(before.sum()), int(sampled.sum())
    ledger.add("prefill", row_work(before, head_rows=len(prompts)), passes=1, tokens_in=read)
    ledger.add(
        "decode",
        row_work(sampled, head_rows=generated, before=before),
        passes=1,
        tokens_generated=generated,
    )
    ledger.add(
        "train",
        row_work(before + sampled, head_rows=generated),
        passes=3,
        tokens_in=read,
        tokens_trained=generated,
    )
    ledger.add_documents(read)
    ledger.add_thoughts(
        len(prompts),
        max_thought_tokens=settings.max_completion_tokens,
        sampled_tokens=generated,
    )
