"""RLP, from config to exported model (arXiv 2510.01265, version 2, Algorithm 1).

    deepspeed train.py configs/quickstart.yaml [section.key=value ...]
    python train.py configs/quickstart.yaml --dry-run

Each step: think (sample G thoughts before a token of ordinary text), score (how probable was the
token that came next, with the thought and without), compare (each thought with its siblings), learn
(raise the probability of the thoughts that helped, and of the text itself).

Dimensions
    B  documents of a step, all ranks;  M  positions on this rank;  G  thoughts per position;  N = M
       * G
    L  thought tokens;  H  target tokens
"""

if __name__ == "__main__":
    from rlp.process.launcher import watch_from_the_start

    watch_from_the_start()  # the imports below take seconds

import argparse
import sys
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from rlp.config import Config, ConfigError, load_config
from rlp.data.documents import Document
from rlp.data.errors import DataError
from rlp.data.positions import Positions
from rlp.learn.checkpoint import CheckpointError
from rlp.learn.guard import NumericsError
from rlp.measure.thought_statistics import (
    thought_lengths,
    watch_gains,
    watch_ratio,
    watch_rewards,
    watch_thoughts,
)
from rlp.model.layout import Layout
from rlp.model.scoring import Scores, score
from rlp.model.shapes import Work
from rlp.model.thoughts import Thoughts
from rlp.objective import (
    clipped_surrogate,
    greedy_match,
    group_relative_advantage,
    information_gain,
    kl_to_start,
    log_evidence,
)
from rlp.process.command import run_as_process
from rlp.process.console import visible_text
from rlp.process.files import FolderLostError, NotWrittenError
from rlp.process.json_files import DamagedFileError
from rlp.process.launcher import LAUNCHER_GONE, LauncherGone, launchers
from rlp.process.lock import RunLock
from rlp.process.preemption import Preemption, StopRequested
from rlp.process.ranks import PeerLost, Ranks, start_ranks, stop_ranks
from rlp.process.tally import Tally
from rlp.process.watchdog import Watchdog
from rlp.sampling.rollout import NoiseKey, sample_thoughts
from rlp.trainer import Run, dry_run

(
    DONE,
    BAD_CONFIG,
    BAD_DATA,
    BAD_NUMERICS,
    NOT_MATCHED,
    PEER_LOST,
    FOLDER_LOST,
    NOT_WRITTEN,
    PREEMPTED,
) = (0, 2, 3, 4, 5, 69, 73, 74, 75)


def train(config: Config, ranks: Ranks) -> int:
    """Run to the end of the budget; returns the exit code."""
    with (
        Watchdog(ranks, config.run) as watchdog,
        Preemption(ranks, config.checkpoint.save_by) as preemption,
        RunLock(ranks) as lock,
    ):
        preemption.on_poll = lock.beat
        run = Run(config, ranks, preemption, watchdog, lock)
        if run.is_complete():
            run.owe_report()
            run.log.say(
                f"{run.folder.path} is complete: nothing to do. To go on from it, write"
                f" run.dir=OTHER run.resume={run.folder.checkpoints}/step_{run.step} and a larger"
                " budget."
            )
            return DONE
        try:
            return loop(run)
        except StopRequested as asked:
            return PREEMPTED if run.stop(asked) else NOT_WRITTEN
        except BaseException:
            run.discard()
            raise


def loop(run: Run) -> int:
    """Evaluate, take steps until the budget is spent, evaluate again, export."""
    config = run.config
    if run.owes_evaluation():
        run.evaluate()
    while not run.is_spent():
        run.safe_point()
        run.begin_step()
        train_step(run)
        if run.due(config.evaluation.every_n_steps) and not run.is_spent():
            run.evaluate()
        if run.due(config.checkpoint.every_n_steps) or run.is_spent():
            run.save()
    return DONE if run.finish(run.evaluate()) else NOT_MATCHED


