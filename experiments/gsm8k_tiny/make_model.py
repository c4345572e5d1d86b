"""A tokenizer and a tiny model config for GSM8K: byte-level BPE trained on the problems, Qwen3
shape.

    python experiments/gsm8k_tiny/make_model.py --data train.jsonl --out
    experiments/gsm8k_tiny/model

The folder holds no weights: `model.init: random` draws them.
"""

import argparse
import json
import sys
from pathlib import Path

import rlp  # noqa: F401, before torch, which transformers loads: see rlp/process/machine.py

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", required=True, help="a JSON Lines file with the fields question and answer"
    )
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--vocabulary", type=int, default=2048)
    options = parser.parse_args()
    out = Path(options.out)
    if not Path(options.data).is_file():
        print(
            f"error: --data: no file at {options.data!r}. Write the path of GSM8K's train.jsonl.",
            file=sys.stderr,
        )
        return 3
    if out.exists():
        print(
            f"error: --out: {out} exists and is never written over. Write another folder.",
            file=sys.stderr,
        )
        return 2
    rows = [
        json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines()
    ]
    tokenizer = train_tokenizer(
        [f"{row['question']}\n{row['answer']}" for row in rows], options.vocabulary
    )
    tokenizer.save_pretrained(out)
    model_config(len(tokenizer), tokenizer.eos_token_id).save_pretrained(out)
    print(f"{out}: {len(tokenizer)} tokens, from {len(rows)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
