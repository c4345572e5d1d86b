"""The tree layout is the repeated layout, for less work; its attention is attention."""

import numpy as np
import pytest
import torch
from einops import rearrange

from rlp.config import ConfigError
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model import attention
from rlp.model.attention import BranchAttention, Tree, why_no_tree
from rlp.model.layout import Layout, repeated_layout, tree_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.scoring import Scores, score
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.sampling.rollout import NoiseKey
from tests.sampled import sample_thoughts
from tests.tiny_models import architecture, random_documents, tiny_policy

CPU = torch.device("cpu")
ATTENTION_ONLY = ("qwen3", "llama", "gpt_neox")
BLOCKS = ("thought", "target", "document", "no_think", "open_marker")


def material(
    *,
    horizon: int = 1,
    instruction: tuple[int, ...] = (),
    open_marker: tuple[int, ...] = (2,),
    seed: int = 0,
) -> tuple[list[Document], Positions, Thoughts, ThoughtFormat]:
    """Three documents of unequal length, up to three positions in each, four thoughts of 1 to 6
    tokens, half of them truncated."""
    documents = random_documents([12, 5, 19], seed=seed)
    generator = np.random.default_rng(seed)
    pairs = [
        (d, t)
        for d, document in enumerate(documents)
        for t in sorted(
            generator.choice(
                np.arange(1, len(document.tokens) - horizon + 1),
                size=min(3, len(document.tokens) - horizon),
                replace=False,
            )
        )
    ]
    positions = Positions(
        np.array([d for d, _ in pairs]),
        np.array([t for _, t in pairs]),
        np.stack([documents[d].tokens[t : t + horizon] for d, t in pairs]),
    )
    lengths = torch.from_numpy(generator.integers(1, 7, size=(len(pairs), 4)))
    mask = torch.arange(6) < lengths[..., None]
    tokens = torch.from_numpy(generator.integers(5, 48, size=(len(pairs), 4, 6))) * mask
    unknown = torch.zeros(mask.shape)
    thoughts = Thoughts(
        tokens, mask, unknown, unknown, torch.from_numpy(generator.random((len(pairs), 4)) < 0.5)
    )
    return (
        documents,
        positions,
        thoughts,
        ThoughtFormat(Markers(open_marker, (3,)), instruction, None, 0.7, 1.0, horizon),
    )


def run(policy: Policy, layout: Layout) -> tuple[Scores, torch.Tensor]:
    """Scores, and the gradient of a fixed random combination of them."""
    policy.lm.set_attn_implementation(attention.register("sdpa") if layout.tree else "sdpa")
    policy.zero_grad()
    scores = score(policy, layout)
    generator = torch.Generator().manual_seed(1)
    blocks = [getattr(scores, name) for name in BLOCKS if getattr(scores, name).numel()]
    sum(
        (block * torch.randn(block.shape, generator=generator)).sum() for block in blocks
    ).backward()
    return scores, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ATTENTION_ONLY)
@pytest.mark.parametrize("horizon,instruction,open_marker", [(1, (), (2,)), (3, (7, 8, 9), (2, 4))])
@pytest.mark.parametrize("lm,no_think", [(True, True), (False, True), (False, False)])
def test_tree_equals_repeated_rows(name, horizon, instruction, open_marker, lm, no_think):
    """Log-probabilities and gradients, with K > 1, padding, unequal lengths, horizons,
    instructions: float32, 1e-4 relative."""
    documents, positions, thoughts, thought_format = material(
        horizon=horizon, instruction=instruction, open_marker=open_marker
    )
    policy = tiny_policy(name, markers=thought_format.markers)
    (plain, plain_gradient), (packed, packed_gradient) = (
        run(
            policy,
            lay_out(
                documents, positions, thoughts, thought_format, lm=lm, no_think=no_think, device=CPU
            ),
        )
        for lay_out in (repeated_layout, tree_layout)
    )
    for block in BLOCKS:
        torch.testing.assert_close(
            getattr(packed, block), getattr(plain, block), rtol=1e-4, atol=1e-4
        )
    assert (packed_gradient - plain_gradient).norm() < 1e-4 * plain_gradient.norm()


