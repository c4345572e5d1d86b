"""`spectrum`: Spectrum tuning by TRL's SFT trainer."""

from rlp.post.pipeline_config import SpectrumStage
from rlp.post.spectrum_rows import row_examples, row_of
from rlp.post.stages.interface import Made, Work
from rlp.post.stages.rows import read_rows
from rlp.post.stages.sft import sft_trainer
from rlp.post.stages.trl_training import Account, train


def tune(work: Work) -> Made:
    """Fine-tune on rows of many pairs of one task, with the loss on outputs alone. Which
    descriptions are dropped hangs on the seed and the number of the row."""
    account = Account(work)
    return train(account, lambda: sft_trainer(work, account, _examples(work)))


def _examples(work: Work) -> list[dict]:
    from transformers import AutoTokenizer

    settings: SpectrumStage = work.settings
    rows = [row_of(row, f"row {n}") for n, row in enumerate(read_rows(settings), start=1)]
    return row_examples(
        rows,
        AutoTokenizer.from_pretrained(work.model),
        row_format=settings.format,
        drop=settings.drop,
        seed=work.seed,
        max_tokens=settings.max_tokens,
    )
