"""A shard that is not what the log says, at the first reading or later; what a window costs."""

import os
import threading
import time
from concurrent.futures import wait

import pytest
import torch

from gsae.errors import StoreError
from gsae.store import windows
from gsae.store.progress import read_records
from gsae.store.shards import tar_path
from gsae.store.stream import Stream

SITE = "resid.0"
SHARDS = [[[4], [4], [4], [4]]]  # one lane; with windows of 4 rows every shard is a window


def open_stream(store, verify, window_rows=4, lanes=(0,), read_threads=2):
    return Stream(store, SITE, lanes, 4, window_rows, seed=0, verify_shards=verify, read_threads=read_threads)


def shard_of(batch):
    return int(batch.row[0]) // 4


def epochs(stream, count):
    """The shards of the next batches, with nothing being read any more at the end."""
    shards = [shard_of(stream.next_batch()) for _ in range(4 * count)]
    for queue in stream._queues:
        wait([future for _, future in queue._loading])
    return shards


def flip(path, offset):
    """Later than it was written, by the file system's clock, which ticks every few milliseconds."""
    content, written = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[offset] ^= 1
    while path.stat().st_mtime_ns == written:
        path.write_bytes(content)


def flip_x(store, lane, shard):
    flip(tar_path(store, SITE, lane, shard), read_records(store, lane)[shard].sites[SITE].tar.offsets[0])


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_that_changes_while_it_is_in_use_is_named(stores, tmp_path, verify):
    stores.build(tmp_path, SHARDS)
    with open_stream(tmp_path, verify) as stream:
        assert sorted(epochs(stream, 1)) == [0, 1, 2, 3]
        flip_x(tmp_path, 0, 2)
        with pytest.raises(StoreError, match=r"resid\.0/0000-000002\.tar: its SHA-256 differs"):
            epochs(stream, 2)


def count_hashes(monkeypatch):
    seen, real = [], windows.require_sha256
    monkeypatch.setattr(windows, "require_sha256", lambda path, *rest: (seen.append(path), real(path, *rest)))
    return seen


def test_a_stream_that_has_failed_gives_nothing_until_it_is_sent_elsewhere(stores, tmp_path):
    stores.build(tmp_path, SHARDS)
    with open_stream(tmp_path, verify=True) as stream:
        path = tar_path(tmp_path, SITE, 0, 2)
        content = path.read_bytes()
        flip_x(tmp_path, 0, 2)
        for _ in range(5):
            with pytest.raises(StoreError, match=r"0000-000002\.tar: its SHA-256 differs"):
                epochs(stream, 1)
        path.write_bytes(content)
        stream.seek(0)
        assert sorted(epochs(stream, 1)) == [0, 1, 2, 3]


def test_a_file_that_is_put_back_as_it_was_is_read_on_and_hashed_once(stores, tmp_path, monkeypatch):
    stores.build(tmp_path, SHARDS)
    seen = count_hashes(monkeypatch)
    with open_stream(tmp_path, verify=False, read_threads=1) as stream:
        epochs(stream, 2)
        assert not seen
        for path in (tmp_path / SITE).iterdir():
            path.with_suffix(".new").write_bytes(path.read_bytes())
            path.with_suffix(".new").rename(path)
        assert sorted(epochs(stream, 4)[-4:]) == [0, 1, 2, 3]
    assert len(seen) == len(set(seen)) == 4


def test_a_shard_that_is_cut_off_later_is_named(stores, tmp_path):
    stores.build(tmp_path, SHARDS)
    with open_stream(tmp_path, verify=True) as stream:
        epochs(stream, 1)
        path = tar_path(tmp_path, SITE, 0, 1)
        os.truncate(path, path.stat().st_size - 512)
        with pytest.raises(StoreError, match=r"resid\.0/0000-000001\.tar has \d+ bytes, the progress log says"):
            epochs(stream, 2)


def spoil_before_rows_are_read(monkeypatch, spoil):
    """Do `spoil` once a file is open and has been found to be the right one."""
    real = windows.read_scattered

    def read(*arguments):
        spoil()
        real(*arguments)

    monkeypatch.setattr(windows, "read_scattered", read)


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(stores, tmp_path, monkeypatch):
    stores.build(tmp_path, [[[4]]])
    path = tar_path(tmp_path, SITE, 0, 0)
    with open_stream(tmp_path, verify=True, read_threads=1) as stream:
        spoil_before_rows_are_read(monkeypatch, lambda: os.truncate(path, 600))
        with pytest.raises(StoreError, match=r"resid\.0/0000-000000\.tar was cut off while it was read"):
            stream.next_batch()


