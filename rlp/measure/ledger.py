"""The ledger: tokens, FLOPs and seconds of a run, by phase, counted from the model's shapes.

FLOPs are those of matrix products, two per multiply-add, in closed form. Norms, activations,
softmaxes and rotary embeddings are left out, as everybody leaves them out; so is the second
forward of activation checkpointing, which is a price of memory and no progress. Attention counts
causal pairs only. Two runs whose ledgers agree have done the same work, whatever their hardware.
A layer whose cost is not known here is left out by name (`ModelShapes.uncounted`): such FLOPs are a
lower bound, and nothing is matched by them.

The oracle in the tests is `torch.utils.flop_counter`. It counts the full square of query-key
pairs, and on a CPU it misses scaled_dot_product_attention: compare with T * T pairs and eager
attention.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rlp.model.shapes import ModelShapes, Work, forward_flops
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import Rollout

PHASES = ("prefill", "decode", "score", "teacher", "train", "lm")
"""What a step spends its work on: the prefix of each thought; sampling; the target after each
thought; the no-think baseline; the update; the next-token loss on documents. The last two share a
forward and a backward pass: its seconds are divided between them as its FLOPs (`Ledger.time`)."""


@dataclass(slots=True)
class PhaseCount:
    """What one phase has cost."""

    tokens_in: int = 0
    """Tokens read as given: documents, prefixes, markers."""
    tokens_generated: int = 0
    """Tokens sampled."""
    tokens_trained: int = 0
    """Tokens whose log-probability received a gradient."""
    flops: float = 0.0
    seconds: float = 0.0


def _phase_counts() -> dict[str, PhaseCount]:
    return {phase: PhaseCount() for phase in PHASES}


@dataclass(slots=True)
class Account:
    """The counts of one step on one rank, or of a whole run over all ranks."""

    phases: dict[str, PhaseCount] = field(default_factory=_phase_counts)
    input_tokens: int = 0
    """Document tokens read (T_inp)."""
    paper_flops: float = 0.0
    """The paper's T_flop = n l bs iters + T_inp, in tokens: thoughts x thought budget + input
    tokens."""
    paper_flops_sampled: float = 0.0
    """The same with the thought tokens that were really sampled in place of the budget."""
    steps: int = 0


_COUNTS = ("tokens_in", "tokens_generated", "tokens_trained", "flops")

_TOTALS = ("input_tokens", "paper_flops", "paper_flops_sampled", "steps")


class Ledger:
    """Adds up a run. Counts are local to the rank until `close_step` sums them over the ranks."""

    def __init__(
        self, shapes: ModelShapes, on_phase: Callable[[str], None] = lambda phase: None
    ) -> None:
        """
        Args:
            on_phase: is told each phase whose time begins.
        """
        self.shapes = shapes
        self._on_phase = on_phase
        self._step = Account()
        self._total = Account()
        self._carried = Account()
        self._running: str | None = None
        self._spans: list[_Span] = []
        self._span: _Span | None = None

    @property
    def steps(self) -> int:
        """Steps closed."""
        return self._total.steps

    @property
    def input_tokens(self) -> int:
        """Document tokens read in closed steps, over all ranks."""
        return self._total.input_tokens

    @property
    def flops(self) -> float:
        """FLOPs of closed steps, over all ranks and phases."""
        return _sum_of(self._total, "flops")

    def spent(self) -> dict[str, float]:
        """What closed steps have cost, by the names of the budget's limits, over all ranks."""
        return _amounts(self._total)

    def carried(self) -> dict[str, float]:
        """What making the data had cost before the first step, likewise."""
        return _amounts(self._carried)

    def mean_step(self) -> dict[str, float]:
        """What a closed step has cost on average; nothing before the first."""
        carried = self.carried()
        return {
            name: (amount - carried[name]) / max(self.steps, 1)
            for name, amount in self.spent().items()
        }

    def carry(self, made: dict) -> None:
        """Begin with the cost of what made the data.

        Args:
            made: its ledger, in the form of `to_json`.

        Raises:
            ValueError: it is no ledger.
        """
        try:
            phases = {phase: PhaseCount(**made["phases"][phase]) for phase in PHASES}
            totals = {name: made[name] for name in _TOTALS if name != "steps"}
            self._carried = Account(phases, **totals)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no ledger of a run: {error}") from error
        _add_to(self._total, self._carried)

    def add(
        self,
        phase: str,
        work: Work,
        *,
        passes: int,
        tokens_in: int = 0,
        tokens_generated: int = 0,
        tokens_trained: int = 0,
    ) -> None:
        """Count work of this rank.

        Args:
            passes: 1 for a forward pass, 3 for a forward and a backward pass. The forward that
                activation checkpointing repeats is not counted.
        """
        if passes not in (1, 3):
            raise ValueError(
                f"Ledger.add: passes must be 1 (forward) or 3 (forward and backward), got {passes}."
            )
        count = self._phase(phase)
        count.flops += passes * forward_flops(self.shapes, work)
        count.tokens_in += tokens_in
        count.tokens_generated += tokens_generated
        count.tokens_trained += tokens_trained

    def add_rollout(self, rollout: Rollout, *, max_thought_tokens: int) -> None:
        """Count the thoughts that this rank sampled: their prefixes, their tokens, those of their
        predictions, and what the paper charges for them.

        Args:
            max_thought_tokens: the most that may be sampled of one, its prediction included.
        """
        sampled = int(rollout.thoughts.sampled_mask.sum())
        prefill = rollout.prefill_work
        self.add("prefill", prefill, passes=1, tokens_in=prefill.tokens)
        self.add("decode", rollout.decode_work, passes=1, tokens_generated=sampled)
        self.add_thoughts(
            rollout.thoughts.truncated.numel(),
            max_thought_tokens=max_thought_tokens,
            sampled_tokens=sampled,
        )

    def add_documents(self, input_tokens: int) -> None:
        """Count document tokens that this rank read, once per document whatever is done with
        them."""
        self._step.input_tokens += input_tokens
        self._step.paper_flops += input_tokens
        self._step.paper_flops_sampled += input_tokens

    def add_thoughts(self, thoughts: int, *, max_thought_tokens: int, sampled_tokens: int) -> None:
        """Count thoughts of this rank in the paper's accounting, which charges each its whole
        budget."""
        self._step.paper_flops += thoughts * max_thought_tokens
        self._step.paper_flops_sampled += sampled_tokens

    @contextmanager
    def time(self, *phases: str) -> Iterator[None]:
        """Add the seconds of the block to its phases, when the step is closed: on a GPU those
        between two moments of its queue, for which nobody waits here.

        Blocks may lie in each other: the seconds of an inner one are not the outer one's as well.
        Phases that share a pass through the model can not be timed apart: its seconds are divided
        among them as the FLOPs that the step has counted for them by its end.
        """
        counts = [self._phase(phase) for phase in phases]
        outer, self._running = self._running, phases[0]
        self._on_phase(self._running)
        span, around = _Span(counts, _Moment()), self._span
        (self._spans if around is None else around.inside).append(span)
        self._span = span
        try:
            yield
        finally:
            span.end(_Moment())
            self._span, self._running = around, outer
            if outer is not None:
                self._on_phase(outer)

    def close_step(self, ranks: Ranks) -> dict:
        """Sum the step over the ranks, add it to the run, and start the next one. Every rank calls
        it.

        Seconds are the largest over the ranks, phase by phase: a phase lasts as long as its slowest
        rank.

        Returns:
            The step's totals, in the form of `to_json`.
        """
        self._step.steps = 1
        for span in self._spans:
            span.settle()
        self._spans = []
        step = _over_ranks(self._step, ranks)
        _add_to(self._total, step)
        self._step = Account()
        return _as_json(step)

    def state(self) -> dict:
        """All that a resumed run needs; plain numbers. Only between steps."""
        assert self._step == Account(), "Ledger.state: the step is open; call close_step first"
        return dataclasses.asdict(self._total)

    def load_state(self, state: dict) -> None:
        """Continue from what `state` returned."""
        expected, counts = (
            {item.name for item in dataclasses.fields(kind)} for kind in (Account, PhaseCount)
        )
        whole = set(state) == expected and set(state["phases"]) == set(PHASES)
        if not whole or any(set(phase) != counts for phase in state["phases"].values()):
            raise ValueError(
                f"Ledger.load_state: expected the keys {sorted(expected)} with phases"
                f" {list(PHASES)}, got {sorted(state)[:20]}. The checkpoint was written by another"
                " version; resume with that one."
            )
        phases = {phase: PhaseCount(**state["phases"][phase]) for phase in PHASES}
        self._total = Account(**{**state, "phases": phases})

    def drop_step(self) -> None:
        """Forget what was counted since the last `close_step`: the step is given up."""
        self._step, self._spans = Account(), []

    def to_json(self) -> dict:
        """The run so far, over all ranks, as `ledger.json` holds it: a plain dict of numbers, and
        `counted_without`, what the FLOPs leave out."""
        return {**_as_json(self._total), "counted_without": list(self.shapes.uncounted)}

    def _phase(self, phase: str) -> PhaseCount:
        if phase not in PHASES:
            raise ValueError(
                f"Ledger: unknown phase {phase!r}; the phases are {', '.join(PHASES)}."
            )
        return self._step.phases[phase]


