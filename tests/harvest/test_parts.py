"""Harvesting in parts: which part is wanted, and which store is refused."""

import shutil
from pathlib import Path

import pytest
from in_parts import begin, copied, fail_with, part_stores
from ranks import run_gsae

from gsae.harvest.parts import next_visit
from gsae.settings import read_config
from gsae.store import finish
from gsae.store.parts import Used, remove_used, write_used


@pytest.fixture(scope="module")
def waiting(tmp_path_factory) -> Path:
    """A folder in which two parts have been harvested and nothing trained."""
    folder = tmp_path_factory.mktemp("waiting")
    run_gsae(1, ["harvest", begin(folder)])
    return folder


def test_a_harvest_that_waits_for_training_touches_nothing_and_says_so(waiting):
    before = {path: path.stat().st_mtime_ns for path in (waiting / "runs").rglob("*")}
    assert "run gsae train, then gsae harvest again" in run_gsae(1, ["harvest", waiting / "config.yaml"])
    assert {path: path.stat().st_mtime_ns for path in (waiting / "runs").rglob("*")} == before


@pytest.mark.parametrize(
    ("stage", "parts", "words"),
    [
        ("harvest", 4, "was harvested with corpus.parts 3, this config has 4"),
        ("harvest", 1, "was harvested with corpus.parts 3, this config has absent"),
        ("train", 1, "corpus.parts is 1 but the store"),
        ("train", 4, "set it to 3"),
    ],
)
def test_a_store_of_other_parts_is_refused(waiting, tmp_path, stage, parts, words):
    config = copied(waiting, tmp_path)
    before = sorted((tmp_path / "runs").rglob("*"))
    assert words in fail_with(1, stage, config, "--corpus.parts", str(parts))
    assert sorted((tmp_path / "runs").rglob("*")) == before


def test_an_ordinary_store_is_not_taken_for_one_in_parts(tmp_path):
    config = begin(tmp_path)
    run_gsae(1, ["harvest", config, "--corpus.parts", "1"])
    for stage in ("harvest", "train"):
        assert "corpus.parts" in fail_with(1, stage, config)


def test_a_part_that_training_removes_meanwhile_is_not_harvested_again(waiting, tmp_path, monkeypatch):
    """Training ends its use of part 0 after the harvest has read what is used up, before it looks whether part 0 is whole."""
    config = read_config("harvest", [str(copied(waiting, tmp_path))])
    store, is_finished, looked_at = tmp_path / "runs/store", finish.is_finished, []

    def look(directory: Path) -> bool:
        if not looked_at:
            write_used(store, Used(1))
            remove_used(store)
        looked_at.append(directory.name)
        return is_finished(directory)

    monkeypatch.setattr("gsae.harvest.parts.finish.is_finished", look)
    assert next_visit(config, num_layers=4) == 2
    assert looked_at[0] == "part-0000"


def test_what_is_left_of_a_removal_goes_before_another_part_is_harvested(waiting, tmp_path):
    config = copied(waiting, tmp_path)
    write_used(tmp_path / "runs/store", Used(1))  # and killed
    run_gsae(1, ["harvest", config])
    assert part_stores(tmp_path) == ["part-0001", "part-0002"]


def test_a_part_that_was_begun_with_another_calibration_is_refused(waiting, tmp_path):
    config = copied(waiting, tmp_path)
    part = tmp_path / "runs/store/part-0001"
    shutil.rmtree(part)
    part.mkdir()
    finish.write_calibration(part, {"resid.1": 1.0, "resid.2": 1.0})
    assert "was begun with another calibration" in fail_with(1, "harvest", config)


def test_a_later_part_without_text_for_a_lane_is_refused_before_any_is_harvested(tmp_path):
    """22 training documents in 20 parts: the first two have text for every lane, some later one has no document."""
    line = fail_with(1, "harvest", begin(tmp_path), "--corpus.parts", "20")
    assert "has no text; lower corpus.parts (20), corpus.num_lanes (4)" in line
    assert not (tmp_path / "runs").exists()


def test_a_part_whose_directory_cannot_be_made_is_one_line(tmp_path):
    config = begin(tmp_path)
    (tmp_path / "runs/store").mkdir(parents=True)
    (tmp_path / "runs/store/part-0000").write_text("in the way")
    assert "part-0000, which cannot be written" in fail_with(1, "harvest", config)
