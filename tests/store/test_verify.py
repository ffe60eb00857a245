import hashlib
import json
import os
import pickle
import shutil
import signal
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from made_up_shards import write_shard
from trees import tree

from gsae.corpus.contexts import Cursor
from gsae.errors import StoreError
from gsae.store.finish import finish, is_finished
from gsae.store.manifest import fingerprint
from gsae.store.progress import ProgressLog, SiteRecord, progress_path, read_records
from gsae.store.repair import repair
from gsae.store.shards import HARVEST_AGAIN, tar_path
from gsae.store.stream import Stream
from gsae.store.verify import verify

LANES = [[[3, 0], [4]], [[2], [5, 1], []]]


@pytest.fixture
def store(stores, tmp_path):
    stores.build(tmp_path, LANES)
    return tmp_path


def problems_of(store):
    return [finding.problem for finding in verify(store)]


def flip(path, at=700):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def write_manifest(store, change):
    """Rewrite the manifest as a faulty harvest would have written it, digest and all."""
    content = json.loads((store / "manifest.json").read_text())
    del content["digest"]
    change(content)
    (store / "manifest.json").write_text(json.dumps({**content, "digest": fingerprint(content)}))


def log_anew(store, lane, shard, site, change):
    """Rewrite one record of a log as a faulty harvest would have written it, and the manifest after it."""
    records = read_records(store, lane)
    records[shard] = replace(records[shard], sites={**records[shard].sites, site: change(records[shard].sites[site])})
    progress_path(store, lane).write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    finish(store)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_healthy_store_has_no_problems(stores, tmp_path, dtype):
    stores.build(tmp_path, LANES, dtype)
    assert verify(tmp_path) == []


def test_every_damaged_shard_is_found_not_only_the_first(store):
    for site, lane, shard in (("resid.0", 0, 1), ("resid.2", 1, 0)):
        flip(tar_path(store, site, lane, shard))
    problems = problems_of(store)
    assert [problem.split(":")[0] for problem in problems] == ["shard resid.0/0000-000001.tar", "shard resid.2/0001-000000.tar"]
    assert all("SHA-256 differs" in problem for problem in problems)


def test_every_line_without_a_tar_and_every_short_tar_is_found(store):
    tar_path(store, "resid.0", 0, 1).unlink()
    short = tar_path(store, "resid.2", 1, 1)
    short.write_bytes(short.read_bytes()[:-512])
    missing, truncated = problems_of(store)
    assert missing.startswith("shard resid.0/0000-000001.tar is missing")
    assert truncated.startswith("shard resid.2/0001-000001.tar has 9728 bytes, the progress log says 10240")


def test_a_tar_without_a_line_is_found(store):
    shutil.copy(tar_path(store, "resid.0", 0, 1), tar_path(store, "resid.0", 0, 2))
    (store / "resid.0" / "notes.tar").write_bytes(b"somebody else's")
    assert problems_of(store) == ["shard resid.0/0000-000002.tar: no line of the progress log speaks of it; delete it"]


def test_a_log_that_is_changed_damaged_short_or_missing_is_found(stores, tmp_path):
    lane = [[2], [3]]
    stores.build(tmp_path, [lane, lane, lane, lane])
    logs = [progress_path(tmp_path, number) for number in range(4)]
    logs[0].unlink()
    logs[1].write_text(logs[1].read_text().replace('"end": [1, 0, 0]', '"end": [1, 0, 1]'))
    logs[2].write_text(logs[2].read_text().replace('"shard": 0', '"shard": 7'))
    logs[3].write_text(logs[3].read_text().splitlines()[0] + "\n")
    missing, changed, damaged, short = problems_of(tmp_path)
    assert missing.startswith("progress/0000.jsonl: missing")
    assert changed.startswith("progress/0001.jsonl: changed after the manifest was written")
    assert "progress/0002.jsonl is damaged at line 1" in damaged
    assert short.startswith("progress/0003.jsonl: 1 shards, the manifest has 2")


def test_a_store_in_the_making_says_so_and_its_shards_are_checked(stores, tmp_path):
    stores.begin(tmp_path, 2)
    stores.write_lane(tmp_path, 1, LANES[1], stop_after=2)
    flip(tar_path(tmp_path, "resid.2", 1, 1))
    shard, whole = problems_of(tmp_path)
    assert shard.startswith("shard resid.2/0001-000001.tar: its SHA-256 differs")
    assert "is not whole: 2 of 2 lanes, the first is 0, are not harvested to the end" in whole


