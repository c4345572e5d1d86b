"""Algorithm 1 of RLP (arXiv 2510.01265, version 2), one optimizer step: think, predict without
thinking, judge, learn.

What a step works with (`StepParts`) is put together elsewhere; so are placebos, and what is counted
and told on the way.

Dimensions
    M  positions of this rank;  G  thoughts per position;  N = M * G
    L  thought tokens;  H  target tokens
"""

from dataclasses import replace

import torch

from rlp.learn.engine import StepResult
from rlp.objective import group_relative_advantage
from rlp.step.judge import Judge
from rlp.step.loss import loss_of
from rlp.step.micro_batch import MicroBatch, micro_batches
from rlp.step.parts import StepParts
from rlp.step.record import StepRecord
from rlp.step.reward import is_measured, rewards_of


def train_step(run: StepParts, step: StepRecord, judge: Judge) -> StepResult:
    """Lines 5 to 15. A micro-batch holds whole groups, and divisors are those of the whole step, so
    neither micro-batches nor ranks change the gradient."""
    optim, thinks = run.config.optim, run.config.objective.thinks
    batches = [predict(run, step, batch) for batch in think(run, step)]
    step.num_thoughts, step.num_tokens = run.ranks.sum(
        [sum(map(count_thoughts, batches)), sum(map(count_targets, batches))]
    )
    if thinks:
        judge.begin(run, step.number, batches)

    # One forward and backward pass serves thoughts and documents: its seconds are shared out as
    # its FLOPs.
    phases = ("train", "lm") if thinks else ("lm",)
    for update in range(optim.updates_per_rollout):
        for index, batch in enumerate(batches):
            run.pulse.safe_point()
            with run.ledger.time(*phases):
                if thinks:
                    learn(run, step, judge, index, batch, first=update == 0)
                else:
                    learn_text(run, step, batch)
        with run.ledger.time(*phases):
            if thinks and update == 0:
                step.compare_sampler(run.ranks)
            result = run.update(step)  # theta and phi, or neither
    return result


def think(run: StepParts, step: StepRecord) -> list[MicroBatch]:
    """Read documents, choose positions, and sample a group of thoughts at each."""
    size = run.config.optim.micro_batch_size
    step.documents = documents = run.next_documents()  # x_0 .. x_T
    if not run.config.objective.thinks:
        return micro_batches(documents, None, None, size)
    positions = run.choose_positions(step.number, documents)  # t  [M]
    thoughts = run.sample_thoughts(step.number, documents, positions)  # c  [M, G, L]  eq. 2
    step.see_thoughts(documents, positions, thoughts, run.scripts)
    return micro_batches(documents, positions, thoughts, size)


def predict(run: StepParts, step: StepRecord, batch: MicroBatch) -> MicroBatch:
    """The no-think prediction of the targets, on steps that score it."""
    scored = (step.number - 1) % run.config.baseline.every_n_steps == 0
    if batch.thoughts is None or not scored:
        return batch
    return replace(batch, baseline_logprob=run.no_think_logprob(batch))  # S_ema  [M]  eq. 4


def learn(
    run: StepParts,
    step: StepRecord,
    judge: Judge,
    index: int,
    batch: MicroBatch,
    *,
    first: bool,
) -> None:
    """Add the gradient of a micro-batch: one forward and one backward, or one for each slice of its
    groups.

    Args:
        index: of the micro-batch in the step.
        first: whether this is the first update with the thoughts; what they are worth is told then.
    """
    reward, evidence = judge.ahead(index), []
    for part in batch.slices(run.config.optim.thoughts_per_forward):
        layout, scores = run.forward(part, matched=reward is None)
        reasoned_logprob, matched = run.evidence(part, scores, "train")  # S_pred  [M, G]  eq. 3
        evidence.append(reasoned_logprob.detach())
        if reward is None:
            whole = batch.evidence(reasoned_logprob.detach(), matched)
            reward = rewards_of(run.reward, whole)  # r  [M, G]  eq. 5
        fed = judge.fed(index, reward)
        advantage = group_relative_advantage(fed)  # A  [M, G]  eq. 7
        scored = run.scored(step, part, layout, scores, reasoned_logprob, advantage[:, part.group])
        step.see_pass(scored, scores.open_marker, part.thoughts, first=first)
        run.engine.backward(loss_of(run.loss, scored))  # eq. 8

    if first:
        whole = batch.evidence(torch.cat(evidence, dim=1), None)
        step.see_rewards(whole, fed, advantage, measured=is_measured(run.reward, whole))


def learn_text(run: StepParts, step: StepRecord, batch: MicroBatch) -> None:
    """Add the gradient of documents alone (continued pretraining)."""
    layout, scores = run.forward(batch)
    scored = run.scored(step, batch, layout, scores)
    step.see_pass(scored, scores.open_marker, None, first=True)
    run.engine.backward(loss_of(run.loss, scored))


def count_thoughts(batch: MicroBatch) -> int:
    """N of a micro-batch."""
    return batch.thoughts.truncated.numel() if batch.thoughts is not None else 0


def count_targets(batch: MicroBatch) -> int:
    """Predicted tokens of the documents of a micro-batch."""
    return sum(len(document.tokens) - 1 for document in batch.documents)
