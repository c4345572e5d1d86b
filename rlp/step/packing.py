"""Which documents of a step go through the model together: so many at a time
(`optim.micro_batch_size`), or as many as fit by their real lengths
(`optim.tokens_per_micro_batch`).

Real lengths are known once thoughts are sampled. Documents are sorted by their longest row, so that
those that are padded together are alike, and put together one after the other while they fit; one
that is too much alone goes in slices of its groups. Where a pass is a collective, every rank makes
as many as the rank that needs most: the others halve what they have, documents first and groups
last, so that no pass is empty.

Dimensions
    M  positions;  G  thoughts per position;  K  positions of a document
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rlp.config import Config
from rlp.learn.engine import Engine
from rlp.measure.plan_work import too_small
from rlp.model.thoughts import ThoughtFormat
from rlp.process.ranks import Ranks
from rlp.step.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Extent:
    """What a forward over some documents and their thoughts runs, in either layout."""

    rows: int
    """Of `repeated`."""
    longest: int
    """Tokens of the longest of them."""
    tokens: int
    """Of the packed row of `tree`."""
    queries: int
    """Rows of the LM head."""

    def __add__(self, other: "Extent") -> "Extent":
        """Both in one forward."""
        return Extent(
            self.rows + other.rows,
            max(self.longest, other.longest),
            self.tokens + other.tokens,
            self.queries + other.queries,
        )

    def size(self, layout: str) -> int:
        """Token positions, padding included; or rows of the LM head, where these are more."""
        tokens = self.rows * self.longest if layout == "repeated" else self.tokens
        return max(tokens, self.queries)


class Lengths:
    """How long the pieces of a step are."""

    def __init__(self, step: MicroBatch, thought_format: ThoughtFormat) -> None:
        """
        Args:
            step: all of it; without thoughts, of its documents alone.
        """
        self._step, self._format = step, thought_format
        self.group_size = 0
        if step.thoughts is None:
            return
        thoughts = step.on_host()
        self._sampled = thoughts.sampled_mask.sum(dim=2).numpy()  # [M, G]
        forced = thoughts.truncated.numpy() * len(thought_format.markers.close)
        # The last token of target or prediction is not read.
        targets = 0 if thought_format.predicts else thought_format.horizon
        around = len(thought_format.markers.open) + targets - 1
        self._branches = self._sampled + forced + around
        self.group_size = self._sampled.shape[1]

    def extent(self, document: int, group: slice, *, lm: bool, no_think: bool) -> Extent:
        """Of a document with a slice of the groups at its positions, as `rlp.model.layout` lays it
        out with the same `lm` and `no_think`."""
        num_tokens, here = len(self._step.documents[document].tokens), slice(0, 0)
        if self._step.positions is not None:
            here = self._step.positions.slice_of_documents(document, document + 1)
        plain, num_positions = lm or no_think, here.stop - here.start
        alone = num_tokens * plain
        predicted = int(self._step.documents[document].predicted.sum()) if lm else 0
        queries = predicted + no_think * num_positions * (self._format.scored + 1)
        if group.start == group.stop or num_positions == 0:
            return Extent(int(plain), alone, alone, queries)

        instruction = len(self._format.instruction)
        contexts = instruction + self._step.positions.position[here]
        branches, sampled = self._branches[here, group], self._sampled[here, group]
        context = int(contexts.max()) if instruction or not plain else 0
        return Extent(
            rows=branches.size + plain,
            longest=max(int((contexts[:, None] + branches).max()), alone),
            tokens=int(branches.sum()) + context + alone,
            queries=int(sampled.sum()) + sampled.size * self._format.scored + queries,
        )


@dataclass(frozen=True, slots=True)
class Pack:
    """Documents that go through the model together, by their places in the step."""

    documents: tuple[int, ...]
    groups: tuple[slice, ...]
    """The parts of each group that are run by themselves: one pass each. One where there are
    several documents."""


@dataclass(frozen=True, slots=True)
class Packer:
    """Puts documents together, up to a limit."""

    extent: Callable[[int, slice], Extent]
    """Of a document with a slice of its groups."""
    group_size: int
    """G; 0 where there are no thoughts."""
    layout: str
    limit: int

    def pack(self, num_documents: int) -> list[Pack]:
        """All of them in as few passes as their order allows, the largest pass first.

        Raises:
            ConfigError: one thought at each position of a document is too much.
        """
        whole = slice(0, self.group_size)
        extents = [self.extent(document, whole) for document in range(num_documents)]
        order = sorted(
            range(num_documents),
            key=lambda d: (extents[d].longest, extents[d].tokens),
            reverse=True,
        )
        packs, open_pack, held = [], (), None
        for document in order:
            alone = extents[document]
            if alone.size(self.layout) > self.limit:
                packs.append(Pack((document,), self._slices(document)))
                continue
            both = alone if held is None else held + alone
            if both.size(self.layout) > self.limit:
                packs.append(Pack(open_pack, (whole,)))
                open_pack, both = (), alone
            open_pack, held = (*open_pack, document), both
        if open_pack:
            packs.append(Pack(open_pack, (whole,)))
        return sorted(packs, key=self._largest, reverse=True)

    def split(self, packs: list[Pack], passes: int) -> list[Pack]:
        """The same in so many passes: the largest is halved, between documents while a pack has
        several, else within groups."""
        packs = list(packs)
        while sum(len(pack.groups) for pack in packs) < passes:
            several = [pack for pack in packs if len(pack.documents) > 1]
            largest = max(several or packs, key=self._largest_to_halve)
            packs.remove(largest)
            packs += self._halves(largest)
        return sorted(packs, key=self._largest, reverse=True)

    def size(self, documents: tuple[int, ...], group: slice) -> int:
        """Of one pass."""
        first, *others = (self.extent(document, group) for document in documents)
        return sum(others, first).size(self.layout)

    def _largest(self, pack: Pack) -> int:
        """The size of its largest pass."""
        return max(self.size(pack.documents, group) for group in pack.groups)

    def _largest_to_halve(self, pack: Pack) -> int:
        if len(pack.documents) > 1:
            return self._largest(pack)
        sizes = [self.size(pack.documents, g) for g in pack.groups if g.stop - g.start > 1]
        return max(sizes, default=0)

    def _halves(self, pack: Pack) -> list[Pack]:
        if len(pack.documents) > 1:
            half = len(pack.documents) // 2
            return [
                Pack(documents, pack.groups)
                for documents in (pack.documents[:half], pack.documents[half:])
            ]
        largest = max(
            (group for group in pack.groups if group.stop - group.start > 1),
            key=lambda group: self.size(pack.documents, group),
        )
        middle = (largest.start + largest.stop) // 2
        halves = (slice(largest.start, middle), slice(middle, largest.stop))
        at = pack.groups.index(largest)
        return [Pack(pack.documents, (*pack.groups[:at], *halves, *pack.groups[at + 1 :]))]

    def _slices(self, document: int) -> tuple[slice, ...]:
        """Its groups in parts that fit, each as large as it can be."""
        slices, start = [], 0
        while start < max(self.group_size, 1):
            stop = min(start + 1, self.group_size)
            needed = self.size((document,), slice(start, stop))
            if needed > self.limit:
                raise too_small(self.limit, needed, "a document", thinks=self.group_size > 0)
            while stop < self.group_size and (
                self.size((document,), slice(start, stop + 1)) <= self.limit
            ):
                stop += 1
            slices.append(slice(start, stop))
            start = max(stop, 1)
        return tuple(slices)


class Cutter:
    """Cuts the steps of a run into what is run by itself."""

    def __init__(
        self,
        config: Config,
        layout: str,
        thought_format: ThoughtFormat,
        engine: Engine | None,
        ranks: Ranks,
    ) -> None:
        """
        Args:
            layout: `repeated` or `tree`.
            engine: that trains the model; None where nothing does, and no pass is a collective.
        """
        self._optim, self._lm = config.optim, config.objective.lm_weight > 0
        self._layout, self._format = layout, thought_format
        self._ranks = ranks
        self._backward_together = engine is not None and engine.backward_is_collective
        self._forward_together = engine is not None and engine.forward_is_collective

    @property
    def by_length(self) -> bool:
        """Whether documents are put together by their real lengths, and not in their order."""
        return self._optim.tokens_per_micro_batch is not None

    def update(self, step: MicroBatch) -> list[MicroBatch]:
        """What the update runs. A collective where its passes are, under stages 2 and 3."""
        if not self.by_length:
            return [
                replace(step.part(chunk), groups=step.slices_of(self._optim.thoughts_per_forward))
                for chunk in self._chunks(step)
            ]
        lengths, thinks = Lengths(step, self._format), step.thoughts is not None

        def extent(document: int, group: slice) -> Extent:
            lm = self._lm and group.start == 0
            return lengths.extent(document, group, lm=lm, no_think=lm and thinks)

        return self._packed(step, extent, lengths.group_size, self._backward_together)

    def documents(self, step: MicroBatch, *, lm: bool, no_think: bool) -> list[MicroBatch]:
        """What a pass over documents alone runs, without gradient. A collective where forwards are,
        under stage 3. Other arguments as those of a layout."""
        step = replace(step, thoughts=None, host=None)
        if not self.by_length:
            return [step.part(chunk) for chunk in self._chunks(step)]
        lengths = Lengths(step, self._format)

        def extent(document: int, group: slice) -> Extent:
            return lengths.extent(document, group, lm=lm, no_think=no_think)

        return self._packed(step, extent, 0, self._forward_together)

    def ahead(self, batches: list[MicroBatch]) -> list[bool]:
        """Which micro-batches are rewarded before their pass with gradient: those that go in
        slices, for each thought is compared with all its siblings; and where forwards are
        collectives, all, if any rank has such a one. A collective there."""
        sliced = [len(batch.groups) > 1 for batch in batches]
        if not (self.by_length and self._forward_together):
            return sliced
        return [self._ranks.any(any(sliced))] * len(batches)

    def _chunks(self, step: MicroBatch) -> list[range]:
        size, count = self._optim.micro_batch_size, len(step.documents)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _packed(
        self,
        step: MicroBatch,
        extent: Callable[[int, slice], Extent],
        group_size: int,
        together: bool,
    ) -> list[MicroBatch]:
        packer = Packer(extent, group_size, self._layout, self._optim.tokens_per_micro_batch)
        packs = packer.pack(len(step.documents))
        if together:
            passes = self._ranks.largest(sum(len(pack.groups) for pack in packs))
            packs = packer.split(packs, passes)
        return [replace(step.part(pack.documents), groups=pack.groups) for pack in packs]