def test_a_manifest_from_another_model_is_named_with_what_differs(stores, store, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    stores.build(other, LANES, dtype="bfloat16")
    shutil.copy(other / "manifest.json", store / "manifest.json")
    (problem,) = problems_of(store)
    assert problem.startswith('manifest.json: is of another store, with dtype "bfloat16"; identity.json has "float32"')


def test_a_manifest_that_does_not_fit_itself_or_the_logs_is_found(store):
    whole = (store / "manifest.json").read_text()
    cases = {
        "has fingerprint 0123, its identity has": lambda content: content.update(fingerprint="0123"),
        "resid.0 has 15 rows in the progress logs, 16 in the manifest": lambda content: content["sites"]["resid.0"].update(rows=16),
        "lane 1 has 3 shards in the progress log, 4 in the manifest": lambda content: content["lanes"][1].update(shards=4),
    }
    for problem, change in cases.items():
        write_manifest(store, change)
        (found,) = problems_of(store)
        assert found.startswith(f"manifest.json: {problem}")
        (store / "manifest.json").write_text(whole)
    (store / "manifest.json").write_text(whole.replace('"rows": 15', '"rows": 16'))
    assert problems_of(store) == [f"manifest.json: was changed after it was written; delete it and {HARVEST_AGAIN}"]


def test_a_changed_identity_cannot_be_mended(store):
    path = store / "identity.json"
    path.write_text(path.read_text().replace('"text"', '"jsonl"'))
    (finding,) = verify(store)
    assert "identity.json was changed after it was written" in finding.problem
    before = tree(store)
    assert finding.cure == "none"
    assert repair(store, [finding]) == []
    assert tree(store) == before


def test_a_calibration_that_is_missing_damaged_or_another_is_found(store):
    path = store / "calibration.json"
    path.write_text(path.read_text().replace("100.0", "101.0", 1))
    assert problems_of(store)[0].startswith("calibration.json: its median norms are not the manifest's")
    path.write_text('{"format": 1}')
    assert "calibration.json is damaged (KeyError('median_norms'))" in problems_of(store)[0]
    path.unlink()
    assert problems_of(store)[0].startswith("calibration.json: missing")


def test_partial_files_are_named(store):
    (store / "resid.0" / "0000-000009.tar.partial").write_bytes(b"half")
    assert problems_of(store) == ["resid.0/0000-000009.tar.partial: left over from an interrupted write; delete it"]


def test_offsets_that_miss_the_rows_are_found(store):
    def shift(site):
        return SiteRecord(replace(site.tar, offsets=(site.tar.offsets[0] - 4, *site.tar.offsets[1:])), site.statistics)

    log_anew(store, 0, 0, "resid.0", shift)
    (problem,) = problems_of(store)
    assert problem.startswith("shard resid.0/0000-000000.tar: the offsets of the progress log do not point at its rows")


def test_int8_scales_that_are_not_where_the_log_says_or_not_finite_are_found(stores, tmp_path):
    def shift(site):
        offsets = site.tar.scale_offsets
        return SiteRecord(replace(site.tar, scale_offsets=(offsets[0] - 4, *offsets[1:])), site.statistics)

    stores.build(tmp_path / "shifted", LANES, dtype="int8")
    log_anew(tmp_path / "shifted", 0, 0, "resid.0", shift)
    (problem,) = problems_of(tmp_path / "shifted")
    assert problem.startswith("shard resid.0/0000-000000.tar: the offsets of the progress log do not point at its rows")
    stores.build(tmp_path / "lost", LANES, dtype="int8")
    log_anew(tmp_path / "lost", 0, 0, "resid.0", lambda site: SiteRecord(replace(site.tar, scale_offsets=()), site.statistics))
    (problem,) = problems_of(tmp_path / "lost")
    assert problem.startswith("shard resid.0/0000-000000.tar: unreadable")


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_member_is_refused_by_name_and_never_unpickled(store, tmp_path_factory):
    path, sprung = tar_path(store, "resid.0", 0, 1), tmp_path_factory.mktemp("trap") / "sprung"
    with tarfile.open(path, "a") as tar:
        content = pickle.dumps(Trap(sprung))
        member = tarfile.TarInfo("0000-000001-00000.pyd")
        member.size = len(content)
        tar.addfile(member, BytesIO(content))
    content = path.read_bytes()
    log_anew(
        store,
        0,
        1,
        "resid.0",
        lambda site: replace(site, tar=replace(site.tar, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())),
    )
    (problem,) = problems_of(store)
    assert problem.startswith("shard resid.0/0000-000001.tar: has a member 0000-000001-00000.pyd, which no store has; delete it")
    with Stream(store, "resid.0", [0, 1], 2, 100, seed=0, verify_shards=True) as stream:
        for _ in range(20):
            stream.next_batch()
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works"


def test_statistics_of_other_rows_are_found(store):
    def nudge(site):
        return SiteRecord(site.tar, replace(site.statistics, sum=site.statistics.sum + torch.tensor([0, 0, 1e-6, 0])))

    log_anew(store, 1, 1, "resid.2", nudge)
    (problem,) = problems_of(store)
    assert problem.startswith("shard resid.2/0001-000001.tar: its statistics are not those of its rows")


def test_rows_and_contexts_that_are_not_as_many_as_logged_are_found(store):
    def count(*rows):
        return lambda site: SiteRecord(
            replace(site.tar, context_rows=rows, offsets=site.tar.offsets[:1] + site.tar.offsets[: len(rows) - 1]), site.statistics
        )

    log_anew(store, 0, 0, "resid.0", count(2, 0))
    log_anew(store, 1, 1, "resid.0", count(5))
    first, second = (problem for problem in problems_of(store) if problem.startswith("shard"))
    assert "0000-000000.tar: context 0 has 3 rows, the progress log says 2" in first
    assert "0001-000001.tar: its members are not the 2 contexts of the progress log" in second


def test_values_that_are_not_finite_are_found(stores, tmp_path):
    stores.begin(tmp_path, 1)
    shard = stores.shard(0, 0, [4])
    shard["resid.2"].contexts[0].x[1, 2] = torch.nan
    write_shard(ProgressLog.open(tmp_path, 0), shard, Cursor(0, 0, 0), Cursor(1, 0, 0), last=True)
    finish(tmp_path)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("shard resid.2/0000-000000.tar: context 0 has values that are NaN or infinite")


def spoil_a_byte(store):
    flip(tar_path(store, "resid.2", 1, 1))


def spoil_a_log(store):
    path = progress_path(store, 1)
    path.write_text(path.read_text().replace('"end": [1, 0, 0]', '"end": [1, 0, 1]'))


def spoil_a_manifest(store):
    write_manifest(store, lambda content: content["identity"].update(d_model=8))


def spoil_the_calibration(store):
    (store / "calibration.json").write_text("{")


def spoil_all(store):
    for shard in (0, 2):
        tar_path(store, "resid.0", 1, shard).write_bytes(b"")
    flip(tar_path(store, "resid.0", 0, 1))
    (store / "resid.2" / "0000-000001.tar.partial").write_bytes(b"half")
    shutil.copy(tar_path(store, "resid.0", 0, 0), tar_path(store, "resid.0", 0, 5))


@pytest.mark.parametrize("spoil", [spoil_a_byte, spoil_a_log, spoil_a_manifest, spoil_the_calibration, spoil_all])
def test_a_repaired_store_is_rebuilt_to_the_byte(stores, store, spoil):
    whole = tree(store)
    spoil(store)
    repair(store, verify(store))
    assert not is_finished(store)
    stores.build(store, LANES)
    assert verify(store) == []
    assert tree(store) == whole


def test_only_the_broken_shard_goes_at_every_site(store):
    whole = tree(store)
    flip(tar_path(store, "resid.2", 1, 1))
    assert repair(store, verify(store)) == ["removed shard 1 of lane 1: 2 tars, its line is a gap", "removed manifest.json"]
    gone = {f"{site}/0001-000001.tar" for site in ("resid.0", "resid.2")} | {"manifest.json"}
    assert whole.keys() - tree(store).keys() == gone
    assert [record.is_gap for record in read_records(store, 1)] == [False, True, False]
    assert all(content == whole[name] for name, content in tree(store).items() if name != "progress/0001.jsonl")
    assert [finding.problem for finding in verify(store)] == [
        f"shard 0001-000001 was lost or taken out; {HARVEST_AGAIN}",
        f"store {store} is not whole: 1 of 2 lanes, the first is 1, are not harvested to the end; {HARVEST_AGAIN}",
    ]


def test_what_is_left_over_goes_and_the_manifest_stays(store):
    whole = tree(store)
    (store / "resid.0" / "0000-000009.tar.partial").write_bytes(b"half")
    shutil.copy(tar_path(store, "resid.0", 0, 1), tar_path(store, "resid.0", 0, 2))
    assert repair(store, verify(store)) == ["removed resid.0/0000-000002.tar", "removed resid.0/0000-000009.tar.partial"]
    assert tree(store) == whole


def test_a_second_repair_finds_nothing_to_remove(store):
    spoil_all(store)
    repair(store, verify(store))
    before = tree(store)
    assert repair(store, verify(store)) == []
    assert tree(store) == before


def is_refused(store):
    """Whether no reader takes a store for whole."""
    if is_finished(store):
        return False
    try:
        for lane in (0, 1):
            Stream(store, "resid.0", [lane], 2, 2, seed=0, verify_shards=False).close()
    except StoreError:
        return True
    return False


def killed_after(store, num_changes):
    """Repair in a process of its own that is killed before it changes anything more; whether it was."""
    changes = 0

    def count(change):
        def counted(*arguments, **named):
            nonlocal changes
            if changes == num_changes:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1
            return change(*arguments, **named)

        return counted

    child = os.fork()
    if child == 0:
        with patch.object(Path, "unlink", count(Path.unlink)), patch.object(Path, "replace", count(Path.replace)):
            repair(store, verify(store))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("spoil", [spoil_a_byte, spoil_a_log, spoil_all])
def test_a_killed_repair_is_never_read_as_whole_and_ends_as_one_that_was_not(stores, tmp_path, spoil):
    stores.build(tmp_path / "whole", LANES)
    spoiled = shutil.copytree(tmp_path / "whole", tmp_path / "spoiled")
    spoil(spoiled)
    straight = shutil.copytree(spoiled, tmp_path / "straight")
    repair(straight, verify(straight))
    for num_changes in range(100):
        store = shutil.copytree(spoiled, tmp_path / f"killed-{num_changes}")
        was_killed = killed_after(store, num_changes)
        if not was_killed:
            break
        assert num_changes == 0 or is_refused(store)
        repair(store, verify(store))
        assert tree(store) == tree(straight)
    assert num_changes > 3
