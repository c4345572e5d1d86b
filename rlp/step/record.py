"""One optimizer step while it is made: its number, its learning rate, and what is seen of it.

Dimensions
    M  positions;  G  thoughts per position;  N  thoughts of a pass;  L  thought tokens
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from einops import rearrange
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.measure.journal import Journal
from rlp.measure.thought_language import Languages, watch_language
from rlp.measure.thought_statistics import (
    TokenScripts,
    thought_lengths,
    watch_gains,
    watch_ratio,
    watch_rewards,
    watch_thoughts,
)
from rlp.measure.top_thoughts import TopThoughts
from rlp.model.thoughts import Thoughts
from rlp.objective import information_gain, kl_to_start
from rlp.process.ranks import Ranks
from rlp.process.tally import Tally
from rlp.sampling.mismatch import MISMATCH_METRICS
from rlp.step.loss import Scored
from rlp.step.reward import Evidence


@dataclass(slots=True)
class StepRecord:
    """What is known of a step before it is made, and what is seen while it is."""

    number: int
    """1 for the first."""
    learning_rate: float
    say: Callable[[str], None]
    """Tells a line about this step."""
    journal: Journal
    close_tokens: int
    """Of the close marker, which counts to no thought's length."""
    max_thought_tokens: int
    language_weight: float = 0.0
    """Of the share of a script, in the reward (`reward.language_weight`)."""
    on_ratios: Callable[[dict[str, float]], None] = lambda means: None
    """Is told `MISMATCH_METRICS` of all ranks before the first update, and ends the run where
    sampler and trainer are two policies."""
    told: TopThoughts | None = None
    """Collects thoughts, on steps that tell some."""
    tally: Tally = field(default_factory=Tally)
    """Everything that is measured, to be reduced over ranks."""
    documents: list[Document] = field(default_factory=list)
    """This rank's."""
    num_thoughts: float = 0.0
    """Of all ranks: what sums over thoughts are divided by."""
    num_tokens: float = 0.0
    """Predicted tokens of the documents of all ranks, likewise."""

    def see_thoughts(
        self,
        documents: list[Document],
        positions: Positions,
        thoughts: Thoughts,
        scripts: TokenScripts,
    ) -> None:
        """What was sampled."""
        self.journal.add_thoughts(positions, thoughts)
        watch_thoughts(
            self.tally,
            documents,
            positions,
            thoughts,
            scripts,
            close_tokens=self.close_tokens,
            max_thought_tokens=self.max_thought_tokens,
        )

    def see_language(self, found: Languages) -> None:
        """In which scripts it is written."""
        watch_language(self.tally, found)

    def see_pass(
        self, scored: Scored, open_marker: Tensor, thoughts: Thoughts | None, *, first: bool
    ) -> None:
        """What a pass with gradient has scored.

        Args:
            open_marker: [M] log-probability of the open marker where a thought may start; empty in
                a pass without documents.
            first: whether no update was made with these thoughts yet.
        """
        weights = scored.weights
        if thoughts is not None:
            if weights.kl_weight > 0 and scored.start_logprob is not None:
                kl = kl_to_start(scored.thought_logprob.detach(), scored.start_logprob, scored.mask)
                self.tally.add("kl/start", kl)
            watch_ratio(
                self.tally,
                scored.thought_logprob,
                scored.behavior_logprob,
                scored.mask,
                weights.clip_low,
                weights.clip_high,
                first=first,
            )
        if scored.document_logprob.numel():
            self.tally.add("lm/loss", -scored.document_logprob, scored.document_mask)
            if open_marker.numel():
                self.tally.add("policy/open_marker_mass", open_marker.exp())

    def compare_sampler(self, ranks: Ranks) -> None:
        """Tell how far sampler and trainer are apart, before the first update with the thoughts.

        The passes with gradient have scored every thought of the step with the weights that sampled
        it: nothing is scored again for this. A collective.
        """
        self.on_ratios(self.tally.reduce(ranks, MISMATCH_METRICS))

    def see_rewards(
        self,
        evidence: Evidence,
        thoughts: Thoughts,
        reward: Tensor,
        advantage: Tensor,
        *,
        measured: bool,
    ) -> None:
        """What the thoughts of a micro-batch were worth.

        Args:
            thoughts: those of the evidence, on the host.
            reward: [M, G] that eq. 7 is fed.
            measured: whether its values mean something by themselves (`is_measured`).
        """
        tally, reasoned_logprob = self.tally, evidence.reasoned_logprob
        tally.add("policy/reasoned_logprob", reasoned_logprob)
        lengths = thought_lengths(evidence.thoughts, self.close_tokens)
        watch_rewards(tally, reward, lengths, measured=measured)
        values = {"reasoned_logprob": reasoned_logprob, "advantage": advantage}
        if measured:
            values["reward"] = reward
        if evidence.baseline_logprob is not None:
            gain = information_gain(reasoned_logprob, evidence.baseline_logprob)
            tally.add("baseline/logprob", evidence.baseline_logprob)
            watch_gains(tally, gain)
            values["baseline_logprob"] = evidence.baseline_logprob[:, None].expand_as(gain)
            values["gain"] = gain
        if evidence.script_share is not None:
            tally.add("reward/language", self.language_weight * evidence.script_share)
            values["script_share"] = evidence.script_share
        if self.told is not None:
            self.told.offer(
                evidence.documents,
                evidence.positions,
                thoughts,
                values,
                self.close_tokens,
            )


def rows(per_thought: Tensor) -> Tensor:
    """[M, G] -> [N], or [M, G, L] -> [N, L]: one row per thought, position by position."""
    return rearrange(per_thought, "m g ... -> (m g) ...")
