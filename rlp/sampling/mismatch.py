"""How far log-probabilities of one policy may be apart where a sampler and the trainer compute
them."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far sampler and trainer may be apart where they hold the same weights, in nats, at
    temperature 1."""

    largest: float
    """Of |log rho| over all tokens of a step: above it, an alarm."""
    kl: float
    """Mean of rho - 1 - log rho, about half the mean square of log rho: above it, an alarm."""


MISMATCH = {
    torch.float32: Mismatch(largest=1e-3, kl=1e-6),
    torch.bfloat16: Mismatch(largest=1.0, kl=1e-3),
}
"""What rounding alone stays below, by compute dtype.

float32: log-probabilities of one policy computed in two ways differ by 1e-5 at most on the tested
architectures; a hundred times that is no rounding, and a KL of 1e-6 is that of 1.4e-3 at every
token.

bfloat16 has 8 bits: a hidden state is rounded by up to 2^-9 of its size in each of the operations
on its way, and logits of size 10 to 20 move by some hundredths of a nat. A KL of 1e-3 is that of
0.045 nats rms; a pretrained model of 135 million parameters has 0.027 (3.5e-4). The largest of a
million such errors is about 5 rms, 0.2 nats, and unlikely tokens err more: a factor of e in a
probability is no rounding.

At a temperature T the error of a logit counts 1 / T, and its square in a KL."""

END_KL = 1e-2
"""Mean of rho - 1 - log rho, at temperature 1, above which a run ends in any dtype: 0.14 nats rms
at every token. What is trained then is not the policy that was sampled from."""


MISMATCH_METRICS = ("policy/behavior_mismatch_kl", "policy/behavior_mismatch_max")
"""What `mismatch_of` reads."""


def mismatch_of(
    means: dict[str, float], dtype: torch.dtype, temperature: float
) -> tuple[str, bool] | None:
    """What is wrong with the ratios of a step before its first update, in words, and whether the
    run has to end.

    None where they are those of rounding, or not finite: an update from those is refused with words
    of its own.

    Args:
        temperature: that thoughts are sampled at.
    """
    at_one = MISMATCH[dtype]
    limit = Mismatch(at_one.largest / temperature, at_one.kl / temperature**2)
    kl = means.get("policy/behavior_mismatch_kl", 0.0)
    largest = means.get("policy/behavior_mismatch_max", 0.0)
    if not (math.isfinite(kl) and math.isfinite(largest)):
        return None
    if kl <= limit.kl and largest <= limit.largest:
        return None

    words = (
        "sampler and trainer hold the same weights, and their log-probabilities of thought tokens"
        f" differ by up to {largest:.3g} nats (expected at most {limit.largest:.3g} in"
        f" {str(dtype).removeprefix('torch.')}), with a KL of {kl:.3g} nats a token (at most"
        f" {limit.kl:.3g})"
    )
    return words, kl > END_KL / temperature**2
