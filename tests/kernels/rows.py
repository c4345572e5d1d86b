"""Random rows, their log-probabilities and gradients, and how far rounding may take them."""

import torch

from tests.kernels.rounding import token_logprob_bounds

NONE = -1

# Ten rows, 23 words: one word or row at a time, sizes that divide neither, and one tile for
# everything.
TILES = [(1, 1), (4, 5), (64, 64)]
# 0 is no soft cap; 1.5 is low enough that most logits are well inside the bend of tanh.
SOFTCAPS = [0.0, 1.5]


def make_inputs(num_rows=10, vocabulary=23, width=6, dtype=torch.float64, seed=0):
    """Random rows at temperatures 0.5 to 2; every other row excludes a token that is not its
    target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    target = torch.randint(vocabulary, (num_rows,), generator=generator)
    excluded = (
        target + torch.randint(1, vocabulary, (num_rows,), generator=generator)
    ) % vocabulary
    excluded[::2] = NONE
    inverse_temperature = torch.linspace(0.5, 2.0, num_rows)
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return hidden, head, target, {"inverse_temperature": inverse_temperature, "excluded": excluded}


def value_and_grads(function, hidden, head, target, **settings):
    """Log-probabilities and the gradients of a fixed weighting of them, in hidden and head."""
    logprob = function(hidden, head, target, **settings)
    weights = torch.linspace(-1.0, 1.0, len(logprob)).to(logprob.dtype)
    return logprob.detach(), *torch.autograd.grad((logprob * weights).sum(), (hidden, head))


def bounds_of(hidden, head, target, rows, softcap=0.0):
    """What rounding can do to the results of `value_and_grads`."""
    return token_logprob_bounds(
        hidden, head, target, torch.linspace(-1.0, 1.0, len(target)), **rows, softcap=softcap
    )


def rows_of(num_rows, inverse_temperature=1.0, excluded=NONE):
    """The same temperature and excluded token in every row."""
    return {
        "inverse_temperature": torch.full((num_rows,), inverse_temperature),
        "excluded": torch.full((num_rows,), excluded),
    }
