"""The rows a rank trains on. In: a store, a site, the rank's lanes. Out: an endless, exactly repeatable sequence of local batches.

    tars --several at once, each row by one copy to where it is handed out--> ring of two windows --> batches, as views

A batch takes the same number of rows from every lane, so what all ranks of a group see together does not depend on how many
they are, and the position of the whole stream is one number: the rows taken.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
from gsae.store.order import LaneOrder
from gsae.store.origin import Origin, find_origins
from gsae.store.progress import progress_sha256, read_records, require_complete, require_rows
from gsae.store.ring import Ring
from gsae.store.shards import TarRecord
from gsae.store.windows import LaneReader


@dataclass(frozen=True, eq=False)
class Batch:
    """A rank's part of a batch: as many rows of each of its lanes, one lane after another. Good until the stream is asked for the next."""

    x: Shaped[Tensor, "local_rows d_model"]
    """Activations in the storage type, on the CPU; `decode` gives their values."""
    lane: Int[Tensor, " local_rows"]
    """The lane of each row."""
    row: Int[Tensor, " local_rows"]
    """The ordinal of each row in its lane; with the lane it names the row (see `find_origins`)."""
    row_scale: Float[Tensor, " local_rows"] | None = None
    """Of int8 rows, on the CPU."""

    def decode(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "local_rows d_model"]:
        """The activations on a device, in the type of training; they travel there as they are stored."""
        return Encoded(self.x, self.row_scale).decode(device, dtype)

    def clone(self) -> "Batch":
        """A copy that stays."""
        return Batch(self.x.clone(), self.lane, self.row.clone(), None if self.row_scale is None else self.row_scale.clone())


class _LaneQueue:
    """One lane's windows on their way to the ring, in order."""

    def __init__(self, reader: LaneReader, ring: Ring, ring_lane: int, rows_taken: int) -> None:
        self._reader, self._ring, self._ring_lane = reader, ring, ring_lane
        self._loading: deque[tuple[int, Future[None]]] = deque()
        self._window, self._skip = reader.order.window_at(rows_taken)
        self._begin = -self._skip
        self.loaded = 0
        """Rows that the ring has had, from where it began."""

    @property
    def next_end(self) -> int:
        """Rows that the ring will have had after the next window to be loaded."""
        return self._begin + self._window.num_rows

    def load_next(self, pool: ThreadPoolExecutor) -> None:
        """Begin to load it."""
        future = pool.submit(self._reader.load, self._window, self._begin, self._skip, self._ring, self._ring_lane)
        self._loading.append((self.next_end, future))
        self._begin, self._skip, self._window = self.next_end, 0, self._reader.order.window_after(self._window)

    def wait_for(self, rows: int) -> None:
        """Wait until the ring has had so many."""
        while self.loaded < rows:
            end, future = self._loading[0]
            future.result()  # of a window that could not be loaded, whenever its rows are asked for
            self._loading.popleft()
            self.loaded = end

    def give_up(self) -> None:
        """Leave the ring alone from now on."""
        wait([future for _, future in self._loading if not future.cancel()])