def train_step(run: Run) -> None:
    """Algorithm 1, lines 5 to 15. A micro-batch holds whole groups; divisors are those of the whole
    step."""
    config, tally = run.config, Tally()
    documents = run.next_documents()  # x_0 .. x_T
    positions, thoughts = think(run, documents, tally) if config.objective.thinks else (None, None)
    divisors = run.ranks.sum(
        [
            thoughts.truncated.numel() if thoughts else 0,
            sum(len(document.tokens) - 1 for document in documents),
        ]
    )
    batches = [
        compare(run, documents, positions, thoughts, start)
        for start in range(0, len(documents), config.optim.micro_batch_size)
    ]
    rewards, before = controls(run, batches, thoughts)

    # One forward and backward pass serves thoughts and documents: its seconds are shared out as its
    # FLOPs.
    phases = ("train", "lm") if config.objective.thinks else ("lm",)
    for update in range(config.optim.updates_per_rollout):
        given = before
        for index, batch in enumerate(batches):
            run.safe_point()
            with run.ledger.time(*phases):
                rewards[index] = learn(
                    run, batch, rewards[index], given, divisors, tally, first=update == 0
                )
            given = None if before is None else rewards[index][-1:]
        with run.ledger.time(*phases):
            result = run.update(tally, documents)  # theta and phi, or neither
    run.end_step(tally, result, documents)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some documents of a step with everything that belongs to them."""

    documents: list[Document]
    positions: Positions | None
    """[M]; None where the run does not think."""
    thoughts: Thoughts | None
    """[M, G, L]."""
    baseline_logprob: Tensor | None
    """[M] S_ema; None on a step that does not score it."""

    def siblings(self, group: slice) -> "MicroBatch":
        """The same with some thoughts of each group only."""
        return replace(self, thoughts=self.thoughts.siblings(group))

    def last_position(self) -> "MicroBatch":
        """Its last position alone, in its document."""
        positions = self.positions.of_documents(len(self.documents) - 1, len(self.documents))
        baseline_logprob = None if self.baseline_logprob is None else self.baseline_logprob[-1:]
        return MicroBatch(
            self.documents[-1:], positions.last(), self.thoughts[-1:], baseline_logprob
        )


def think(run: Run, documents: list[Document], tally: Tally) -> tuple[Positions, Thoughts]:
    """Choose positions and sample a group of thoughts at each."""
    config = run.config.thought
    positions = run.choose_positions(documents)  # t        [M]
    with run.ledger.time("decode"), run.engine.generation():
        rollout = sample_thoughts(  # c ~ pi_theta(. | x_<t)   [M, G, L]   eq. 2
            run.engine.policy,
            documents,
            positions,
            run.setup.thought_format,
            NoiseKey(run.config.run.seed, run.step),
            group_size=config.group_size,
            max_thought_tokens=config.max_thought_tokens,
            rows=config.sampling_rows,
            shared=run.shares_prefixes,
            agree=run.agree,
            prefill=lambda: run.ledger.time("prefill"),
        )
    run.count_rollout(rollout)
    run.journal.add_thoughts(positions, rollout.thoughts)
    watch_thoughts(
        tally,
        documents,
        positions,
        rollout.thoughts,
        run.scripts,
        close_tokens=len(run.setup.markers.close),
        max_thought_tokens=config.max_thought_tokens,
    )
    return positions, rollout.thoughts


def compare(
    run: Run,
    documents: list[Document],
    positions: Positions | None,
    thoughts: Thoughts | None,
    start: int,
) -> MicroBatch:
    """The micro-batch that begins at a document, with the no-think prediction of its targets."""
    stop = min(start + run.config.optim.micro_batch_size, len(documents))
    documents = documents[start:stop]
    if thoughts is None:
        return MicroBatch(documents, None, None, None)
    thoughts, positions = (
        thoughts[positions.slice_of_documents(start, stop)],
        positions.of_documents(start, stop),
    )
    if not run.scores_baseline():
        return MicroBatch(documents, positions, thoughts, None)
    layout = run.lay_out(
        documents,
        positions,
        None,
        run.setup.thought_format,
        lm=False,
        no_think=True,
        device=run.ranks.device,
    )
    with run.ledger.time("teacher"):
        baseline_logprob = run.teacher.baseline_logprob(
            layout, len(positions.position)
        )  # S_ema    [M]      eq. 4
    run.count("teacher", layout.document_work if run.teacher.model else Work(), passes=1)
    return MicroBatch(documents, positions, thoughts, baseline_logprob)


def learn(
    run: Run,
    batch: MicroBatch,
    reward: Tensor | None,
    before: Tensor | None,
    divisors: list[float],
    tally: Tally,
    *,
    first: bool,
) -> Tensor | None:
    """Add the gradient of a micro-batch: one forward and one backward, or one for each slice of its
    groups.

    A group in slices is scored once more, without gradient and before: each thought is compared
    with all its siblings.

    Args:
        reward: [M, G], where it is known: after the first update with the same thoughts, or of a
            control.
        before: [1, G], reward of the position before the first one, where every position is given
            that of the position before it (`reward.placebo: shuffled_reward`).
        first: whether this is the first update with the thoughts; what they are worth is told then.

    Returns:
        the reward.
    """
    lm = run.config.objective.lm_weight > 0
    if batch.thoughts is None:
        layout, scores = forward(run, batch, lm=lm)
        run.engine.backward(text_loss(run, layout, scores, divisors, tally))
        return None

    slices = group_slices(run, batch)
    if reward is None and len(slices) > 1:
        reward = rewards_of(run, batch, *score_ahead(run, batch))
    reasoned = []
    for group in slices:
        part = batch.siblings(group)
        layout, scores = forward(
            run, part, lm=lm and group.start == 0, matched=run.asks_for_matches and reward is None
        )
        reasoned_logprob, matched = evidence(run, part, scores, "train")  # S_pred   [M, G]   eq. 3
        if reward is None:
            reward = rewards_of(
                run, batch, reasoned_logprob.detach(), matched
            )  # r(c)     [M, G]   eq. 5
        fed = reward if before is None else torch.cat([before, reward[:-1]])
        advantage = group_relative_advantage(fed)  # A        [M, G]   eq. 7
        loss = thought_loss(
            run,
            part,
            layout,
            scores,
            reasoned_logprob,
            advantage[:, group],
            divisors,
            tally,
            first=first,
        )
        run.engine.backward(loss + text_loss(run, layout, scores, divisors, tally))
        reasoned.append(reasoned_logprob.detach())
    if first:
        tell(run, batch, torch.cat(reasoned, dim=1), fed, advantage, tally)
    return reward


def group_slices(run: Run, batch: MicroBatch) -> list[slice]:
    """Which thoughts of each group are run together (`optim.thoughts_per_forward`)."""
    group_size = batch.thoughts.tokens.shape[1]
    size = min(run.config.optim.thoughts_per_forward or group_size, group_size)
    return [slice(start, start + size) for start in range(0, group_size, size)]


def forward(
    run: Run, batch: MicroBatch, *, lm: bool, matched: bool = False
) -> tuple[Layout, Scores]:
    """One pass of the policy, with gradient, over thoughts and documents."""
    layout = run.lay_out(
        batch.documents,
        batch.positions,
        batch.thoughts,
        run.setup.thought_format,
        lm=lm,
        no_think=lm and batch.thoughts is not None,
        device=run.ranks.device,
    )
    run.count("train", layout.thought_work, passes=3, tokens_trained=int(layout.thought_mask.sum()))
    run.count(
        "lm",
        layout.document_work,
        passes=3,
        tokens_trained=int(layout.document_mask.sum()) if lm else 0,
    )
    return layout, score(run.engine, layout, matched=matched)


@torch.no_grad()
def score_ahead(run: Run, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
    """`evidence` of whole groups, without gradient."""
    parts = []
    with run.ledger.time("score"):
        for group in group_slices(run, batch):
            part = batch.siblings(group)
            layout = run.lay_out(
                part.documents,
                part.positions,
                part.thoughts,
                run.setup.thought_format,
                lm=False,
                no_think=False,
                device=run.ranks.device,
            )
            run.count("score", layout.thought_work, passes=1)
            scores = score(run.engine.policy, layout, matched=run.asks_for_matches)
            parts.append(evidence(run, part, scores, "score"))

    reasoned_logprob, matched = zip(*parts)
    return torch.cat(reasoned_logprob, dim=1), (
        torch.cat(matched, dim=1) if run.asks_for_matches else None
    )


def evidence(
    run: Run, batch: MicroBatch, scores: Scores, phase: str
) -> tuple[Tensor, Tensor | None]:
    """S_pred [M, G], and whether the targets are the most probable tokens [M, G], where they were
    asked for it."""
    group_size = batch.thoughts.tokens.shape[1]
    reasoned_logprob = rearrange(log_evidence(scores.target), "(m g) -> m g", g=group_size)
    if scores.matched is None:
        return reasoned_logprob, None
    run.count(phase, Work(head_rows=scores.target.numel()), passes=1)
    return reasoned_logprob, rearrange(scores.matched, "(m g) -> m g", g=group_size)


def rewards_of(
    run: Run, batch: MicroBatch, reasoned_logprob: Tensor, matched: Tensor | None
) -> Tensor:
    """[M, G] reward of whole groups. Without a baseline it is S_pred: what is missing cancels in
    eq. 7."""
    if matched is not None:
        return greedy_match(matched)
    if batch.baseline_logprob is None:
        return reasoned_logprob
    return information_gain(reasoned_logprob, batch.baseline_logprob)


def thought_loss(
    run: Run,
    batch: MicroBatch,
    layout: Layout,
    scores: Scores,
    reasoned_logprob: Tensor,
    advantage: Tensor,
    divisors: list[float],
    tally: Tally,
    *,
    first: bool,
) -> Tensor:
    """The terms of the loss that thoughts have."""
    weights, thoughts, num_thoughts = run.config.objective, batch.thoughts, divisors[0]
    mask, behavior_logprob = (
        rearrange(part, "m g l -> (m g) l") for part in (thoughts.mask, thoughts.behavior_logprob)
    )
    surrogate = clipped_surrogate(
        scores.thought,
        behavior_logprob,
        mask,
        rearrange(advantage, "m g -> (m g)"),  # [N]   eq. 8
        clip_low=weights.clip_low,
        clip_high=weights.clip_high,
    )
    loss = weights.policy_weight * surrogate.sum() / num_thoughts
    if weights.predictor_weight > 0:
        loss = loss - weights.predictor_weight * reasoned_logprob.sum() / num_thoughts
    if weights.kl_weight > 0:
        kl = kl_to_start(scores.thought, start_logprob(run, layout), mask)
        loss = loss + weights.kl_weight * kl.sum() / num_thoughts
        tally.add("kl/start", kl)
    watch_ratio(tally, scores.thought, thoughts, weights.clip_low, weights.clip_high, first=first)
    return loss


@torch.no_grad()
def start_logprob(run: Run, layout: Layout) -> Tensor:
    """[N, L] log-probabilities of the thoughts' tokens under the starting checkpoint."""
    run.count("teacher", layout.thought_work + layout.document_work, passes=1)
    with run.ledger.time("teacher"):
        return score(run.start, layout).thought


