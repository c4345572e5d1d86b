"""What the filtered arm keeps of a model's own documents.

Right problems, well-formed stories, each text once, and of the stories those in the sparser half of
the clusters of n-grams: TF-IDF of words and pairs of words, k-means with a tenth as many clusters
as stories. It is no Prismatic selection, whose clusters are of gradients.
"""

import re

import numpy as np

from experiments.loop.world import ANIMALS, COLOURS, NAMES, RIGHT_PROBLEMS, TOPICS

_STORY = re.compile(
    rf"({'|'.join(TOPICS)}) story : ({'|'.join(NAMES)}) has a ({'|'.join(ANIMALS)})"
    rf" that is ({'|'.join(COLOURS)}) \."
)

CLUSTERS = 0.1
"""Of the stories that are left to choose among."""


def is_well_formed(text: str) -> bool:
    """Whether a text is a story of the grammar, or a problem that is right."""
    return text in RIGHT_PROBLEMS or _STORY.fullmatch(text) is not None


def reasons(texts: list[str]) -> list[str]:
    """Why each is left out, empty where it is kept (`rlp.post.stages.generation.Filter`)."""
    found, seen = [], set()
    for text in texts:
        wrong = "wrong" if text.startswith("problem") else "malformed"
        found.append("duplicate" if text in seen else "" if is_well_formed(text) else wrong)
        seen.add(text)
    stories = [n for n, text in enumerate(texts) if not found[n] and _STORY.fullmatch(text)]
    for n, sparse in zip(stories, in_sparse_clusters([texts[n] for n in stories])):
        found[n] = "" if sparse else "dense"
    return found


def in_sparse_clusters(texts: list[str]) -> list[bool]:
    """Whether each text is in the sparser half of the clusters of these."""
    if len(texts) < 2:
        return [True] * len(texts)
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = TfidfVectorizer(analyzer="word", ngram_range=(1, 2), token_pattern=r"\S+")
    clusters = max(1, round(CLUSTERS * len(texts)))
    labels = KMeans(clusters, n_init=1, random_state=0).fit_predict(rows.fit_transform(texts))
    return in_smaller_half(labels)


def in_smaller_half(labels: np.ndarray) -> list[bool]:
    """Whether each is in one of the smaller half of the clusters, or in one as small as the largest
    of these: of equal clusters none goes.

    Args:
        labels: [n], the cluster of each.
    """
    sizes = np.bincount(labels)
    ascending = np.sort(sizes[sizes > 0])
    largest = ascending[(len(ascending) + 1) // 2 - 1]
    return (sizes[labels] <= largest).tolist()
