"""`sft`: supervised fine-tuning by TRL.

Thought markers are ordinary tokens here: a row may hold whole thoughts.
"""

from typing import TYPE_CHECKING

from rlp.model.shapes import row_work
from rlp.post.pipeline_config import SftStage, SpectrumStage
from rlp.post.stages.interface import Made, Work
from rlp.post.stages.rows import read_rows
from rlp.post.stages.trl_training import Account, train, trl_arguments

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


def supervise(work: Work) -> Made:
    """Fine-tune on rows of text, or on completions of prompts, on whose tokens alone the loss
    is."""
    account = Account(work)
    return train(account, lambda: sft_trainer(work, account, read_rows(work.settings)))


def sft_trainer(work: Work, account: Account, rows: list[dict]) -> "Trainer":
    """TRL's trainer, which counts what it does.

    Args:
        rows: with the columns that TRL reads.
    """
    import trl
    from datasets import Dataset

    settings: SftStage | SpectrumStage = work.settings

    class Counted(trl.SFTTrainer):
        """Its steps are in the ledger."""

        def compute_loss(
            self, model: object, inputs: dict, *more: object, **named: object
        ) -> object:
            _count(account, inputs)
            return super().compute_loss(model, inputs, *more, **named)

    return Counted(
        model=work.model,
        args=trl.SFTConfig(
            max_length=settings.max_tokens,
            per_device_train_batch_size=settings.batch_size,
            **trl_arguments(work, settings),
        ),
        train_dataset=Dataset.from_list(rows),
    )


def _count(account: Account, inputs: dict[str, "Tensor"]) -> None:
    """A forward and a backward pass over a batch of rows."""
    lengths = inputs["attention_mask"].sum(dim=1).cpu().numpy()
    trained = int((inputs["labels"][:, 1:] != -100).sum())
    tokens = int(lengths.sum())
    account.ledger.add(
        "lm",
        row_work(lengths, head_rows=tokens),
        passes=3,
        tokens_in=tokens,
        tokens_trained=trained,
    )
    account.ledger.add_documents(tokens)
