"""How alike texts are: of one model, of two models, and of answers to different prompts.

    intra(m, q)     = mean over i < j of cos(e(y_i), e(y_j)),  y ~ m(. | q)
    inter(m, m', q) = mean over i, j of cos(e(y_i^m), e(y_j^m'))
    floor(m, m', q) = mean over q' != q, and i, j, of cos(e(y_i^m at q), e(y_j^m' at q'))
    vendi(m, q)     = exp(- sum_k lambda_k ln lambda_k), lambda of the [n, n] matrix of cos / n

All are means of products of unit vectors, so they come from the sums of a cell's vectors, and no
matrix of all texts against all is made. Every mean over pairs is one over pairs of different texts
(unbiased), so none depends on how many texts a cell has, but for `vendi`, `distinct_*` and the
entropy, which can not exceed what n texts allow.

Nothing here depends on the order of texts, or on what models are called.

Dimensions
    n  texts;  D  coordinates of an embedding;  M  models;  Q  prompts;  R  models, or pairs of them
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy import sparse

from rlp.config import ConfigError
from rlp.post.distributions import effective_number

Embedding = Callable[[list[str]], np.ndarray]
"""Texts -> [n, D], one row each, of any length but 0."""

VERBATIM_WORDS = 5
"""A run of so many words in both texts is overlap; fewer are often grammar."""

TIE = 1e-9
"""Similarities that differ by no more are equal: what lies between is rounding."""

AT_ONCE = 1024
"""Rows of a prompt's matrix of similarities that are held together."""

# Han, kana, Thai, Lao, Burmese, Khmer: written without spaces, so that each letter is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, numbers too; what has none gives its other marks, one by
    one."""
    text = unicodedata.normalize("NFC", text).lower()
    return _WORD.findall(text) or re.findall(r"\S", text)


def same_text(text: str) -> str:
    """What two texts that are duplicates agree in: all but white space, and the form of accents."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def tfidf(texts: list[str]) -> sparse.csr_array:
    """[n, D]: counts of words times ln(N / texts with the word) + 1, each row of length 1.

    N and the counts are those of the different texts among these, so that a text that stands there
    twice, such as one of a copied model, changes nothing.

    Raises:
        ConfigError: scikit-learn is missing.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ConfigError(
            "scikit-learn is not installed, and similarity is measured with its TF-IDF. Write: pip"
            " install 'rlp-pretraining[post]', or an embedding of your own: --embedding"
            " package.module:function."
        ) from error
    vectorizer = TfidfVectorizer(analyzer=words, smooth_idf=False)
    vectorizer.fit(sorted(set(texts)))
    return sparse.csr_array(vectorizer.transform(texts))


def embedded(texts: list[str], embedding: Embedding | None) -> sparse.csr_array:
    """[n, D] of unit rows; `embedding` None is TF-IDF. Equal texts are embedded once.

    Raises:
        ConfigError: the embedding gives something else than a finite row for each text, or one of
            length 0.
    """
    different = sorted(set(texts))
    rows = tfidf(different) if embedding is None else _checked(different, embedding)
    place = {text: row for row, text in enumerate(different)}
    return rows[[place[text] for text in texts]]


def _checked(texts: list[str], embedding: Embedding) -> sparse.csr_array:
    rows = np.asarray(embedding(list(texts)), dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(texts):
        raise ConfigError(
            f"the embedding gave an array of shape {rows.shape} for {len(texts)} texts; expected"
            f" [{len(texts)}, D]."
        )
    length = np.linalg.norm(rows, axis=1)
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(bad):
        raise ConfigError(
            f"the embedding gave a row of length {length[bad[0]]:g} for {texts[bad[0]]!r}; expected"
            " finite numbers that are not all 0."
        )
    return sparse.csr_array(rows / length[:, None])


def cell_means(rows: sparse.csr_array, cells: list[np.ndarray]) -> sparse.csr_array:
    """[cells, D]: the mean row of the texts of each cell; 0 where it has none.

    Args:
        rows: [n, D].
        cells: [texts] int64 each, which rows are its own.
    """
    sizes = np.array([len(cell) for cell in cells])
    which = np.repeat(np.arange(len(cells)), sizes)
    members = np.concatenate([*cells, np.zeros(0, dtype=np.int64)])
    weights = 1 / sizes[which]
    return sparse.csr_array((weights, (which, members)), (len(cells), rows.shape[0])) @ rows


def products(one: sparse.csr_array, other: sparse.csr_array) -> np.ndarray:
    """[Q]: the scalar product of row q of both."""
    return np.asarray(one.multiply(other).sum(axis=1)).ravel()


def intra(one: sparse.csr_array, other: sparse.csr_array, sizes: np.ndarray) -> np.ndarray:
    """[Q]: mean product over pairs of two different texts of a cell; NaN below two.

    Of rows whose product with themselves is 1: the sum over all i, j is n more than that over pairs
    of different ones.

    Args:
        one, other: [Q, D] means of the cells' rows, for a cosine twice the same.
        sizes: [Q], n of each cell.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (sizes * products(one, other) - 1) / (sizes - 1)
    return np.where(sizes > 1, found, np.nan)


