import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_shards import write_shard

from gsae.corpus.contexts import Cursor
from gsae.errors import StoreError
from gsae.store.progress import ProgressLog, as_gap, progress_path, read_records, require_complete
from gsae.store.shards import open_tar

LANE = [[3, 2], [4], [1, 1]]

KILLED_BEFORE_THE_LOG_LINE = """
import os, runpy, signal, sys
from pathlib import Path
import gsae.store.progress as progress
sys.path.insert(0, str(Path(sys.argv[2]).parents[1]))
stores = runpy.run_path(sys.argv[2])["Stores"]()
store = Path(sys.argv[1])
stores.write_lane(store, 0, [[3, 2], [4], [1, 1]], stop_after=1)
progress.append_line = lambda path, line: os.kill(os.getpid(), signal.SIGKILL)
stores.write_lane(store, 0, [[3, 2], [4], [1, 1]])
"""


def content_of(store):
    return {path.relative_to(store): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture
def whole(stores, tmp_path):
    """What an uninterrupted harvest leaves."""
    store = tmp_path / "whole"
    stores.write_lane(store, 0, LANE)
    return content_of(store)


@pytest.fixture
def cut_off(stores, tmp_path):
    """A store whose harvest ended after two of three shards."""
    store = tmp_path / "cut_off"
    stores.write_lane(store, 0, LANE, stop_after=2)
    return store


def test_a_log_says_where_to_go_on(stores, tmp_path):
    log = ProgressLog.open(tmp_path, 0)
    assert (log.shards, log.next_index, log.cursor, log.is_finished) == ((), 0, None, False)
    record = write_shard(log, stores.shard(0, 0, [3]), Cursor(0, 0, 1), Cursor(4, 2, 7), last=False)
    assert (log.shards, log.next_index, log.cursor, log.is_finished) == ((as_gap(record),), 1, Cursor(4, 2, 7), False)
    write_shard(log, stores.shard(0, 3, []), Cursor(4, 2, 7), Cursor(4, 2, 7), last=True)
    again = ProgressLog.open(tmp_path, 0)
    assert (again.next_index, again.cursor, again.is_finished) == (2, Cursor(4, 2, 7), True)


def test_a_record_is_read_back_as_it_was_written(stores, tmp_path):
    stores.write_lane(tmp_path, 0, LANE)
    line = json.loads(progress_path(tmp_path, 0).read_text().splitlines()[0])
    site = line["sites"]["resid.0"]
    assert (line["format"], line["lane"], line["shard"], line["contexts"], line["last"]) == (1, 0, 0, 2, False)
    assert (line["start"], line["end"]) == ([0, 0, 0], [1, 0, 0])
    assert (site["rows"], site["context_rows"], len(site["offsets"]), len(site["sha256"])) == (5, [3, 2], 2, 64)
    for record, text in zip(read_records(tmp_path, 0), progress_path(tmp_path, 0).read_text().splitlines(), strict=True):
        assert json.dumps(record.to_json()) == text


def test_a_resumed_lane_equals_an_uninterrupted_one(stores, whole, cut_off):
    stores.write_lane(cut_off, 0, LANE)
    assert content_of(cut_off) == whole


def test_a_harvest_killed_before_the_log_line_resumes_to_the_same_bytes(stores, whole, tmp_path, request):
    conftest = str(request.path.parent / "conftest.py")
    done = subprocess.run([sys.executable, "-c", KILLED_BEFORE_THE_LOG_LINE, str(tmp_path / "store"), conftest], check=False)
    assert done.returncode == -signal.SIGKILL
    store = tmp_path / "store"
    assert (store / "resid.0" / "0000-000001.tar").exists()
    assert len(read_records(store, 0)) == 1
    stores.write_lane(store, 0, LANE)
    assert content_of(store) == whole


@pytest.mark.parametrize("half_line", ['{"format": 1, "lane": 0, "sha', '{"format": 1, "lane": 0, "sha\n', "\0\0\0\0\n"])
def test_a_half_written_last_line_does_not_count_and_is_cut_off(stores, whole, cut_off, half_line):
    with progress_path(cut_off, 0).open("a") as log:
        log.write(half_line)
    assert len(read_records(cut_off, 0)) == 2
    assert ProgressLog.open(cut_off, 0).next_index == 2
    assert progress_path(cut_off, 0).read_text().count("\n") == 2
    stores.write_lane(cut_off, 0, LANE)
    assert content_of(cut_off) == whole


def test_what_an_interrupted_harvest_left_is_removed_in_its_lane_only(stores, cut_off):
    before = content_of(cut_off)
    contexts = [stores.context(0, 0, 2)]
    for site in ("resid.0", "resid.2"):
        with open_tar(cut_off / site / "0000-000002.tar", 0, 2) as tar:
            tar.add(contexts[0])
    for name in ("resid.0/0000-000003.tar.partial", "progress/0000.jsonl.partial"):
        (cut_off / name).write_bytes(b"half")
    (cut_off / "resid.0" / "0001-000000.tar.partial").write_bytes(b"another rank is writing this")
    ProgressLog.open(cut_off, 0)
    after = content_of(cut_off)
    assert [str(path) for path in after.keys() - before.keys()] == ["resid.0/0001-000000.tar.partial"]
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_is_not_whole_at_every_site_is_a_gap_and_costs_no_other(stores, whole, tmp_path, spoil, shard):
    store = tmp_path / "store"
    stores.write_lane(store, 0, LANE)
    spoil(store / "resid.2" / f"0000-{shard:06d}.tar")
    log = ProgressLog.open(store, 0)
    assert ([gap.shard for gap in log.gaps], log.next_index, log.is_ended, log.is_finished) == ([shard], 3, True, False)
    gone = {Path(site, f"0000-{shard:06d}.tar") for site in ("resid.0", "resid.2")}
    assert whole.keys() - content_of(store).keys() == gone
    with pytest.raises(StoreError, match=f"lane 0 lacks shard {shard}; run gsae harvest again"):
        require_complete(store, 0, read_records(store, 0))
    stores.write_lane(store, 0, LANE)
    assert content_of(store) == whole


@pytest.mark.parametrize("lost", [[2], [1, 2], [0, 1, 2], [0, 2]])
def test_a_log_ends_before_lost_shards_that_no_whole_one_follows(stores, whole, tmp_path, lost):
    store = tmp_path / "store"
    stores.write_lane(store, 0, LANE)
    for shard in lost:
        (store / "resid.0" / f"0000-{shard:06d}.tar").unlink()
    log = ProgressLog.open(store, 0)
    kept = max(set(range(3)) - set(lost), default=-1) + 1
    assert ([gap.shard for gap in log.gaps], log.next_index) == ([shard for shard in lost if shard < kept], kept)
    stores.write_lane(store, 0, LANE)
    assert content_of(store) == whole


def test_a_gap_is_filled_with_its_own_text_only(stores, tmp_path):
    stores.write_lane(tmp_path, 0, LANE)
    (tmp_path / "resid.0" / "0000-000001.tar").unlink()
    log, shard = ProgressLog.open(tmp_path, 0), stores.shard(0, 5, LANE[1])
    for start, end, last in ((0, 2, False), (1, 3, False), (1, 2, True)):
        with pytest.raises(StoreError, match=r"shard 0000-000001 of .* was made of other text before"):
            write_shard(log, shard, Cursor(start, 0, 0), Cursor(end, 0, 0), last, index=1)
    assert [gap.shard for gap in ProgressLog.open(tmp_path, 0).gaps] == [1]


def test_a_damaged_line_is_named(cut_off):
    path = progress_path(cut_off, 0)
    first, second = path.read_text().splitlines()
    for lines, number in ((["{}", second], 1), ([first, first], 2), ([first[:40], second], 1)):
        path.write_text("".join(line + "\n" for line in lines))
        with pytest.raises(StoreError, match=rf"0000\.jsonl is damaged at line {number}; delete the file and run gsae harvest again"):
            read_records(cut_off, 0)
    path.write_text(first.replace('"format": 1', '"format": 2') + "\n")
    with pytest.raises(StoreError, match="format 2, this version of gsae reads 1"):
        read_records(cut_off, 0)


def test_lanes_have_logs_of_their_own(stores, tmp_path):
    stores.write_lane(tmp_path, 0, LANE)
    stores.write_lane(tmp_path, 1, [[2]])
    assert [len(read_records(tmp_path, lane)) for lane in (0, 1, 2)] == [3, 1, 0]
    assert torch.equal(read_records(tmp_path, 1)[0].sites["resid.0"].statistics.mean, torch.tensor([1, 0.5, 0, 0]).double())
