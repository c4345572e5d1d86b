"""A folder with a world in it: what `rlp world` writes.

    base_train.jsonl    with thoughts, for the language-model loss; read once, in order
    train.jsonl         without thoughts, for RLP
    held_out.jsonl      without thoughts, every held-out question exactly once
    tokenizer/          one token per word
    model_config.json   Qwen3Config for a random start
    base.yaml           the config that makes the base of base_train.jsonl
    base/               that base, from which RLP begins; with seed 0 only, as it comes with us
    quickstart.yaml     the config of RLP from that base on these documents (headings.yaml)

The base and the configs come with the package; the rest is made, and a function of the seed. A base
knows the questions of its own seed, which another seed may hold out: so a folder of another seed
has none, until its base.yaml has made one.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from rlp.config import ConfigError, require, require_one_of
from rlp.process.files import make_folder, new_folder, write_new
from rlp.world import headings, rare
from rlp.world.problems import (
    BLOCKS,
    CLOSE,
    OPEN,
    TRAIN_EPOCHS,
    VOCABULARY,
    plain_documents,
    split_questions,
)

PACKAGED = package_files("rlp.world")

COMMITTED_SEED = 0
"""Of the documents that the committed bases have seen."""

MAX_SEED = 2**63 - 1
"""As `run.seed`."""


@dataclass(frozen=True, slots=True)
class World:
    """One kind of world: its thoughts, and what of it comes with the package."""

    base_documents: Callable[[Sequence[int], random.Random], Iterator[str]]
    """base_train.jsonl, from the questions of its block."""
    base: str
    """Folder of the committed base."""
    base_config: str
    """The config that made it."""
    config: str
    """The config of RLP from it."""
    data: str
    """Where the repository's configs have its documents."""


MADE = ("base_train.jsonl", "train.jsonl", "held_out.jsonl", "tokenizer", "model_config.json")
"""What the configs name, of what is made from a seed."""

WORLDS = {
    "rare": World(
        rare.base_documents, "base", "base.yaml", "quickstart.yaml", "experiments/world/data"
    ),
    "headings": World(
        headings.base_documents,
        "headings_base",
        "headings_base.yaml",
        "headings.yaml",
        "experiments/world/headings",
    ),
}
"""By `rlp world --kind`."""


def make_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token per word; text is split at spaces and decoded with spaces."""
    words = {word: index for index, word in enumerate(vocabulary)}
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


def make_model_config(vocabulary: Sequence[str] = VOCABULARY) -> Qwen3Config:
    """Two layers, 84,992 parameters: enough for one addition a word, not for a sum of six."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,  # at this width the default 0.02 does not learn
        tie_word_embeddings=False,
        pad_token_id=vocabulary.index("<pad>"),
        bos_token_id=None,
        eos_token_id=vocabulary.index("<eos>"),
    )


def jsonl(documents: Iterable[str]) -> bytes:
    """One {"text": document} per line."""
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode("ascii")


def make_documents(world: World, seed: int) -> dict[str, list[str]]:
    """The documents of every split, in the order of their file."""
    questions = split_questions(seed)
    rng = {name: random.Random(f"{name} {seed}") for name in BLOCKS}
    return {
        "base_train": list(world.base_documents(questions["base_train"], rng["base_train"])),
        "train": list(plain_documents(questions["train"], TRAIN_EPOCHS, rng["train"])),
        "held_out": list(plain_documents(questions["held_out"], 1, rng["held_out"])),
    }


def config_text(world: World, name: str, folder: Path, seed: int) -> str:
    """A config of the package, which is one of the repository too, for a folder of the world: with
    whole paths, and its seed."""
    home = folder.resolve()
    paths = {f"{world.data}/{made}": home / made for made in MADE} | {
        f"rlp/world/{world.base}": home / "base"
    }
    lines = []
    for line in (PACKAGED / name).read_text(encoding="utf-8").splitlines(keepends=True):
        for path, here in paths.items() if not line.startswith("#") else ():
            line = line.replace(path, json.dumps(str(here), ensure_ascii=False))
        lines += [line, f"  seed: {seed}\n"] if line == "run:\n" else [line]
    return "".join(lines)


def write_documents(folder: Path, world: World, seed: int) -> None:
    """Add all that is made from a seed to a folder."""
    for name, documents in make_documents(world, seed).items():
        write_new(folder / f"{name}.jsonl", jsonl(documents), point="world.torn_file")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    make_model_config().to_json_file(folder / "model_config.json", use_diff=False)


def write_world(out: Path, *, kind: str = "rare", seed: int = COMMITTED_SEED) -> bool:
    """Make a folder of a world, which was absent or empty; whether its base is in it.

    Raises:
        ConfigError: there is no such kind or seed; `out` is a file, or a folder with something in
            it.
    """
    require_one_of("--kind", kind, tuple(WORLDS))
    require(0 <= seed <= MAX_SEED, "--seed", seed, "must be at least 0 and below 2 ** 63")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} already holds files, and nothing is written over. Write a folder that is empty"
            " or not there."
        )
    world, with_base = WORLDS[kind], seed == COMMITTED_SEED
    with new_folder(out, point="world.before_rename") as folder:
        write_documents(folder, world, seed)
        for name, packaged in (("base.yaml", world.base_config), (world.config, world.config)):
            text = config_text(world, packaged, out, seed)
            write_new(folder / name, text.encode(), point="world.torn_file")
        if with_base:
            make_folder(folder / "base")
            for file in (PACKAGED / world.base).iterdir():
                write_new(folder / "base" / file.name, file.read_bytes(), point="world.torn_file")
    return with_base
