"""The progress log of a lane: one line a shard. In: a shard's rows at every site. Out: their tars and the line that makes them exist.

A shard exists if its line does. The line is written last, so a killed harvest leaves at most tars without a line, partial tars and
a half-written line; opening the log for a resumed harvest removes them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gsae.corpus.contexts import Cursor
from gsae.errors import StoreError
from gsae.store.durable import PARTIAL_SUFFIX, append_line, make_directory, write_aside
from gsae.store.shards import HARVEST_AGAIN, ContextRows, TarRecord, require_size, tar_path, write_tar
from gsae.store.statistics import SiteStatistics

PROGRESS_FORMAT = 1


@dataclass(frozen=True)
class SiteRows:
    """What a shard holds at one site."""

    contexts: Sequence[ContextRows]
    statistics: SiteStatistics


@dataclass(frozen=True)
class SiteRecord:
    """One site's part of a shard."""

    tar: TarRecord
    statistics: SiteStatistics


@dataclass(frozen=True)
class ShardRecord:
    """One line of a progress log: a shard of one lane, at all sites."""

    lane: int
    shard: int
    contexts: int
    start: Cursor
    """The first token of text in it."""
    end: Cursor
    """The next token of text after it in this lane."""
    last: bool
    """Whether the lane is complete with it."""
    sites: dict[str, SiteRecord]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        sites = {}
        for name, site in self.sites.items():
            sites[name] = {"rows": site.tar.rows, **asdict(site.tar), "statistics": site.statistics.to_json()}
        start, end = ([cursor.document, cursor.piece, cursor.token] for cursor in (self.start, self.end))
        own = {"format": PROGRESS_FORMAT, "lane": self.lane, "shard": self.shard, "contexts": self.contexts}
        return {**own, "start": start, "end": end, "last": self.last, "sites": sites}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ShardRecord":
        """The record that `to_json` wrote."""
        sites = {
            name: SiteRecord(
                TarRecord(site["bytes"], site["sha256"], tuple(site["offsets"]), tuple(site["context_rows"])),
                SiteStatistics.from_json(site["statistics"]),
            )
            for name, site in value["sites"].items()
        }
        return cls(value["lane"], value["shard"], value["contexts"], Cursor(*value["start"]), Cursor(*value["end"]), value["last"], sites)


def progress_path(store: Path, lane: int) -> Path:
    """Where the log of a lane is."""
    return store / "progress" / f"{lane:04d}.jsonl"


