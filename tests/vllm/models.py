"""Models that vLLM runs on a CPU, whose attention begins at heads of 32."""

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlp.model.policy import Policy
from tests.tiny_models import MARKERS, architecture


def random_policy(*, tied: bool, head_dim: int = 32, seed: int = 0) -> Policy:
    """A tiny random Qwen3, whose logits are some units wide."""
    config = architecture("qwen3")
    config.tie_word_embeddings, config.head_dim, config.initializer_range = tied, head_dim, 0.1
    torch.manual_seed(seed)
    return Policy(AutoModelForCausalLM.from_config(config).float().eval(), MARKERS)


def write_wide(source: Path, folder: Path) -> Path:
    """A Qwen3 checkpoint with heads twice as wide that computes the same, and trains the same.

    The new half of every query, key and value is zero, and so is what reads it: no gradient ever
    reaches it. Rotary pairs (i, i + D/2) keep their frequencies, theta^(-2i / D), at twice D and
    the square of theta. RMS norms divide by a root that is sqrt(2) smaller, which the scale of the
    attention, 1 / sqrt(D), takes back of queries; that of keys stands in their norm's weight.
    """
    narrow = AutoModelForCausalLM.from_pretrained(source)
    config = deepcopy(narrow.config)
    config.head_dim = 2 * narrow.config.head_dim
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": narrow.config.rope_parameters["rope_theta"] ** 2,
    }
    wide, own = AutoModelForCausalLM.from_config(config), narrow.state_dict()
    with torch.no_grad():
        for name, p in wide.named_parameters():
            p.copy_(_widened(name, own[name], narrow))
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _widened(name: str, values: Tensor, narrow: PreTrainedModel) -> Tensor:
    kind, half = name.split(".")[-2], narrow.config.head_dim // 2
    if kind in ("q_proj", "k_proj", "v_proj"):
        return _halves_apart(values.T, half).T
    if kind == "o_proj":
        return _halves_apart(values, half)
    if kind in ("q_norm", "k_norm"):
        return _halves_apart(values, half) * (0.5**0.5 if kind == "k_norm" else 1.0)
    return values


def _halves_apart(values: Tensor, half: int) -> Tensor:
    """[..., heads * 2 half] with `half` zeros after each half of a head."""
    parts = values.reshape(*values.shape[:-1], -1, half)
    return torch.cat([parts, torch.zeros_like(parts)], dim=-1).flatten(-2)
