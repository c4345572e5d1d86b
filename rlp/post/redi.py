"""REDI: right traces pulled up and wrong ones pushed down, the second with less weight
(arXiv 2505.24850).

    L = mean_n [ -log pi(y_w | x) / |y_w|  +  alpha log pi(y_l | x) / |y_l| ]

There is no reference model, no logarithm of a sigmoid and no bound: the second term falls without
end as the wrong trace gets less likely, and takes the right one along where alpha and the rate are
high. `CollapseAlarm` watches for that.

Pure functions of tensors and numbers; the trainer is `rlp.post.redi_trainer`.

Dimensions
    N  pairs of a right and a wrong trace after one prompt
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def redi_loss(
    chosen_logprob: Tensor,
    chosen_tokens: Tensor,
    rejected_logprob: Tensor,
    rejected_tokens: Tensor,
    alpha: float,
) -> Tensor:
    """The mean loss of N pairs, in nats a token.

        L = 1/N sum_n [ -log pi(y_w | x) / |y_w|  +  alpha log pi(y_l | x) / |y_l| ]

    Its gradient is -1 / (N |y_w|) in each right log-probability and alpha / (N |y_l|) in each wrong
    one. With alpha 0 it is supervised fine-tuning on the right traces, each weighted alike whatever
    its length; with alpha 1 a pair whose traces change places changes the sign of its loss. It has
    no lower bound for alpha above 0.

    Args:
        chosen_logprob: [N], nats, log pi(y_w | x): summed over the tokens of the right trace.
        chosen_tokens: [N], |y_w|, at least 1.
        rejected_logprob: [N], nats, summed over those tokens of the wrong trace that count.
        rejected_tokens: [N], how many do; |y_l| where all of them count.
        alpha: weight of the wrong traces, from 0 to 1; 0.8 in the paper.

    Returns:
        A number with gradient.

    Raises:
        ValueError: alpha is outside [0, 1]; shapes differ, are not [N] or hold nothing; a count is
            below 1; a log-probability is not finite.
    """
    require_alpha(alpha)
    given = {
        "chosen_logprob": chosen_logprob,
        "chosen_tokens": chosen_tokens,
        "rejected_logprob": rejected_logprob,
        "rejected_tokens": rejected_tokens,
    }
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    if len(set(shapes.values())) != 1 or chosen_logprob.ndim != 1 or len(chosen_logprob) == 0:
        raise ValueError(f"redi_loss expects four tensors [N], N at least 1, got {shapes}.")
    for name in ("chosen_tokens", "rejected_tokens"):
        _refuse(given[name] < 1, name, given[name], "a trace has at least 1 token that counts")
    for name in ("chosen_logprob", "rejected_logprob"):
        _refuse(~torch.isfinite(given[name]), name, given[name], "log-probabilities are finite")

    chosen = chosen_logprob / chosen_tokens
    rejected = rejected_logprob / rejected_tokens
    return (alpha * rejected - chosen).mean()


def require_alpha(alpha: float) -> None:
    """
    Raises:
        ValueError: it is no weight from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha must be from 0 (only right traces) to 1 (wrong ones weigh as much), got"
            f" {alpha}."
        )


def _refuse(is_bad: Tensor, name: str, values: Tensor, expected: str) -> None:
    if is_bad.any():
        index = int(is_bad.nonzero()[0, 0])
        raise ValueError(f"redi_loss: {name}[{index}] is {values[index].item():g}; {expected}.")


def departure(chosen: Sequence[int], rejected: Sequence[int]) -> int | None:
    """Index of the first token of a wrong trace that is not the right one's; None where all that it
    has is the beginning of the right one.

    Where the right trace is the only right one, this is the first wrong token. Where there are
    several it is no more than where the two part.
    """
    for index, token in enumerate(rejected):
        if index >= len(chosen) or chosen[index] != token:
            return index
    return None


class CollapseError(Exception):
    """The right traces have got less likely under training; says by how much."""


class CollapseAlarm:
    """Tells when the right traces get less likely under the training that is to raise them.

    That is the sign it goes by, for what it leaves out of account: the loss falls in a collapse as
    it does in learning (its second term has no bound), the wrong traces are meant to fall, and the
    norm of the gradient also rises where a model learns something new, and changes with the batch.
    The log-probability of the right traces, in contrast, has one direction in which it may go.

    With m the mean over the last `window` steps, M the highest such mean of `window` steps before
    them, and s^2 the variance between steps, half the mean square of the differences of neighbours,
    which no trend adds to, it fires where

        M - m > max(drop, 6 s sqrt(2 / window))

    and at once where a log-probability is not a number. Six standard errors, since M is the best
    of many. What falls before `2 window` steps are made is seen then.
    """

    def __init__(self, drop: float = 0.1, window: int = 10) -> None:
        """
        Args:
            drop: nats a token.
            window: steps.

        Raises:
            ValueError: drop is not above 0, or the window is below 2.
        """
        if not drop > 0 or window < 2:
            raise ValueError(
                f"the collapse alarm needs a drop above 0 nats a token and a window of 2 steps at"
                f" least, got drop {drop} and window {window}."
            )
        self.drop, self.window = drop, window
        self._recent: list[float] = []
        self._seen, self._squares, self._best = 0, 0.0, -math.inf

    def see(self, chosen_logprob: float) -> str:
        """Take what a step measured; what has happened, in words, or nothing.

        Args:
            chosen_logprob: of the right traces of the step, nats a token.
        """
        if not math.isfinite(chosen_logprob):
            return f"the log-probability of the chosen traces is {chosen_logprob}"
        if self._recent:
            self._squares += (chosen_logprob - self._recent[-1]) ** 2
        self._seen += 1
        self._recent = [*self._recent, chosen_logprob][-2 * self.window :]
        if self._seen < 2 * self.window:
            return ""

        self._best = max(self._best, sum(self._recent[: self.window]) / self.window)
        mean = sum(self._recent[self.window :]) / self.window
        error = math.sqrt(self._squares / (self._seen - 1) / self.window)  # s sqrt(2 / window)
        if self._best - mean <= max(self.drop, 6 * error):
            return ""
        return (
            f"the log-probability of the chosen traces has fallen from {self._best:.3f} to"
            f" {mean:.3f} nats a token (means of {self.window} steps)"
        )