def test_a_shard_that_changes_while_it_is_read_is_named(stores, tmp_path, monkeypatch):
    stores.build(tmp_path, [[[4]]])
    with open_stream(tmp_path, verify=True, read_threads=1) as stream:
        spoil_before_rows_are_read(monkeypatch, lambda: flip_x(tmp_path, 0, 0))
        with pytest.raises(StoreError, match=r"resid\.0/0000-000000\.tar was changed while it was read"):
            stream.next_batch()


def test_a_disk_that_fails_is_told_with_the_shard(stores, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    stores.build(tmp_path, [[[4]]])
    monkeypatch.setattr(windows, "read_scattered", fail)
    with (
        open_stream(tmp_path, verify=False) as stream,
        pytest.raises(StoreError, match=r"resid\.0/0000-000000\.tar .* cannot be read: Input"),
    ):
        stream.next_batch()


@pytest.mark.parametrize(("verify", "hashed"), [(True, 4), (False, 0)])
def test_a_shard_is_hashed_when_it_is_first_read_and_not_again(stores, tmp_path, monkeypatch, verify, hashed):
    seen = count_hashes(monkeypatch)
    stores.build(tmp_path, SHARDS)
    with open_stream(tmp_path, verify, read_threads=1) as stream:
        epochs(stream, 3)
    assert len(seen) == len(set(seen)) == hashed


def test_a_position_costs_the_window_it_is_in_and_no_other(stores, tmp_path, monkeypatch):
    stores.build(tmp_path, [[[10], [10], [10]], [[8], [9]]])
    asked, go_on = [], threading.Event()
    real = windows.LaneReader.load

    def load(reader, window, *rest):
        is_first = len(asked) < 2  # of each of the two lanes
        asked.append((window.epoch, window.index))
        if not is_first:
            go_on.wait(30)
        real(reader, window, *rest)

    monkeypatch.setattr(windows.LaneReader, "load", load)
    with Stream(tmp_path, SITE, (0, 1), 4, 12, seed=0, verify_shards=True, read_threads=2) as stream:
        stream.seek(2 * 40)  # 40 rows of each lane: row 10 of the second epoch of lane 0, row 6 of the third of lane 1; windows of 6
        batch = stream.next_batch().clone()
        assert asked[:2] == [(1, 1), (2, 1)]
        go_on.set()
    with Stream(tmp_path, SITE, (0, 1), 4, 12, seed=0, verify_shards=True) as stream:
        straight = [stream.next_batch().clone() for _ in range(21)]
    assert torch.equal(batch.row, straight[20].row)


def test_memory_is_that_of_two_windows_and_a_batch(stores, tmp_path):
    # Three lanes of 40, 24 and 1 rows.
    stores.build(tmp_path, [[[40]], [[20], [4]], [[1]]])
    for batch_rows, window_rows, held in [
        (6, 36, 24),  # windows of 12 rows: 24 of each lane
        (6, 300, 80),  # all of the longest lane, twice
        (15, 36, 25),  # batches of 5 rows a lane: 24, in whole batches
        (30, 12, 20),  # windows of 4, smaller than the 10 rows of a batch: 4 + 10, in whole batches
    ]:
        with Stream(tmp_path, SITE, range(3), batch_rows, window_rows, seed=0, verify_shards=True) as stream:
            assert stream._ring.lane_capacity == held
            for _ in range(30):
                stream.next_batch()


@pytest.mark.parametrize("leave", [Stream.close, lambda stream: stream.seek(0)])
def test_the_ring_is_left_alone_only_when_nothing_is_read_into_it_any_more(stores, tmp_path, monkeypatch, leave):
    stores.build(tmp_path, SHARDS)
    reading = threading.Event()

    def read(*arguments):
        reading.set()
        time.sleep(0.3)
        reading.clear()

    with open_stream(tmp_path, verify=False) as stream:
        stream.next_batch()
        stream._queues[0].wait_for(8)
        monkeypatch.setattr(windows, "read_scattered", read)
        stream.next_batch()  # there is room for the third window now
        assert reading.wait(10)
        leave(stream)
        assert not reading.is_set()
        monkeypatch.undo()
