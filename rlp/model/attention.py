"""Attention of a packed tree: trunks (documents) once, and branches (thoughts) that share them.

All tokens of a micro-batch stand in one packed row, without padding, and everything but attention
is done on that row. Attention is done by segments: a trunk token attends to its trunk up to itself;
a branch token attends to a prefix of its trunk and to its own branch up to itself. The second kind
is two ordinary attentions

    part 1   all G branches of a position over the prefix, their queries in one list, not causal
    part 2   each branch over itself, causal

merged by their log-sum-exps: with lse = log(exp(lse_1) + exp(lse_2)),

    out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)

Neither copies the prefix per branch nor holds a mask. The backward pass of each part is the
ordinary one with the *merged* out and lse, because dL/dscore = p (dp - out . dout) with p =
exp(score - lse) holds key by key. What a token means is not known here.

Dimensions
    T  tokens of the packed row
    B  trunks;  P  trunk tokens, padded
    M  positions;  G  branches per position;  N  branches, M * G;  L  branch tokens, padded
    A  heads of queries;  C  heads of keys;  F = A / C, those that share keys;  E  width of a head
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True, slots=True)
class Tree:
    """Which token of the packed row is which."""

    trunk: Tensor
    """[B, P] int64, place of each trunk token in the packed row; padding on the right points
    anywhere."""
    branch: Tensor
    """[N, L] int64, the same for branches; [0, 0] where there is none."""
    place: Tensor
    """[T] int64, place of each packed token in the list of all trunk tokens [B * P], then all
    branch tokens [N * L]."""
    trunk_of: tuple[int, ...]
    """[M], the trunk that a position's branches continue."""
    prefix: tuple[int, ...]
    """[M], how many tokens of it they attend to; at least 1."""


class Attends(Protocol):
    """Attention of a packed row that holds keys from forward to forward."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [1, T, A, E] of queries [1, A, T, E], keys and values [1, C, T, E]."""


def part_form(query: Tensor) -> str:
    """Which code does a part: torch's flash attention for the device, or `plain` for float32 on a
    GPU, where there is none."""
    if query.device.type == "cpu":
        return "flash_cpu"
    return "flash_cuda" if query.dtype in (torch.float16, torch.bfloat16) else "plain"


def part_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple]:
    """Attention with its log-sum-exp.

    Args:
        query: [X, A, Q, E]; key, value: [X, A, S, E].

    Returns:
        out [X, A, Q, E], lse [X, A, Q] float32 (float64 for float64), and what the backward needs
        beside them.
    """
    form = part_form(query)
    if form == "flash_cpu":
        return (
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, causal, scale=scale
            ),
            (),
        )
    if form == "flash_cuda":
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return out, lse, tuple(rest[:6])

    scores = _scores(query, key, causal, scale)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp() @ value, lse, ()


