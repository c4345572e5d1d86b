"""Which documents add something new: how different their gradients are, and which stand where few
others do.

    g_i    = gradient of log P(y_i | x_i) under a proxy, of unit length, projected to d numbers
    K      = G G^T / n;      G-Vendi = exp(- sum_k lambda_k ln lambda_k), in [1, min(n, d)]
    sparse = the smaller of the clusters that k-means (cosine) makes of the g_i

after Prismatic Synthesis (arXiv 2505.20161). `rlp select` does this for a corpus on disk
(`rlp.post.selection_run`); the loop that makes data by it is `rlp.post.selection_loop`.

Features may be an array in memory or one that is mapped from disk: they are read in pieces, and
only in their order.

Dimensions
    n  documents;  d  coordinates of a feature;  k  clusters
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from rlp.config import ConfigError
from rlp.data.documents import Document
from rlp.post.distributions import effective_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIMENSIONS = 1024
"""d, as in the paper."""

AT_ONCE = 4096
"""Rows of features that are held together."""

SAMPLED = 16
"""Rows per cluster from which the first centroids are chosen."""

ROUNDS = 25
"""Of k-means at most; it ends where no document changes its cluster."""

ROUNDING = 1e-4
"""By which the square of a unit feature's length may differ from 1."""


def gradient_features(
    model: "PreTrainedModel",
    documents: Sequence[Document],
    *,
    dimensions: int = DIMENSIONS,
    seed: int = 0,
    tokens_per_batch: int = 1024,
) -> np.ndarray:
    """[n, d] float32: the unit gradient of each document, projected (`selection_sketch`).

    The gradient is that of the sum of log p over the tokens that a document's loss mask names, all
    but the first without one; a mean would have the same direction. It depends on the document, the
    weights, d and the seed, and on the documents beside it by rounding alone.

    A document whose gradient has no direction (not finite, or 0) has a row of NaN.

    Args:
        model: causal, of transformers, or any module with its logits and embeddings.
        tokens_per_batch: with padding, as many as a batch of training could have.

    Raises:
        ConfigError: d or a document is too small; a document holds a token that the model lacks, or
            nothing that is predicted; the model has no linear layer but its head.
    """
    from rlp.post.selection_sketch import (
        Projection,
        linear_layers,
        projected_gradients,
        projecting,
    )

    if dimensions < 1 or tokens_per_batch < 1:
        raise ConfigError(
            f"gradient features have at least 1 dimension, of batches of at least 1 token, got"
            f" {dimensions} and {tokens_per_batch}."
        )
    if not linear_layers(model):
        raise ConfigError("the proxy has no linear layer but its LM head: nothing is projected.")
    _refuse_documents(documents, model.get_input_embeddings().weight.shape[0])
    features = np.full((len(documents), dimensions), np.nan, dtype=np.float32)
    projection = Projection(dimensions, seed)
    with projecting(model, projection):
        for rows in _batches(documents, tokens_per_batch):
            found = projected_gradients(model, [documents[row] for row in rows], projection)
            features[rows] = unit_rows(found.cpu().numpy())
    return features


def _refuse_documents(documents: Sequence[Document], vocabulary: int) -> None:
    for number, document in enumerate(documents):
        if len(document.tokens) < 2 or not document.predicted.any():
            raise ConfigError(
                f"document {number} has {len(document.tokens)} tokens and none that is predicted;"
                " expected at least two, one of them with a loss."
            )
        if not 0 <= document.tokens.min() <= document.tokens.max() < vocabulary:
            raise ConfigError(
                f"document {number} holds token {document.tokens.max()}, and the proxy has rows 0"
                f" to {vocabulary - 1}: its vocabulary is another."
            )


