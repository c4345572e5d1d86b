"""`redi`: right traces up, wrong ones down, on pairs of both; REDI's loss, DPO's or SimPO's.

work/steps.jsonl    what the trainer has logged of every step; there when the stage is done
"""

import json
import math
from typing import TYPE_CHECKING

import numpy as np

from rlp.model.shapes import row_work
from rlp.post.pipeline_config import RediStage
from rlp.post.redi import CollapseAlarm, CollapseError
from rlp.post.stages.interface import Made, StageError, Work
from rlp.post.stages.rows import read_rows
from rlp.post.stages.trl_training import Account, train, trl_arguments
from rlp.process.files import write_atomically

if TYPE_CHECKING:
    from transformers import Trainer


def contrast(work: Work) -> Made:
    """Train on pairs of a right and a wrong trace."""
    account = Account(work, log="steps.jsonl")
    try:
        return train(account, lambda: _trainer(work, account))
    except CollapseError as error:
        raise StageError(
            f"{error} What was kept on the way (keep_steps) stands; stop_on_collapse: false goes on"
            " all the same."
        ) from error


def _trainer(work: Work, account: Account) -> "Trainer":
    from datasets import Dataset
    from transformers import PrinterCallback

    settings: RediStage = work.settings
    rows = Dataset.from_list(read_rows(settings))
    arguments = trl_arguments(work, settings) | {
        "max_length": settings.max_tokens,
        "per_device_train_batch_size": settings.batch_size,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    trainer = _MAKE[settings.loss](work, account, rows, arguments)
    trainer.remove_callback(PrinterCallback)  # steps.jsonl has it
    trainer.add_callback(_keep_log(work))
    return trainer


def _redi(work: Work, account: Account, rows: object, arguments: dict) -> "Trainer":
    import trl

    from rlp.post.redi_trainer import RediTrainer

    settings: RediStage = work.settings
    return _counted(RediTrainer, account)(
        model=work.model,
        args=trl.DPOConfig(**arguments),
        train_dataset=rows,
        alpha=settings.alpha,
        negative=settings.negative,
        alarm=CollapseAlarm(settings.drop),
        stop_on_collapse=settings.stop_on_collapse,
        tell=work.tell,
    )


def _dpo(work: Work, account: Account, rows: object, arguments: dict) -> "Trainer":
    import trl

    args = trl.DPOConfig(beta=work.settings.beta, **arguments)
    return _counted(trl.DPOTrainer, account, references=1)(
        model=work.model, args=args, train_dataset=rows
    )


def _simpo(work: Work, account: Account, rows: object, arguments: dict) -> "Trainer":
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings: RediStage = work.settings
    args = CPOConfig(
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=settings.beta,
        simpo_gamma=settings.margin * settings.beta,
        **arguments,
    )
    return _counted(CPOTrainer, account)(
        model=work.model,
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(work.model),
    )


_MAKE = {"redi": _redi, "dpo": _dpo, "simpo": _simpo}


def _counted(trainer: type, account: Account, references: int = 0) -> type:
    """A trainer whose steps are in the ledger.

    Args:
        references: forward passes of another model at each batch.
    """

    class Counted(trainer):
        def compute_loss(
            self, model: object, inputs: dict, *more: object, **named: object
        ) -> object:
            _count(account, inputs, references)
            return super().compute_loss(model, inputs, *more, **named)

    return Counted


def _count(account: Account, inputs: dict, references: int) -> None:
    """A forward and a backward pass over both traces of a batch of pairs."""
    # DPO's trainer has both in one tensor, SimPO's each in its own, and the prompts once more.
    names = ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")
    masks = [inputs[name] for name in names if name in inputs]
    lengths = np.concatenate([mask.sum(dim=1).cpu().numpy() for mask in masks])
    tokens = int(lengths.sum())
    work = row_work(lengths, head_rows=tokens)
    account.ledger.add("lm", work, passes=3, tokens_in=tokens, tokens_trained=tokens)
    if references:
        account.ledger.add("score", work, passes=references, tokens_in=tokens)
    account.ledger.add_documents(tokens)


def _keep_log(work: Work) -> object:
    """Writes what was logged, from the first step on, also of what was resumed."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_train_end(self, args: object, state: object, control: object, **_: object) -> None:
            if state.global_step < state.max_steps:
                return  # asked to stop: the rest follows
            told = [_finite(line) for line in state.log_history if "loss" in line]
            lines = "".join(
                json.dumps(line, allow_nan=False, sort_keys=True) + "\n" for line in told
            )
            write_atomically(work.folder / "steps.jsonl", lines.encode(), point="stage.torn_steps")

    return Keep()


def _finite(line: dict[str, float]) -> dict[str, float | None]:
    """With null for what is no number, which JSON has no word for."""
    return {name: value if math.isfinite(value) else None for name, value in line.items()}
