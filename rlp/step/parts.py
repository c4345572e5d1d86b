"""The parts that a step works with, put together once and whole, and passes made with them.

Dimensions
    B  documents of this rank;  M  positions;  G  thoughts per position;  N = M * G
    L  thought tokens, those of a prediction included;  H  target tokens
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.config import Config
from rlp.data.batches import Batches
from rlp.data.documents import Document
from rlp.data.positions import Positions, choose_positions
from rlp.learn.engine import Engine, StepResult
from rlp.learn.guard import Guard
from rlp.learn.teacher import Teacher
from rlp.measure.ledger import Ledger
from rlp.measure.thought_language import ThoughtLanguage
from rlp.measure.thought_statistics import TokenScripts
from rlp.model.layout import DOCUMENT, THOUGHT, Layout
from rlp.model.policy import Policy
from rlp.model.scoring import Scores, by_document, difficulty, score
from rlp.model.setup import RunSetup
from rlp.model.shapes import Work
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.objective import log_evidence
from rlp.process.outside import Part
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import NoiseKey
from rlp.sampling.sampler import Sampler
from rlp.step.baseline import NoThink, baseline_of
from rlp.step.loss import Scored
from rlp.step.micro_batch import MicroBatch
from rlp.step.packing import Cutter
from rlp.step.pulse import Pulse
from rlp.step.record import StepRecord, rows
from rlp.step.reward import Evidence, rewards_of


@dataclass(frozen=True, slots=True)
class StepParts:
    """Everything that Algorithm 1 is given."""

    config: Config
    ranks: Ranks
    setup: RunSetup
    thought_format: ThoughtFormat
    """Of this run's steps: with a prediction after each thought where the reward needs one."""
    batches: Batches
    engine: Engine
    teacher: Teacher
    start: Policy | None
    """The starting checkpoint, where something needs it."""
    guard: Guard
    ledger: Ledger
    pulse: Pulse
    cut: Cutter
    """What is run together."""
    lay_out: Callable[..., Layout]
    """Of `rlp.model.layout.LAYOUTS`."""
    sampler: Sampler
    scripts: TokenScripts | None
    language: ThoughtLanguage | None
    """None in a run that does not think, as `scripts`."""
    selector: Part
    baseline: Part
    reward: Part
    loss: Part

    # What a step reads and samples

    def next_documents(self) -> list[Document]:
        """This rank's share of the next batch."""
        documents = self.batches.next_share()
        self.ledger.add_documents(sum(len(document.tokens) for document in documents))
        return documents

    def choose_positions(self, step: int, documents: list[Document]) -> Positions:
        """[M] the positions of a step."""
        statistics = {name: self._difficulty(documents, name) for name in self.selector.needs}
        return choose_positions(
            documents,
            self.setup.candidates,
            self.config.position,
            horizon=self.config.target.horizon,
            seed=self.config.run.seed,
            step=step,
            selector=self.selector,
            statistics=statistics,
        )

    def _difficulty(self, documents: list[Document], statistic: str) -> list[np.ndarray]:
        whole = [replace(document, loss_mask=None) for document in documents]
        scores, scored = [], []
        with self.ledger.time("score"):
            for some in self.cut.documents(MicroBatch(whole), lm=True, no_think=False):
                layout = self._rows_of(some, lm=True, no_think=False)
                scores.append(difficulty(self.engine.policy, layout, statistic))
                scored += some.documents
                self.count("score", layout.document_work, passes=1)
            found = by_document(torch.cat(scores), [len(document.tokens) for document in scored])
        of_document = dict(zip(map(id, scored), found))
        return [of_document[id(document)] for document in whole]

    def sample_thoughts(
        self, step: int, documents: list[Document], positions: Positions
    ) -> Thoughts:
        """[M, G, L] a group of thoughts at each position, from the policy (eq. 2)."""
        thought = self.config.thought
        with self.ledger.time("decode"), self.sampler.phase():
            rollout = self.sampler.sample(
                documents,
                positions,
                self.thought_format,
                NoiseKey(self.config.run.seed, step),
                group_size=thought.group_size,
                max_thought_tokens=thought.max_thought_tokens,
                beat=self.pulse.beat,
                prefill=lambda: self.ledger.time("prefill"),
            )
        most = thought.max_thought_tokens + self.thought_format.predicted
        self.ledger.add_rollout(rollout, max_thought_tokens=most)
        return rollout.thoughts

    # Passes

    def no_think_logprob(self, batch: MicroBatch) -> Tensor:
        """[M] log-evidence of the targets without a thought, under the baseline (eq. 4)."""
        layout = self._rows_of(batch, lm=False, no_think=True, thoughts=False)
        scored = {}
        with self.ledger.time("teacher"):
            for statistic in self.baseline.needs:
                scored[statistic] = self.teacher.logprob(statistic, layout)
                self.count("teacher", layout.document_work, passes=1)
        no_think = NoThink(batch.documents, batch.positions, **scored)
        return baseline_of(self.baseline, no_think, self.ranks.device)

    def forward(self, batch: MicroBatch, *, matched: bool = False) -> tuple[Layout, Scores]:
        """One pass of the policy, with gradient: over the thoughts, and in the first slice over the
        documents too, where the loss has a weight for them.

        Args:
            matched: ask whether the targets are the most probable tokens, if the reward needs it.
        """
        lm = batch.is_first_slice and self.config.objective.lm_weight > 0
        layout = self._rows_of(batch, lm=lm, no_think=lm and batch.thoughts is not None)
        trained = layout.sizes[THOUGHT]
        self.count("train", layout.thought_work, passes=3, tokens_trained=trained)
        trained = layout.sizes[DOCUMENT]
        self.count("lm", layout.document_work, passes=3, tokens_trained=trained)
        return layout, score(self.engine, layout, matched=matched and self.asks_for_matches)

    def evidence(
        self, batch: MicroBatch, scores: Scores, phase: str
    ) -> tuple[Tensor, Tensor | None]:
        """[M, G] S_pred (eq. 3), and [M, G] whether the targets are the most probable tokens, where
        the pass was asked for it, which costs `phase` the head once more."""
        group_size = batch.thoughts.tokens.shape[1]
        reasoned_logprob = rearrange(log_evidence(scores.target), "(m g) -> m g", g=group_size)
        if scores.matched is None:
            return reasoned_logprob, None
        self.count(phase, Work(head_rows=scores.target.numel()), passes=1)
        return reasoned_logprob, rearrange(scores.matched, "(m g) -> m g", g=group_size)

    @torch.no_grad()
    def evidence_ahead(self, batch: MicroBatch) -> Evidence:
        """The evidence about whole groups, scored without gradient and by itself."""
        reasoned_logprob, matched = [], []
        with self.ledger.time("score"):
            for part in batch.slices():
                layout = self._rows_of(part, lm=False, no_think=False)
                self.count("score", layout.thought_work, passes=1)
                scores = score(self.engine.policy, layout, matched=self.asks_for_matches)
                of_part = self.evidence(part, scores, "score")
                reasoned_logprob.append(of_part[0])
                matched.append(of_part[1])

        known = torch.cat(matched, dim=1) if self.asks_for_matches else None
        return self.known_of(batch, torch.cat(reasoned_logprob, dim=1), known)

    def known_of(
        self, batch: MicroBatch, reasoned_logprob: Tensor, matched: Tensor | None
    ) -> Evidence:
        """What a reward is given about the thoughts of a micro-batch.

        Args:
            reasoned_logprob, matched: [M, G], of whole groups.
        """
        evidence = batch.evidence(reasoned_logprob, matched)
        if self.config.reward.language_weight == 0:
            return evidence
        share = self.language.of(batch.on_host()).share.to(reasoned_logprob)
        return replace(evidence, script_share=share)

    def rewards(self, evidence: Evidence) -> Tensor:
        """[M, G] float32 rewards of whole groups (eq. 5 or another)."""
        return rewards_of(self.reward, evidence, self.config.reward.language_weight)

    def rewards_ahead(self, batch: MicroBatch) -> Tensor:
        """[M, G] rewards of a micro-batch before the pass with gradient."""
        return self.rewards(self.evidence_ahead(batch))

    @property
    def panel_teacher(self) -> Policy | None:
        """The network whose no-think prediction is the baseline; None where it is none, or a part
        from outside makes it of something else."""
        if self.baseline.is_outside or not self.teacher.networks:
            return None
        return next(iter(self.teacher.networks.values()))

    @property
    def asks_for_matches(self) -> bool:
        """Whether the reward needs to know that the targets are the most probable tokens."""
        return "matched" in self.reward.needs

    def scored(
        self,
        step: StepRecord,
        batch: MicroBatch,
        layout: Layout,
        scores: Scores,
        behavior_logprob: Tensor | None = None,
        reasoned_logprob: Tensor | None = None,
        advantage: Tensor | None = None,
    ) -> Scored:
        """What the loss is given of a pass.

        Args:
            behavior_logprob: [N, L] of the sampled tokens in this pass; None without thoughts.
            reasoned_logprob, advantage: [M, G] of the thoughts in this pass; None without thoughts.
        """
        if batch.thoughts is None:  # N is 0
            behavior_logprob = scores.thought
            advantage = reasoned_logprob = scores.thought.sum(dim=1)
        else:
            advantage, reasoned_logprob = rows(advantage), rows(reasoned_logprob)

        needs_start = batch.thoughts is not None and "start_logprob" in self.loss.needs
        return Scored(
            thought_logprob=scores.thought,
            behavior_logprob=behavior_logprob,
            mask=layout.thought_mask,
            advantage=advantage,
            reasoned_logprob=reasoned_logprob,
            start_logprob=self._start_logprob(layout) if needs_start else None,
            document_logprob=scores.document,
            document_mask=layout.document_mask,
            num_thoughts=step.num_thoughts,
            num_tokens=step.num_tokens,
            weights=self.config.objective,
            ratio_cap=(
                self.config.objective.ratio_cap if self.config.sampling.engine == "vllm" else None
            ),
        )

    @torch.no_grad()
    def _start_logprob(self, layout: Layout) -> Tensor:
        """[N, L] log-probabilities of the sampled tokens under the starting checkpoint."""
        self.count("teacher", layout.thought_work + layout.document_work, passes=1)
        with self.ledger.time("teacher"):
            return score(self.start, layout).thought

    def _rows_of(
        self, batch: MicroBatch, *, lm: bool, no_think: bool, thoughts: bool = True
    ) -> Layout:
        return self.lay_out(
            batch.documents,
            batch.positions,
            batch.on_host() if thoughts and batch.thoughts is not None else None,
            self.thought_format,
            lm=lm,
            no_think=no_think,
            device=self.ranks.device,
        )

    # The update

    def update(self, step: StepRecord) -> StepResult:
        """Make the update from the gradient that the engine holds, unless it is refused (`Guard`):
        theta and phi, or neither."""
        self.pulse.weights_move()
        result = self.guard.update(
            self.engine, step.learning_rate, step.tally, step.documents, step.say
        )
        self.teacher.refresh()
        return result

    def count(self, phase: str, work: Work, *, passes: int, tokens_trained: int = 0) -> None:
        """Count a pass over given tokens; `tokens_trained` of them have a gradient through their
        log-probability."""
        self.ledger.add(
            phase, work, passes=passes, tokens_in=work.tokens, tokens_trained=tokens_trained
        )