def part_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: tuple,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value of one part, given the merged out and lse."""
    form = part_form(query)
    if form == "flash_cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )
    if form == "flash_cuda":
        cumulative_query, cumulative_key, max_query, max_key, seed, offset = rest
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            lse,
            cumulative_query,
            cumulative_key,
            max_query,
            max_key,
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )

    probability = (_scores(query, key, causal, scale) - lse[..., None]).exp()
    grad_score = probability * (grad @ value.mT - (grad * out).sum(dim=-1, keepdim=True))
    return grad_score @ key * scale, grad_score.mT @ query * scale, probability.mT @ grad


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = query @ key.mT * scale
    if not causal:
        return scores
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf"))


class BranchAttention(torch.autograd.Function):
    """Attention of branches over prefixes of trunks and themselves."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        trunk_key: Tensor,
        trunk_value: Tensor,
        tree: Tree,
        scale: float,
    ) -> Tensor:
        """
        Args:
            query: [N, A, L, E]; key, value: [N, C, L, E], of the branches.
            trunk_key, trunk_value: [B, C, P, E].

        Returns:
            [N, A, L, E].
        """
        heads = {"f": query.shape[1] // key.shape[1]}
        own_key, own_value = (
            repeat(part, "n c l e -> n (c f) l e", **heads) for part in (key, value)
        )
        own, own_lse, own_rest = part_forward(query, own_key, own_value, True, scale)
        out, lse, prefix_rest = torch.empty_like(query), torch.empty_like(own_lse), []

        for rows, folded, *prefix in _prefixes(query, trunk_key, trunk_value, tree):
            part, part_lse, rest = part_forward(folded, *prefix, False, scale)
            part = _unfold(part, query[rows])
            part_lse = _unfold(part_lse[..., None], query[rows])[..., 0]

            lse[rows] = torch.logaddexp(part_lse, own_lse[rows])
            share = (part_lse - lse[rows]).exp()[..., None].to(part.dtype)
            own_share = (own_lse[rows] - lse[rows]).exp()[..., None].to(part.dtype)
            out[rows] = part * share + own[rows] * own_share
            prefix_rest.append(rest)

        ctx.save_for_backward(query, key, value, trunk_key, trunk_value, out, lse)
        ctx.tree, ctx.scale, ctx.own_rest, ctx.prefix_rest = tree, scale, own_rest, prefix_rest
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        query, key, value, trunk_key, trunk_value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        heads = {"f": query.shape[1] // key.shape[1]}
        own_key, own_value = (
            repeat(part, "n c l e -> n (c f) l e", **heads) for part in (key, value)
        )
        grad_query, grad_key, grad_value = part_backward(
            grad, query, own_key, own_value, out, lse, ctx.own_rest, True, ctx.scale
        )
        grad_key, grad_value = (
            rearrange(part, "n (c f) l e -> n c f l e", **heads).sum(dim=2)
            for part in (grad_key, grad_value)
        )
        grad_query = grad_query.contiguous()

        # Every position of a document adds to these: in bfloat16 a sum of many would lose most.
        wide = torch.promote_types(trunk_key.dtype, torch.float32)
        grad_trunk_key, grad_trunk_value = (
            torch.zeros_like(part, dtype=wide) for part in (trunk_key, trunk_value)
        )
        parts = zip(
            _prefixes(query, trunk_key, trunk_value, ctx.tree),
            ctx.tree.trunk_of,
            ctx.tree.prefix,
            ctx.prefix_rest,
        )
        for (rows, folded, *prefix), b, length, rest in parts:
            folded_grad, folded_out, folded_lse = (
                _fold(part[rows], trunk_key.shape[1]) for part in (grad, out, lse[..., None])
            )
            folded_lse = folded_lse[..., 0].contiguous()
            part_query, part_key, part_value = part_backward(
                folded_grad, folded, *prefix, folded_out, folded_lse, rest, False, ctx.scale
            )
            grad_query[rows] += _unfold(part_query, query[rows])
            grad_trunk_key[b, :, :length] += part_key[0]
            grad_trunk_value[b, :, :length] += part_value[0]

        return (
            grad_query,
            grad_key,
            grad_value,
            grad_trunk_key.to(trunk_key.dtype),
            grad_trunk_value.to(trunk_value.dtype),
            None,
            None,
        )


def _prefixes(query: Tensor, trunk_key: Tensor, trunk_value: Tensor, tree: Tree):
    """Per position: its rows, its queries folded, and the keys and values of its prefix."""
    group = query.shape[0] // len(tree.prefix)
    for m, (b, length) in enumerate(zip(tree.trunk_of, tree.prefix)):
        rows = slice(m * group, (m + 1) * group)
        yield (
            rows,
            _fold(query[rows], trunk_key.shape[1]),
            trunk_key[b : b + 1, :, :length],
            trunk_value[b : b + 1, :, :length],
        )


def _fold(part: Tensor, key_heads: int) -> Tensor:
    """All queries of a group that share keys, as one list: [G, A, L, E] -> [1, C, F * G * L, E]."""
    return rearrange(part, "g (c f) l e -> 1 c (f g l) e", c=key_heads).contiguous()


def _unfold(part: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_fold`, for a group shaped like `like` [G, A, L, E]."""
    return rearrange(part, "1 c (f g l) e -> g (c f) l e", g=like.shape[0], l=like.shape[2])


def attend_trunks(
    query: Tensor, key: Tensor, value: Tensor, trunk: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of each trunk of a packed row: out [B * P, A, E], and the trunks' keys and
    values [B, C, P, E]."""
    trunk_query, trunk_key, trunk_value = (_segment(part, trunk) for part in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(
        trunk_query,
        trunk_key,
        trunk_value,
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return rearrange(out, "b a p e -> (b p) a e"), trunk_key, trunk_value


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
    """Attention of the packed row.

    Args:
        query: [A, T, E]; key, value: [C, T, E], with positions already in them.

    Returns:
        [T, A, E].
    """
    out, trunk_key, trunk_value = attend_trunks(query, key, value, tree.trunk, scale)
    if tree.prefix:
        branch = BranchAttention.apply(
            *(_segment(part, tree.branch) for part in (query, key, value)),
            trunk_key,
            trunk_value,
            tree,
            scale,
        )
        out = torch.cat([out, rearrange(branch, "n a l e -> (n l) a e")])
    return out.index_select(0, tree.place)


def _segment(part: Tensor, index: Tensor) -> Tensor:
    """[A, T, E] -> [X, A, Y, E], the tokens that an index [X, Y] names."""
    return rearrange(
        part.index_select(1, index.flatten()), "a (x y) e -> x a y e", x=index.shape[0]
    )


def register(base: str) -> str:
    """The name of an attention of transformers that is `base` unless a forward is given `tree=`.

    Args:
        base: the attention that a model has by itself, such as sdpa.
    """
    name = f"rlp_tree_{base}"
    plain = ALL_ATTENTION_FUNCTIONS[base]

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        tree: Tree | Attends | None = None,
        **options: object,
    ):
        if tree is None:
            return plain(module, query, key, value, attention_mask, scaling=scaling, **options)
        if isinstance(tree, Tree):
            return tree_attention(query[0], key[0], value[0], tree, scaling)[None], None
        return tree.attend(module.layer_idx, query, key, value, scaling), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


ATTENTION_ONLY = {"qwen3", "qwen2", "llama", "mistral", "gpt_neox", "olmo2", "smollm3"}
"""Architectures that have been shown to be."""


def why_no_tree(config: PretrainedConfig, attention: str) -> str | None:
    """Why a model can not run a tree; None where it can.

    A branch sees its prefix through attention alone, so a state that is carried from token to token
    (state-space, linear attention, convolution) has nothing to continue from.
    """
    text = config.get_text_config()
    if text.model_type not in ATTENTION_ONLY:
        return f"{text.model_type} has not been shown to be attention-only"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    slides = getattr(text, "use_sliding_window", False) or (
        text.model_type == "mistral" and text.sliding_window
    )
    if slides or kinds != {"full_attention"}:
        return "it has layers with a sliding window"
    if attention != "sdpa":
        return f"its attention is {attention}; a tree needs sdpa"
    return None
