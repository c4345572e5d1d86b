"""Log-probabilities of a layout against the model itself: one text at a time, no batch, no padding,
no kernel."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.admission import why_unsound
from rlp.model.layout import repeated_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.scoring import Scores, by_document, difficulty, score
from rlp.model.thoughts import ThoughtFormat, Thoughts
from tests.tiny_models import ARCHITECTURES, WORDS, random_documents, tiny_policy

CPU = torch.device("cpu")
MARKERS = Markers(open=(2, 40), close=(41, 3))
INSTRUCTION = (6, 7, 8)
TEMPERATURE = 0.8  # 1 / 0.8 = 1.25 is exact in float32, so float64 tests are exact
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""The same numbers summed in another batch shape and order. Measured: 8e-6 at most."""


def format_of(horizon: int = 1, **fields: object) -> ThoughtFormat:
    return replace(
        ThoughtFormat(
            markers=MARKERS,
            instruction=INSTRUCTION,
            begin=None,
            temperature=TEMPERATURE,
            target_temperature=1.0,
            horizon=horizon,
        ),
        **fields,
    )


def example(horizon: int = 1, *, seed: int = 0) -> tuple[list[Document], Positions, Thoughts]:
    """Three documents of unequal length, four positions, groups of three: thoughts of one to six
    tokens, half of them truncated."""
    generator = np.random.default_rng(seed)
    documents = random_documents([11, 6, 14], seed=seed)
    places = [(0, 1), (0, 7), (1, 2), (2, 10)]
    positions = Positions(
        document=np.array([d for d, _ in places]),
        position=np.array([t for _, t in places]),
        target=np.stack([documents[d].tokens[t : t + horizon] for d, t in places]),
    )
    length = torch.from_numpy(generator.integers(1, 7, size=(4, 3)))
    length[0, 0], length[1, 0] = 6, 1
    tokens = torch.from_numpy(generator.integers(5, len(WORDS), size=(4, 3, 6)))
    truncated = torch.from_numpy(generator.random((4, 3)) < 0.5)
    truncated[0, 0], truncated[0, 1], truncated[1, 0] = True, False, True
    length = torch.where(truncated, length, length.clamp(min=2))
    for m, g in (~truncated).nonzero().tolist():
        tokens[m, g, length[m, g] - 2 : length[m, g]] = torch.tensor(MARKERS.close)
    mask = torch.arange(6) < length[..., None]
    return (
        documents,
        positions,
        Thoughts(
            tokens=tokens * mask,
            mask=mask,
            behavior_logprob=torch.zeros(mask.shape),
            entropy=torch.zeros(mask.shape),
            truncated=truncated,
        ),
    )


def lm_logits(policy: Policy, text: list[int]) -> Tensor:
    """[P, V] the model's own logits of one text, at least float32."""
    logits = policy.lm(input_ids=torch.tensor([text])).logits[0]
    return logits if logits.dtype == torch.float64 else logits.float()


def logprob_of(logits: Tensor, token: int, temperature: float, excluded: int) -> Tensor:
    """log softmax of one row of logits, a token left out."""
    kept = [word for word in range(len(logits)) if word != excluded]
    return logits[token] / temperature - (logits[kept] / temperature).logsumexp(dim=0)


def each_thought(
    documents: list[Document],
    positions: Positions,
    thoughts: Thoughts,
    thought_format: ThoughtFormat,
) -> Iterator[tuple[list[int], list[int], list[int], list[int]]]:
    """(context, sampled tokens, what closes them by force, targets) of each thought."""
    for m, (d, t) in enumerate(zip(positions.document, positions.position)):
        prefix = documents[d].tokens[:t].tolist()
        begin = (
            prefix[:1]
            if thought_format.begin is not None and prefix[0] == thought_format.begin
            else []
        )
        context = [*begin, *thought_format.instruction, *prefix[len(begin) :], *MARKERS.open]
        for g in range(thoughts.tokens.shape[1]):
            forced = [*MARKERS.close] if thoughts.truncated[m, g] else []
            yield (
                context,
                thoughts.tokens[m, g][thoughts.mask[m, g]].tolist(),
                forced,
                positions.target[m].tolist(),
            )


