"""Models from files: config, dtype, attention, weights; what cannot be trained is refused before it
is built."""

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from rlp.config import Config, ConfigError, ModelConfig, first_line
from rlp.model.attention import register, why_no_tree
from rlp.model.markers import Markers, Whole, embed_markers
from rlp.model.policy import Policy
from rlp.model.tokenizer import (
    WHERE_MODELS_LIVE,
    in_one_line,
    refuse_other_tokenizer,
    settle_source,
)
from rlp.process.machine import bfloat16_instructions

BFLOAT16_WIDTH = 256
"""Width of a model from which bfloat16 pays on a CPU that has instructions for it. Measured on one
core with avx512_bf16 (AMD EPYC, torch 2.13, 2026-11-21), CPU-seconds in float32 over those in
bfloat16 for a Qwen3 of four layers, training | decoding:
width 64: 1.1 | 0.7, 128: 1.5 | 1.0, 256: 2.0 | 1.3, 512: 2.6 | 2.0; a matrix product alone, width
576: 4.8, without the instructions 0.8."""


def choose_dtype(config: Config, device: torch.device, width: int) -> tuple[torch.dtype, str]:
    """The dtype of forward and backward, `engine.dtype` with auto resolved, and why.

    Args:
        width: D of the model.
    """
    if config.engine.dtype != "auto":
        return getattr(torch, config.engine.dtype), "as engine.dtype says"
    if config.engine.zero_stage == 0:
        return torch.float32, "engine.zero_stage 0 has no float32 master weights"
    if device.type == "cuda":
        return torch.bfloat16, "a GPU"
    instructions = bfloat16_instructions()
    if instructions is None:
        return torch.float32, "this CPU has no instructions for bfloat16"
    if width < BFLOAT16_WIDTH:
        return (
            torch.float32,
            f"the model is {width} wide, and bfloat16 pays from {BFLOAT16_WIDTH} on",
        )
    return (
        torch.bfloat16,
        f"this CPU has {instructions}; engine.dtype=float32 is two to five times slower",
    )


def read_model_config(config: ModelConfig) -> PretrainedConfig:
    """The architecture, with every dropout off, for the layers that `Policy.train` leaves in
    training mode."""
    settle_source(config.path, "model.path")
    try:
        values, _ = PretrainedConfig.get_config_dict(config.path)
    except Exception as error:  # what is wrong in a file comes as any type
        raise ConfigError(
            f"model.path: no model config at {config.path!r}: {in_one_line(error)}."
            f" {WHERE_MODELS_LIVE}"
        ) from error
    if not values:
        raise ConfigError(f"model.path: no config.json in {config.path!r}. {WHERE_MODELS_LIVE}")
    _refuse_impossible_sizes(config.path, values)

    try:
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=False)
    except Exception as error:  # as above
        raise ConfigError(
            f"model.path: the config.json of {config.path!r} describes no model:"
            f" {type(error).__name__}: {in_one_line(error)}"
        ) from error

    for name, value in list(vars(architecture).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(architecture, name, 0.0)
    return architecture


_SIZES = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "state_size",
    "max_position_embeddings",
    "n_positions",
)
"""Numbers of a config.json of which a model has at least one, by the names of most
architectures."""


