"""How well a window mixes. In: the lanes of a site, how training takes batches. Out: the rows of one document that meet in a batch.

Two numbers for a row of a batch of B rows: how many of the other ones come from its document, on average,

    1/B (sum_w k_w (k_w - 1) sum_d c_w[d] (c_w[d] - 1) / (n_w (n_w - 1)) + sum_{v != w} k_v k_w sum_d c_v[d] c_w[d] / (n_v n_w)),

where the batch takes k_w of the n_w rows of window w, c_w[d] of which are of document d; and how many would, were all N rows of the site
permuted together, n_d of which are of document d:

    (B - 1) sum_d n_d (n_d - 1) / (N (N - 1)).

The first is exact for the windows of a batch, over all their permutations. It is averaged over batches spread evenly over an epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from gsae.config import TrainConfig
from gsae.errors import ConfigError
from gsae.store.order import LaneOrder, Run, Window
from gsae.store.shards import TarRecord, read_documents, tar_path

MIN_BATCHES, MAX_BATCHES = 8, 64
"""Batches that are looked at; of an epoch of fewer, all."""
MAX_WINDOWS_ROWS = 2**20
"""Rows of windows that are looked at, about, where that does not make them fewer than MIN_BATCHES."""
MAX_SHUFFLED_ROWS = 2**24
"""Rows of a site, the first ones of every lane, whose documents stand for all after a perfect shuffle."""


@dataclass(frozen=True)
class Batching:
    """How training takes batches from a store."""

    batch_rows: int | None = None
    """Rows of a batch, over all lanes; None: the default of train.batch_rows, or the multiple of the store's lanes below it."""
    window_rows: int = TrainConfig.window_rows
    """Rows shuffled together, over all lanes."""
    seed: int = TrainConfig.seed
    """Seed of the order."""

    def rows_of(self, num_lanes: int) -> int:
        """Rows of a batch of a store of so many lanes.

        Raises:
            ConfigError: batch_rows or window_rows do not fit the number of lanes.
        """
        if self.window_rows < num_lanes:
            raise ConfigError(f"--window-rows ({self.window_rows}) is under one row a lane; give at least {num_lanes}")
        below = (self.batch_rows or TrainConfig.batch_rows) // num_lanes * num_lanes
        if self.batch_rows is None:
            return max(below, num_lanes)
        if self.batch_rows != below:
            nearest = f"{below} or {below + num_lanes}" if below else f"{num_lanes}"
            raise ConfigError(f"--batch-rows ({self.batch_rows}) is not a multiple of the store's {num_lanes} lanes; give {nearest}")
        return below


@dataclass(frozen=True)
class Mixing:
    """How well the windows of a site mix."""

    batch_rows: int
    window_rows: int
    seed: int
    num_batches: int
    """Batches that were looked at."""
    same_document_rows: float
    """Other rows of a row's document in its batch, as training takes it."""
    perfect_same_document_rows: float
    """The same after a perfect shuffle of the site."""
    perfect_from_rows: int
    """Rows of the site whose documents give the latter; all, or the first ones of a large store."""

    @property
    def ratio(self) -> float | None:
        """How many times as many as after a perfect shuffle; None where no document has two rows."""
        return self.same_document_rows / self.perfect_same_document_rows if self.perfect_same_document_rows else None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "ratio": self.ratio}


@dataclass(frozen=True, eq=False)
class _Counts:
    """Rows by document; those of documents that are not named are 0."""

    document: Int[np.ndarray, " documents"]
    rows: Float64[np.ndarray, " documents"]
    """Whole numbers, or expected ones."""

    @property
    def total(self) -> float:
        return float(self.rows.sum())

    @property
    def pairs(self) -> float:
        """Ordered pairs of two rows of one document."""
        return float(self.rows @ (self.rows - 1))


def _sum(parts: Sequence[_Counts]) -> _Counts:
    document, place = np.unique(np.concatenate([part.document for part in parts]), return_inverse=True)
    return _Counts(document, np.bincount(place, weights=np.concatenate([part.rows for part in parts])))


