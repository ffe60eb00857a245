"""`gsae verify` on real stores of the small pipeline: found, repaired, and harvested again by real ranks."""

import shutil
from pathlib import Path

import pytest
from conftest import small_settings, write_config, write_text
from made_up_run import MadeUpRun
from ranks import run_gsae
from trees import tree

from gsae.cli import main
from gsae.store.shards import tar_path


def run(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code)


def config_of(folder: Path, text: Path) -> Path:
    settings = small_settings(folder)
    settings["corpus"]["path"] = f"{text}/*.txt"
    return write_config(folder / "config.yaml", settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with text and the store that one rank harvested from it."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text", num_documents=60)
    run_gsae(1, ["harvest", config_of(folder, folder / "text")])
    return folder


@pytest.mark.parametrize("size", [1, 2])
def test_a_harvest_after_a_repair_rebuilds_just_what_was_broken_to_the_byte(whole, tmp_path, size, capsys):
    config, store = config_of(tmp_path, whole / "text"), tmp_path / "runs/store"
    shutil.copytree(whole / "runs/store", store)
    flipped, short = tar_path(store, "resid.1", 1, 1), tar_path(store, "resid.2", 3, 0)
    content = bytearray(flipped.read_bytes())
    content[-20_000] ^= 1
    flipped.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-1])
    assert run("verify", store) == 2
    found = capsys.readouterr().out
    assert "shard resid.1/0001-000001.tar: its SHA-256 differs" in found
    assert "shard resid.2/0003-000000.tar has" in found
    assert run("verify", store, "--repair") == 0
    assert "removed shard 1 of lane 1: 2 tars" in capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in store.glob("resid.*/*.tar")}
    wanted = {str(path.relative_to(whole / "runs/store")) for path in (whole / "runs/store").glob("resid.*/*.tar")}
    gone = wanted - {str(path.relative_to(store)) for path in kept}
    assert gone == {f"{site}/{shard}.tar" for site in ("resid.1", "resid.2") for shard in ("0001-000001", "0003-000000")}
    run_gsae(size, ["harvest", config])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tree(store) == tree(whole / "runs/store")
    assert run("verify", store) == 0


def test_a_whole_store_is_left_alone_by_a_repair(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert run("verify", whole, "--repair") == 0
    assert capsys.readouterr().out == f"{whole}: 1 stores, 0 runs with 0 checkpoints; no problems\n"
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_repair_leaves_checkpoints_alone_and_says_so_by_its_exit_code(tmp_path, capsys):
    made = MadeUpRun().write(tmp_path)
    weights = next(made.glob("checkpoints/*/sae.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    before = tree(tmp_path)
    assert run("verify", tmp_path, "--repair") == 2
    assert "SHA-256 differs" in capsys.readouterr().out
    assert tree(tmp_path) == before