def of_thoughts(
    policy: Policy,
    documents: list[Document],
    positions: Positions,
    thoughts: Thoughts,
    thought_format: ThoughtFormat,
) -> tuple[Tensor, Tensor]:
    """Each thought's tokens, padded with zeros, and its target's: a forward for each thought."""
    budget = thoughts.tokens.shape[2]
    thought_rows, target_rows = [], []
    for context, thought, forced, target in each_thought(
        documents, positions, thoughts, thought_format
    ):
        logits = lm_logits(policy, [*context, *thought, *forced, *target])
        row = [
            logprob_of(logits[len(context) + u - 1], token, thought_format.temperature, -1)
            for u, token in enumerate(thought)
        ]
        thought_rows.append(zero_padded(row, budget))
        start = len(context) + len(thought) + len(forced)
        target_rows.append(of_target(logits[start - 1 :], target))
    return torch.stack(thought_rows), torch.stack(target_rows)


def of_target(logits: Tensor, target: Iterable[int]) -> Tensor:
    """The target's tokens one after the other, from the row that predicts the first."""
    return torch.stack(
        [logprob_of(logits[h], token, 1.0, MARKERS.open[0]) for h, token in enumerate(target)]
    )


def zero_padded(row: list[Tensor], length: int) -> Tensor:
    return torch.stack(row + [torch.zeros_like(row[0])] * (length - len(row)))


def oracle(
    policy: Policy,
    documents: list[Document],
    positions: Positions,
    thoughts: Thoughts,
    thought_format: ThoughtFormat,
) -> Scores:
    """The blocks of `Scores` by definition: a fresh forward of the model for each thought and each
    document."""
    thought, target = of_thoughts(policy, documents, positions, thoughts, thought_format)

    longest = max(len(document.tokens) for document in documents)
    logits = [lm_logits(policy, document.tokens.tolist()) for document in documents]
    lm_rows = []
    for rows, document in zip(logits, documents):
        row = [
            logprob_of(rows[t - 1], document.tokens[t], 1.0, -1)
            for t in range(1, len(document.tokens))
        ]
        lm_rows.append(zero_padded(row, longest - 1))

    places = list(zip(positions.document, positions.position, positions.target))
    return Scores(
        thought=thought,
        target=target,
        document=torch.stack(lm_rows),
        no_think=torch.stack([of_target(logits[d][t - 1 :], target) for d, t, target in places]),
        open_marker=torch.stack(
            [logprob_of(logits[d][t - 1], MARKERS.open[0], 1.0, -1) for d, t, _ in places]
        ),
    )


BLOCKS = ("thought", "target", "document", "no_think", "open_marker")


def all_scores(
    policy: Policy,
    documents: list[Document],
    positions: Positions,
    thoughts: Thoughts,
    thought_format: ThoughtFormat,
) -> Scores:
    return score(
        policy,
        repeated_layout(
            documents, positions, thoughts, thought_format, lm=True, no_think=True, device=CPU
        ),
    )


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_score_is_the_models_own(name: str, horizon: int):
    """Thoughts ended and truncated, targets, documents, no-think targets and the open marker,
    batched and padded together."""
    policy = tiny_policy(name, markers=MARKERS)
    with torch.no_grad():
        mine = all_scores(policy, *example(horizon), format_of(horizon))
        expected = oracle(policy, *example(horizon), format_of(horizon))
    for block in BLOCKS:
        assert getattr(mine, block).dtype == torch.float32
        assert_close(
            getattr(mine, block),
            getattr(expected, block),
            **FLOAT32,
            msg=lambda text, block=block: f"{block}: {text}",
        )