@dataclass
class _Batch:
    """What is known of a batch after some of its lanes."""

    taken: int
    """Rows of each lane that come before."""
    pairs_within: float = 0.0
    """Ordered pairs of two rows of one document and window, expected."""
    windows: list[_Counts] = field(default_factory=list)
    """Rows from each window by document, expected."""

    def add(self, rows: int, window: _Counts) -> None:
        """So many rows of a window."""
        num_rows = window.total
        self.pairs_within += rows * (rows - 1) * window.pairs / max(num_rows * (num_rows - 1), 1)
        self.windows.append(_Counts(window.document, window.rows * (rows / num_rows)))

    @property
    def pairs(self) -> float:
        """Ordered pairs of two rows of one document, expected."""
        squares = _sum([_Counts(window.document, window.rows**2) for window in self.windows])
        return self.pairs_within + float((_sum(self.windows).rows ** 2 - squares.rows).sum())


class MixingMeter:
    """Takes the lanes of a site, each once, and has the result. Of the shards only documents are read, of a bounded number of rows.

    Args:
        store: directory of the store.
        site: name of the site.
        num_rows: rows of the site.
        num_lanes: lanes of the store.
        batching: how training takes batches.

    Raises:
        ConfigError: `batching` does not fit the number of lanes.
    """

    def __init__(self, store: Path, site: str, num_rows: int, num_lanes: int, batching: Batching) -> None:
        self._store, self._site, self._num_rows, self._batching = store, site, num_rows, batching
        self._batch_rows = batching.rows_of(num_lanes)
        self._lane_rows = self._batch_rows // num_lanes
        self._window_rows = batching.window_rows // num_lanes
        self._shuffled_rows = max(MAX_SHUFFLED_ROWS // num_lanes, 1)
        in_epoch = max(num_rows // self._batch_rows, 1)
        looked_at = min(in_epoch, MAX_BATCHES, max(MIN_BATCHES, MAX_WINDOWS_ROWS // batching.window_rows))
        self._batches = [_Batch((2 * number + 1) * in_epoch // (2 * looked_at) * self._lane_rows) for number in range(looked_at)]
        self._shuffled: list[_Counts] = []
        self._whole_before: list[int] = []

    def add(self, lane: int, tars: Sequence[TarRecord]) -> None:
        """The next lane: its tars, in shard order.

        Raises:
            StoreError: a tar is missing or damaged.
        """
        counts: dict[Run, _Counts] = {}

        def count(run: Run) -> _Counts:
            if run not in counts:
                documents = read_documents(tar_path(self._store, self._site, lane, run.shard), tars[run.shard], run.first_row, run.num_rows)
                document, rows = np.unique(documents, return_counts=True)
                counts[run] = _Counts(document, rows.astype(np.float64))
            return counts[run]

        order = LaneOrder(lane, [tar.rows for tar in tars], self._window_rows, self._batching.seed)
        for batch in self._batches:
            for window, rows in _windows_of(order, batch.taken, self._lane_rows):
                batch.add(rows, _sum([count(run) for run in order.runs(window)]))
        self._add_first_rows(tars, count)

    def _add_first_rows(self, tars: Sequence[TarRecord], count: Callable[[Run], _Counts]) -> None:
        left = self._shuffled_rows
        for shard, tar in enumerate(tars):
            rows = min(left, tar.rows)
            if rows:
                self._shuffled.append(count(Run(shard, 0, rows)))
            left -= rows
        if sum(tar.rows for tar in tars) > self._shuffled_rows:
            # A lane is in the order of the corpus: of the documents before its last one, all that is in the lane has been read.
            self._whole_before.append(int(self._shuffled[-1].document[-1]))

    def result(self) -> Mixing:
        """How well the site's windows mix, after all its lanes."""
        counts = _sum(self._shuffled)
        whole = counts.document < min(self._whole_before, default=counts.document[-1] + 1)
        if whole.any():
            counts = _Counts(counts.document[whole], counts.rows[whole])
        others = counts.pairs / counts.total  # of the same document, anywhere in the site
        return Mixing(
            self._batch_rows,
            self._batching.window_rows,
            self._batching.seed,
            len(self._batches),
            float(np.mean([batch.pairs for batch in self._batches])) / self._batch_rows,
            (self._batch_rows - 1) * others / max(self._num_rows - 1, 1),
            int(counts.total),
        )


def _windows_of(order: LaneOrder, taken: int, rows: int) -> Iterator[tuple[Window, int]]:
    """The windows that some rows of a lane come from, and how many from each."""
    while rows:
        window, before = order.window_at(taken)
        some = min(rows, window.num_rows - before)
        yield window, some
        taken, rows = taken + some, rows - some
