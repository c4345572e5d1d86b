"""A tokenizer and a tiny model config for GSM8K: byte-level BPE of its problems, Qwen3 shape.

    python experiments/gsm8k_tiny/make_model.py --out experiments/gsm8k_tiny/model

The folder holds no weights: `model.init: random` draws them.
"""

import argparse
import sys
from pathlib import Path

from rlp.config import DataConfig  # rlp before torch: see rlp/process/machine.py
from rlp.data.errors import DataError
from rlp.data.sources import open_rows

# isort: split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

SPECIAL = ["<pad>", "<eos>", "<think>", "</think>"]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<think>", "</think>"],
    )


def model_config(vocabulary: int, eos_token_id: int) -> Qwen3Config:
    """Qwen3 with 4 layers of width 128: 0.9 M parameters beside the embedding."""
    # At this width the default initializer_range of 0.02 trains slowly.
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=0,
    )


def problems(source: str) -> list[str]:
    """The texts of configs/gsm8k_tiny.yaml, read as a run reads them.

    Raises:
        DataError: nothing can be read there.
    """
    rows = open_rows([source], DataConfig(train=[source]), "train", "--data")
    return ["{question}\n{answer}".format_map(rows.read(index)) for index in range(len(rows))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        default="hub:openai/gsm8k@main",
        help="rows with the fields question and answer: a file, or hub:OWNER/NAME (GSM8K)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--vocabulary", type=int, default=2048)
    options = parser.parse_args()

    if options.out.exists():
        print(
            f"error: --out: {options.out} exists and is never written over. Write another folder.",
            file=sys.stderr,
        )
        return 2
    try:
        texts = problems(options.data)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3

    tokenizer = train_tokenizer(texts, options.vocabulary)
    tokenizer.save_pretrained(options.out)
    model_config(len(tokenizer), tokenizer.eos_token_id).save_pretrained(options.out)
    print(f"{options.out}: {len(tokenizer)} tokens, from {len(texts)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