def text_loss(
    run: Run, layout: Layout, scores: Scores, divisors: list[float], tally: Tally
) -> Tensor:
    """The next-token loss on the documents; 0 for a pass without them."""
    if scores.document.numel() == 0:
        return torch.zeros((), device=run.ranks.device)
    tally.add("lm/loss", -scores.document[layout.document_mask])
    if scores.open_marker.numel():
        tally.add("policy/open_marker_mass", scores.open_marker.exp())
    return -run.config.objective.lm_weight * scores.document.sum() / divisors[1]


def tell(
    run: Run,
    batch: MicroBatch,
    reasoned_logprob: Tensor,
    reward: Tensor,
    advantage: Tensor,
    tally: Tally,
) -> None:
    """What the thoughts of a micro-batch were worth: the reward that eq. 7 is fed, and the
    information gain."""
    tally.add("policy/reasoned_logprob", reasoned_logprob)
    scored = batch.baseline_logprob is not None
    measured = scored or run.asks_for_matches
    watch_rewards(
        tally,
        reward,
        thought_lengths(batch.thoughts, len(run.setup.markers.close)),
        measured=measured,
    )
    values = {"reasoned_logprob": reasoned_logprob, "advantage": advantage} | (
        {"reward": reward} if measured else {}
    )
    if scored:
        gain = information_gain(reasoned_logprob, batch.baseline_logprob)
        tally.add("baseline/logprob", batch.baseline_logprob)
        watch_gains(tally, gain)
        values |= {
            "baseline_logprob": batch.baseline_logprob[:, None].expand_as(gain),
            "gain": gain,
        }
    run.offer_thoughts(batch.documents, batch.positions, batch.thoughts, values)


