"""A small pipeline whose store is int8, from end to end, on two ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config, write_text
from ranks import run_gsae

from gsae.cli import main
from gsae.store.manifest import load
from gsae.store.progress import read_records
from gsae.store.shards import map_tar, read_tar, tar_path
from gsae.store.stream import Stream

SITE = "resid.2"


def run(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code)


def config_of(folder: Path, storage: str) -> Path:
    settings = small_settings(folder)
    settings["harvest"]["storage_dtype"] = storage
    settings["harvest"]["store"] = str(folder / storage)
    settings["output"] = str(folder / f"runs-{storage}")
    settings["train"] |= {"total_rows": 6400, "sweeps": settings["train"]["sweeps"][:2]}
    return write_config(folder / f"{storage}.yaml", settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same text harvested as int8 and as float32, which is what the LLM gives."""
    folder = tmp_path_factory.mktemp("int8")
    write_text(folder / "text")
    for storage in ("int8", "float32"):
        run_gsae(2, ["harvest", config_of(folder, storage)])
    return folder


def rows_of(store: Path):
    """Token and position of the rows at SITE, and their decoded values, lane by lane."""
    members = [
        member.rows
        for lane in range(load(store).num_lanes)
        for record in read_records(store, lane)
        for member in read_tar(tar_path(store, SITE, lane, record.shard))
    ]
    places = torch.stack([torch.cat([getattr(rows, name) for rows in members]) for name in ("token", "position", "document")])
    return places, torch.cat([rows.encoded.decode() for rows in members]).double()


def test_the_manifest_says_what_int8_costs(folder):
    places, stored = rows_of(folder / "int8")
    original_places, x = rows_of(folder / "float32")
    assert torch.equal(places, original_places)
    site, original = load(folder / "int8").sites[SITE], load(folder / "float32").sites[SITE]
    fvu = (x - stored).square().sum() / (stored - stored.mean(dim=0)).square().sum()
    assert 1e-6 < site.storage_fvu < 1e-3
    assert site.storage_fvu == pytest.approx(float(fvu), rel=1e-9)
    assert original.storage_fvu == 0
    assert torch.allclose(site.mean, stored.mean(dim=0), rtol=1e-9, atol=1e-12)


def test_an_int8_store_takes_a_quarter_of_a_float32_one_and_a_scale(folder):
    store, original = folder / "int8", folder / "float32"
    (record, *_), (wide, *_) = read_records(store, 0), read_records(original, 0)
    views = map_tar(tar_path(store, SITE, 0, 0), record.sites[SITE].tar, "int8", 16)
    assert sum(view.x.nbytes + view.row_scale.nbytes for view in views) == record.sites[SITE].tar.rows * (16 + 4)
    assert record.sites[SITE].tar.bytes < wide.sites[SITE].tar.bytes


def test_one_rank_harvests_int8_to_the_same_bytes(folder, tmp_path):
    shutil.copytree(folder / "text", tmp_path / "text")
    run_gsae(1, ["harvest", config_of(tmp_path, "int8")])
    one, two = (
        {path.relative_to(store): path.read_bytes() for path in store.rglob("*.tar")} for store in (tmp_path / "int8", folder / "int8")
    )
    assert one == two


def test_an_int8_store_is_verified_and_inspected(folder, tmp_path, capsys):
    assert run("verify", folder / "int8") == 0
    capsys.readouterr()
    assert run("inspect", folder / "int8", "--output", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)["sites"][SITE]
    _, stored = rows_of(folder / "int8")
    assert found["storage_fvu"] == load(folder / "int8").sites[SITE].storage_fvu
    assert found["norm_quantiles"]["1.0"] == pytest.approx(float(stored.norm(dim=1).max()), rel=1e-6)


def test_training_reads_the_decoded_rows(folder):
    _, stored = rows_of(folder / "int8")
    rows = {lane: sum(record.sites[SITE].tar.rows for record in read_records(folder / "int8", lane)) for lane in range(4)}
    first = {lane: sum(rows[other] for other in range(lane)) for lane in rows}
    with Stream(folder / "int8", SITE, [1, 2], 64, 512, seed=0, verify_shards=True) as stream:
        for _ in range(20):
            batch = stream.next_batch()
            assert (batch.x.dtype, batch.row_scale.dtype) == (torch.int8, torch.float32)
            wanted = stored[torch.tensor([first[lane] for lane in batch.lane.tolist()]) + batch.row]
            assert torch.equal(batch.decode(torch.device("cpu"), torch.float32).double(), wanted)


def test_runs_on_int8_rows_end_where_those_on_exact_rows_do(folder):
    """Both in float64; the two stores differ by a FVU of less than 1e-3."""
    ends = {}
    for storage in ("int8", "float32"):
        for stage in ("train", "evaluate"):
            run_gsae(2, [stage, config_of(folder, storage)])
        runs = sorted((folder / f"runs-{storage}").glob(f"{SITE}/*/results.json"))
        assert len(runs) == 2
        ends[storage] = [json.loads(path.read_text())["metrics"]["fvu"] for path in runs]
    assert ends["int8"] == pytest.approx(ends["float32"], rel=0.03)
    assert ends["int8"] != ends["float32"]