def test_tree_is_exact_in_float64():
    """What float32 leaves of a difference is rounding."""
    documents, positions, thoughts, thought_format = material(horizon=2)
    policy = tiny_policy("gpt_neox", markers=thought_format.markers).double()
    (plain, plain_gradient), (packed, packed_gradient) = (
        run(
            policy,
            lay_out(
                documents, positions, thoughts, thought_format, lm=True, no_think=True, device=CPU
            ),
        )
        for lay_out in (repeated_layout, tree_layout)
    )
    torch.testing.assert_close(packed.target, plain.target, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        packed_gradient, plain_gradient, rtol=0, atol=1e-11 * float(plain_gradient.abs().max())
    )


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("part", ["flash_cpu", "plain"])
def test_two_merged_parts_are_one_attention(monkeypatch, heads, part):
    """Forward and backward against softmax over prefix and branch together, in float64, with shared
    key heads."""
    monkeypatch.setattr(attention, "part_form", lambda query: part)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    segments = Tree(
        torch.zeros(2, 9), torch.zeros(6, 5), torch.zeros(0), trunk_of=(0, 1, 1), prefix=(3, 9, 1)
    )
    inputs = (
        draw(6, 4, 5, 8),
        draw(6, heads, 5, 8),
        draw(6, heads, 5, 8),
        draw(2, heads, 9, 8),
        draw(2, heads, 9, 8),
    )
    weight = torch.randn(6, 4, 5, 8, generator=generator, dtype=torch.float64)
    out, expected = (
        BranchAttention.apply(*inputs, segments, 0.3),
        one_softmax(*inputs, segments, 0.3),
    )
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
    ):
        torch.testing.assert_close(ours, theirs)


def one_softmax(
    query, key, value, trunk_key, trunk_value, segments: Tree, scale: float
) -> torch.Tensor:
    """Per branch: its prefix and itself as one sequence of keys."""
    rows = []
    group = query.shape[0] // len(segments.prefix)
    shared = query.shape[1] // key.shape[1]
    for n in range(query.shape[0]):
        b, length = segments.trunk_of[n // group], segments.prefix[n // group]
        keys, values = (
            torch.cat([trunk[b, :, :length], own[n]], dim=1).repeat_interleave(shared, dim=0)
            for trunk, own in ((trunk_key, key), (trunk_value, value))
        )
        allowed = torch.ones(query.shape[2], keys.shape[1], dtype=torch.bool).tril(length)
        scores = (
            rearrange(query[n], "h l d -> h l 1 d") * rearrange(keys, "h s d -> h 1 s d")
        ).sum(-1) * scale
        rows.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ values)
    return torch.stack(rows)


def test_a_document_is_run_once_for_all_its_thoughts():
    """The packed row holds each document once, each thought without its prefix, and no padding."""
    documents, positions, thoughts, thought_format = material()
    layout = tree_layout(
        documents, positions, thoughts, thought_format, lm=True, no_think=True, device=CPU
    )
    branch_tokens = (
        int(thoughts.mask.sum()) + thoughts.truncated.numel() + int(thoughts.truncated.sum())
    )  # open markers, forced close markers
    assert layout.tokens.shape == (
        1,
        sum(len(document.tokens) for document in documents) + branch_tokens,
    )
    assert layout.document_work.tokens + layout.thought_work.tokens == layout.tokens.numel()


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3_text", "mamba", "mamba2", "falcon_h1", "nemotron_h"]
)
def test_models_that_carry_state_or_slide_are_refused(name):
    """A branch sees its prefix through full attention alone."""
    assert why_no_tree(architecture(name), "sdpa")


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_attention_only_models_run_trees(name):
    assert why_no_tree(architecture(name), "sdpa") is None
    assert "eager" in why_no_tree(architecture(name), "eager")


