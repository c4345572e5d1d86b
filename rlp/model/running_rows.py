"""Rows of tokens that a model reads on, a token in each at a time, and each begun anew on its own.

    ReadRows      prefixes that were run once, side by side
    RunningRows   N rows; each begins as a copy of a prefix, whenever that is

Which token comes next is not known here.

Dimensions
    N  rows that run;  R  prefixes;  T  columns;  V  vocabulary
"""

import numpy as np
import torch
from torch import Tensor

from rlp.model.cached_rows import CachedRows, unknown_part
from rlp.model.layout import padded_rows
from rlp.model.policy import Policy

MORE_COLUMNS = 64
"""Columns of the mask that are made ahead."""

SHRUNK = 7 / 8
"""The share of all columns below which those of the rows that go on are held alone."""


class ReadRows:
    """Prefixes, run once."""

    def __init__(self, policy: Policy, prefixes: list[np.ndarray]) -> None:
        """One forward.

        Args:
            prefixes: [tokens] int64 each; one may be empty.
        """
        tokens, mask = padded_rows(prefixes, left=True)
        if tokens.shape[1] == 0:
            tokens, mask = (
                np.zeros((len(prefixes), 1), np.int64),
                np.zeros((len(prefixes), 1), bool),
            )
        on_device = [torch.from_numpy(part).to(policy.device) for part in (tokens, mask)]
        self.length = np.array([len(prefix) for prefix in prefixes])
        """[R] int64, tokens of each."""
        self.columns = tokens.shape[1]
        """T, of the longest; at least one."""
        _, self.cache = policy.prefill(*on_device)
        self.unknown = unknown_part(self.cache, self.columns)
        """Of the model's cache, what can not be begun anew in one row alone."""


class RunningRows:
    """N rows that run. All calls stand within `Policy.sampling`."""

    def __init__(self, policy: Policy, num_rows: int) -> None:
        self._policy = policy
        self._position = torch.zeros(num_rows, dtype=torch.int64, device=policy.device)
        self._goes_on = np.zeros(num_rows, dtype=bool)
        # Tokens of each row that goes on, else 0.
        self._length, self._columns = np.zeros(num_rows, dtype=np.int64), 0
        self._mask = self._position[:, None]
        self._rows: CachedRows | None = None
        self._cache: object = None

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to run."""
        return self._cache is not None

    def begin(self, rows: list[int], read: ReadRows, chosen: list[int]) -> None:
        """Some rows become copies of prefixes.

        Args:
            rows: which, each once. Where `read.unknown` names something, no other row goes on, and
                `read` is used up.
            chosen: the prefix of each.
        """
        assert read.unknown is None or not self._goes_on.any(), "these rows begin together"
        if read.unknown is None:
            self._replace(rows, read, chosen)
        else:
            of_all = np.zeros(len(self._length), dtype=np.int64)
            of_all[rows] = chosen
            self._cache, self._columns = read.cache, read.columns
            self._length[rows] = read.length[chosen]
            self._policy.fork(self._cache, self._on_device(of_all))
        self._goes_on[rows] = True
        self._position[self._on_device(rows)] = self._on_device(read.length[chosen])
        self._make_mask()

    def next(self, token: Tensor, going: Tensor) -> Tensor:
        """One more token in every row.

        Args:
            token: [N] int64.
            going: [N] bool. The position of other rows stays; what they compute means nothing.

        Returns:
            [N, V] float32, the logits after it.
        """
        if self._columns == self._mask.shape[1]:
            self._fit()
        self._columns += 1
        self._length += self._goes_on
        mask = self._mask[:, : self._columns]
        logits = self._policy.decode(token, mask, self._position, self._cache)
        self._position += going
        return logits

    def end(self, rows: list[int]) -> None:
        """Some rows go no further, until they begin anew."""
        self._goes_on[rows], self._length[rows] = False, 0
        self._position[self._on_device(rows)] = 0
        self._fit()

    def keep(self, rows: list[int]) -> None:
        """Hold these rows only, in this order."""
        index = self._on_device(rows)
        self._goes_on, self._length = self._goes_on[rows], self._length[rows]
        self._position = self._position[index]
        if self._rows is None:
            self._policy.fork(self._cache, index)
        else:
            self._rows.keep(index)
        self._make_mask()

    def _replace(self, rows: list[int], read: ReadRows, chosen: list[int]) -> None:
        """`begin` beside rows that go on."""
        if self._rows is None:
            self._rows = CachedRows(read.cache, len(self._length))
            self._cache = self._rows.cache
        self._length[rows] = read.length[chosen]
        self._columns = max(1, int(self._length.max()))
        self._rows.resize(self._columns)

        self._rows.replace(self._on_device(rows), read.cache, self._on_device(chosen))
        # Where a prefill has one column, or one row, some scans take padding for a token.
        empty = [row for row in rows if not self._length[row]]
        self._rows.clear(self._on_device(empty))

    def _fit(self) -> None:
        """Let go of columns that no row needs, and mask as many as come next."""
        longest = max(1, int(self._length.max()))
        if self._rows is not None and longest <= SHRUNK * self._columns:
            self._columns = longest
            self._rows.resize(longest)
        self._make_mask()

    def _make_mask(self) -> None:
        """[N, T] int64, 1 on the tokens of a row: its last columns, and all that come."""
        first = self._on_device(self._columns - self._length)
        column = torch.arange(self._columns + MORE_COLUMNS, device=first.device)
        self._mask = (column >= first[:, None]).long()

    def _on_device(self, numbers: list[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(numbers, dtype=np.int64), device=self._policy.device)
