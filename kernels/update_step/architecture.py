"""The random model of the benchmarks."""

import argparse

from transformers import Qwen3Config

from update_step.given import EOS, PAD


def architecture(options: argparse.Namespace) -> Qwen3Config:
    """Qwen3 in the proportions of its 1.7B.

    Intermediate 3 d, half as many key heads as heads, tied embeddings.
    """
    head_dim = 128 if options.d >= 1024 else min(64, options.d // 4)
    heads = options.d // head_dim
    return Qwen3Config(
        hidden_size=options.d,
        num_hidden_layers=options.layers,
        vocab_size=options.vocabulary,
        intermediate_size=3 * options.d,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
