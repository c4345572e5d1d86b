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


WIDTH, LAYERS, HEADS, EXPERTS = 32, 2, 4, 4
TINY_FIELDS = {
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "attention_hidden_size", "lru_width"), WIDTH
    ),
    **dict.fromkeys(
        (
            "n_layer",
            "num_hidden_layers",
            "num_layers",
            "n_layers",
            "decoder_layers",
            "encoder_layers",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "n_head",
            "num_attention_heads",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"),
        2 * WIDTH,
    ),
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "rotary_dim": 4,
    "state_size": 8,
    "initializer_range": 0.3,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "full_attention_interval": 2,
}
MAX_PARAMETERS = 4_000_000
"""A model of more has sizes by other names; it would take too long."""


def tiny(name: str, **others: object) -> PretrainedConfig:
    """A small config of any architecture of transformers, by the names that most of them give to
    their sizes, and others by their own."""
    cls = CONFIG_MAPPING[name]
    known = {**cls().to_dict(), **cls.attribute_map}
    fields = {
        key: value for key, value in TINY_FIELDS.items() if key in known or key == "vocab_size"
    }
    if "qk_rope_head_dim" in fields:  # which is then what a head is as wide as
        fields.pop("head_dim", None)
    return cls(**fields | others)


def random_documents(lengths: list[int], *, seed: int = 0) -> list[Document]:
    """Documents of random words, no special token in them."""
    generator = np.random.default_rng(seed)
    return [
        Document(id=100 + index, tokens=generator.integers(5, len(WORDS), size=length))
        for index, length in enumerate(lengths)
    ]