def test_asking_for_a_tree_that_can_not_be_is_refused(tmp_path, tokenizer):
    """`engine.layout: tree` is never quietly something else."""
    from rlp.model.loading import choose_layout
    from tests.training import tiny_config

    tiny_policy("mamba").lm.save_pretrained(tmp_path / "model")
    config = tiny_config(
        tmp_path / "run", tmp_path / "model", tmp_path / "none.jsonl", engine__layout="tree"
    )
    with pytest.raises(ConfigError, match="Write engine.layout=repeated"):
        choose_layout(config, architecture("mamba"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_two_merged_parts_are_one_attention_on_a_gpu(dtype, tolerance):
    """Flash attention's own forward and backward, merged, against float64 on the CPU; 2 ** -7 is
    the rounding of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    segments = Tree(
        torch.zeros(2, 300), torch.zeros(8, 70), torch.zeros(0), trunk_of=(0, 1), prefix=(130, 300)
    )
    shapes = (8, 16, 70, 128), (8, 8, 70, 128), (8, 8, 70, 128), (2, 8, 300, 128), (2, 8, 300, 128)
    inputs = [
        torch.randn(*shape, generator=generator).to(dtype).double().requires_grad_()
        for shape in shapes
    ]
    weight = torch.randn(8, 16, 70, 128, generator=generator).to(dtype).double()
    expected = one_softmax(*inputs, segments, 128**-0.5)
    truth = [expected, *torch.autograd.grad((expected * weight).sum(), inputs)]
    on_gpu = [part.detach().to("cuda", dtype).requires_grad_() for part in inputs]
    out = BranchAttention.apply(*on_gpu, segments, 128**-0.5)
    measured = [out, *torch.autograd.grad((out * weight.to(out)).sum(), on_gpu)]
    for ours, theirs in zip(measured, truth):
        assert (ours.double().cpu() - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("name", ATTENTION_ONLY)
@pytest.mark.parametrize(
    "instruction,open_marker,close_marker,rows",
    [((), (2,), (3,), 128), ((7, 8, 9), (2, 4), (5, 6), 12)],
)
def test_shared_keys_sample_the_thoughts_of_forked_caches(
    name, instruction, open_marker, close_marker, rows
):
    """Same tokens, ends and truncation for the same noise; log-probabilities and entropies to
    float32 rounding.

    Thoughts end at different lengths, so that branches are dropped on the way.
    """
    documents, positions, _, _ = material(seed=1)
    thought_format = ThoughtFormat(
        Markers(open_marker, close_marker), instruction, None, 1.0, 1.0, 1
    )
    policy = tiny_policy(name, markers=thought_format.markers)
    policy.lm.set_attn_implementation(attention.register("sdpa"))
    forked, shared = (
        sample_thoughts(
            policy,
            documents,
            positions,
            thought_format,
            NoiseKey(0, 1),
            group_size=4,
            max_thought_tokens=20,
            slots=rows,
            shared=shared,
        )
        for shared in (False, True)
    )
    assert len(close_marker) > 1 or len(set(forked.thoughts.mask.sum(dim=2).flatten().tolist())) > 5
    assert torch.equal(forked.thoughts.tokens, shared.thoughts.tokens)
    assert torch.equal(forked.thoughts.mask, shared.thoughts.mask)
    assert torch.equal(forked.thoughts.truncated, shared.thoughts.truncated)
    torch.testing.assert_close(
        shared.thoughts.behavior_logprob, forked.thoughts.behavior_logprob, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(shared.thoughts.entropy, forked.thoughts.entropy, rtol=0, atol=1e-4)


def test_shared_keys_run_each_document_once():
    """Three documents up to each one's last position, and an open marker for each thought."""
    documents, positions, _, thought_format = material()
    policy = tiny_policy()
    policy.lm.set_attn_implementation(attention.register("sdpa"))
    work = sample_thoughts(
        policy,
        documents,
        positions,
        thought_format,
        NoiseKey(0, 1),
        group_size=4,
        max_thought_tokens=3,
        slots=128,
        shared=True,
    ).prefill_work
    last = [int(positions.position[positions.document == d].max()) for d in range(3)]
    assert work.tokens == sum(last) + 4 * len(positions.position)