class _Moment:
    """A moment: on a GPU, of its queue."""

    def __init__(self) -> None:
        self._event = None
        if torch.cuda.is_initialized():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._time = time.perf_counter()

    def seconds_since(self, start: "_Moment") -> float:
        """Waits for the GPU to come to this moment."""
        if self._event is None or start._event is None:
            return self._time - start._time
        self._event.synchronize()
        return start._event.elapsed_time(self._event) / 1000


class _Span:
    """A block whose seconds belong to phases."""

    def __init__(self, counts: list[PhaseCount], start: _Moment) -> None:
        self._counts, self._start = counts, start
        self.inside: list[_Span] = []
        """Blocks that lie in it."""

    def end(self, moment: _Moment) -> None:
        """It is over: phases that share it have theirs of its seconds in proportion to the FLOPs
        counted so far; the first has all where none has any."""
        self._end = moment
        flops = sum(count.flops for count in self._counts)
        self._shares = [
            count.flops / flops if flops else float(index == 0)
            for index, count in enumerate(self._counts)
        ]

    def settle(self) -> float:
        """Add its seconds, without those of the blocks in it, to its phases.

        Returns:
            all its seconds.
        """
        seconds = self._end.seconds_since(self._start)
        own = seconds - sum(span.settle() for span in self.inside)
        for count, share in zip(self._counts, self._shares):
            count.seconds += own * share
        return seconds


