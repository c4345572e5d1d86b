"""Every causal language model that transformers can build: a tiny one of each either makes a step
or is refused with one sentence.

Takes minutes: `make test-all`.
"""

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlp.config import ConfigError
from rlp.process.exit_codes import DONE
from tests.tiny_models import WORDS
from tests.training import tiny_config, train

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


def tiny(name: str) -> PretrainedConfig:
    """A small config of an architecture, by the names that most of them give to their sizes."""
    cls = CONFIG_MAPPING[name]
    known = {**cls().to_dict(), **cls.attribute_map}
    fields = {
        key: value for key, value in TINY_FIELDS.items() if key in known or key == "vocab_size"
    }
    if "qk_rope_head_dim" in fields:  # which is then what a head is as wide as
        fields.pop("head_dim", None)
    return cls(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_causal_language_model_makes_a_step_or_is_refused_with_a_sentence(
    tmp_path: Path, tokenizer, corpus: Path, ranks, name: str
):
    """And where it is refused there is no run folder."""
    try:
        config = tiny(name)
        with torch.device("meta"):
            parameters = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
            )
    except Exception as error:  # of any type: what a config of these fields lacks
        pytest.skip(f"no tiny {name}: {error}")
    if parameters > MAX_PARAMETERS:
        pytest.skip(f"no tiny {name}: {parameters:,} parameters")
    config.save_pretrained(tmp_path / "model")
    # Beside a config of Qwen2, transformers opens any tokenizer as Qwen2's own.
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = tiny_config(
        tmp_path / "run",
        tmp_path / "model",
        corpus,
        model__tokenizer=tmp_path / "tokenizer",
        model__init="random",
        budget__steps=1,
        data__max_document_tokens=32,
    )
    try:
        assert train(run, ranks) == DONE
    except ConfigError as refusal:
        print(name, refusal)
        assert "\n" not in str(refusal) and str(refusal).startswith(
            ("model.path: ", "model.tokenizer: ")
        )
        assert not (tmp_path / "run").exists()
