import json
from dataclasses import replace

import pytest
import torch

from gsae.corpus.contexts import Cursor
from gsae.store.finish import finish
from gsae.store.progress import ProgressLog, SiteRecord, progress_path, write_shard
from gsae.store.shards import tar_path
from gsae.store.verify import verify

LANES = [[[3, 0], [4]], [[2], [5, 1], []]]


@pytest.fixture
def store(stores, tmp_path):
    stores.build(tmp_path, LANES)
    return tmp_path


def log_anew(store, lane, shard, site, change):
    """Rewrite one record of a log as a faulty harvest would have written it, and the manifest after it."""
    log = ProgressLog.open(store, lane)
    records = list(log.records())
    records[shard] = replace(records[shard], sites={**records[shard].sites, site: change(records[shard].sites[site])})
    progress_path(store, lane).write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    finish(store)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_healthy_store_has_no_problems(stores, tmp_path, dtype):
    stores.build(tmp_path, LANES, dtype)
    assert verify(tmp_path) == []


def test_every_damaged_shard_is_found_not_only_the_first(store):
    for site, lane, shard in (("resid.0", 0, 1), ("resid.2", 1, 0)):
        path = tar_path(store, site, lane, shard)
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
    problems = verify(store)
    assert [problem.split(":")[0] for problem in problems] == ["shard resid.0/0000-000001.tar", "shard resid.2/0001-000000.tar"]
    assert all("SHA-256 differs" in problem for problem in problems)


def test_a_store_that_is_not_whole_gives_the_one_line(store):
    tar_path(store, "resid.0", 0, 1).unlink()
    (problem,) = verify(store)
    assert problem.startswith("shard resid.0/0000-000001.tar is missing")


def test_a_changed_or_missing_log_is_found(store):
    path = progress_path(store, 1)
    path.write_text(path.read_text().replace('"end": [1, 0, 0]', '"end": [1, 0, 1]'))
    progress_path(store, 0).unlink()
    problems = verify(store)
    assert [problem.split(":")[0] for problem in problems[:2]] == ["progress/0000.jsonl", "progress/0001.jsonl"]
    assert problems[2] == "resid.0: 0 rows in the progress logs, 15 in the manifest"


def test_partial_files_are_named(store):
    (store / "resid.0" / "0000-000009.tar.partial").write_bytes(b"half")
    assert verify(store) == ["resid.0/0000-000009.tar.partial: left over from an interrupted write; delete it"]


def test_offsets_that_miss_the_rows_are_found(store):
    def shift(site):
        return SiteRecord(replace(site.tar, offsets=(site.tar.offsets[0] - 4, *site.tar.offsets[1:])), site.statistics)

    log_anew(store, 0, 0, "resid.0", shift)
    assert verify(store) == ["shard resid.0/0000-000000.tar: the offsets of the progress log do not point at its rows"]


def test_statistics_of_other_rows_are_found(store):
    def nudge(site):
        return SiteRecord(site.tar, replace(site.statistics, sum=site.statistics.sum + torch.tensor([0, 0, 1e-6, 0])))

    log_anew(store, 1, 1, "resid.2", nudge)
    assert verify(store) == ["shard resid.2/0001-000001.tar: its statistics are not those of its rows"]


def test_values_that_are_not_finite_are_found(stores, tmp_path):
    stores.begin(tmp_path, 1)
    shard = stores.shard(0, 0, [4])
    shard["resid.2"].contexts[0].x[1, 2] = torch.nan
    write_shard(ProgressLog.open(tmp_path, 0), shard, Cursor(0, 0, 0), Cursor(1, 0, 0), last=True)
    finish(tmp_path)
    assert verify(tmp_path) == ["shard resid.2/0000-000000.tar: it has values that are NaN or infinite"]