def read_records(store: Path, lane: int) -> list[ShardRecord]:
    """The finished shards of a lane, in order; a half-written last line does not count.

    Raises:
        StoreError: a line is damaged, or of another format.
    """
    path = progress_path(store, lane)
    return _parse(path, _whole_lines(path.read_bytes() if path.exists() else b""), lane)


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines that were written to their end: a crash can leave the last one short, or its blocks unwritten."""
    *lines, _half = content.split(b"\n")
    if lines and not _is_json(lines[-1]):
        lines.pop()
    return lines


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(path: Path, lines: Sequence[bytes], lane: int) -> list[ShardRecord]:
    records = []
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
            if value["format"] != PROGRESS_FORMAT:
                raise StoreError(f"{path} has format {value['format']}, this version of gsae reads {PROGRESS_FORMAT}; harvest again")
            record = ShardRecord.from_json(value)
            is_in_place = (record.lane, record.shard) == (lane, number)
        except (ValueError, KeyError, TypeError):
            is_in_place = False
        if not is_in_place:
            raise StoreError(f"{path} is damaged at line {number + 1}; delete the file and {HARVEST_AGAIN}")
        records.append(record)
    return records


def is_complete(records: Sequence[ShardRecord]) -> bool:
    """Whether a lane is harvested to its end."""
    return bool(records) and records[-1].last


def require_complete(store: Path, lane: int, records: Sequence[ShardRecord]) -> None:
    """Raise StoreError unless a lane is harvested to its end."""
    if not is_complete(records):
        raise StoreError(f"store {store} is not whole: lane {lane} ends after {len(records)} shards; {HARVEST_AGAIN}")


def require_rows(site: str, lane: int, num_lanes: int, rows: int) -> None:
    """Raise StoreError when a lane has no rows at a site."""
    if rows == 0:
        raise StoreError(f"lane {lane} has no rows at {site}; lower corpus.num_lanes ({num_lanes}) or give more text")


def has_tars(store: Path, record: ShardRecord) -> bool:
    """Whether the tars of a shard are there at every site, in their full size; nothing of them is read."""
    try:
        for name, site in record.sites.items():
            require_size(tar_path(store, name, record.lane, record.shard), site.tar)
    except StoreError:
        return False
    return True


def progress_sha256(store: Path, lane: int) -> str:
    """Hash of the log of a lane."""
    return hashlib.sha256(progress_path(store, lane).read_bytes()).hexdigest()


class ProgressLog:
    """One lane's log, open for a harvest to continue: `open` it, then call `write_shard` until the lane is finished."""

    def __init__(self, store: Path, lane: int, records: Sequence[ShardRecord]) -> None:
        self.store = store
        self.lane = lane
        self._records = list(records)

    @classmethod
    def open(cls, store: Path, lane: int) -> "ProgressLog":
        """The log of a lane, with what a killed harvest left behind removed.

        It ends before the first shard of which a tar is missing or cut off at any site: that one and those after it are harvested again.
        """
        path = progress_path(store, lane)
        make_directory(path.parent)
        content = path.read_bytes() if path.exists() else b""
        lines = _whole_lines(content)
        records = _parse(path, lines, lane)
        num_whole = next((record.shard for record in records if not has_tars(store, record)), len(records))
        kept = b"".join(line + b"\n" for line in lines[:num_whole])
        if kept != content:
            with write_aside(path) as file:
                file.write(kept)
        path.with_name(path.name + PARTIAL_SUFFIX).unlink(missing_ok=True)
        for tar in store.glob(f"*/{lane:04d}-*.tar*"):
            if tar.suffix != ".tar" or int(tar.stem.rpartition("-")[2]) >= num_whole:
                tar.unlink()
        return cls(store, lane, records[:num_whole])

    def records(self) -> tuple[ShardRecord, ...]:
        """The finished shards, in order."""
        return tuple(self._records)

    @property
    def next_index(self) -> int:
        """Index of the next shard."""
        return len(self._records)

    @property
    def cursor(self) -> Cursor | None:
        """Where the next shard starts in the corpus; None at the start of the lane."""
        return self._records[-1].end if self._records else None

    @property
    def is_finished(self) -> bool:
        """Whether the lane is complete."""
        return is_complete(self._records)

    def append(self, record: ShardRecord) -> None:
        """Make a shard exist: its tars are in place at all sites."""
        append_line(progress_path(self.store, self.lane), json.dumps(record.to_json(), allow_nan=False))
        self._records.append(record)


def write_shard(log: ProgressLog, sites: Mapping[str, SiteRows], start: Cursor, end: Cursor, last: bool) -> ShardRecord:
    """Write the next shard of a lane: the tars of all sites, then its line in the log.

    Args:
        log: the lane's log; the shard gets its next index.
        sites: the rows at every site; all sites have the same contexts, in the same order.
        start: the first token of text in the shard.
        end: the next token of text after it in this lane.
        last: whether the lane is complete with it; a lane may end with a shard without contexts.
    """
    (contexts,) = {len(rows.contexts) for rows in sites.values()}
    written = {}
    for name, rows in sites.items():
        num_rows = sum(len(context.x) for context in rows.contexts)
        if num_rows != rows.statistics.kept.rows:
            raise ValueError(f"{name}: {num_rows} rows to store, but statistics of {rows.statistics.kept.rows}")
        tar = write_tar(tar_path(log.store, name, log.lane, log.next_index), log.lane, log.next_index, rows.contexts)
        written[name] = SiteRecord(tar, rows.statistics)
    record = ShardRecord(log.lane, log.next_index, contexts, start, end, last, written)
    log.append(record)
    return record
