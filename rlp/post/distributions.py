"""How far two distributions are apart, and how many equally frequent things one amounts to.

    JSD(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m),   m = (p + q) / 2,   nats, from 0 to ln 2
    number    = exp(- sum_k lambda_k ln lambda_k)

Dimensions
    O  options;  n  things that are compared with each other
"""

import numpy as np


def divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[...]: Jensen-Shannon divergence of distributions [..., O] in nats: 0 where they are equal,
    ln 2 where no option has a share in both.

    Raises:
        ValueError: one is no distribution.
    """
    from scipy.special import rel_entr

    one, other = np.broadcast_arrays(np.asarray(one, np.float64), np.asarray(other, np.float64))
    for given in (one, other):
        if (given < 0).any() or not np.allclose(given.sum(axis=-1), 1):
            raise ValueError(f"divergence expects two distributions, got {given}")
    middle = (one + other) / 2
    found = (rel_entr(one, middle) + rel_entr(other, middle)).sum(axis=-1) / 2
    return np.maximum(found, 0.0)  # of equal ones rounding may leave -1e-17


def effective_number(similarities: np.ndarray) -> float:
    """The number of different things that similarities amount to: 1 where all are equal, n where no
    two have anything in common (Friedman and Dieng, arXiv 2210.02410).

    Args:
        similarities: [n, n] products of unit vectors, over n; or the products of their coordinates
            instead, over the same n, which have the same eigenvalues above 0.
    """
    values = np.linalg.eigvalsh(similarities)
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))
