"""Shards written in the background, and what is left when that fails. Rows are made up; the threads and files are real."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from gsae.corpus.contexts import Cursor
from gsae.errors import GsaeError, StoreError
from gsae.harvest import writing
from gsae.harvest.lanes import _set_at_end
from gsae.harvest.pending import PendingShard
from gsae.harvest.writing import MAX_WAITING_BATCHES, ShardWriter
from gsae.store.encoding import encode
from gsae.store.progress import ProgressLog, read_records
from gsae.store.shards import ContextRows
from gsae.store.statistics import measure_rows, site_statistics

SITES = ["resid.0", "resid.1"]


class Beats:
    """Signs of life that are noted; `verdict` is raised as the heartbeat does."""

    def __init__(self):
        self.counts, self.verdict = {}, None

    def beat(self, **done):
        for name, count in done.items():
            self.counts[name] = self.counts.get(name, 0) + count
        if self.verdict is not None:
            raise self.verdict


class Batch:
    """Two contexts of three rows."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def rows_of(self, site):
        time.sleep(self.seconds)
        x, kept, none = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
        statistics = site_statistics(measure_rows(x, kept), kept, kept, {}, none, lambda ids: map(str, ids), 1.0)
        integers = torch.zeros(3, dtype=torch.int32)
        return [ContextRows(encode(each, "float32").x, integers, integers, integers) for each in x], statistics


def shard_of(store, lane, index=0):
    cursor = SimpleNamespace(start=Cursor(index, 0, 0), end=Cursor(index + 1, 0, 0))
    return PendingShard(ProgressLog.open(store, lane), index, [cursor, cursor], last=False)


def write(writer, shard, num_batches=1, batch=None):
    writer.begin(shard)
    for _ in range(num_batches):
        writer.add(batch or Batch())
    writer.end()


def write_all(store, shards, beats=None, seconds=0.0):
    """The main thread has other work for some seconds before it looks at what became of them."""
    with ShardWriter(store, SITES, 4, beats or Beats()) as writer:
        for shard in shards:
            write(writer, shard)
        time.sleep(seconds)


def names(store):
    return sorted(str(path.relative_to(store)) for path in store.rglob("*.tar*"))


def test_shards_are_logged_in_the_end_and_counted(tmp_path):
    beats = Beats()
    write_all(tmp_path, [shard_of(tmp_path, lane) for lane in (0, 1)], beats)
    for lane in (0, 1):
        (record,) = read_records(tmp_path, lane)
        assert [site.tar.rows for site in record.sites.values()] == [6, 6]
    assert beats.counts == {"shards": 2, "bytes": sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))}


def test_batches_wait_in_memory_up_to_a_bound(tmp_path):
    """With a disk that is slower than the LLM the main thread waits."""
    added = []
    with ShardWriter(tmp_path, SITES, 4, Beats()) as writer:
        writer.begin(shard_of(tmp_path, 0))
        begun = time.monotonic()
        for _ in range(MAX_WAITING_BATCHES + 3):
            writer.add(Batch(seconds=0.1))
            added.append(time.monotonic() - begun)
        writer.end()
    assert added[MAX_WAITING_BATCHES - 2] < 0.1
    assert added[-1] > 0.25


def test_a_shard_that_cannot_be_logged_goes_and_no_other_is_logged_after_it(tmp_path, monkeypatch):
    first, second = shard_of(tmp_path, 0), shard_of(tmp_path, 1)

    def refuse(record):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(first.log, "add", refuse)
    with pytest.raises(StoreError, match="the progress log of lane 0 cannot be written"):
        write_all(tmp_path, [first, second], seconds=0.5)
    assert names(tmp_path) == []
    assert read_records(tmp_path, 1) == []


def test_a_rank_that_was_given_up_logs_no_more(tmp_path):
    beats = Beats()
    beats.verdict = GsaeError("rank 0 has got no further")
    with pytest.raises(GsaeError, match="got no further"):
        write_all(tmp_path, [shard_of(tmp_path, 0)], beats)
    assert read_records(tmp_path, 0) == []
    assert names(tmp_path) == []


def fail_in_the_second(store):
    with ShardWriter(store, SITES, 4, Beats()) as writer:
        write(writer, shard_of(store, 0))
        while not read_records(store, 0):
            time.sleep(0.01)
        writer.begin(shard_of(store, 1))
        writer.add(Batch())
        raise RuntimeError("the LLM failed")


def test_an_error_in_the_block_leaves_logged_shards_only(tmp_path):
    with pytest.raises(RuntimeError, match="the LLM"):
        fail_in_the_second(tmp_path)
    assert names(tmp_path) == ["resid.0/0000-000000.tar", "resid.1/0000-000000.tar"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("tars of", "progress logs"))]


def test_a_write_error_names_the_shard(tmp_path, monkeypatch):
    def refuse(path, lane, shard):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "open_tar", refuse)
    with pytest.raises(StoreError, match=r"shard resid\.\d/0000-000000.tar cannot be written to .* \(No space left on device\)"):
        write_all(tmp_path, [shard_of(tmp_path, 0)])


def test_the_reader_is_told_before_it_is_waited_for():
    event = threading.Event()
    with pytest.raises(ValueError, match="any"), _set_at_end(event):
        raise ValueError("any")
    assert event.is_set()