def _sum_of(account: Account, name: str) -> float:
    return sum(getattr(count, name) for count in account.phases.values())


def _over_ranks(step: Account, ranks: Ranks) -> Account:
    """Counts summed over the ranks, seconds the largest; one step, however many ranks."""
    counts = [getattr(step.phases[phase], name) for phase in PHASES for name in _COUNTS]
    totals = [step.input_tokens, step.paper_flops, step.paper_flops_sampled]
    summed = iter(ranks.sum(counts + totals))
    seconds_of_ranks = ranks.gather([step.phases[phase].seconds for phase in PHASES])
    slowest = [max(of_phase) for of_phase in zip(*seconds_of_ranks)]

    over_ranks = Account(steps=step.steps)
    for phase, seconds in zip(PHASES, slowest, strict=True):
        tokens_in, generated, trained, flops = (next(summed) for _ in _COUNTS)
        over_ranks.phases[phase] = PhaseCount(
            int(tokens_in), int(generated), int(trained), flops, seconds
        )
    over_ranks.input_tokens = int(next(summed))
    over_ranks.paper_flops, over_ranks.paper_flops_sampled = summed
    return over_ranks


def _add_to(total: Account, step: Account) -> None:
    for phase in PHASES:
        count, added = total.phases[phase], step.phases[phase]
        for name in (*_COUNTS, "seconds"):
            setattr(count, name, getattr(count, name) + getattr(added, name))
    for name in _TOTALS:
        setattr(total, name, getattr(total, name) + getattr(step, name))


def _amounts(account: Account) -> dict[str, float]:
    return {
        "tokens": account.input_tokens,
        "flops": _sum_of(account, "flops"),
        "paper_flops": account.paper_flops,
        "seconds": _sum_of(account, "seconds"),
    }


def _as_json(account: Account) -> dict:
    return {
        "phases": {phase: dataclasses.asdict(account.phases[phase]) for phase in PHASES},
        "input_tokens": account.input_tokens,
        "flops": _sum_of(account, "flops"),
        "paper_flops": account.paper_flops,
        "paper_flops_sampled": account.paper_flops_sampled,
        "seconds": _sum_of(account, "seconds"),
        "steps": account.steps,
    }
