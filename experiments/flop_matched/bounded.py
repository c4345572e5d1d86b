"""The information gain with a floor, a reward of one's own (docs/extending.md): does RLP lose
worlds to thoughts that are wrong and believed?"""

import math

from torch import Tensor

from rlp import Evidence

FLOOR_NATS = -math.log(4)
"""As much below 0 as the best thought is above it, with four headings to choose from."""


class BoundedGain:
    """max(gain, -log 4): a thought that is wrong costs no more than a right one can gain."""

    needs = ("baseline_logprob",)

    def __call__(self, evidence: Evidence) -> Tensor:
        gain = evidence.reasoned_logprob - evidence.baseline_logprob[:, None]
        return gain.clamp(min=FLOOR_NATS)