def _batches(documents: Sequence[Document], tokens: int) -> Iterator[list[int]]:
    """Rows of documents of like length, so many that with padding they are at most `tokens`."""
    order = sorted(range(len(documents)), key=lambda row: (len(documents[row].tokens), row))
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(documents[row].tokens) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; NaN where there is no direction."""
    with np.errstate(all="ignore"):
        length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        unit = (rows / length).astype(np.float32)
    unit[~((length[:, 0] > 0) & np.isfinite(length[:, 0]))] = np.nan
    return unit


# Diversity


def g_vendi(features: np.ndarray, among: np.ndarray | None = None) -> float:
    """The number of different directions that the features amount to: 1 where all are equal, n
    where no two have anything in common.

    The eigenvalues of G G^T / n are those of G^T G / n, and the smaller of the two matrices is
    made.

    Args:
        features: [n, d], rows of length 1.
        among: [n] bool, which of them are measured; None: all.

    Raises:
        ConfigError: there is no row, or one that is not of length 1.
    """
    count = len(features) if among is None else int(among.sum())
    if not count:
        raise ConfigError("G-Vendi of no document: there is nothing to measure.")
    if count < features.shape[1]:
        rows = np.concatenate(list(_pieces(features, among))).astype(np.float64)
        gram = rows @ rows.T
    else:
        gram = np.zeros((features.shape[1],) * 2)
        for rows in _pieces(features, among):
            rows = rows.astype(np.float64)
            gram += rows.T @ rows
    return effective_number(gram / count)


def _pieces(features: np.ndarray, among: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Rows in their order, some thousand at a time, each piece checked."""
    for start in range(0, len(features), AT_ONCE):
        rows = np.asarray(features[start : start + AT_ONCE])
        if among is not None:
            rows = rows[among[start : start + AT_ONCE]]
        square = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
        wrong = np.flatnonzero(~(np.abs(square - 1) <= ROUNDING))
        if len(wrong):
            raise ConfigError(
                f"a feature among {start} to {start + len(rows) - 1} has length"
                f" {np.sqrt(square[wrong[0]]):g}; expected rows of length 1. Leave out documents"
                " whose gradient has no direction (NaN)."
            )
        yield rows


# Clusters


