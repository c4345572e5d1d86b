"""Gradients of documents, how different they are, and which stand where few others do."""

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap
from transformers import AutoModelForCausalLM

from rlp.config import ConfigError
from rlp.data.documents import Document
from rlp.post import selection_sketch
from rlp.post.selection import (
    default_clusters,
    g_vendi,
    gradient_features,
    keep_share,
    sparse_clusters,
    unit_rows,
)
from rlp.post.selection_sketch import Projection, linear_layers
from tests.tiny_models import architecture, random_documents, tiny_policy


def unit(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """[count, dimensions] random directions."""
    rng = np.random.default_rng(seed)
    return unit_rows(rng.standard_normal((count, dimensions)).astype(np.float32))


# G-Vendi


@pytest.mark.parametrize("dimensions", [8, 5, 100])
def test_orthonormal_rows_amount_to_their_number_and_equal_ones_to_one(dimensions):
    assert g_vendi(np.eye(5, dimensions, dtype=np.float32)) == pytest.approx(5)
    assert g_vendi(np.repeat(unit(1, dimensions), 7, axis=0)) == pytest.approx(1)


def test_two_halves_are_two_and_three_to_one_is_its_entropy():
    rows = np.eye(2, 4, dtype=np.float32)
    assert g_vendi(rows[[0, 1, 0, 1]]) == pytest.approx(2)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert g_vendi(rows[[0, 0, 0, 1]]) == pytest.approx(expected)


def test_the_dual_is_the_primal():
    """30 rows of 20 numbers go by the [20, 20] matrix; with 20 zeros more, by the [30, 30] one."""
    rows = unit(30, 20)
    wide = np.concatenate([rows, np.zeros_like(rows)], axis=1)
    assert g_vendi(wide) == pytest.approx(g_vendi(rows), rel=1e-6)
    value = np.linalg.eigvalsh(rows.astype(np.float64) @ rows.T / 30)
    value = value[value > 1e-12]
    assert g_vendi(rows) == pytest.approx(np.exp(-(value * np.log(value)).sum()), rel=1e-6)


def test_doubling_the_set_or_its_order_changes_nothing(monkeypatch):
    rows = unit(40, 24)
    assert g_vendi(np.concatenate([rows, rows])) == pytest.approx(g_vendi(rows))
    assert g_vendi(rows[::-1]) == pytest.approx(g_vendi(rows))
    whole, some = g_vendi(rows), g_vendi(rows[::2])
    monkeypatch.setattr("rlp.post.selection.AT_ONCE", 7)
    assert g_vendi(rows) == pytest.approx(whole)
    assert g_vendi(rows, np.arange(40) % 2 == 0) == pytest.approx(some)


@pytest.mark.parametrize(
    "rows, words",
    [
        (np.zeros((0, 4), np.float32), "nothing to measure"),
        (np.ones((2, 4), np.float32), "has length 2; expected rows of length 1"),
        (np.full((2, 4), np.nan, np.float32), "has length nan"),
    ],
)
def test_rows_that_are_no_directions_are_refused(rows, words):
    with pytest.raises(ConfigError, match=words):
        g_vendi(rows)


# Features


def tiny(name: str = "qwen3"):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(architecture(name), attn_implementation="eager")
    return lm.float().eval()


def masked_documents() -> list[Document]:
    """Of several lengths, some with a prompt that is not predicted."""
    found = random_documents([2, 5, 9, 30, 17, 12])
    masks = [None, None, np.arange(9) >= 4, np.arange(30) >= 29, np.arange(17) % 3 == 1, None]
    return [Document(d.id, d.tokens, loss_mask=mask) for d, mask in zip(found, masks)]


def functional_gradients(lm, documents) -> list[dict[str, torch.Tensor]]:
    """The gradient of each document by torch.func, a vmap over the rows of one batch."""
    weights = {name: weight.detach() for name, weight in lm.named_parameters()}
    length = max(len(document.tokens) for document in documents)
    tokens = torch.zeros(len(documents), length, dtype=torch.int64)
    counts = torch.zeros(len(documents), length - 1)
    for row, document in enumerate(documents):
        tokens[row, : len(document.tokens)] = torch.from_numpy(document.tokens)
        counts[row, : len(document.tokens) - 1] = torch.from_numpy(document.predicted).float()

    def logprob(weights, row, count):
        logits = functional_call(lm, weights, (row[None],), {"use_cache": False}).logits
        said = logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        return (said * count).sum()

    found = vmap(grad(logprob), in_dims=(None, 0, 0))(weights, tokens, counts)
    return [{name: value[row] for name, value in found.items()} for row in range(len(documents))]


def projected(gradients: dict[str, torch.Tensor], layers, projection: Projection) -> np.ndarray:
    """phi by its definition, entry by entry."""
    phi = torch.zeros(projection.dimensions)
    for name in layers:
        gradient = gradients[f"{name}.weight"]
        h, k = projection.sides(name, *gradient.shape, gradient.device)
        place = (h.place[:, None] + k.place) % projection.dimensions
        phi.index_add_(0, place.flatten(), (gradient * h.sign[:, None] * k.sign).flatten())
    return phi.numpy()


def test_features_are_those_of_torch_func_projected_by_the_same_map(monkeypatch):
    """Through the layers' own gradients, and through transforms."""
    lm, documents = tiny(), masked_documents()
    layers = linear_layers(lm)
    assert len(layers) == 2 * 7
    gradients = functional_gradients(lm, documents)
    projection = Projection(64, 3)
    expected = unit_rows(np.stack([projected(one, layers, projection) for one in gradients]))
    by_layer = gradient_features(lm, documents, dimensions=64, seed=3)
    np.testing.assert_allclose(by_layer, expected, atol=1e-5)
    monkeypatch.setattr(selection_sketch, "LONGEST", 0)
    by_transform = gradient_features(lm, documents, dimensions=64, seed=3, tokens_per_batch=40)
    np.testing.assert_allclose(by_transform, expected, atol=1e-5)


def test_a_projection_is_off_by_one_over_the_root_of_its_length():
    """A product of unit gradients has an error of about 1 / sqrt(d): of a dense matrix of signs it
    is at most sqrt(2 / d) each, and these signs are as good."""
    lm, documents = tiny(), random_documents([12] * 24, seed=1)
    whole = np.stack(
        [
            torch.cat([one[f"{name}.weight"].flatten() for name in linear_layers(lm)]).numpy()
            for one in functional_gradients(lm, documents)
        ]
    )
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    pairs = np.triu_indices(len(documents), 1)
    true = (whole @ whole.T)[pairs]
    error = {}
    for dimensions in (64, 256, 1024, 4096):
        rows = gradient_features(lm, documents, dimensions=dimensions)
        error[dimensions] = np.sqrt(np.mean(((rows @ rows.T)[pairs] - true) ** 2))
    for dimensions, found in error.items():
        assert 0.3 / math.sqrt(dimensions) < found < math.sqrt(2 / dimensions), error


def test_signs_depend_on_seed_and_layer_alone():
    lm, documents = tiny(), masked_documents()
    one = gradient_features(lm, documents, dimensions=32, seed=1)
    alone = [gradient_features(lm, [d], dimensions=32, seed=1)[0] for d in reversed(documents)]
    np.testing.assert_allclose(one[::-1], alone, atol=1e-5)
    other = gradient_features(lm, documents, dimensions=32, seed=2)
    assert np.abs((one * other).sum(axis=1)).max() < 0.9


def test_a_model_is_left_as_it_was():
    lm = tiny().train()
    lm.get_input_embeddings().weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in lm.parameters()]
    gradient_features(lm, masked_documents(), dimensions=8)
    assert [parameter.requires_grad for parameter in lm.parameters()] == before
    assert lm.training and all(parameter.grad is None for parameter in lm.parameters())
    assert not any(module._forward_hooks for module in lm.modules())


