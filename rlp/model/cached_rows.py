"""What a model holds of N rows of tokens that begin at different times: its cache, row by row.

At any time the cache of N rows is what a batch of N rows padded on the left would have left: the
tokens of a row stand in the last columns, whenever it began and whatever it read. So a model that
decodes a padded batch rightly decodes these rows rightly, whatever its layers are. Keys and values
have columns, of which a layer with a window holds the last ones; the states of recurrences and
convolutions have none, and are replaced whole.

Dimensions
    N  rows that run;  R  rows of a prefill;  T  columns
"""

import copy

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

COLUMN_AXES = {"keys": 2, "values": 2, "indexer_keys": 1}
"""The tensors of a layer that have an entry for each token of each row [N, ...], and which axis
counts the tokens."""

FEWEST_FREE = 32
"""Columns at least that a tensor has room for when it is made anew."""


class Columns:
    """A tensor with an entry for each token of each row, to which tokens are added in place.

    It is a stretch of a longer one: a token that is added moves none of those before it, and
    columns on the left are let go of at no cost.
    """

    def __init__(self, like: Tensor, num_rows: int, axis: int, most: int | None) -> None:
        """
        Args:
            like: [R, ...], the same of other rows.
            axis: which of its axes counts the tokens.
            most: columns that are held at most, the last ones; None where all are.
        """
        shape = list(like.shape)
        shape[0], shape[axis] = num_rows, 0
        self._axis, self._most = axis, most
        self._room, self._start, self._stop = like.new_zeros(shape), 0, 0

    def tensor(self) -> Tensor:
        """What is held, a view."""
        return self._between(self._start, self._stop)

    def add(self, new: Tensor) -> Tensor:
        """What is held with new columns after it, a view; of these it then holds what it may."""
        count = new.shape[self._axis]
        if self._stop + count > self._room.shape[self._axis]:
            self._move(0, count)
        self._between(self._stop, self._stop + count).copy_(new)
        self._stop += count

        whole = self.tensor()
        self._start = self._stop - self._held_of(self._stop - self._start)
        return whole

    def resize(self, columns: int) -> None:
        """Hold what it may of so many: the last ones, and where there are fewer, zeros before
        them."""
        start = self._stop - self._held_of(columns)
        if start < 0:
            self._move(self._start - start, 0)
            start = 0
        if start < self._start:
            self._between(start, self._start).zero_()
        self._start = start

    def write(self, rows: Tensor, taken: Tensor) -> None:
        """Replace rows [R] by others [R, ...], that may have fewer columns: zeros before them."""
        first = self._stop - taken.shape[self._axis]
        self._between(self._start, first)[rows] = 0
        self._between(first, self._stop)[rows] = taken

    def keep(self, rows: Tensor) -> None:
        """Hold these rows only."""
        self._room = self.tensor().index_select(0, rows)
        self._start, self._stop = 0, self._room.shape[self._axis]

    def _held_of(self, columns: int) -> int:
        return columns if self._most is None else min(columns, self._most)

    def _between(self, start: int, stop: int) -> Tensor:
        return self._room.narrow(self._axis, start, stop - start)

    def _move(self, before: int, after: int) -> None:
        """Stand in a new tensor, with so many free columns on the left and at least so many on the
        right."""
        held = self.tensor()
        shape, count = list(held.shape), held.shape[self._axis]
        shape[self._axis] = before + count + after + max(FEWEST_FREE, count // 4)
        self._room, self._start, self._stop = held.new_empty(shape), before, before + count
        self.tensor().copy_(held)


class _InPlace:
    """What comes before a layer of a cache whose tensors are `Columns`."""

    columns: dict[str, Columns]

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
        """As of the layer."""
        if isinstance(self, DynamicSlidingWindowLayer):
            self.cumulative_length += keys.shape[-2]
        return self._add("keys", keys), self._add("values", values)

    def update_indexer(self, keys: Tensor) -> Tensor:
        """As of the layer."""
        return self._add("indexer_keys", keys)

    def _add(self, name: str, new: Tensor) -> Tensor:
        whole = self.columns[name].add(new)
        setattr(self, name, self.columns[name].tensor())
        return whole


class _FullLayer(_InPlace, DynamicLayer):
    pass


class _IndexedLayer(_InPlace, DynamicIndexedLayer):
    pass


class _WindowLayer(_InPlace, DynamicSlidingWindowLayer):
    pass


class _StateAndFullLayer(_InPlace, LinearAttentionAndFullAttentionLayer):
    pass


class _StateAndWindowLayer(_InPlace, LinearAttentionAndSlidingWindowAttentionLayer):
    pass


KNOWN: dict[type, type] = {
    DynamicLayer: _FullLayer,
    DynamicIndexedLayer: _IndexedLayer,
    DynamicSlidingWindowLayer: _WindowLayer,
    LinearAttentionAndFullAttentionLayer: _StateAndFullLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: _StateAndWindowLayer,
    LinearAttentionLayer: LinearAttentionLayer,
}
"""Layers of a cache all of whose tensors are known here, each of them and no descendant, and what
holds the same in place."""

if hasattr(cache_utils, "DummyLayer"):  # of layers without a cache; transformers 5.17 has none
    KNOWN[cache_utils.DummyLayer] = cache_utils.DummyLayer


def unknown_part(cache: object, columns: int) -> str | None:
    """The name of what holds rows in a way that is not known here; None where nothing does.

    Args:
        cache: that a forward has left.
        columns: T, of that forward.
    """
    if type(cache) is not DynamicCache:
        return type(cache).__name__
    for layer in cache.layers:
        name = type(layer).__name__
        if type(layer) not in KNOWN:
            return name
        if getattr(layer, "indexer_position_ids", None) is not None:
            return f"{name}.indexer_position_ids"
        most = _most_columns(layer)
        held = columns if most is None else min(columns, most)
        for part, (tensor, axis) in _with_columns(layer).items():
            if tensor.shape[axis] != held:
                return f"{name}.{part}"
    return None


class CachedRows:
    """The cache of N rows."""

    def __init__(self, like: DynamicCache, num_rows: int) -> None:
        """
        Args:
            like: that a forward of the same model has left, in which `unknown_part` finds nothing.
        """
        self.cache = copy.copy(like)
        self.cache.layers = [_of_rows(layer, num_rows) for layer in like.layers]
        self.resize(0)

    def resize(self, columns: int) -> None:
        """Hold this many columns, the last ones that there are; before them, padding."""
        for layer in self.cache.layers:
            for name, held in _columns(layer).items():
                held.resize(columns)
                setattr(layer, name, held.tensor())
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns

    def replace(self, rows: Tensor, source: DynamicCache, chosen: Tensor) -> None:
        """Rows become copies of rows of another cache.

        Args:
            rows: [R] int64, each once.
            source: that a forward of the same model has left. Of its columns those that are held
                here are enough for these rows.
            chosen: [R] int64, the row of `source` that each becomes.
        """
        for mine, other in zip(self.cache.layers, source.layers, strict=True):
            taken = _with_columns(other)
            for name, held in _columns(mine).items():
                tensor, axis = taken[name]
                count = min(tensor.shape[axis], held.tensor().shape[axis])
                tensor = tensor.narrow(axis, tensor.shape[axis] - count, count)
                held.write(rows, tensor.index_select(0, chosen))
            for (states, number), (others, _) in zip(_states(mine), _states(other), strict=True):
                states[number][rows] = others[number].index_select(0, chosen)

    def clear(self, rows: Tensor) -> None:
        """Rows become such as have read nothing."""
        for layer in self.cache.layers:
            for held in _columns(layer).values():
                held.tensor()[rows] = 0
            for states, number in _states(layer):
                states[number][rows] = 0

    def keep(self, rows: Tensor) -> None:
        """Hold these rows only."""
        for layer in self.cache.layers:
            for name, held in _columns(layer).items():
                held.keep(rows)
                setattr(layer, name, held.tensor())
            for states, number in _states(layer):
                states[number] = states[number].index_select(0, rows)


def _of_rows(layer: object, num_rows: int) -> object:
    """A layer like another, of N rows that have read nothing."""
    alone = object.__new__(KNOWN[type(layer)])
    for name, value in vars(layer).items():
        setattr(alone, name, dict(value) if isinstance(value, dict) else value)

    if isinstance(alone, _InPlace):
        most = _most_columns(layer)
        alone.columns = {
            name: Columns(tensor, num_rows, axis, most)
            for name, (tensor, axis) in _with_columns(layer).items()
        }
    for states, number in _states(alone):
        state = states[number]
        states[number] = state.new_zeros(num_rows, *state.shape[1:])
    return alone


def _columns(layer: object) -> dict[str, Columns]:
    return layer.columns if isinstance(layer, _InPlace) else {}


def _with_columns(layer: object) -> dict[str, tuple[Tensor, int]]:
    """The tensors of a layer that have an entry for each token, and which axis counts them."""
    tensors = {name: (getattr(layer, name, None), axis) for name, axis in COLUMN_AXES.items()}
    return {name: part for name, part in tensors.items() if part[0] is not None}


def _states(layer: object) -> list[tuple[dict[int, Tensor], int]]:
    """The convolution and the recurrent states of a layer, [N, ...] each: what holds it, and its
    number there."""
    if not isinstance(layer, LinearAttentionLayer):
        return []
    homes = (layer.conv_states, layer.recurrent_states)
    return [(home, number) for home in homes for number in home if home[number] is not None]


def _most_columns(layer: object) -> int | None:
    """A token sees itself and so many before it."""
    window = getattr(layer, "sliding_window", None)
    return None if window is None else window - 1
