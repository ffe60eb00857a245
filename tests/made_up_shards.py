"""Shards written at once from rows that tests make up, as a harvest writes them batch by batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gsae.corpus.contexts import Cursor
from gsae.store.progress import ProgressLog, ShardRecord, SiteRecord
from gsae.store.shards import ContextRows, TarRecord, open_tar, tar_path
from gsae.store.statistics import SiteStatistics


@dataclass(frozen=True)
class SiteRows:
    """What a shard holds at one site."""

    contexts: Sequence[ContextRows]
    statistics: SiteStatistics


def write_tar(path: Path, lane: int, shard: int, contexts: Sequence[ContextRows]) -> TarRecord:
    """One shard of one site."""
    with open_tar(path, lane, shard) as tar:
        for context in contexts:
            tar.add(context)
    return tar.record


def write_shard(
    log: ProgressLog, sites: Mapping[str, SiteRows], start: Cursor, end: Cursor, last: bool, index: int | None = None
) -> ShardRecord:
    """The tars of all sites, then the line in the log: of the next shard, or of the gap that `index` names."""
    shard = log.next_index if index is None else index
    (contexts,) = {len(rows.contexts) for rows in sites.values()}
    written = {}
    for name, rows in sites.items():
        tar = write_tar(tar_path(log.store, name, log.lane, shard), log.lane, shard, rows.contexts)
        written[name] = SiteRecord(tar, rows.statistics)
    record = ShardRecord(log.lane, shard, contexts, start, end, last, written)
    log.add(record)
    return record