def test_scores_and_their_gradients_are_exact_in_float64():
    """GPT-NeoX computes in the dtype it is given, so nothing but float64 rounding is left: values,
    and the gradient of each parameter under random weights for every number in every block."""
    policy = tiny_policy("gpt_neox", markers=MARKERS).double()
    documents, positions, thoughts = example(3)
    generator = torch.Generator().manual_seed(0)
    mine, expected = (
        all_scores(policy, documents, positions, thoughts, format_of(3)),
        oracle(policy, documents, positions, thoughts, format_of(3)),
    )
    weights = [
        torch.randn(getattr(mine, block).shape, generator=generator, dtype=torch.float64)
        for block in BLOCKS
    ]
    gradients = []
    for scores in (mine, expected):
        policy.zero_grad()
        sum(
            (weight * getattr(scores, block)).sum() for weight, block in zip(weights, BLOCKS)
        ).backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
        )
    for block in BLOCKS:
        assert_close(getattr(mine, block), getattr(expected, block))
    assert gradients[0].keys() == gradients[1].keys() and all(
        gradient.abs().max() > 0 for gradient in gradients[0].values()
    )
    for name in gradients[0]:
        assert_close(
            gradients[0][name], gradients[1][name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ["qwen3", "mamba2", "falcon_h1", "nemotron_h"])
def test_other_documents_and_siblings_change_no_score(name: str):
    """Rows do not see each other: with the tokens of document 2 and of one sibling replaced, all
    others keep their numbers.
    The shapes stay, so the arithmetic does: 1e-6 is a rounding of numbers of order ten."""
    policy = tiny_policy(name, markers=MARKERS)
    documents, positions, thoughts = example()
    other = Document(id=documents[2].id, tokens=random_documents([14], seed=9)[0].tokens)
    tokens = thoughts.tokens.clone()
    tokens[0, 1, 0] = 20 + (tokens[0, 1, 0] == 20)
    changed_positions = replace(
        positions, target=np.stack([*positions.target[:3], other.tokens[10:11]])
    )
    with torch.no_grad():
        before = all_scores(policy, documents, positions, thoughts, format_of())
        after = all_scores(
            policy,
            [*documents[:2], other],
            changed_positions,
            replace(thoughts, tokens=tokens),
            format_of(),
        )
    siblings = [n for n in range(12) if n != 1 and n < 9]
    touched = {
        "thought": (siblings, [1, 9, 10, 11]),
        "target": (siblings, [1, 9, 10, 11]),
        "document": ([0, 1], [2]),
        "no_think": ([0, 1, 2], [3]),
        "open_marker": ([0, 1, 2], [3]),
    }
    for block, (kept, moved) in touched.items():
        mine, other_scores = getattr(before, block), getattr(after, block)
        assert_close(mine[kept], other_scores[kept], rtol=0, atol=1e-6)
        assert all((mine[n] - other_scores[n]).abs().max() > 1e-3 for n in moved), block


def test_a_truncated_thought_is_scored_as_if_it_had_closed_itself():
    """Its forced close marker is in the context of the target, and in nothing else: same target,
    same thought tokens, no more."""
    policy = tiny_policy(markers=MARKERS)
    documents, positions, thoughts = example()
    tokens, mask = torch.zeros(4, 3, 8, dtype=torch.int64), torch.zeros(4, 3, 8, dtype=torch.bool)
    for m, g in np.ndindex(4, 3):
        closed = thoughts.tokens[m, g][thoughts.mask[m, g]].tolist() + [*MARKERS.close] * bool(
            thoughts.truncated[m, g]
        )
        tokens[m, g, : len(closed)], mask[m, g, : len(closed)] = torch.tensor(closed), True
    closed = Thoughts(
        tokens=tokens,
        mask=mask,
        behavior_logprob=torch.zeros(mask.shape),
        entropy=torch.zeros(mask.shape),
        truncated=torch.zeros(4, 3, dtype=torch.bool),
    )
    with torch.no_grad():
        forced, sampled = (
            all_scores(policy, documents, positions, thoughts, format_of()),
            all_scores(policy, documents, positions, closed, format_of()),
        )
        open_ended = all_scores(
            policy,
            documents,
            positions,
            replace(thoughts, truncated=torch.zeros(4, 3, dtype=torch.bool)),
            format_of(),
        )
    truncated = thoughts.truncated.flatten()
    assert_close(forced.target, sampled.target, **FLOAT32)
    assert (forced.target - open_ended.target)[truncated].abs().min() > 1e-3
    ours = thoughts.mask.flatten(0, 1)
    assert_close(forced.thought[ours], sampled.thought[:, :6][ours], **FLOAT32)
    assert not forced.thought[~ours].any()


def test_a_forced_close_marker_gets_no_gradient_as_a_token():
    """The sum of a truncated thought's log-probabilities never depends on what comes after its last
    sampled token."""
    policy = tiny_policy(markers=Markers(open=(2,), close=(3,)))
    documents, positions, thoughts = example()
    for close in ((3,), (4,), (4, 3, 4)):
        truncated = replace(thoughts, truncated=torch.ones(4, 3, dtype=torch.bool))
        layout = repeated_layout(
            documents,
            positions,
            truncated,
            format_of(markers=Markers(open=(2,), close=close)),
            lm=False,
            no_think=False,
            device=CPU,
        )
        scores = score(policy, layout)
        policy.zero_grad()
        scores.thought.sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        if close == (3,):
            first, first_target = gradient, scores.target.detach()
    assert_close(gradient, first, rtol=1e-4, atol=1e-5 * first.abs().max().item())
    assert (scores.target - first_target).abs().max() > 1e-2


def test_the_instruction_changes_thoughts_and_targets_and_never_the_no_think_scores():
    """With a begin token it stands behind it (the oracle builds its own context)."""
    policy = tiny_policy(markers=MARKERS)
    documents, positions, thoughts = example()
    documents = [
        Document(id=document.id, tokens=np.concatenate([[1], document.tokens[1:]]))
        for document in documents
    ]
    with torch.no_grad():
        scores = {
            words: all_scores(
                policy, documents, positions, thoughts, format_of(instruction=words, begin=1)
            )
            for words in ((), INSTRUCTION)
        }
        expected = oracle(policy, documents, positions, thoughts, format_of(begin=1))
    bare, instructed = scores[()], scores[INSTRUCTION]
    for block in ("document", "no_think", "open_marker"):
        assert_close(getattr(bare, block), getattr(instructed, block), **FLOAT32)
    for block in ("thought", "target"):
        assert (getattr(bare, block) - getattr(instructed, block)).abs().max() > 0.1
        assert_close(getattr(instructed, block), getattr(expected, block), **FLOAT32)


def test_a_target_softmax_without_the_open_marker_sums_to_one_over_the_rest():
    """log p(x | no marker) = log p(x) - log(1 - p(marker)), with and without a thought."""
    policy = tiny_policy(markers=MARKERS)
    documents, positions, thoughts = example()
    with torch.no_grad():
        scores = all_scores(policy, documents, positions, thoughts, format_of())
        whole = torch.stack(
            [scores.document[d, t - 1] for d, t in zip(positions.document, positions.position)]
        )
    assert_close(scores.no_think[:, 0], whole - torch.log1p(-scores.open_marker.exp()), **FLOAT32)
    assert (scores.no_think[:, 0] > whole).all()


def test_a_target_temperature_reaches_targets_only():
    policy = tiny_policy(markers=MARKERS)
    with torch.no_grad():
        plain, warm = (
            all_scores(policy, *example(), format_of(target_temperature=temperature))
            for temperature in (1.0, 2.0)
        )
    for block in ("thought", "document", "open_marker"):
        assert torch.equal(getattr(plain, block), getattr(warm, block))
    for block in ("target", "no_think"):
        assert (getattr(plain, block) - getattr(warm, block)).abs().max() > 0.1


def test_blocks_that_are_not_asked_for_are_empty():
    policy = tiny_policy(markers=MARKERS)
    documents, positions, thoughts = example(3)
    with torch.no_grad():
        lm_only = score(
            policy,
            repeated_layout(
                documents, None, None, format_of(3), lm=True, no_think=False, device=CPU
            ),
        )
        thoughts_only = score(
            policy,
            repeated_layout(
                documents, positions, thoughts, format_of(3), lm=False, no_think=False, device=CPU
            ),
        )
        no_think_only = score(
            policy,
            repeated_layout(
                documents, positions, None, format_of(3), lm=False, no_think=True, device=CPU
            ),
        )
        whole = all_scores(policy, documents, positions, thoughts, format_of(3))
    assert [getattr(lm_only, block).numel() for block in BLOCKS] == [0, 0, 39, 0, 0]
    assert [getattr(thoughts_only, block).numel() for block in BLOCKS] == [72, 36, 0, 0, 0]
    assert [getattr(no_think_only, block).numel() for block in BLOCKS] == [0, 0, 0, 12, 4]
    for part, block in (
        (lm_only, "document"),
        (thoughts_only, "thought"),
        (thoughts_only, "target"),
        (no_think_only, "no_think"),
        (no_think_only, "open_marker"),
    ):
        assert_close(getattr(part, block), getattr(whole, block), **FLOAT32)


# --- Other answers about the same queries.


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mamba2"])
def test_difficulty_is_the_entropy_or_the_surprisal_before_each_token(name: str):
    """Of the plain document, nothing excluded; index t speaks of token t, index 0 of nothing."""
    policy = tiny_policy(name, markers=MARKERS)
    documents = random_documents([11, 2, 6])
    layout = repeated_layout(
        documents, None, None, format_of(), lm=True, no_think=False, device=CPU
    )
    entropy, surprisal = (
        by_document(difficulty(policy, layout, statistic), [11, 2, 6])
        for statistic in ("entropy", "surprisal")
    )
    for document, entropies, surprisals in zip(documents, entropy, surprisal):
        with torch.no_grad():
            logprobs = lm_logits(policy, document.tokens.tolist()).double().log_softmax(dim=1)[:-1]
        assert (
            len(entropies) == len(surprisals) == len(document.tokens)
            and entropies[0] == surprisals[0] == 0
        )
        assert entropies.dtype == surprisals.dtype == np.float32
        assert_close(
            torch.from_numpy(entropies[1:]).double(),
            -(logprobs.exp() * logprobs).sum(dim=1),
            **FLOAT32,
        )
        assert_close(
            torch.from_numpy(surprisals[1:]).double(),
            -logprobs[torch.arange(len(logprobs)), torch.from_numpy(document.tokens[1:])],
            **FLOAT32,
        )


def test_greedy_says_whether_the_target_is_the_most_probable_word_but_the_open_marker():
    """Targets are set to the model's own first choice, then to its second; the first choice of one
    position is the open marker."""
    documents, positions, _ = example()
    free = tiny_policy()
    with torch.no_grad():
        logits = torch.stack(
            [
                lm_logits(free, documents[d].tokens[:t].tolist())[-1]
                for d, t in zip(positions.document, positions.position)
            ]
        )
    first, second = logits.topk(2, dim=1).indices.T
    marker = int(first[0])
    policy = Policy(free.lm, Markers(open=(marker,), close=(3,)))
    best = torch.where(first == marker, second, first)
    worst = logits.argmin(dim=1)
    for target, expected in ((best, True), (worst, False)):
        layout = repeated_layout(
            documents,
            replace(positions, target=target[:, None].numpy()),
            None,
            format_of(markers=policy.markers),
            lm=False,
            no_think=True,
            device=CPU,
        )
        scores = score(policy, layout, matched=True)
        assert scores.no_think_matched.tolist() == [expected] * 4


# --- Architectures that transform their logits.

SCALED = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.0625},
    "falcon_h1": {
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
}


