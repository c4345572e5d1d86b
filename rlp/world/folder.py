"""A folder with the heading world in it: what `rlp world` writes.

    base_train.jsonl    with thoughts, for the language-model loss; read once, in order
    train.jsonl         without thoughts, for RLP
    held_out.jsonl      without thoughts, every held-out question exactly once
    tokenizer/          one token per word
    model_config.json   Qwen3Config for a random start
    base/               the model that base_train.jsonl made of it, from which RLP begins
    quickstart.yaml     the config of RLP from that base on these documents

The base and the config come with the package; the rest is made, and a function of the seed.
"""

import json
from collections.abc import Iterable
from importlib.resources import files as package_files
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from rlp.config import ConfigError
from rlp.process.files import make_folder, new_folder, write_new
from rlp.world.problems import CLOSE, OPEN, VOCABULARY, make_documents

SEED = 0
"""Of the documents that the base has seen: with another one its questions would be held out."""

PACKAGED = package_files("rlp.world")

REPOSITORY_PATHS = {
    "rlp/world/base": "base",
    "experiments/world/data/train.jsonl": "train.jsonl",
    "experiments/world/data/held_out.jsonl": "held_out.jsonl",
}
"""Paths in quickstart.yaml, which is a config of the repository too, and what stands for each in a
folder of the world."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; text is split at spaces and decoded with spaces."""
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=[OPEN, CLOSE],
        clean_up_tokenization_spaces=False,  # "west ." stays two words
    )


def make_model_config() -> Qwen3Config:
    """Two layers, 84,992 parameters: enough for one addition a word, not for a sum of six."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,  # at this width the default 0.02 does not learn
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=None,
        eos_token_id=VOCABULARY.index("<eos>"),
    )


def jsonl(documents: Iterable[str]) -> bytes:
    """One {"text": document} per line."""
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode("ascii")


def quickstart(folder: Path) -> str:
    """The text of quickstart.yaml for a folder of the world, with whole paths."""
    text = (PACKAGED / "quickstart.yaml").read_text(encoding="utf-8")
    for path, name in REPOSITORY_PATHS.items():
        text = text.replace(path, json.dumps(str(folder.resolve() / name), ensure_ascii=False))
    return text


def write_documents(folder: Path, seed: int) -> None:
    """Add all that is made from a seed to a folder."""
    for name, documents in make_documents(seed).items():
        write_new(folder / f"{name}.jsonl", jsonl(documents), point="world.torn_file")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    make_model_config().to_json_file(folder / "model_config.json", use_diff=False)


def write_world(out: Path) -> None:
    """Make a folder of the world, which was absent or empty.

    Raises:
        ConfigError: `out` is a file, or a folder with something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} already holds files, and nothing is written over. Write a folder that is empty"
            " or not there."
        )
    with new_folder(out, point="world.before_rename") as folder:
        write_documents(folder, SEED)
        make_folder(folder / "base")
        for file in (PACKAGED / "base").iterdir():
            write_new(folder / "base" / file.name, file.read_bytes(), point="world.torn_file")
        write_new(folder / "quickstart.yaml", quickstart(out).encode(), point="world.torn_file")
