"""The progress log of a lane: one line a shard. In: the tars of a shard. Out: the line that makes them exist.

A shard exists if its line names its tars. The line is written last, so a killed harvest leaves at most tars without a line, partial
tars and a half-written line; opening the log for a resumed harvest removes them. A line without tars is a *gap*: it says what text the
shard has to be made of again, so that one broken shard costs one shard.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsae.corpus.contexts import Cursor
from gsae.errors import StoreError
from gsae.store.durable import PARTIAL_SUFFIX, append_line, make_directory, write_aside
from gsae.store.mirror import provide
from gsae.store.shards import HARVEST_AGAIN, TarRecord, require_size, tar_path
from gsae.store.statistics import SiteStatistics

PROGRESS_FORMAT = 1


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
    """Whether the lane ends with it."""
    sites: dict[str, SiteRecord]
    """Empty for a gap."""

    @property
    def is_gap(self) -> bool:
        """Whether its tars are lost."""
        return not self.sites

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        sites = {}
        for name, site in self.sites.items():
            sites[name] = {"rows": site.tar.rows, **site.tar.to_json(), "statistics": site.statistics.to_json()}
        start, end = ([cursor.document, cursor.piece, cursor.token] for cursor in (self.start, self.end))
        own = {"format": PROGRESS_FORMAT, "lane": self.lane, "shard": self.shard, "contexts": self.contexts}
        return {**own, "start": start, "end": end, "last": self.last, "sites": sites}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ShardRecord":
        """The record that `to_json` wrote."""
        sites = {
            name: SiteRecord(
                TarRecord.from_json(site),
                SiteStatistics.from_json(site["statistics"]),
            )
            for name, site in value["sites"].items()
        }
        return cls(value["lane"], value["shard"], value["contexts"], Cursor(*value["start"]), Cursor(*value["end"]), value["last"], sites)


def progress_path(store: Path, lane: int) -> Path:
    """Where the log of a lane is."""
    return store / "progress" / f"{lane:04d}.jsonl"


def read_records(store: Path, lane: int) -> list[ShardRecord]:
    """The shards of a lane, in order, gaps included; a half-written last line does not count.

    Raises:
        StoreError: a line is damaged, or of another format.
    """
    return _parse(progress_path(store, lane), _whole_lines(_content(store, lane)), lane)


def _content(store: Path, lane: int) -> bytes:
    """The log of a lane; nothing where it has none."""
    path = progress_path(store, lane)
    provide(store, path)
    return path.read_bytes() if path.exists() else b""


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
    """Whether a lane is harvested to its end, without a gap."""
    return bool(records) and records[-1].last and not any(record.is_gap for record in records)


def require_complete(store: Path, lane: int, records: Sequence[ShardRecord]) -> None:
    """Raise StoreError unless a lane is harvested to its end."""
    if not is_complete(records):
        gaps = [record.shard for record in records if record.is_gap]
        what = f"lacks shard {gaps[0]}" if gaps else f"ends after {len(records)} shards"
        raise StoreError(f"store {store} is not whole: lane {lane} {what}; {HARVEST_AGAIN}")


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
    return hashlib.sha256(_content(store, lane)).hexdigest()


class ProgressLog:
    """One lane's log, open for a harvest to continue: `open` it, then `add` the shards that are missing.

    Of the shards it keeps what text they are of; what else a line says stays on the disk, so that memory hardly grows with them.
    """

    def __init__(self, store: Path, lane: int, records: Sequence[ShardRecord]) -> None:
        self.store = store
        self.lane = lane
        self._shards = [as_gap(record) for record in records]
        self._lost = {record.shard for record in records if record.is_gap}

    @classmethod
    def open(cls, store: Path, lane: int) -> "ProgressLog":
        """The log of a lane, with what a killed harvest left behind removed.

        A shard of which a tar is missing or cut off at any site is a gap; where no whole shard comes after it, the log ends before it.
        """
        path = progress_path(store, lane)
        make_directory(path.parent)
        content = path.read_bytes() if path.exists() else b""
        lines = _whole_lines(content)
        records = [record if has_tars(store, record) else as_gap(record) for record in _parse(path, lines, lane)]
        whole = [record.shard for record in records if not record.is_gap]
        del records[max(whole, default=-1) + 1 :]
        kept = b"".join((_line_of(record).encode() if record.is_gap else lines[record.shard]) + b"\n" for record in records)
        if content != kept:
            with write_aside(path) as file:
                file.write(kept)
        path.with_name(path.name + PARTIAL_SUFFIX).unlink(missing_ok=True)
        for tar in store.glob(f"*/{lane:04d}-*.tar*"):
            if tar.suffix != ".tar" or int(tar.stem.rpartition("-")[2]) not in whole:
                tar.unlink()
        return cls(store, lane, records)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """The shards that are there, in order, as gaps: without what their lines say of their tars."""
        return tuple(shard for shard in self._shards if shard.shard not in self._lost)

    @property
    def gaps(self) -> tuple[ShardRecord, ...]:
        """The shards that are lost."""
        return tuple(self._shards[shard] for shard in sorted(self._lost))

    @property
    def next_index(self) -> int:
        """Index of the shard after all of these."""
        return len(self._shards)

    @property
    def cursor(self) -> Cursor | None:
        """Where that shard starts in the corpus; None at the start of the lane."""
        return self._shards[-1].end if self._shards else None

    @property
    def is_ended(self) -> bool:
        """Whether no shard comes after these."""
        return bool(self._shards) and self._shards[-1].last

    @property
    def is_finished(self) -> bool:
        """Whether the lane is complete."""
        return self.is_ended and not self._lost

    def add(self, record: ShardRecord) -> None:
        """Make a shard exist: its tars are in place at all sites. It is the next one, or fills a gap.

        Raises:
            StoreError: a gap is filled with other text than it had.
        """
        path = progress_path(self.store, self.lane)
        if record.shard == self.next_index:
            append_line(path, _line_of(record))
            self._shards.append(as_gap(record))
            return
        if record.shard not in self._lost or as_gap(record) != self._shards[record.shard]:
            raise StoreError(
                f"shard {self.lane:04d}-{record.shard:06d} of {self.store} was made of other text before; "
                "give harvest.store another directory, or restore the text"
            )
        lines = _whole_lines(path.read_bytes())
        lines[record.shard] = _line_of(record).encode()
        with write_aside(path) as file:
            file.writelines(line + b"\n" for line in lines)
        self._lost.remove(record.shard)


def cut_log(store: Path, lane: int, keep: int | None, lost: Collection[int]) -> list[int]:
    """Leave the log of a lane its first `keep` lines (None leaves all), those of the `lost` shards as gaps; nothing is read beyond them.

    Returns:
        The shards whose lines changed or went.

    Raises:
        StoreError: a line that is to stay is damaged.
    """
    path = progress_path(store, lane)
    lines = _whole_lines(path.read_bytes()) if path.exists() else []
    kept = _parse(path, lines[:keep], lane)
    changed = [record.shard for record in kept if record.shard in lost and not record.is_gap] + list(range(len(kept), len(lines)))
    if not changed:
        return []
    with write_aside(path) as file:
        file.write("".join(f"{_line_of(as_gap(record) if record.shard in lost else record)}\n" for record in kept).encode())
    return changed


def as_gap(record: ShardRecord) -> ShardRecord:
    """The shard without its tars."""
    return replace(record, sites={})


def _line_of(record: ShardRecord) -> str:
    return json.dumps(record.to_json(), allow_nan=False)
