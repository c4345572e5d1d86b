"""How near a model's spread over options is to the right one, and how much of it there is.

All of a model's log-probabilities [O] of the options, each with its end, which need not sum to 1:
what is missing went to outputs that are no option.

    mass   = sum_o p(o)
    JSD    of p / mass and the right one (`rlp.post.distributions.divergence`)
    yield  = E[different valid options among n draws] = sum_o 1 - (1 - p(o))^n
    excess = sum_o q(o) (ln q(o) - ln p(o))     nats over the truth's own; missing mass costs too

A divergence of renormalized options says nothing about mass, so the two are told together.

Dimensions
    O  options
"""

from collections.abc import Iterable, Sequence

import numpy as np

from rlp.config import ConfigError

DRAWS = 100
"""Of a yield."""


def mass_of(logprobs: np.ndarray) -> float:
    """The probability of all options together.

    Args:
        logprobs: [O] nats.
    """
    return float(np.exp(logprobs).sum())


def renormalized(logprobs: np.ndarray) -> np.ndarray:
    """[O]: probabilities that sum to 1.

    Raises:
        ConfigError: the model gives no option any probability, or one that is no number.
    """
    from scipy.special import softmax

    logprobs = np.asarray(logprobs, dtype=np.float64)
    if np.isnan(logprobs).any() or not (logprobs > -np.inf).any() or (logprobs == np.inf).any():
        raise ConfigError(
            f"none of the {len(logprobs)} options has a probability, or one of them is no number:"
            " nothing can be renormalized. Look at the format and at the options."
        )
    return softmax(logprobs)


def excess_nats(truth: np.ndarray, logprobs: np.ndarray) -> float:
    """Expected nats of an output under the model, less those under the truth: their KL divergence.
    Infinite where the model excludes an option that the truth has.

    Args:
        truth: [O], sums to 1.
        logprobs: [O] nats, not renormalized.
    """
    from scipy.special import entr

    with np.errstate(invalid="ignore"):
        cost = np.where(truth > 0, truth * -np.asarray(logprobs, dtype=np.float64), 0.0)
    return float(cost.sum() - entr(truth).sum())


def expected_yield(truth: np.ndarray, logprobs: np.ndarray, draws: int = DRAWS) -> float:
    """How many different options with a share of the truth `draws` outputs hold on average."""
    probabilities = np.exp(logprobs)[truth > 0]
    return float((1 - (1 - np.minimum(probabilities, 1)) ** draws).sum())


def yield_of(outputs: Iterable[str], options: Sequence[str]) -> int:
    """How many different options there are among outputs, white space at their ends aside."""
    return len({output.strip() for output in outputs} & set(options))