@dataclass(frozen=True, slots=True)
class Clusters:
    """What k-means made of features."""

    centroids: np.ndarray
    """[k, d] float32, of length 1."""
    label: np.ndarray
    """[n] int32, whose each is."""
    similarity: np.ndarray
    """[n] float32, cosine with its centroid."""
    size: np.ndarray
    """[k] int64, documents of each; none is empty."""
    keep: Fraction
    """Share of the clusters that count as sparse."""

    @property
    def sparse(self) -> np.ndarray:
        """[k] bool: the ceil(keep * k) smallest clusters, with those that are as small as the
        largest of them. So clusters of equal size are all sparse."""
        count = -(-self.keep.numerator * len(self.size) // self.keep.denominator)
        return self.size <= np.sort(self.size)[count - 1]

    @property
    def kept(self) -> np.ndarray:
        """[n] bool, the documents in sparse clusters."""
        return self.sparse[self.label]

    @property
    def score(self) -> np.ndarray:
        """[n] nats, -ln of the share of the documents that are in its cluster: the rarer, the
        higher."""
        return np.log(len(self.label) / self.size[self.label])

    def first(self, count: int) -> np.ndarray:
        """[n] bool: of the kept ones at most `count`, the smallest clusters first, and within
        clusters of one size those farthest from their centroid."""
        order = np.lexsort((self.similarity, self.size[self.label]))
        order = order[self.kept[order]][:count]
        chosen = np.zeros(len(self.label), dtype=bool)
        chosen[order] = True
        return chosen

    def nearest(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of other features the cluster each is nearest to, and the cosine: [m] int32, float32."""
        return _nearest(features, self.centroids)


def sparse_clusters(
    features: np.ndarray,
    clusters: int | None = None,
    *,
    keep: float | str | Fraction = 0.5,
    seed: int = 0,
    on_round: Callable[[int], None] = lambda changed: None,
) -> Clusters:
    """k-means by cosine, and which of its clusters are the sparser `keep` of them.

    Chosen are the first centroids as by k-means++, among rows in the order of their checksums: the
    order in which documents come changes nothing but rounding. There are fewer clusters than asked
    for where fewer rows differ, or some end empty.

    Args:
        features: [n, d], rows of length 1.
        clusters: k; None: `default_clusters`.
        keep: above 0, at most 1; of the clusters, rounded up.
        on_round: called after each round with how many documents changed their cluster.

    Raises:
        ConfigError: there are fewer documents than clusters, or none; a row is not of length 1;
            `keep` is no such share.
    """
    count = len(features)
    clusters = default_clusters(count) if clusters is None else clusters
    share = keep_share(keep)
    if not 1 <= clusters <= count:
        raise ConfigError(
            f"{clusters:,} clusters of {count:,} documents: expected at least 1, and no more than"
            " there are documents."
        )
    centroids = _first_centroids(features, clusters, seed)
    label, similarity = _nearest(features, centroids)
    for _ in range(ROUNDS):
        centroids = _moved(features, label, centroids)
        before, (label, similarity) = label, _nearest(features, centroids)
        changed = int((before != label).sum())
        on_round(changed)
        if not changed:
            break
    there, label = np.unique(label, return_inverse=True)
    size = np.bincount(label, minlength=len(there))
    return Clusters(centroids[there], label.astype(np.int32), similarity, size, share)


def default_clusters(count: int) -> int:
    """k of n documents: 1 % of them as in the paper, at least 16 where there are so many, at most
    4096, whose cost is that of the gradients of a small proxy."""
    return max(1, min(count, max(16, -(-count // 100)), 4096))


def keep_share(keep: float | str | Fraction) -> Fraction:
    """The decimal number that was written, exactly.

    Raises:
        ConfigError: it is not above 0 and at most 1.
    """
    try:
        share = Fraction(str(keep))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"keep must be a share, such as 0.5, got {keep!r}.") from error
    if not 0 < share <= 1:
        raise ConfigError(f"keep must be above 0 and at most 1, got {keep}.")
    return share


def _first_centroids(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """[at most k, d]: rows chosen one by one, among the `SAMPLED` * k with the least checksums.
    Each is the best of some that are drawn with a probability that is proportional to the squared
    distance to the nearest chosen one: a single draw puts two into one bundle too often."""
    checksum = np.concatenate([_checksums(rows, seed) for rows in _pieces(features)])
    sample = np.lexsort((np.arange(len(checksum)), checksum))[: SAMPLED * clusters]
    rows = np.asarray(features[np.sort(sample)])
    rows = rows[np.argsort(checksum[np.sort(sample)], kind="stable")]

    draws = np.random.Generator(np.random.Philox(key=seed))
    trials = 2 + int(np.log(clusters))
    distance, chosen = np.full(len(rows), 2.0), []
    for _ in range(clusters):
        total = np.cumsum(np.where(distance > ROUNDING, distance, 0.0))
        if not total[-1]:
            break  # no two rows that are left differ
        tried = np.searchsorted(total, draws.random(trials) * total[-1], side="right")
        apart = np.minimum(distance, 2 - 2 * (rows[tried] @ rows.T).astype(np.float64))
        best = apart.sum(axis=1).argmin()
        chosen.append(int(tried[best]))
        distance = apart[best]
    return rows[chosen]


def _checksums(rows: np.ndarray, seed: int) -> np.ndarray:
    """[n] uint64 of the rows' bytes."""
    key = seed.to_bytes(8, "little")
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in rows]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _nearest(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    label, similarity = [], []
    for rows in _pieces(features):
        for start in range(0, len(rows), 512):
            cosine = rows[start : start + 512] @ centroids.T
            label.append(cosine.argmax(axis=1).astype(np.int32))
            similarity.append(cosine.max(axis=1))
    nothing = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.float32)]
    return np.concatenate(label or nothing[0]), np.concatenate(similarity or nothing[1])


def _moved(features: np.ndarray, label: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """[k, d]: the mean row of each cluster, of length 1; one that is empty, or whose rows cancel,
    stays."""
    total, start = np.zeros(centroids.shape), 0
    for rows in _pieces(features):
        np.add.at(total, label[start : start + len(rows)], rows)
        start += len(rows)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    moved = np.divide(total, length, out=centroids.astype(np.float64), where=length > 1e-6)
    return moved.astype(np.float32)