def build(name: str, **fields: object) -> nn.Module:
    common = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**common | fields)).float().eval()


@pytest.mark.parametrize("name", SCALED)
def test_scaled_and_capped_logits_are_the_models_own(name: str):
    """The config's factor or cap is applied once, in the model's own sense (divide, multiply,
    cap)."""
    policy = Policy(build(name, **SCALED[name]), MARKERS)
    assert why_unsound(policy) is None
    with torch.no_grad():
        mine, expected = (
            all_scores(policy, *example(), format_of()),
            oracle(policy, *example(), format_of()),
        )
    for block in BLOCKS:
        assert_close(getattr(mine, block), getattr(expected, block), **FLOAT32)


@pytest.mark.parametrize(
    "limit, config_limit", [((0.001, float("inf")), (0.0, float("inf"))), ((0.0, 0.5), (0.0, 0.5))]
)
def test_time_steps_are_clamped_as_the_config_says(
    limit: tuple[float, float], config_limit: tuple[float, float]
):
    """Scan and decoding are one policy only where neither clamps; a floor that the config does not
    name is taken out."""
    lm = tiny_policy("nemotron_h").lm
    lm.config.time_step_limit = list(config_limit)
    mixers = [module for module in lm.modules() if hasattr(module, "time_step_limit")]
    assert mixers
    for mixer in mixers:
        mixer.time_step_limit = limit
    Policy(lm, MARKERS)
    assert [mixer.time_step_limit for mixer in mixers] == [config_limit] * len(mixers)