class Stream:
    """Endless batches from some lanes of a site; use it in a `with` block, or `close` it.

    Memory is that of two windows and a batch. A window is loaded as soon as there is room for it, so while the rows of one are taken,
    the next one is on its way; no position costs more than the window it is in.

    Args:
        store: directory of the store.
        site: name of the site.
        lanes: the lanes of this rank; only their tars are opened.
        batch_rows: rows of a batch over all lanes of the store; a multiple of their number.
        window_rows: rows shuffled together, over all lanes of the store.
        seed: seed of the order.
        verify_shards: whether the SHA-256 of a tar is compared when it is first read.
        max_rows: leave out the last rows of each lane, so that at most so many are used over all lanes of the store; None uses all.
        read_threads: lanes that are read at once.
        pinned: whether batches lie where a GPU can copy them from while it computes.

    Raises:
        StoreError: the store is not whole, has no such site, or a lane has no rows.
        ConfigError: batch_rows, window_rows or max_rows do not fit the number of lanes.
    """

    def __init__(
        self,
        store: Path,
        site: str,
        lanes: Sequence[int],
        batch_rows: int,
        window_rows: int,
        seed: int,
        verify_shards: bool,
        max_rows: int | None = None,
        read_threads: int = 4,
        pinned: bool = False,
    ) -> None:
        manifest = load(store)
        if site not in manifest.sites:
            raise StoreError(f"store {store} has no site {site}, only {', '.join(manifest.sites)}; harvest it, or train another")
        _require_fit(batch_rows, window_rows, max_rows, manifest.num_lanes)
        self._store, self._site = store, site
        self._num_lanes = manifest.num_lanes
        self._lane_rows = batch_rows // manifest.num_lanes
        lane_window = window_rows // manifest.num_lanes
        self._readers = []
        for lane in sorted(lanes):
            tars = _tars_of_lane(store, manifest, site, lane)
            shard_rows = first_rows([tar.rows for tar in tars], lane_limit(max_rows, lane, manifest.num_lanes))
            order = LaneOrder(lane, shard_rows, lane_window, seed)
            self._readers.append(LaneReader(store, site, lane, tars[: len(shard_rows)], order, verify_shards))
        self._lane = torch.tensor(sorted(lanes)).repeat_interleave(self._lane_rows)
        lane_window = min(lane_window, max(reader.order.num_rows for reader in self._readers))
        # Two windows; or one and a batch, of windows that are smaller than a batch.
        num_slots = -(-(lane_window + max(lane_window, self._lane_rows)) // self._lane_rows)
        self._ring = Ring(num_slots, len(self._readers), self._lane_rows, manifest.d_model, manifest.dtype, pinned)
        self._pool = ThreadPoolExecutor(read_threads, thread_name_prefix=f"windows of {site}")
        self._queues: list[_LaneQueue] = []
        self._begin = self._rows_taken = 0

    @property
    def rows_taken(self) -> int:
        """Rows taken so far over all lanes of the store: the position to `seek` to."""
        return self._rows_taken

    def seek(self, rows_taken: int) -> None:
        """Continue as if so many rows had been taken over all lanes of the store; a multiple of their number."""
        if rows_taken % self._num_lanes:
            raise ValueError(f"{rows_taken} rows are not as many from each of {self._num_lanes} lanes")
        self._drop_queues()
        self._begin = self._rows_taken = rows_taken

    def next_batch(self) -> Batch:
        """The next batch; its tensors are views of memory that the batch after it may overwrite.

        Raises:
            StoreError: a tar is gone or damaged.
        """
        if not self._queues:
            taken = self._begin // self._num_lanes
            self._queues = [_LaneQueue(reader, self._ring, place, taken) for place, reader in enumerate(self._readers)]
        number = (self._rows_taken - self._begin) // (self._num_lanes * self._lane_rows)
        self._load(number * self._lane_rows)
        for queue in self._queues:
            queue.wait_for((number + 1) * self._lane_rows)
        self._rows_taken += self._lane_rows * self._num_lanes
        x, row, row_scale = self._ring.slot(number)
        return Batch(x, self._lane, row, row_scale)

    def origins(self, batch: Batch) -> list[Origin]:
        """Where each row of a batch comes from; its values are not read.

        Raises:
            StoreError: a tar is gone or damaged.
        """
        return find_origins(self._store, self._site, batch.lane, batch.row)

    def close(self) -> None:
        """Stop loading. The stream cannot be used afterwards."""
        self._drop_queues()
        self._pool.shutdown()

    def _load(self, used: int) -> None:
        """Begin to load what there is room for, now that `used` rows of each lane are not needed any more; a window a lane in turns."""
        end = used + self._ring.lane_capacity
        while waiting := [queue for queue in self._queues if queue.next_end <= end]:
            for queue in waiting:
                queue.load_next(self._pool)

    def _drop_queues(self) -> None:
        for queue in self._queues:
            queue.give_up()
        self._queues = []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


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


def lane_limit(max_rows: int | None, lane: int, num_lanes: int) -> int | None:
    """How many rows of a lane are used when at most `max_rows` of the store are: the lanes share them evenly."""
    return None if max_rows is None else max_rows // num_lanes + (lane < max_rows % num_lanes)


def first_rows(shard_rows: Sequence[int], limit: int | None) -> list[int]:
    """Rows of the first shards of a lane, of the last one only so many that there are at most `limit` in all; None takes all."""
    rest, taken = limit, []
    for rows in shard_rows:
        if rest == 0:
            break
        taken.append(rows if rest is None else min(rows, rest))
        rest = None if rest is None else rest - taken[-1]
    return taken


def _require_fit(batch_rows: int, window_rows: int, max_rows: int | None, num_lanes: int) -> None:
    if batch_rows % num_lanes:
        below = batch_rows - batch_rows % num_lanes
        nearest = f"{below} or {below + num_lanes}" if below else f"{num_lanes}"
        raise ConfigError(f"train.batch_rows ({batch_rows}) is not a multiple of the store's {num_lanes} lanes; set it to {nearest}")
    if window_rows < num_lanes:
        raise ConfigError(f"train.window_rows ({window_rows}) is under one row a lane; set it to at least {num_lanes}")
    if max_rows is not None and max_rows < num_lanes:
        raise ConfigError(f"train.max_rows ({max_rows}) is under one row a lane; set it to at least {num_lanes}")
