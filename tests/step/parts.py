"""Parts that a test names as a user names their own."""

from torch import Tensor

from rlp.step.baseline import NoThink


def start(no_think: NoThink) -> Tensor:
    """The starting checkpoint."""
    return no_think.start_logprob


start.needs = ("start_logprob",)
