"""The endless sequence of one lane's rows. In: the lane's tars. Out: any window of it, from (seed, epoch, lane, window) alone.

    shards 0 1 2 ... --shuffled by epoch--> rows of the epoch --cut--> windows --each permuted--> rows as they are handed out

An epoch has each row of the lane once. A window never spans epochs, so the last one of an epoch may be short.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from gsae.store.encoding import Encoded
from gsae.store.shards import TarRecord, map_tar, require_size, tar_path


@dataclass(frozen=True)
class Place:
    """Where a row stands in the sequence."""

    epoch: int
    window: int
    """Index of the window in its epoch."""
    offset: int
    """Rows of the window that come before."""


@dataclass(frozen=True, eq=False)
class Window:
    """Rows of a lane that are shuffled together in memory."""

    rows: Encoded
    """Activations as they stand in the shards."""
    row: Int[Tensor, " rows"]
    """The ordinal of each in its lane, counted over the shards in their own order."""
    order: Int[Tensor, " rows"]
    """The permutation in which they are handed out."""


class LaneReader:
    """One lane of one site.

    Args:
        store: directory of the store.
        site: name of the site.
        lane: number of the lane.
        tars: what the progress log says of its tars, in shard order; at least one row in all.
        storage: name of the storage type.
        d_model: width of a row.
        window_rows: rows of a window of this lane.
        seed: seed of the order.
        verify_shards: whether the SHA-256 of a tar is compared when it is first read.

    Raises:
        StoreError: a tar is missing or has another size than its record.
    """

    def __init__(
        self,
        store: Path,
        site: str,
        lane: int,
        tars: Sequence[TarRecord],
        *,
        storage: str,
        d_model: int,
        window_rows: int,
        seed: int,
        verify_shards: bool,
    ) -> None:
        self._paths = [tar_path(store, site, lane, shard) for shard in range(len(tars))]
        self._tars = tars
        for path, tar in zip(self._paths, tars, strict=True):
            require_size(path, tar)
        self._first_rows = list(accumulate((tar.rows for tar in tars), initial=0))
        self._lane = lane
        self._storage = storage
        self._d_model = d_model
        self._window_rows = window_rows
        self._seed = seed
        self._unverified = set(range(len(tars))) if verify_shards else set()

    @property
    def num_rows(self) -> int:
        """Rows of the lane, and of each of its epochs."""
        return self._first_rows[-1]

    def place(self, rows_taken: int) -> Place:
        """Where the row stands that comes after `rows_taken` others."""
        epoch, row = divmod(rows_taken, self.num_rows)
        window, offset = divmod(row, self._window_rows)
        return Place(epoch, window, offset)

    def place_after(self, place: Place) -> Place:
        """Where the window after that of `place` begins."""
        if (place.window + 1) * self._window_rows < self.num_rows:
            return Place(place.epoch, place.window + 1, 0)
        return Place(place.epoch + 1, 0, 0)

    def load(self, epoch: int, window: int) -> Window:
        """Read one window.

        Raises:
            StoreError: a tar is gone, or its SHA-256 differs from the record's.
        """
        begin = window * self._window_rows
        end = min(begin + self._window_rows, self.num_rows)
        rows = Encoded.empty(end - begin, self._d_model, self._storage)
        row = torch.empty(end - begin, dtype=torch.int64)
        first = 0  # of the shard, counted over the rows of the epoch
        for shard in self._shard_order(epoch):
            shard_rows = self._tars[shard].rows
            low, high = max(begin, first), min(end, first + shard_rows)
            if low < high:
                self._copy(shard, low - first, rows[low - begin : high - begin])
                first_row = self._first_rows[shard] + low - first
                row[low - begin : high - begin] = torch.arange(first_row, first_row + high - low)
            first += shard_rows
        order = torch.randperm(end - begin, generator=self._generator("rows", epoch, window))
        return Window(rows, row, order)

    def _copy(self, shard: int, skip: int, target: Encoded) -> None:
        """Copy rows skip, skip + 1, ... of a shard until `target` is full."""
        verify = shard in self._unverified
        contexts = map_tar(self._paths[shard], self._tars[shard], self._storage, self._d_model, verify)
        self._unverified.discard(shard)
        filled = 0
        for context in contexts:
            part = context[skip : skip + len(target) - filled]
            target[filled : filled + len(part)].copy_(part)
            filled += len(part)
            skip = max(0, skip - len(context))

    def _shard_order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(len(self._tars), generator=self._generator("shards", epoch)).tolist()
        return order

    def _generator(self, *parts: str | int) -> torch.Generator:
        named = "/".join(str(part) for part in ("stream", self._seed, self._lane, *parts))
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "little") >> 1)
