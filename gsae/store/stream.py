"""The rows a rank trains on. In: a store, a site, the rank's lanes. Out: an endless, exactly repeatable sequence of local batches.

A batch takes the same number of rows from every lane, so what all ranks of a group see together does not depend on how many
they are, and the position of the whole stream is one number: the rows taken.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gsae.errors import ConfigError, StoreError
from gsae.store.encoding import Encoded
from gsae.store.manifest import Manifest, load
from gsae.store.progress import progress_sha256, read_records, require_complete, require_rows
from gsae.store.shards import TarRecord, read_tar, tar_path
from gsae.store.windows import LaneReader, Place, Window


@dataclass(frozen=True, eq=False)
class Batch:
    """A rank's part of a batch: as many rows of each of its lanes, one lane after another."""

    x: Shaped[Tensor, "local_rows d_model"]
    """Activations in the storage type, on the CPU; `decode` gives their values."""
    lane: Int[Tensor, " local_rows"]
    """The lane of each row."""
    row: Int[Tensor, " local_rows"]
    """The ordinal of each row in its lane; with the lane it names the row (see `provenance`)."""
    row_scale: Float[Tensor, " local_rows"] | None = None
    """Of int8 rows, on the CPU."""

    def decode(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "local_rows d_model"]:
        """The activations on a device, in the type of training; they travel there as they are stored."""
        return Encoded(self.x, self.row_scale).decode(device, dtype)


class _LaneQueue:
    """One lane's windows as they come: the one in use, and the next one, which loads meanwhile."""

    def __init__(self, reader: LaneReader, pool: ThreadPoolExecutor, rows_taken: int) -> None:
        self._reader = reader
        self._pool = pool
        self._place = reader.place(rows_taken)
        self._current = self._submit(self._place)
        self._next: Future[Window] | None = None

    def load_next(self) -> None:
        """Begin to load the window after the current one."""
        self._next = self._submit(self._reader.place_after(self._place))

    def take(self, rows: Encoded, row: Int[Tensor, " rows"]) -> None:
        """Fill `rows` and `row`, their ordinals, with the next ones."""
        filled = 0
        while filled < len(row):
            window = self._current.result()
            chosen = window.order[self._place.offset : self._place.offset + len(row) - filled]
            rows[filled : filled + len(chosen)].take_(window.rows, chosen)
            torch.index_select(window.row, 0, chosen, out=row[filled : filled + len(chosen)])
            filled += len(chosen)
            self._place = Place(self._place.epoch, self._place.window, self._place.offset + len(chosen))
            if self._place.offset == len(window.row):
                self._advance()

    def cancel(self) -> None:
        """Give up the loads that have not begun."""
        self._current.cancel()
        if self._next is not None:
            self._next.cancel()

    def _advance(self) -> None:
        assert self._next is not None
        self._place = self._reader.place_after(self._place)
        self._current = self._next
        self.load_next()

    def _submit(self, place: Place) -> "Future[Window]":
        return self._pool.submit(self._reader.load, place.epoch, place.window)


