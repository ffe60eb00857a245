"""Shards written while the LLM computes the next rows. In: harvested batches of a shard. Out: its tars, then its line in the log.

Each site's tars are written by a thread of its own, as the batches come; a shard is logged when all of its tars are in place. The ranks'
main threads wait only when the disk is slower than the LLM, so memory is bounded by batches, however large a shard is.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gsae.errors import StoreError
from gsae.harvest.pending import PendingShard
from gsae.harvest.rows import HarvestedBatch
from gsae.heartbeat import Heartbeat
from gsae.store.progress import ShardRecord, SiteRecord
from gsae.store.shards import open_tar, short_name, tar_path
from gsae.store.statistics import no_rows

MAX_WAITING_BATCHES = 4
"""LLM batches that may wait in memory to be written."""


class ShardWriter:
    """Writes the shards of a rank, one after another: `begin`, `add` the batches, `end`.

    Use it in a `with` block. A block that ends well ends when all is on the disk; one that ends by an exception leaves logged shards
    only, and nothing else.

    Args:
        store: directory of the store.
        sites: names of its sites.
        d_model: width of a row.
        beats: this rank's sign of life. It is given before a shard is logged, so that a rank that was given up logs no more, and counts
            `shards` and `bytes` afterwards.
    """

    def __init__(self, store: Path, sites: Sequence[str], d_model: int, beats: Heartbeat) -> None:
        self._store = store
        self._sites = [_SiteWriter(store, site, d_model) for site in sites]
        self._logging = ThreadPoolExecutor(1, thread_name_prefix="progress logs")
        self._beats = beats
        self._waiting: deque[list[Future[Any]]] = deque()
        self._unlogged: list[PendingShard] = []
        self._has_failed = False

    def begin(self, shard: PendingShard) -> None:
        """The batches that follow are this shard's."""
        self._unlogged.append(shard)
        self._wait_for([writer.begin(shard.log.lane, shard.index) for writer in self._sites])

    def add(self, batch: HarvestedBatch) -> None:
        """The next rows of the shard; waits while too many batches are not written yet.

        Raises:
            StoreError: writing an earlier one failed.
        """
        self._wait_for([writer.add(batch) for writer in self._sites])

    def end(self) -> None:
        """The shard is complete."""
        parts = {writer.site: writer.end() for writer in self._sites}
        self._wait_for([*parts.values(), self._logging.submit(self._log, self._unlogged[-1], parts)])

    def _log(self, shard: PendingShard, parts: dict[str, "Future[SiteRecord]"]) -> None:
        if self._has_failed:
            raise _AbandonedError
        self._has_failed = True
        sites = {site: part.result() for site, part in parts.items()}
        start, end = shard.contexts[0].start, shard.contexts[-1].end
        record = ShardRecord(shard.log.lane, shard.index, len(shard.contexts), start, end, shard.last, sites)
        self._beats.beat()
        with _named(f"the progress log of lane {shard.log.lane}", self._store):
            shard.log.add(record)
        self._unlogged.remove(shard)
        self._has_failed = False
        self._beats.beat(shards=1, bytes=sum(site.tar.bytes for site in sites.values()))

    def _wait_for(self, new: list["Future[Any]"]) -> None:
        """Let no more than so much be under way."""
        self._waiting.append(new)
        while len(self._waiting) > MAX_WAITING_BATCHES:
            self._take_first()

    def _take_first(self) -> None:
        for written in self._waiting.popleft():
            written.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            while self._waiting and error is None:
                self._take_first()
        finally:
            for writer in self._sites:
                writer.close()
            self._logging.shutdown(cancel_futures=True)
            for shard in self._unlogged:
                for writer in self._sites:
                    tar_path(self._store, writer.site, shard.log.lane, shard.index).unlink(missing_ok=True)


class _SiteWriter:
    """Writes the tars of one site, in a thread of its own."""

    def __init__(self, store: Path, site: str, d_model: int) -> None:
        self.site = site
        self._store, self._d_model = store, d_model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"tars of {site}")
        self._open = ExitStack()
        self._has_failed = False

    def begin(self, lane: int, shard: int) -> "Future[None]":
        return self._thread.submit(self._begin, tar_path(self._store, self.site, lane, shard), lane, shard)

    def add(self, batch: HarvestedBatch) -> "Future[None]":
        return self._thread.submit(self._add, batch)

    def end(self) -> "Future[SiteRecord]":
        return self._thread.submit(self._end)

    def close(self) -> None:
        """Stop; a tar that is not complete is removed."""
        self._thread.shutdown(cancel_futures=True)
        with suppress(_AbandonedError, OSError), self._open:  # a full disk complains once more when what is buffered cannot go there
            raise _AbandonedError

    def _begin(self, path: Path, lane: int, shard: int) -> None:
        self._path = path
        self._statistics = no_rows(self._d_model)
        with self._guarded():
            self._tar = self._open.enter_context(open_tar(path, lane, shard))

    def _add(self, batch: HarvestedBatch) -> None:
        contexts, statistics = batch.rows_of(self.site)
        self._statistics += statistics
        with self._guarded():
            for context in contexts:
                self._tar.add(context)

    def _end(self) -> SiteRecord:
        with self._guarded():
            self._open.close()
        record = self._tar.record
        if record.rows != self._statistics.kept.rows:
            raise ValueError(f"{self.site}: {record.rows} rows are stored, but statistics are of {self._statistics.kept.rows}")
        return SiteRecord(record, self._statistics)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A block that writes: nothing is written after a failure, and what the system complains about names the shard."""
        if self._has_failed:
            raise _AbandonedError
        self._has_failed = True
        with _named(f"shard {short_name(self._path)}", self._store):
            yield
        self._has_failed = False


class _AbandonedError(Exception):
    """What ends a tar that will not be completed."""


@contextmanager
def _named(what: str, store: Path) -> Iterator[None]:
    """A block in which the system's complaints become one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{what} cannot be written to {store} ({error.strerror}); free some space there or mend its permissions, "
            "then run gsae harvest again with the same config: it continues after the last whole shards"
        ) from error
