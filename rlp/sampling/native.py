"""Thoughts sampled by the policy itself, the very module that is trained.

Thoughts grow in slots (`slots`). The host looks at them from time to time: a thought that has ended
leaves its slot to the next one of the queue (`schedule`), and what that one stands behind is read
when it is needed. Which slot a thought takes, and when, changes nothing in it.

Dimensions
    M  positions;  G  thoughts per position;  N  slots;  L  thought tokens
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat
from rlp.process.faults import fault, poisoned
from rlp.sampling.forked_slots import ForkedSlots
from rlp.sampling.graph import Recorded, Recorder
from rlp.sampling.growth import Growth
from rlp.sampling.rollout import NoiseKey, Rollout, decode_work
from rlp.sampling.schedule import Fill, Read, Schedule, num_slots, trunk_places
from rlp.sampling.shared_slots import SharedSlots
from rlp.sampling.slots import FEWEST_SLOTS, Room, Slots, Trunk

LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens between two looks at the slots, by device. On a GPU a look waits for it; a slot then
stands idle for 3.5 tokens of a thought on average. On a CPU there is nothing to wait for."""


class NativeSampler:
    """A `Sampler` that runs the policy."""

    def __init__(
        self,
        policy: Policy,
        *,
        slots: int,
        shared: bool = False,
        recorder: Callable[[], Recorder] | None = None,
        lend: Callable[[], AbstractContextManager] = nullcontext,
        agree: Callable[[int], int] = int,
        look_every: int | None = None,
    ) -> None:
        """
        Args:
            slots: thoughts that grow side by side.
            shared: run each document once for all its positions and hold its keys once, for models
                that run trees; else run each context once and copy its cache.
            recorder: makes what records a step and replays it; None: steps are run as they are.
            lend: makes the context in which the policy's weights are whole (`Engine.generation`).
            agree: told how many forwards this rank wants to make, answers how many any rank does.
                Ranks that gather weights together during sampling must make the same number of
                forwards; alone, the answer is the question. It leaves `lend` where the run is to
                stop.
            look_every: tokens between two looks at the slots; by default `LOOK_EVERY`.
        """
        self._policy, self._num_slots, self._recorder = policy, slots, recorder
        self._kind: type[Slots] = SharedSlots if shared else ForkedSlots
        self._lend, self._agree = lend, agree
        self._look_every = look_every

    @contextmanager
    def phase(self) -> Iterator[None]:
        """As `Sampler.phase`."""
        try:
            with self._lend(), self._policy.sampling():
                yield
        finally:
            # What a graph was recorded in is a pool of its own, which nothing else is given.
            if self._recorder is not None:
                torch.cuda.empty_cache()

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
        """As `Sampler.sample`."""
        fault("rollout")
        trunks = self._kind.trunks(documents, positions, thought_format)
        num_open = len(thought_format.markers.open)
        places = positions.places()

        predicted = thought_format.predicted

        def uniforms(thought: int) -> np.ndarray:
            m, g = divmod(thought, group_size)
            d, t = places[m]
            return noise.uniforms(documents[d], t, g, max_thought_tokens + predicted)

        together = self._kind is ForkedSlots and self._policy.why_together is not None
        close_tokens = len(thought_format.markers.close)
        slot_tokens = num_open + max_thought_tokens - 1
        if predicted:
            slot_tokens += close_tokens + predicted
        room = self._room(trunks, group_size, slot_tokens, together=together)
        slots = self._kind(self._policy, room)
        growth = Growth(
            slots,
            thought_format,
            len(places) * group_size,
            max_thought_tokens,
            dtype=torch.promote_types(self._policy.head.dtype, torch.float32),
        )
        schedule = Schedule.of(trunks, group_size, slots, room, together=together)
        filling = Filling(slots, growth, schedule, uniforms)
        device = self._policy.device.type
        filling.run(
            Recorded(growth.step, self._recorder()) if self._recorder else growth.step,
            look_every=self._look_every or LOOK_EVERY[device],
            shrinks=not room.static,
            agree=self._agree,
            beat=beat,
            prefill=prefill,
        )

        thoughts = growth.thoughts(group_size)
        logprob = poisoned("rollout.logprob", thoughts.behavior_logprob)
        thoughts = replace(thoughts, behavior_logprob=logprob)
        prefixes = [thought_format.prefix(documents[d].tokens, t) for d, t in places]
        return Rollout(
            thoughts,
            _prefill_work(trunks, group_size, num_open),
            decode_work(prefixes, thoughts, close_tokens=close_tokens),
        )

    def _room(
        self, trunks: list[Trunk], group_size: int, slot_tokens: int, *, together: bool
    ) -> Room:
        """What a call of `sample` needs; at least one of everything, for a rank that has nothing to
        sample keeps others company."""
        thoughts = [len(trunk.members) * group_size for trunk in trunks] or [1]
        slots = num_slots(self._num_slots, sum(thoughts))
        places = trunk_places(slots, max(thoughts), len(thoughts), lasting=self._kind.reads_trunks)
        if together:
            slots = max(slots, group_size)
            places = slots // group_size
        on_cpu = self._policy.device.type == "cpu"
        static = self._kind.can_be_recorded and not (on_cpu and self._recorder is None)
        return Room(
            num_slots=slots,
            slot_tokens=slot_tokens,
            num_trunks=places,
            trunk_tokens=max((len(trunk.tokens) for trunk in trunks), default=1),
            seats=min(slots, max(thoughts)),
            static=static,
        )


