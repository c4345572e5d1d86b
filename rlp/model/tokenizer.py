"""The tokenizer of a model: found, opened, and held to the model that it is used with."""

import os
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from rlp.config import Config, ConfigError, ModelConfig
from rlp.data.hub import settle_hub
from rlp.model.markers import Markers, find_markers


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, from `model.tokenizer` or `model.path`."""
    source = config.tokenizer or config.path
    settle_source(source, "model.tokenizer" if config.tokenizer else "model.path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what is wrong in a file comes as any type
        raise ConfigError(
            f"model.tokenizer: no tokenizer at {source!r}: {in_one_line(error)}."
            f" {WHERE_MODELS_LIVE}"
        ) from error

    # transformers makes an empty tokenizer of the kind that config.json names where there is
    # nothing to read.
    names = {*tokenizer.vocab_files_names.values(), *_TOKENIZER_FILES}
    reads_files = tokenizer.vocab_files_names and Path(source).is_dir()
    if reads_files and not any(any(Path(source).glob(name)) for name in names):
        raise ConfigError(
            f"model.tokenizer: {source!r} holds a model's config and no tokenizer (none of"
            f" {', '.join(sorted(names))}). Write model.tokenizer=FOLDER_OR_HUB_NAME of the one"
            " that belongs to it, or put its files there."
        )
    return tokenizer


_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "*.gguf")
"""What a tokenizer is read from, beside what its class names."""


def settle_source(source: str, key: str) -> None:
    """Get ready to ask the Hub for what is not on this machine.

    Raises:
        ConfigError: what is not there is written as a path is.
    """
    if os.path.exists(source):
        return
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ConfigError(f"{key}: there is no file or folder {source!r}. {WHERE_MODELS_LIVE}")
    settle_hub()


def in_one_line(error: Exception) -> str:
    """What an error says, on one line: validators of configs name the key on their second."""
    return " ".join(str(error).split())[:400]


WHERE_MODELS_LIVE = (
    "Write a folder that holds a Hugging Face model, or a Hub name that this machine can reach."
)


def open_tokenizer(config: Config) -> tuple[PreTrainedTokenizerBase, Markers]:
    """The tokenizer of a config, and its markers: added to it where `thought.add_markers` asks for
    it."""
    tokenizer = load_tokenizer(config.model)
    return tokenizer, find_markers(tokenizer, config.thought)


def refuse_other_tokenizer(
    config: Config,
    architecture: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
) -> None:
    """Refuse a tokenizer with more tokens than the model has rows; added markers get rows of their
    own."""
    vocabulary = architecture.get_text_config().vocab_size
    num_tokens = max(tokenizer.get_vocab().values()) + 1 - len(markers.pieces)
    if num_tokens > vocabulary:
        raise ConfigError(
            f"model.tokenizer: {num_tokens} tokens, but the embedding of {config.model.path} has"
            f" {vocabulary} rows. Write the tokenizer that belongs to the model, or resize the"
            " model's embedding first."
        )


def quiet_transformers() -> None:
    """Keep transformers from writing to the console."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