def _refuse_impossible_sizes(source: str, values: dict) -> None:
    """Refuse what no model has before transformers divides by it."""
    for part in (values, values.get("text_config")):
        if not isinstance(part, dict):
            continue
        for name in _SIZES:
            value = part.get(name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(
                    f"model.path: the config.json of {source!r} has {name}={value}; expected at"
                    " least 1. Write the config of the model."
                )

        heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise ConfigError(
                f"model.path: the config.json of {source!r} has num_attention_heads={heads} and"
                f" num_key_value_heads={shared}; expected that each of these is shared by as many"
                " of those. Write the config of the model."
            )


def choose_layout(config: Config, architecture: PretrainedConfig) -> tuple[str, str]:
    """`engine.layout` with auto resolved, and why.

    Raises:
        ConfigError: a tree is asked for and the model can not run it.
    """
    if config.engine.layout == "repeated":
        return "repeated", "as engine.layout says"
    attention = "sdpa" if config.model.attention == "auto" else config.model.attention
    obstacle = why_no_tree(architecture, attention)
    if obstacle is None:
        return "tree", "each document is run once for all its thoughts"
    if config.engine.layout == "tree":
        raise ConfigError(
            f"engine.layout: {architecture.model_type} can not run a tree: {obstacle}. Write"
            " engine.layout=repeated."
        )
    return "repeated", obstacle


def _choose_attention(
    config: ModelConfig, layout: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The attention to ask transformers for; None lets it take sdpa, or eager where a model has no
    sdpa."""
    if layout == "tree":
        return register("sdpa")
    if config.attention != "auto":
        return config.attention
    if device.type == "cuda" and dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return None


def load_policy(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    dtype: torch.dtype,
    device: torch.device,
    whole: Whole = lambda parameters: nullcontext(),
) -> Policy:
    """Load or initialize the model, put the added markers in, and check that this program can score
    it.

    Args:
        tokenizer, markers: of `open_tokenizer`.
        whole: for a model that is sharded as it is read.

    Raises:
        ConfigError: no such model, weights missing, a vocabulary larger than the embedding, or
            logits that are not a product of hidden state and head.
    """
    architecture = read_model_config(config.model)
    refuse_other_tokenizer(config, architecture, tokenizer, markers)
    layout, _ = choose_layout(config, architecture)
    lm = _load(config, architecture, _choose_attention(config.model, layout, dtype, device), dtype)
    embed_markers(lm, markers, whole)

    # Some makers freeze a parameter that only training recipes of their own move: without a
    # gradient it stays as it is here too.
    for parameter in lm.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    if config.engine.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(lm, markers, config.engine.logprob_form)


def load_with_markers(
    config: Config, tokenizer: PreTrainedTokenizerBase, markers: Markers
) -> PreTrainedModel:
    """The pretrained model as transformers loads it, in its own dtype and with its config
    untouched, with the added markers in it."""
    architecture = AutoConfig.from_pretrained(config.model.path, trust_remote_code=False)
    refuse_other_tokenizer(config, architecture, tokenizer, markers)
    lm = _load(config, architecture, None, "auto")
    embed_markers(lm, markers, lambda parameters: nullcontext())
    return lm


UNLOADABLE = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    SafetensorError,
)
"""What files that are damaged, or of another model, make transformers raise."""


def _load(
    config: Config, architecture: PretrainedConfig, attention: str | None, dtype: torch.dtype | str
) -> PreTrainedModel:
    """`_build`, with what transformers raises turned into a ConfigError."""
    try:
        return _build(config, architecture, attention, dtype)
    except ConfigError:
        raise
    except UNLOADABLE as error:
        raise ConfigError(
            f"model.path: {config.model.path!r} could not be loaded: {first_line(error)}."
            f" {WHERE_MODELS_LIVE}"
        ) from error


def _build(
    config: Config, architecture: PretrainedConfig, attention: str | None, dtype: torch.dtype | str
) -> PreTrainedModel:
    if config.model.init == "random":
        torch.manual_seed(config.run.seed)
        return AutoModelForCausalLM.from_config(
            architecture, attn_implementation=attention, dtype=dtype, trust_remote_code=False
        )

    _refuse_pickles(config.model.path)
    lm, loading = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        config=architecture,
        attn_implementation=attention,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )

    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(
            f"model.path: {config.model.path!r} lacks {len(missing)} weights that the architecture"
            f" has, such as {missing[0]}. Write the folder of a complete checkpoint."
        )
    return lm


def _refuse_pickles(source: str) -> None:
    """An index of safetensors may name files of another kind, which transformers would unpickle."""
    index = cached_file(
        source,
        "model.safetensors.index.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is None:
        return
    for name in json.loads(Path(index).read_bytes())["weight_map"].values():
        is_text = isinstance(name, str)
        if not (is_text and name.endswith(".safetensors") and Path(name).name == name):
            raise ValueError(
                f"{index} names {name!r}; expected safetensors files in the same folder"
            )
