"""Slots: whichever one a thought takes, whenever it does, it is the thought that it was keyed to
be."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlp.config import ConfigError, SamplingConfig
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model import attention, slot_attention
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.slot_attention import SlotKeys, key_room
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.process.preemption import StopRequested
from rlp.sampling import native
from rlp.sampling.graph import WARM_UP, Recorded
from rlp.sampling.native import NativeSampler
from rlp.sampling.opening import open_sampler
from rlp.sampling.rollout import NoiseKey, Rollout
from rlp.sampling.schedule import Fill, Read, Schedule, trunk_places
from rlp.sampling.shared_slots import SharedSlots
from rlp.sampling.slots import FEWEST_SLOTS, Trunk
from sampling_phase.blocks import BlockSampler
from tests.tiny_models import random_documents, tiny_policy

GROUP, BUDGET = 4, 24
NOISE = NoiseKey(seed=0, step=1)
DOCUMENTS = random_documents([12, 7, 17, 40, 30, 9, 3])
PLACES = ((0, 2), (0, 9), (1, 5), (2, 1), (2, 15), (3, 30), (3, 39), (4, 20), (5, 4), (6, 1))
"""(document, position): contexts of one token to 39, several of one document, documents of one
token that is run."""


def positions_at(*places: tuple[int, int]) -> Positions:
    target = np.stack([DOCUMENTS[d].tokens[t : t + 1] for d, t in places])
    document, position = (np.array(column) for column in zip(*places))
    return Positions(document, position, target)


def format_of(close: tuple[int, ...] = (3,), opening: tuple[int, ...] = (2,)) -> ThoughtFormat:
    return ThoughtFormat(Markers(opening, close), (), None, 1.0, 1.0, 1)


def tree_policy() -> Policy:
    policy = tiny_policy()
    policy.lm.set_attn_implementation(attention.register("sdpa"))
    return policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    """One that runs trees."""
    return tree_policy()


def think(
    policy: Policy,
    thought_format: ThoughtFormat | None = None,
    *,
    slots: int = 1000,
    places: tuple[tuple[int, int], ...] = PLACES,
    documents: list[Document] = DOCUMENTS,
    budget: int = BUDGET,
    sampler: object = None,
    **options: object,
) -> Rollout:
    sampler = sampler or NativeSampler(policy, slots=slots, shared=True, **options)
    with sampler.phase():
        return sampler.sample(
            documents,
            positions_at(*places) if places else Positions(*[np.zeros(0, dtype=np.int64)] * 3),
            thought_format or format_of(),
            NOISE,
            group_size=GROUP,
            max_thought_tokens=budget,
        )


def equal_to_the_bit(mine: Thoughts, other: Thoughts) -> None:
    """Tokens, ends, log-probabilities and entropies."""
    for part, expected in zip(mine.parts(), other.parts()):
        assert torch.equal(part, expected)


def lengths(thoughts: Thoughts) -> list[int]:
    return thoughts.mask.sum(dim=2).flatten().tolist()


@pytest.fixture(scope="module")
def whole(policy: Policy) -> Thoughts:
    """All thoughts side by side."""
    thoughts = think(policy).thoughts
    # Some are cut by the budget and others are not: slots become free at many times.
    assert len(set(lengths(thoughts))) > 5 and 0 < thoughts.truncated.sum() < 40
    return thoughts


@pytest.mark.parametrize("look_every", [1, 8])
@pytest.mark.parametrize("slots", [1, GROUP - 1, 5, 17])
def test_any_number_of_slots_and_looks_gives_the_same_thoughts(
    policy: Policy, whole: Thoughts, slots: int, look_every: int
):
    """Fewer slots than a group too; thoughts that take the place of others; with one slot asked
    for there are as many as keep the bits of a product."""
    equal_to_the_bit(think(policy, slots=slots, look_every=look_every).thoughts, whole)


@pytest.mark.parametrize(
    "close, opening", [((3,), (2,)), ((7, 9), (2, 11, 12)), ((20, 20, 21), (2,))]
)
def test_slots_think_what_blocks_think(close: tuple[int, ...], opening: tuple[int, ...]):
    """A loop in fixed blocks, whose longest thought they wait for: same tokens and ends, markers of
    several tokens too; other sums of the same numbers are equal to 1e-5."""
    policy, thought_format = tree_policy(), format_of(close, opening)
    blocks = think(policy, thought_format, sampler=BlockSampler(policy, rows=8, shared=True))
    policy.lm.set_attn_implementation(attention.register("sdpa"))
    slots = think(policy, thought_format, slots=9)
    assert torch.equal(slots.thoughts.tokens, blocks.thoughts.tokens)
    assert torch.equal(slots.thoughts.mask, blocks.thoughts.mask)
    assert torch.equal(slots.thoughts.truncated, blocks.thoughts.truncated)
    for mine, other in zip(slots.thoughts.parts()[2:4], blocks.thoughts.parts()[2:4]):
        assert_close(mine, other, rtol=0, atol=1e-5)
    assert slots.decode_work == blocks.decode_work


def test_permuted_slots_and_places_think_the_same(
    policy: Policy, whole: Thoughts, monkeypatch: pytest.MonkeyPatch
):
    """Free slots and places are taken in an order drawn by lot, each time anew."""
    generator = np.random.default_rng(0)

    class Shuffled(Schedule):
        def moves(self) -> Iterator[Read | Fill]:
            generator.shuffle(self._free_places)
            for move in super().moves():
                if isinstance(move, Fill):
                    turned = generator.permutation(move.slots).tolist()
                    self.thought[turned] = move.thoughts
                    self._place[turned] = move.places
                    move = replace(move, slots=turned)
                yield move

    monkeypatch.setattr(native, "Schedule", Shuffled)
    for slots in (6, 1000):
        equal_to_the_bit(think(policy, slots=slots).thoughts, whole)


def test_a_rank_that_holds_other_documents_thinks_the_same(policy: Policy, whole: Thoughts):
    """Longer or shorter neighbours change the room for keys and the packed forward, not a bit."""
    for places in (PLACES[:2], PLACES[2:5], PLACES[8:], PLACES[4:7] + PLACES[9:]):
        chosen = [PLACES.index(place) for place in places]
        mine = think(policy, places=places, slots=7).thoughts
        longest = mine.tokens.shape[2]
        for part, other in zip(mine.parts()[:-1], whole.parts()[:-1]):
            assert torch.equal(part, other[chosen][:, :, :longest])
        assert torch.equal(mine.truncated, whole.truncated[chosen])


def test_trunks_that_wait_for_a_place_are_read_when_one_is_free(
    policy: Policy, whole: Thoughts, monkeypatch: pytest.MonkeyPatch
):
    """One place for seven documents, and one document to a forward."""
    monkeypatch.setattr(native, "trunk_places", lambda *sizes, lasting: 1)
    monkeypatch.setattr("rlp.sampling.schedule.READ_TOKENS", 1)
    equal_to_the_bit(think(policy, slots=9).thoughts, whole)


def test_the_work_that_is_counted_is_what_is_run(policy: Policy):
    """Each document once, each open marker in each thought, each token but a thought's last."""
    rows = []
    handle = policy.lm.base_model.register_forward_pre_hook(
        lambda module, given, named: rows.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        found = think(policy, format_of(opening=(2, 11)), places=PLACES[:2], slots=8)
    finally:
        handle.remove()
    run = sum(lengths(found.thoughts)) - 8
    assert found.prefill_work.tokens == 9 + 8 * 2
    assert found.prefill_work.head_rows == 8 * 2
    assert found.decode_work.tokens == found.decode_work.head_rows == run
    # One forward of the document, then as many as the longest thought takes, of slots that fewer
    # and fewer thoughts are left for.
    assert rows[0] == 9 and len(rows) == 1 + 2 + max(lengths(found.thoughts)) - 1
    assert rows[1] == 8 and rows[-1] == FEWEST_SLOTS and rows[1:] == sorted(rows[1:])[::-1]


def test_slots_do_not_wait_for_each_other(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """With 8 of them, as many steps as a queue takes whose first thought always goes where it can
    begin first."""
    steps, run = [], SharedSlots.next
    monkeypatch.setattr(
        SharedSlots, "next", lambda slots, *given: steps.append(given) or run(slots, *given)
    )
    monkeypatch.setattr(native, "trunk_places", lambda *sizes, lasting: len(DOCUMENTS))
    thoughts = think(policy, slots=8).thoughts
    ends = np.zeros(8)
    for length in lengths(thoughts):
        ends[ends.argmin()] += length  # the open marker, and all tokens but the last
    assert len(steps) == ends.max()


# --- What goes wrong.


def test_a_close_marker_that_never_comes_ends_at_the_budget(policy: Policy):
    """Every thought is truncated, and the refill goes on."""
    thoughts = think(policy, format_of(close=(0,) * (BUDGET + 1)), slots=6).thoughts
    assert thoughts.truncated.all() and set(lengths(thoughts)) == {BUDGET}


class Poison:
    """Makes the logits, or what a layer gives, NaN in the row of one thought, once."""

    def __init__(self, module: torch.nn.Module, call: int, row: int) -> None:
        self._calls, self._call, self._row = 0, call, row
        self._handle = module.register_forward_hook(self._spoil)

    def _spoil(self, module: torch.nn.Module, given: tuple, out: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls == self._call:
            out = out.clone()
            out[0, self._row] = float("nan")
        return out

    def __enter__(self) -> "Poison":
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("layer", ["last norm", "first attention"])
def test_a_nan_in_one_row_ends_its_thought_alone(policy: Policy, whole: Thoughts, layer: str):
    """Its log-probability is the NaN that the guard finds; keys and values that are not finite
    reach neither its neighbours nor the thought that takes its slot."""
    base = policy.lm.base_model
    module = base.norm if layer == "last norm" else base.layers[0].self_attn.v_proj
    with Poison(module, call=6, row=2):
        thoughts = think(policy, slots=8).thoughts
    broken = thoughts.behavior_logprob.isnan().any(dim=2)
    assert broken.sum() == 1 and thoughts.truncated[broken].all()
    length = lengths(Thoughts(*(part[broken][None] for part in thoughts.parts())))[0]
    assert thoughts.behavior_logprob[broken][0, length - 1].isnan()
    assert (thoughts.tokens < policy.head.shape[0]).all() and (thoughts.tokens >= 0).all()

    longest = thoughts.tokens.shape[2]
    for part, other in zip(thoughts.parts()[:4], whole.parts()[:4]):
        assert torch.equal(part[~broken], other[:, :, :longest][~broken])
        assert not other[:, :, longest:].any()


def test_a_stop_leaves_in_the_middle_and_holds_nothing(policy: Policy):
    """Whoever is asked to stop does so at the next look; keys are given up."""
    looks = []

    def agree(count: int) -> int:
        looks.append(count)
        if len(looks) == 8:
            raise StopRequested
        return count

    def held() -> int:
        gc.collect()
        return sum(isinstance(thing, SlotKeys) for thing in gc.get_objects())

    before = held()
    with pytest.raises(StopRequested):
        think(policy, slots=6, agree=agree)
    assert len(looks) == 8 and held() == before
    assert not policy._samples


class Ranks:
    """Ranks that make as many forwards each, run one after the other: what the others want is
    played from a list."""

    def __init__(self, others: list[int]) -> None:
        self.said: list[int] = []
        self._others = others

    def agree(self, count: int) -> int:
        self.said.append(count)
        others = self._others[len(self.said) - 1 :][:1]
        return max([count, *others])


def test_a_rank_with_nothing_to_sample_keeps_the_others_company(policy: Policy, whole: Thoughts):
    """As many forwards as they make, those that read documents too, and no thought."""
    alone = Ranks([])
    think(policy, slots=9, agree=alone.agree)
    rows = []
    handle = policy.lm.base_model.register_forward_pre_hook(
        lambda module, given, named: rows.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    company = Ranks(alone.said)
    try:
        nothing = think(policy, places=(), slots=9, agree=company.agree)
    finally:
        handle.remove()
    assert nothing.thoughts.tokens.shape == (0, GROUP, 0)
    assert nothing.prefill_work.tokens == nothing.decode_work.tokens == 0
    assert len(rows) == sum(alone.said) and not any(company.said)

    # And a rank that has its own thoughts, while the others read and step more often.
    busy = Ranks([count + index % 3 for index, count in enumerate(alone.said * 2)])
    equal_to_the_bit(think(policy, slots=9, agree=busy.agree).thoughts, whole)


def test_without_others_nothing_to_sample_runs_nothing(policy: Policy):
    assert think(policy, places=()).thoughts.mask.shape == (0, GROUP, 0)


# --- A recorded step.


class HostRead(Exception):
    """A step reads a number on the host, or makes something whose shape depends on one."""


class Recordable(TorchDispatchMode):
    """Refuses what a CUDA graph can not hold."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if name in self.FORBIDDEN or indexed:
            raise HostRead(name)
        return function(*arguments, **(options or {}))


class Double:
    """A recorder on a CPU: it keeps the function, and calls it where a graph would be replayed."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        self.calls.append("warm up")
        function()

    def record(self, function: Callable[[], None]) -> None:
        self.calls.append("record")
        self._function = function

    def replay(self) -> None:
        self.calls.append("replay")
        with Recordable():
            self._function()


@pytest.mark.parametrize("close", [(3,), (7, 9)])
def test_a_recorded_step_reads_nothing_on_the_host(
    policy: Policy, whole: Thoughts, close: tuple[int, ...]
):
    """All shapes are those of the phase: the same thoughts, as a CUDA graph would think them."""
    made = []

    def recorder() -> Double:
        made.append(Double())
        return made[-1]

    recorded = think(policy, format_of(close), slots=9, recorder=recorder, look_every=8).thoughts
    equal_to_the_bit(recorded, think(policy, format_of(close), slots=9).thoughts)
    calls = made[0].calls
    assert len(made) == 1
    assert calls[: WARM_UP + 2] == ["warm up"] * WARM_UP + ["record", "replay"]
    assert set(calls[WARM_UP + 1 :]) == {"replay"} and len(calls) > 20


def test_a_recorded_step_finds_its_tensors_where_they_were(policy: Policy):
    """Nothing that a step reads or writes is made anew while thoughts come and go."""
    seen: list[dict[str, int]] = []

    class Watching(Double):
        def replay(self) -> None:
            self._function()
            growth = self._function.__self__
            keys = growth._slots._keys
            named = vars(growth) | vars(keys) | {"fold": keys._tables[0].fold}
            for kind, layers in (("trunk", keys._trunk_keys), ("own", keys._own_keys)):
                named |= {
                    f"{kind} {i} {j}": t for i, two in layers.items() for j, t in enumerate(two)
                }
            seen.append(
                {name: t.data_ptr() for name, t in named.items() if isinstance(t, torch.Tensor)}
            )

    think(policy, slots=5, recorder=Watching, look_every=8)
    assert len(seen) > 20 and all(places == seen[0] for places in seen)
    assert len(seen[0]) > 20


def test_a_step_that_reads_on_the_host_is_found():
    """The watcher of the tests above."""
    numbers = torch.arange(3)
    for reads in (
        lambda: numbers[1].item(),
        lambda: numbers[numbers > 1],
        lambda: bool(numbers.sum() > 2),
        lambda: numbers.nonzero(),
    ):
        with pytest.raises(HostRead), Recordable():
            reads()


def test_a_step_is_run_and_then_recorded_once_and_replayed():
    done = []
    double = Double()
    step = Recorded(lambda: done.append(len(double.calls)), double)
    for _ in range(WARM_UP + 3):
        step()
    assert len(done) == WARM_UP + 3
    assert double.calls == ["warm up"] * WARM_UP + ["record"] + ["replay"] * 3


@pytest.mark.parametrize(
    "options, said",
    [
        ({"shared": True}, "the device is cpu"),
        ({"shared": False}, "do not share the keys"),
        ({"shared": True, "together": True}, "engine.generation=synced"),
    ],
)
def test_a_graph_where_none_can_be_is_refused(policy: Policy, options: dict, said: str):
    """Once, at the start, with all reasons; auto and off are not."""
    with pytest.raises(ConfigError, match="sampling.graph") as refusal:
        open_sampler(SamplingConfig(graph="on"), policy, **options)
    assert said in str(refusal.value) and "sampling.graph=auto" in str(refusal.value)
    for choice in ("auto", "off"):
        open_sampler(SamplingConfig(graph=choice), policy, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_thinks_what_an_eager_loop_thinks_and_gives_its_memory_back():
    """On a GPU: same tokens and numbers to the bit, since a graph runs the same kernels."""
    policy = tree_policy().cuda()
    samplers = [
        open_sampler(SamplingConfig(slots=9, graph=choice), policy, shared=True)
        for choice in ("off", "on")
    ]
    eager = think(policy, sampler=samplers[0]).thoughts
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        graphed = think(policy, sampler=samplers[1]).thoughts
    equal_to_the_bit(graphed, eager)
    del graphed
    torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    # What cuBLAS keeps for the stream that was recorded is a workspace of 32 MiB at most.
    assert after[0] <= before[0] + 2**25 and after[1] <= before[1] + 2**26


# --- Bookkeeping.


def test_key_room_is_room_in_steps_that_keep_the_bits():
    assert [key_room(n) for n in (1, 16, 17, 192, 193, 384, 385, 2049)] == [
        16, 16, 32, 192, 384, 384, 400, 2064,
    ]  # fmt: skip


def test_places_for_trunks():
    """Three times what is needed at once and two more where trunks linger; never more than there
    are."""
    assert trunk_places(128, 16, 1000, lasting=True) == 26
    assert trunk_places(128, 1024, 1000, lasting=True) == 5
    assert trunk_places(128, 16, 3, lasting=True) == 3
    assert trunk_places(128, 16, 1000, lasting=False) == 8


@pytest.mark.parametrize("lasting", [True, False])
def test_a_place_is_free_when_nothing_reads_its_trunk(lasting: bool):
    """Two places, three trunks of two thoughts, four slots: the third is read when the thoughts of
    another have ended, or at once where begun thoughts need it no more."""
    trunks = [Trunk(np.arange(5), ((m, 5),)) for m in range(3)]
    schedule = Schedule(trunks, 2, 4, 2, lasting=lasting)
    first = list(schedule.moves())
    assert [type(move) for move in first] == [Read, Fill]
    assert first[0].places == [0, 1] and first[1].thoughts == [0, 1, 2, 3]
    schedule.end([0])
    second = list(schedule.moves())
    if lasting:
        assert second == [] and schedule.num_going == 3
        schedule.end([2])
        assert list(schedule.moves()) == []
        schedule.end([1])
        second = list(schedule.moves())
    read, fill = second
    assert isinstance(read, Read) and read.trunks == trunks[2:] and read.places[0] == 0
    assert fill.thoughts[0] == 4 and fill.places[0] == 0
    assert schedule.is_drained == lasting


def test_slots_stay_busy_while_long_thoughts_hold_their_trunks():
    """With the places of `trunk_places`, a queue of exponential lengths takes at most 1.1 times the
    steps that unlimited places take."""
    generator = np.random.default_rng(0)
    drawn = np.minimum(generator.exponential(341, size=1024).astype(int) + 1, 2048)

    def steps(places: int) -> int:
        trunks = [Trunk(np.arange(5), ((m, 5),)) for m in range(64)]
        schedule = Schedule(trunks, 16, 128, places, lasting=True)
        left, count = np.zeros(128, dtype=int), 0
        while True:
            for move in schedule.moves():
                if isinstance(move, Fill):
                    left[move.slots] = drawn[move.thoughts]
            if not schedule.num_going:
                return count
            left -= 8
            count += 8
            schedule.end(np.flatnonzero((schedule.thought >= 0) & (left <= 0)).tolist())

    assert steps(trunk_places(128, 16, 64, lasting=True)) <= 1.1 * steps(64)
    assert steps(8) > 1.8 * steps(64)


def test_one_product_or_one_for_each_trunk_gives_the_same(
    policy: Policy, whole: Thoughts, monkeypatch: pytest.MonkeyPatch
):
    """Which of the two a CPU takes depends on what it costs."""
    for flops in (0, 10**12):
        monkeypatch.setattr(slot_attention, "LOOP_FLOPS", flops)
        equal_to_the_bit(think(policy, slots=9).thoughts, whole)