def controls(
    run: Run, batches: list[MicroBatch], thoughts: Thoughts | None
) -> tuple[list[Tensor | None], Tensor | None]:
    """`reward.placebo`: rewards that say nothing about the thoughts they are given to.

    Each position of the step gets what the position before it has, and the first what the last has,
    in the
    order of the documents over all ranks: micro-batches and ranks change nothing.

        foreign_thought    the position before gives its thoughts, which are scored here in place of
                           its own
        shuffled_reward    it gives its rewards, which `learn` has by then; only those of the last
                           position are scored ahead

    Returns:
        for each micro-batch its rewards [M, G] where they are known here, and `before` of the first
        one.
    """
    placebo, ranks = run.config.reward.placebo, run.ranks
    if thoughts is None or placebo == "none":
        return [None] * len(batches), None
    if sum(ranks.gather(len(thoughts.tokens))) < 2:
        raise ConfigError(
            f"reward.placebo: {placebo} exchanges the positions of a step, and step {run.step} has"
            " a single one. Write an optim.batch_size of 2 or more."
        )
    if placebo == "shuffled_reward":
        last = batches[-1].last_position()
        reward = rewards_of(run, last, *score_ahead(run, last))
        return [None] * len(batches), ranks.gather(reward.cpu())[ranks.rank - 1].to(ranks.device)

    foreign = thoughts.exchanged(
        ranks.gather(thoughts[-1:].to("cpu"))[ranks.rank - 1].to(ranks.device)
    )
    rewards, start = [], 0
    for batch in batches:
        run.safe_point()
        stop = start + len(batch.thoughts.tokens)
        rewards.append(
            rewards_of(run, batch, *score_ahead(run, replace(batch, thoughts=foreign[start:stop])))
        )
        start = stop
    return rewards, None


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, and turn errors into one clear message and an exit code."""
    parser = argparse.ArgumentParser(
        description="Pretrain a causal language model with RLP.",
        epilog="Overrides: section.key=value, as in thought.group_size=8.",
    )
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the resolved config, one example, memory, FLOPs and disk, and exit",
    )
    parser.add_argument(
        "--machine",
        default="",
        metavar="8x80",
        help="with --dry-run: plan for 8 devices of 80 GB instead of this machine",
    )
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    options = parser.parse_intermixed_args(arguments)
    ranks = None
    if options.machine and not options.dry_run:
        parser.error(
            f"--machine {options.machine} plans for a machine, and without --dry-run this would"
            f" start a real run on this one. Write --dry-run --machine {options.machine}, or leave"
            " --machine out."
        )
    try:
        launchers().require()
        config = load_config(options.config, options.overrides)
        ranks = start_ranks(config.run.watchdog_s)
        if options.dry_run:
            print(visible_text(dry_run(config, options.machine, ranks)))
            return DONE
        code = train(config, ranks)
        stop_ranks()
        return code
    except (ConfigError, CheckpointError) as error:
        return fail(error, BAD_CONFIG, ranks)
    except (DataError, DamagedFileError) as error:
        return fail(error, BAD_DATA, ranks)
    except NotWrittenError as error:
        return fail(error, NOT_WRITTEN, ranks)
    except FolderLostError as error:
        return fail(error, FOLDER_LOST, ranks)
    except NumericsError as error:
        return fail(error, BAD_NUMERICS, ranks)
    except PeerLost as error:
        return fail(error, PEER_LOST, None)
    except LauncherGone as error:
        return fail(error, LAUNCHER_GONE, None)


def fail(error: Exception, code: int, ranks: Ranks | None) -> int:
    """Say an error once, on the first rank; on every rank where none is given."""
    if ranks is None or ranks.is_first:
        print(visible_text(f"error: {error}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    run_as_process(main)