class Filling:
    """Slots that are filled from a queue until it is empty and every thought has ended."""

    def __init__(
        self,
        slots: Slots,
        growth: Growth,
        schedule: Schedule,
        uniforms: Callable[[int], np.ndarray],
    ) -> None:
        """
        Args:
            uniforms: the numbers [L + H] that a thought and its prediction are drawn by, given its
                place in the rollout.
        """
        self._slots, self._growth, self._schedule = slots, growth, schedule
        self._uniforms = uniforms

    def run(
        self,
        step: Callable[[], None],
        *,
        look_every: int,
        shrinks: bool,
        agree: Callable[[int], int],
        beat: Callable[[], None],
        prefill: Callable[[], AbstractContextManager],
    ) -> None:
        """Until nothing is left on any rank.

        Args:
            step: runs `Growth.step`.
            shrinks: when nothing waits any more, hold only slots that go on as soon as they are
                half of all.
        """
        while True:
            beat()
            if self._schedule.num_going:
                self._look(shrinks)
            moves = list(self._schedule.moves())
            num_reads = sum(isinstance(move, Read) for move in moves)
            company = agree(num_reads) - num_reads
            for move in moves:
                self._do(move, prefill)
            for _ in range(company):
                with prefill():
                    self._slots.idle_read()

            for _ in range(steps := agree(look_every if self._schedule.num_going else 0)):
                step()
            if not steps:
                return

    def _look(self, shrinks: bool) -> None:
        """Free the slots whose thoughts have ended."""
        schedule, seen = self._schedule, self._growth.look()
        ended = (schedule.thought >= 0) & ~seen.going
        if not ended.any():
            return
        slots = np.flatnonzero(ended).tolist()
        self._growth.end(slots, schedule.thought[slots], seen)
        schedule.end(slots)
        self._slots.free(slots, broken=bool(seen.broken[slots].any()))

        fewer = max(FEWEST_SLOTS, schedule.num_going)
        if shrinks and schedule.is_drained and 2 * fewer <= self._slots.num_slots:
            kept = np.argsort(schedule.thought < 0, kind="stable")[:fewer].tolist()
            for part in (schedule, self._slots, self._growth):
                part.keep(kept)

    def _do(self, move: Read | Fill, prefill: Callable[[], AbstractContextManager]) -> None:
        if isinstance(move, Read):
            with prefill():
                self._slots.read(move.places, move.trunks)
            return
        self._slots.fill(move.slots, move.places, move.prefix)
        uniforms = np.stack([self._uniforms(thought) for thought in move.thoughts])
        self._growth.begin(move.slots, move.thoughts, uniforms)


def _prefill_work(trunks: list[Trunk], group_size: int, num_open: int) -> Work:
    """Each trunk once, and the open marker in every thought."""
    prefix = np.array([prefix for trunk in trunks for _, prefix in trunk.members], dtype=np.int64)
    opening = np.full_like(prefix, num_open)
    lengths = np.array([len(trunk.tokens) for trunk in trunks], dtype=np.int64)
    return row_work(lengths, 0) + row_work(
        opening, group_size * int(opening.sum()), before=prefix, count=group_size
    )
