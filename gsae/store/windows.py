"""Windows of a lane, read from its tars. In: an order, the tars' records. Out: each row of a window where it will be handed out."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from gsae.errors import StoreError
from gsae.store.mirror import mirror_of
from gsae.store.order import LaneOrder, Run, Window
from gsae.store.ring import Ring
from gsae.store.scatter import read_scattered
from gsae.store.shards import HARVEST_AGAIN, TarRecord, open_whole, require_sha256, require_size, short_name, tar_path


@dataclass(frozen=True)
class _Stamp:
    """By this a file is taken for unchanged."""

    bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: int) -> "_Stamp":
        status = os.fstat(file)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class LaneReader:
    """One lane of one site.

    Args:
        store: directory of the store.
        site: name of the site.
        lane: number of the lane.
        tars: what the progress log says of its tars, in shard order.
        order: the order of its rows; it may leave out the last ones.
        verify_shards: whether the SHA-256 of a tar is compared when it is first read. One that changes later is compared anyway.

    Raises:
        StoreError: a tar is missing or has another size than its record.
    """

    def __init__(self, store: Path, site: str, lane: int, tars: Sequence[TarRecord], order: LaneOrder, verify_shards: bool) -> None:
        self.order = order
        self._paths = [tar_path(store, site, lane, shard) for shard in range(len(tars))]
        self._tars = tars
        if mirror_of(store) is None:  # which holds few of them
            for path, tar in zip(self._paths, tars, strict=True):
                require_size(path, tar)
        self._first_rows = list(accumulate((tar.rows for tar in tars), initial=0))
        self._verify = verify_shards
        self._stamps: dict[int, _Stamp] = {}

    def load(self, window: Window, taken: int, skip: int, ring: Ring, ring_lane: int) -> None:
        """Read one window.

        Args:
            window: which one.
            taken: rows of the lane that the ring had or has before the first row of the window; negative when the window began earlier.
            skip: rows of the window, as they are handed out, that are not wanted.
            ring: where the rows go.
            ring_lane: which of the ring's lanes this is.

        Raises:
            StoreError: a tar is gone, cannot be read, or is not the one of the record.
        """
        handed_out = np.empty(window.num_rows, dtype=np.int64)
        handed_out[self.order.permutation(window).numpy()] = np.arange(window.num_rows)
        done = 0
        for run in self.order.runs(window):
            its = handed_out[done : done + run.num_rows]
            self._read(run, ring, ring.places(ring_lane, taken + its), its >= skip)
            done += run.num_rows

    def _read(self, run: Run, ring: Ring, places: Int64[np.ndarray, " rows"], wanted: np.ndarray) -> None:
        tar = self._tars[run.shard]
        scales: list[Float32[np.ndarray, " rows"]] = []
        addresses = np.where(wanted, ring.addresses(places), ring.nowhere)
        with self._open(run.shard) as file:
            contexts = list(_contexts(tar, run))
            for offset, pieces, sizes in _stretches(tar, contexts, addresses, ring):
                read_scattered(file, offset, pieces, sizes)
            if tar.scale_offsets:
                scales = [_read_scales(file, tar.scale_offsets[context] + 4 * row, count) for context, row, count in contexts]
        first_row = self._first_rows[run.shard] + run.first_row
        row_scale = np.concatenate(scales)[wanted] if scales else None
        ring.note(places[wanted], np.arange(first_row, first_row + run.num_rows)[wanted], row_scale)

    @contextmanager
    def _open(self, shard: int) -> Iterator[int]:
        """The tar of a shard, as its record says it is, for as long as it is read."""
        path, tar = self._paths[shard], self._tars[shard]
        try:
            with open_whole(path, tar) as content:
                file = content.fileno()
                stamp = _Stamp.of(file)
                if self._stamps.get(shard) != stamp:
                    if self._verify or shard in self._stamps:
                        require_sha256(path, content, tar)
                    self._stamps[shard] = stamp
                yield file
                if _Stamp.of(file) != stamp:
                    raise StoreError(f"shard {short_name(path)} was changed while it was read; {HARVEST_AGAIN}")
        except EOFError:
            raise StoreError(f"shard {short_name(path)} was cut off while it was read; {HARVEST_AGAIN}") from None
        except OSError as error:
            raise StoreError(f"shard {short_name(path)} in {path.parent.parent} cannot be read: {error.strerror}") from error


def _contexts(tar: TarRecord, run: Run) -> Iterator[tuple[int, int, int]]:
    """The contexts in which a run's rows stand: each one's ordinal, the first row in it, and the rows."""
    first, end = 0, run.first_row + run.num_rows
    for context, num_rows in enumerate(tar.context_rows):
        low, high = max(first, run.first_row), min(first + num_rows, end)
        if low < high:
            yield context, low - first, high - low
        first += num_rows


def _stretches(
    tar: TarRecord, contexts: Sequence[tuple[int, int, int]], addresses: Int64[np.ndarray, " rows"], ring: Ring
) -> Iterator[tuple[int, Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"]]]:
    """What to read at once: an offset, addresses, sizes. What stands between the rows of two contexts is little, and is read too."""
    offsets = np.array([tar.offsets[context] + row * ring.row_bytes for context, row, _ in contexts])
    counts = np.array([count for _, _, count in contexts])
    first_rows = np.cumsum(counts) - counts
    between = offsets[1:] - offsets[:-1] - counts[:-1] * ring.row_bytes
    for group in np.split(np.arange(len(counts)), 1 + np.flatnonzero(between > ring.scratch_bytes)):
        begin, end = first_rows[group[0]], first_rows[group[-1]] + counts[group[-1]]
        gaps = first_rows[group[1:]] - begin
        pieces = np.insert(addresses[begin:end], gaps, ring.nowhere)
        yield int(offsets[group[0]]), pieces, np.insert(np.full(end - begin, ring.row_bytes), gaps, between[group[:-1]])


def _read_scales(file: int, offset: int, count: int) -> Float32[np.ndarray, " rows"]:
    content = os.pread(file, 4 * count, offset)
    if len(content) < 4 * count:
        raise EOFError
    return np.frombuffer(content, dtype=np.float32)
