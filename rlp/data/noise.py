"""Random numbers that depend on a key alone: on no rank, no order, no batch."""

import numpy as np

(
    POSITION_NOISE,
    THOUGHT_NOISE,
    PANEL_NOISE,
    ORDER_NOISE,
    SOURCE_NOISE,
    BENCHMARK_THOUGHT_NOISE,
    BENCHMARK_ANSWER_NOISE,
    PLAIN_NOISE,
    SPECTRUM_NOISE,
    SPECTRUM_DROP_NOISE,
) = range(10)
"""Purposes of `keyed_noise`: draws for different purposes never share a stream."""


def keyed_noise(
    *,
    seed: int,
    purpose: int,
    step: int = 0,
    document: int = 0,
    occurrence: int = 0,
    position: int = 0,
    thought: int = 0,
) -> np.random.Generator:
    """A generator that depends on its key alone.

    So a draw is the same on any rank, in any batch, after any resume. Philox is a function from
    (key, counter) to bits; the lowest counter word runs over the draws.

    Args:
        occurrence: of the document in the step (`Document.occurrence`).
    """
    key = np.array([seed, (purpose << 32) | step], dtype=np.uint64)
    counter = np.array([0, (occurrence << 32) | thought, position, document], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
