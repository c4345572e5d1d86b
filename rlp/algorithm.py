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
from rlp.step.micro_batch import MicroBatch, in_order
from rlp.step.parts import StepParts
from rlp.step.record import StepRecord
from rlp.step.reward import is_measured


def train_step(run: StepParts, step: StepRecord, judge: Judge) -> StepResult:
    """Lines 5 to 15. A micro-batch holds whole groups, and divisors are those of the whole step, so
    neither micro-batches nor ranks change the gradient."""
    thinks = run.config.objective.thinks
    whole = predict(run, step, judge.given(run, step.number, think(run, step)))
    step.num_thoughts, step.num_tokens = run.ranks.sum(
        [count_thoughts(whole), count_targets(whole)]
    )
    batches = run.cut.update(whole)

    for update in range(run.config.optim.updates_per_rollout):
        first = update == 0
        with run.pulse.may_be_left():
            if first and thinks:
                judge.begin(run, step.number, whole, batches)
            run.engine.begin_update(sum(len(batch.slices()) for batch in batches))
            for index, batch in enumerate(batches[:-1]):
                learn(run, step, judge, index, batch, first=first)
                run.pulse.between_passes(run.engine.backward_is_collective)
        learn(run, step, judge, len(batches) - 1, batches[-1], first=first)
        with run.ledger.time(*phases_of(run)):
            if first and thinks:
                step.compare_sampler(run.ranks)
            result = run.update(step)  # theta and phi, or neither
    return result


def phases_of(run: StepParts) -> tuple[str, ...]:
    """One forward and backward pass serves thoughts and documents: its seconds are shared out as
    its FLOPs."""
    return ("train", "lm") if run.config.objective.thinks else ("lm",)


def think(run: StepParts, step: StepRecord) -> MicroBatch:
    """Read documents, choose positions, and sample a group of thoughts at each: the whole step."""
    step.documents = documents = run.next_documents()  # x_0 .. x_T
    if not run.config.objective.thinks:
        return MicroBatch(documents)
    positions = run.choose_positions(step.number, documents)  # t  [M]
    thoughts = run.sample_thoughts(step.number, documents, positions)  # c  [M, G, L]  eq. 2
    step.see_thoughts(documents, positions, thoughts, run.scripts)
    host = thoughts.to("cpu")
    step.see_language(run.language.of(host))
    return MicroBatch(documents, positions, thoughts, host=host)


def predict(run: StepParts, step: StepRecord, whole: MicroBatch) -> MicroBatch:
    """The no-think prediction of the targets, on steps that score it."""
    scored = (step.number - 1) % run.config.baseline.every_n_steps == 0
    if whole.thoughts is None or not scored:
        return whole
    batches = run.cut.documents(whole, lm=False, no_think=True)
    logprob = in_order(batches, [run.no_think_logprob(batch) for batch in batches])
    return replace(whole, baseline_logprob=logprob)  # S_ema  [M]  eq. 4


def learn(
    run: StepParts,
    step: StepRecord,
    judge: Judge,
    index: int,
    batch: MicroBatch,
    *,
    first: bool,
) -> None:
    """Add the gradient of a micro-batch.

    Args:
        index: of the micro-batch in the step.
        first: whether this is the first update with the thoughts; what they are worth is told then.
    """
    with run.ledger.time(*phases_of(run)):
        if batch.thoughts is None:
            learn_text(run, step, batch)
        else:
            learn_thoughts(run, step, judge, index, batch, first=first)


def learn_thoughts(
    run: StepParts,
    step: StepRecord,
    judge: Judge,
    index: int,
    batch: MicroBatch,
    *,
    first: bool,
) -> None:
    """`learn`: one forward and one backward, or one for each slice of its groups."""
    reward, evidence = judge.ahead(index), []
    for part in batch.slices():
        layout, scores = run.forward(part, matched=reward is None)
        reasoned_logprob, matched = run.evidence(part, scores, "train")  # S_pred  [M, G]  eq. 3
        evidence.append(reasoned_logprob.detach())
        if reward is None:
            whole = run.known_of(batch, reasoned_logprob.detach(), matched)
            reward = run.rewards(whole)  # r  [M, G]  eq. 5
        fed = judge.fed(index, reward)
        advantage = group_relative_advantage(fed)  # A  [M, G]  eq. 7
        behavior = judge.behavior(index, part, scores.thought)
        scored = run.scored(
            step, part, layout, scores, behavior, reasoned_logprob, advantage[:, part.group]
        )
        step.see_pass(scored, scores.open_marker, part.thoughts, first=first)
        run.engine.backward(loss_of(run.loss, scored))  # eq. 8

    if first:
        whole = run.known_of(batch, torch.cat(evidence, dim=1), None)
        measured = is_measured(run.reward, whole)
        step.see_rewards(whole, batch.on_host(), fed, advantage, measured=measured)


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
    """Tokens of the documents of a micro-batch that the LM loss is taken on."""
    return sum(int(document.predicted.sum()) for document in batch.documents)