def test_a_document_whose_gradient_is_not_finite_is_nan_and_spoils_no_other():
    lm, documents = tiny(), masked_documents()
    clean = gradient_features(lm, documents, dimensions=32)
    bad = int(documents[2].tokens[6])
    others = [row for row, d in enumerate(documents) if bad not in d.tokens[:-1]]
    assert others
    with torch.no_grad():
        lm.get_input_embeddings().weight[bad] = torch.nan
        lm.get_output_embeddings().weight = torch.nn.Parameter(
            tiny().get_output_embeddings().weight.detach()
        )
    found = gradient_features(lm, documents, dimensions=32)
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(found[others], clean[others], atol=1e-5)


@pytest.mark.parametrize(
    "document, words",
    [
        (Document(0, np.array([7])), "document 0 has 1 tokens"),
        (Document(0, np.arange(5, 9), loss_mask=np.arange(4) == 0), "none that is predicted"),
        (Document(0, np.array([7, 48])), "holds token 48, and the proxy has rows 0 to 47"),
    ],
)
def test_a_document_without_a_gradient_is_refused(document, words):
    with pytest.raises(ConfigError, match=words):
        gradient_features(tiny(), [document])


def test_hybrids_of_attention_and_state_space_have_features_too():
    rows = gradient_features(tiny_policy("falcon_h1").lm, masked_documents(), dimensions=16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


# Clusters


def bundles(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(features, whose): close rows around axes, so many each, mixed."""
    rng = np.random.default_rng(seed)
    whose = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise = 0.05 * rng.standard_normal((len(whose), 32))
    return unit_rows((np.eye(32)[whose] + noise).astype(np.float32)), whose


def test_the_sparser_half_of_the_clusters_is_kept():
    features, whose = bundles([40, 30, 5, 3])
    found = sparse_clusters(features, 4, keep=0.5)
    assert sorted(found.size) == [3, 5, 30, 40]
    assert set(whose[found.kept]) == {2, 3} and found.kept.sum() == 8
    np.testing.assert_allclose(found.score[whose == 3], math.log(78 / 3))


@pytest.mark.parametrize(
    "keep, kept", [("0.25", 1), ("0.26", 2), (0.5, 2), (0.75, 3), (0.9, 4), (1, 4)]
)
def test_a_share_of_the_clusters_is_exact_and_rounded_up(keep, kept):
    found = sparse_clusters(bundles([9, 7, 5, 3])[0], 4, keep=keep)
    assert found.sparse.sum() == kept


def test_clusters_of_equal_size_drop_nothing():
    found = sparse_clusters(bundles([6] * 5)[0], 5, keep=0.2)
    assert found.kept.all() and len(found.size) == 5
    found = sparse_clusters(bundles([6, 6, 6, 20])[0], 4, keep=0.25)  # ties with the smallest
    assert found.kept.sum() == 18


def test_order_changes_no_cluster():
    features, _ = bundles([20, 12, 6, 2], seed=4)
    order = np.random.default_rng(1).permutation(len(features))
    one, other = sparse_clusters(features, 6), sparse_clusters(features[order], 6)
    same = {tuple(np.unique(np.flatnonzero(one.label == k))) for k in range(len(one.size))}
    again = {tuple(np.unique(order[other.label == k])) for k in range(len(other.size))}
    assert same == again
    assert sparse_clusters(features, 6).label.tolist() == one.label.tolist()


def test_equal_documents_are_one_cluster():
    found = sparse_clusters(np.repeat(unit(1, 8), 12, axis=0), 4)
    assert len(found.size) == 1 and found.kept.all()


def test_the_first_of_the_sparse_are_those_far_from_the_rest():
    features, whose = bundles([20, 4, 4])
    found = sparse_clusters(features, 3, keep="0.5")
    assert found.first(100).sum() == 8 and found.first(0).sum() == 0
    five = found.first(5)
    assert five.sum() == 5 and not five[whose == 0].any()
    assert found.similarity[five].max() <= np.sort(found.similarity[found.kept])[4]


def test_other_documents_go_to_the_nearest_cluster():
    features, whose = bundles([10, 10, 10])
    found = sparse_clusters(features, 3)
    others, theirs = bundles([3, 3, 3], seed=9)
    label, similarity = found.nearest(others)
    for k in range(3):
        assert set(label[theirs == k]) == set(found.label[whose == k])
    assert similarity.min() > 0.9
    assert found.nearest(others[:0])[0].shape == (0,)


@pytest.mark.parametrize(
    "clusters, keep, words",
    [
        (31, 0.5, "31 clusters of 30 documents"),
        (0, 0.5, "0 clusters of 30 documents"),
        (3, 0, "keep must be above 0"),
        (3, 1.5, "keep must be above 0 and at most 1"),
        (3, "half", "keep must be a share"),
    ],
)
def test_clusters_that_can_not_be_are_refused(clusters, keep, words):
    with pytest.raises(ConfigError, match=words):
        sparse_clusters(bundles([10, 10, 10])[0], clusters, keep=keep)


def test_shares_are_the_decimals_that_were_written():
    """0.1 of 30 is 3; in floating point it is 4 when rounded up."""
    share = keep_share(0.1)
    assert -(-share.numerator * 30 // share.denominator) == 3
    assert [default_clusters(n) for n in (1, 10, 100, 5000, 10**7)] == [1, 10, 16, 50, 4096]