def inter(one: sparse.csr_array, other: sparse.csr_array, both: np.ndarray) -> np.ndarray:
    """[Q]: mean product over pairs of a text of each; NaN where one of the two has none.

    Args:
        one, other: [Q, D] means of two models' cells.
        both: [Q] bool, where both have texts.
    """
    return np.where(both, products(one, other), np.nan)


def floor(
    one: sparse.csr_array, other: sparse.csr_array, has_one: np.ndarray, has_other: np.ndarray
) -> np.ndarray:
    """[Q]: mean cosine of an answer to prompt q and one to another prompt, each of the two models
    in turn answering q; NaN where there is no such pair."""
    return (_floor(one, other, has_one, has_other) + _floor(other, one, has_other, has_one)) / 2


def _floor(
    at: sparse.csr_array, elsewhere: sparse.csr_array, has: np.ndarray, has_elsewhere: np.ndarray
) -> np.ndarray:
    total = np.asarray(elsewhere.sum(axis=0)).ravel()
    others = has_elsewhere.sum() - has_elsewhere
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (at @ total - products(at, elsewhere)) / others
    return np.where(has & (others > 0), found, np.nan)


def runs(texts: list[str], length: int) -> list[frozenset[tuple[str, ...]]]:
    """Of each text its different runs of `length` words; a shorter one is one run."""
    found = []
    for text in texts:
        own = words(text)
        last = max(len(own) - length, 0)
        found.append(frozenset(tuple(own[k : k + length]) for k in range(last + 1)))
    return found


def overlap_rows(texts: list[str], length: int) -> tuple[sparse.csr_array, sparse.csr_array]:
    """([n, D], [n, D]) whose product of rows i and j is the share of the runs of text i that text j
    has too."""
    number: dict[tuple[str, ...], int] = {}
    of_text = [
        [number.setdefault(run, len(number)) for run in sorted(own)] for own in runs(texts, length)
    ]
    which = np.repeat(np.arange(len(texts)), [len(own) for own in of_text])
    column = np.concatenate([np.array(own, dtype=np.int64) for own in of_text])
    shape = (len(texts), len(number))
    holds = sparse.csr_array((np.ones(len(column)), (which, column)), shape)
    share = sparse.csr_array((1 / np.bincount(which)[which], (which, column)), shape)
    return share, holds


def vendi(rows: sparse.csr_array) -> float:
    """The number of different texts that the similarities amount to: 1 where all n are equal, n
    where no two have anything in common (Friedman and Dieng, arXiv 2210.02410).

    Args:
        rows: [n, D] of unit length; the smaller of the two products is used.
    """
    count = rows.shape[0]
    gram = rows @ rows.T if count <= rows.shape[1] else rows.T @ rows
    return effective_number(gram.toarray() / count)


def duplicates(texts: list[str]) -> float:
    """The share of pairs i < j that are the same text (`same_text`); at least two texts."""
    counts = np.array(list(Counter(map(same_text, texts)).values()))
    return float((counts * (counts - 1)).sum() / (len(texts) * (len(texts) - 1)))


def entropy(counts: np.ndarray) -> float:
    """Nats of the distribution that counts make."""
    share = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(share * np.log(share)).sum()))


def answer_entropy(texts: list[str]) -> float:
    """Nats of how often each different answer came, by its words alone."""
    return entropy(np.array(list(Counter(tuple(words(text)) for text in texts).values())))


def distinct(texts: list[str], length: int) -> float:
    """Different runs of `length` words over all such runs; NaN where no text is that long."""
    all_runs = [
        tuple(own[k : k + length])
        for own in map(words, texts)
        for k in range(len(own) - length + 1)
    ]
    return len(set(all_runs)) / len(all_runs) if all_runs else math.nan


def models_among_nearest(rows: sparse.csr_array, model: np.ndarray, count: int) -> float:
    """From how many models the `count` most similar answers to a prompt come: an answer and those
    nearest to it, as the number of equally frequent models that they amount to (the exponential of
    the entropy of their shares), mean over answers.

    1 where every answer stands among its own model's, M where they mix evenly. Of answers that are
    equally near, each counts in part.

    Args:
        rows: [n, D] of unit length, of all models.
        model: [n], whose each is.
        count: at least 2, at most n.
    """
    whose = np.equal.outer(model, np.unique(model)).astype(np.float64)
    found = []
    for start in range(0, rows.shape[0], AT_ONCE):
        here = np.arange(start, min(start + AT_ONCE, rows.shape[0]))
        near = (rows[here] @ rows.T).toarray()
        near[np.arange(len(here)), here] = -np.inf
        least = np.partition(near, -(count - 1), axis=1)[:, -(count - 1)][:, None]
        above, tied = near > least + TIE, np.abs(near - least) <= TIE
        part = (count - 1 - above.sum(axis=1)) / tied.sum(axis=1)
        shares = (whose[here] + (above + tied * part[:, None]) @ whose) / count
        found += [math.exp(entropy(row)) for row in shares]
    return float(np.mean(found))


def is_right(text: str, answers: tuple[str, ...]) -> bool:
    """Whether one of the answers stands in a text as whole words, in any case; `4` does not stand
    in `14` or `4.5`."""
    text = same_text(text).lower()
    return any(
        re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(same_text(one).lower())}(?!\w)(?![.,]\d)", text)
        for one in answers
    )