class Stream:
    """Endless batches from some lanes of a site; use it in a `with` block, or `close` it.

    Args:
        store: directory of the store.
        site: name of the site.
        lanes: the lanes of this rank; only their tars are opened.
        batch_rows: rows of a batch over all lanes of the store; a multiple of their number.
        window_rows: rows shuffled together, over all lanes of the store. Twice that is held in memory by all ranks together.
        seed: seed of the order.
        verify_shards: whether the SHA-256 of a tar is compared when it is first read.

    Raises:
        StoreError: the store is not whole, has no such site, or a lane has no rows.
        ConfigError: batch_rows or window_rows do not fit the number of lanes.
    """

    def __init__(
        self, store: Path, site: str, lanes: Sequence[int], batch_rows: int, window_rows: int, seed: int, verify_shards: bool
    ) -> None:
        manifest = load(store)
        if site not in manifest.sites:
            raise StoreError(f"store {store} has no site {site}, only {', '.join(manifest.sites)}; harvest it, or train another")
        _require_fit(batch_rows, window_rows, manifest.num_lanes)
        self._lanes = sorted(lanes)
        self._num_lanes = manifest.num_lanes
        self._lane_rows = batch_rows // manifest.num_lanes
        self._d_model = manifest.d_model
        self._storage = manifest.dtype
        self._readers = [
            LaneReader(
                store,
                site,
                lane,
                _tars_of_lane(store, manifest, site, lane),
                storage=manifest.dtype,
                d_model=manifest.d_model,
                window_rows=window_rows // manifest.num_lanes,
                seed=seed,
                verify_shards=verify_shards,
            )
            for lane in self._lanes
        ]
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"windows of {site}")
        self._queues: list[_LaneQueue] = []
        self._rows_taken = 0

    @property
    def rows_taken(self) -> int:
        """Rows taken so far over all lanes of the store: the position to `seek` to."""
        return self._rows_taken

    def seek(self, rows_taken: int) -> None:
        """Continue as if so many rows had been taken over all lanes of the store; a multiple of their number."""
        if rows_taken % self._num_lanes:
            raise ValueError(f"{rows_taken} rows are not as many from each of {self._num_lanes} lanes")
        self._drop_queues()
        self._rows_taken = rows_taken

    def next_batch(self) -> Batch:
        """The next batch.

        Raises:
            StoreError: a tar is gone or damaged.
        """
        if not self._queues:
            self._queues = [_LaneQueue(reader, self._pool, self._rows_taken // self._num_lanes) for reader in self._readers]
            for queue in self._queues:
                queue.load_next()
        local_rows = self._lane_rows * len(self._lanes)
        rows = Encoded.empty(local_rows, self._d_model, self._storage)
        row = torch.empty(local_rows, dtype=torch.int64)
        for index, queue in enumerate(self._queues):
            its_rows = slice(index * self._lane_rows, (index + 1) * self._lane_rows)
            queue.take(rows[its_rows], row[its_rows])
        self._rows_taken += self._lane_rows * self._num_lanes
        return Batch(rows.x, torch.tensor(self._lanes).repeat_interleave(self._lane_rows), row, rows.row_scale)

    def close(self) -> None:
        """Stop loading. The stream cannot be used afterwards."""
        self._drop_queues()
        self._pool.shutdown()

    def _drop_queues(self) -> None:
        for queue in self._queues:
            queue.cancel()
        self._queues = []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Provenance:
    """Where a row comes from."""

    shard: int
    context: int
    """Ordinal of the context in the shard."""
    document: int
    """Index of the document among those of the training split."""
    position: int
    """Position in its segment."""
    token: int
    """Token id."""


def provenance(store: Path, site: str, lane: int, row: int) -> Provenance:
    """Where row `row` of a lane comes from.

    Raises:
        StoreError: the lane has no such row.
    """
    rest = row
    for record in read_records(store, lane):
        tar = record.sites[site].tar
        if rest >= tar.rows:
            rest -= tar.rows
            continue
        for context, member in enumerate(read_tar(tar_path(store, site, lane, record.shard))):
            rows = member.rows
            if rest < len(rows.x):
                return Provenance(record.shard, context, int(rows.document[rest]), int(rows.position[rest]), int(rows.token[rest]))
            rest -= len(rows.x)
    raise StoreError(f"lane {lane} of {site} in {store} has no row {row}")


def _tars_of_lane(store: Path, manifest: Manifest, site: str, lane: int) -> list[TarRecord]:
    records = read_records(store, lane)
    require_complete(store, lane, records)
    if progress_sha256(store, lane) != manifest.lanes[lane].progress_sha256:
        raise StoreError(
            f"progress log of lane {lane} in {store} was changed after the manifest was written; run gsae verify {store} --repair"
        )
    tars = [record.sites[site].tar for record in records]
    require_rows(site, lane, manifest.num_lanes, sum(tar.rows for tar in tars))
    return tars


def _require_fit(batch_rows: int, window_rows: int, num_lanes: int) -> None:
    if batch_rows % num_lanes:
        below = batch_rows - batch_rows % num_lanes
        nearest = f"{below} or {below + num_lanes}" if below else f"{num_lanes}"
        raise ConfigError(f"train.batch_rows ({batch_rows}) is not a multiple of the store's {num_lanes} lanes; set it to {nearest}")
    if window_rows < num_lanes:
        raise ConfigError(f"train.window_rows ({window_rows}) is under one row a lane; set it to at least {num_lanes}")
