"""The order in which a lane's rows are handed out. In: its shards' rows, a seed. Out: windows, from (seed, epoch, lane, window) alone.

    shards 0 1 2 ... --shuffled by epoch--> rows of the epoch --cut--> windows --each permuted--> rows as they are handed out

An epoch has each row of the lane once. A window never spans epochs, so the last one of an epoch may be short.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Rows of a lane that are shuffled together in memory."""

    epoch: int
    index: int
    """Of the window in its epoch."""
    num_rows: int


@dataclass(frozen=True)
class Run:
    """Rows of a window that stand one after another in a shard."""

    shard: int
    first_row: int
    """In the shard."""
    num_rows: int


class LaneOrder:
    """The endless sequence of one lane's rows; it reads nothing.

    Args:
        lane: number of the lane.
        shard_rows: rows of its shards, in their own order; at least one in all.
        window_rows: rows of a window of this lane.
        seed: seed of the order.
    """

    def __init__(self, lane: int, shard_rows: Sequence[int], window_rows: int, seed: int) -> None:
        self._lane = lane
        self._shard_rows = shard_rows
        self._window_rows = window_rows
        self._seed = seed
        self.num_rows = sum(shard_rows)
        """Rows of the lane, and of each of its epochs."""

    def window(self, epoch: int, index: int) -> Window:
        """A window of an epoch."""
        return Window(epoch, index, min(self._window_rows, self.num_rows - index * self._window_rows))

    def window_at(self, rows_taken: int) -> tuple[Window, int]:
        """The window of the row that comes after `rows_taken` others, and the rows of it that come before."""
        epoch, row = divmod(rows_taken, self.num_rows)
        index, offset = divmod(row, self._window_rows)
        return self.window(epoch, index), offset

    def window_after(self, window: Window) -> Window:
        """The next window."""
        if (window.index + 1) * self._window_rows < self.num_rows:
            return self.window(window.epoch, window.index + 1)
        return self.window(window.epoch + 1, 0)

    def runs(self, window: Window) -> Iterator[Run]:
        """What a window is made of, in the order in which its permutation counts its rows; none of them is empty."""
        begin = window.index * self._window_rows
        end, first = begin + window.num_rows, 0  # of the shard, counted over the rows of the epoch
        for shard in self._shard_order(window.epoch):
            low, high = max(begin, first), min(end, first + self._shard_rows[shard])
            if low < high:
                yield Run(shard, low - first, high - low)
            first += self._shard_rows[shard]

    def permutation(self, window: Window) -> Int[Tensor, " rows"]:
        """The places in a window of the rows as they are handed out."""
        return torch.randperm(window.num_rows, generator=self._generator("rows", window.epoch, window.index))

    def _shard_order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(len(self._shard_rows), generator=self._generator("shards", epoch)).tolist()
        return order

    def _generator(self, *parts: str | int) -> torch.Generator:
        named = "/".join(str(part) for part in ("stream", self._seed, self._lane, *parts))
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "little") >> 1)
