"""Tiny random models of several architectures, a tokenizer of words, and documents for them."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from rlp.data.documents import Document
from rlp.model.markers import Markers
from rlp.model.policy import Policy

WORDS = ["<pad>", "<eos>", "<think>", "</think>", "<unk>", ".", *(f"w{i}" for i in range(42))]
"""The vocabulary of the tests: 48 words, one token each."""

MARKERS = Markers(open=(2,), close=(3,))
"""<think> and </think>."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`."""
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<think>", "</think>"],
    )


def architecture(name: str) -> PretrainedConfig:
    """A tiny random config, with weights large enough that rounding and mixing show."""
    common = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    attention = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    mamba = {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    }
    own = {
        "qwen3": attention | {"head_dim": 8, "tie_word_embeddings": True},
        "llama": attention | {"tie_word_embeddings": False, "max_position_embeddings": 4096},
        "gemma2": attention | {"head_dim": 8, "sliding_window": 6},
        "gemma3_text": attention | {"head_dim": 8, "sliding_window": 6},
        "gpt_neox": {
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
        },
        "mamba": {"state_size": 8},
        "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        "falcon_h1": attention | mamba,
        "nemotron_h": (
            attention
            | {
                "hybrid_override_pattern": "M-*-",
                "num_hidden_layers": 4,
                "head_dim": 8,
                "attention_head_dim": 8,
                "mamba_num_heads": 8,
                "mamba_head_dim": 8,
                "ssm_state_size": 8,
                "n_groups": 2,
                "chunk_size": 8,
            }
        ),
    }
    return CONFIG_MAPPING[name](**common | own[name])


ARCHITECTURES = (
    "qwen3",
    "llama",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "mamba",
    "mamba2",
    "falcon_h1",
    "nemotron_h",
)
"""Attention with and without tied embeddings, soft caps and sliding windows; state-space; hybrids
of both."""


def tiny_policy(name: str = "qwen3", *, seed: int = 0, markers: Markers = MARKERS) -> Policy:
    """A random policy of an architecture."""
    torch.manual_seed(seed)
    return Policy(AutoModelForCausalLM.from_config(architecture(name)).float().eval(), markers)


def random_documents(lengths: list[int], *, seed: int = 0) -> list[Document]:
    """Documents of random words, no special token in them."""
    generator = np.random.default_rng(seed)
    return [
        Document(id=100 + index, tokens=generator.integers(5, len(WORDS), size=length))
        for index, length in enumerate(lengths)
    ]
