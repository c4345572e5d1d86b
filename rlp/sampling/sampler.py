"""What every sampler of thoughts is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.rollout import NoiseKey, Rollout


class Sampler(Protocol):
    """Thoughts from one policy. Built once (`open_sampler`) for a run, a probe, a splice or an
    evaluation, which all sample through it.

    What is drawn
        Each token of a thought from the whole distribution of the policy at
        `thought_format.temperature` after prefix, open marker and the thought so far: no top-p, no
        top-k. A thought ends with its close marker, which is kept, or at its budget
        (`Thoughts.truncated`). It has at least one token.
        Where the format predicts (`ThoughtFormat.predicts`), a prediction follows: after the close
        marker, sampled or forced, tokens from the same distribution without the open marker, as far
        as the end-of-sequence token or `horizon` of them. The thoughts are the same either way.
    What log-probabilities mean
        `Thoughts.behavior_logprob` is that of the distribution that the token was drawn from, as
        the sampler computed it. Where the sampler is not the trainer's own code, the ratio of eq. 8
        corrects what the two disagree on.
    What may be missing
        `Thoughts.entropy`, where a sampler does not see the whole distribution.
    The key
        A thought depends on the weights and on (seed, purpose, step, document and its occurrence in
        the step, position, number of the thought, number of the token): not on the rank, on what is
        sampled beside it, on the order, or on a resume. Two samplers draw other thoughts from the
        same key.
    Collectives
        Entering and leaving `phase`; and `sample`, where forwards of the policy are (ZeRO stage 3
        with `engine.generation: synced`): then every rank calls it, also one without positions.
    A stop
        A sampler is built with a function that it calls whenever the host looks at what was
        sampled; it leaves `phase` by an exception where the run is to stop. Thoughts of that call
        are given up, and memory goes back.
    """

    def phase(self) -> AbstractContextManager[None]:
        """Around calls of `sample`: the weights are those that the policy has on entering, and the
        memory that sampling took goes back to training on leaving."""
        ...

    def sample(
        self,
        documents: list[Document],
        positions: Positions,
        thought_format: ThoughtFormat,
        noise: NoiseKey,
        *,
        group_size: int,
        max_thought_tokens: int,
        beat: Callable[[], None] = lambda: None,
        prefill: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Rollout:
        """G thoughts at each position, within `phase`.

        Args:
            group_size: G.
            max_thought_tokens: budget of a thought, the close marker included.
            beat: called whenever the host looks at what was sampled, to tell that it goes on.
            prefill: makes what is entered while prefixes are run, to tell their time from that of
                decoding.
        """
        ...
