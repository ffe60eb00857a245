"""Where a bank resumes, told from the checkpoints that a kill left behind."""

import json
from pathlib import Path

import pytest

from gsae.errors import CheckpointError
from gsae.store.runs import checkpoints, damage, prune_checkpoints, write_checkpoint
from gsae.train.checkpoint import STATE_FILE, find_resume_point, truncate_metrics


def save(run: Path, step: int, **state) -> None:
    described = {"step": step, "finished": False, "stopped": None, **state}
    write_checkpoint(run, step, lambda directory: (directory / STATE_FILE).write_text(json.dumps(described)))


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints(run)]


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    return {name: tmp_path / name for name in ("a", "b")}


def test_nothing_was_saved_yet(runs):
    point = find_resume_point(runs, first_checkpoint=50)
    assert (point.step, point.sources) == (0, {"a": None, "b": None})


def test_a_kill_between_two_saves_resumes_where_both_are_and_drops_what_is_newer(runs):
    for step in (50, 100):
        for run in runs.values():
            save(run, step)
    save(runs["a"], 137)
    point = find_resume_point(runs, first_checkpoint=50)
    assert point.step == 100
    assert {name: source.name for name, source in point.sources.items()} == {"a": "00000100", "b": "00000100"}
    assert steps(runs["a"]) == steps(runs["b"]) == [50, 100]


def test_a_kill_during_the_first_save_starts_anew(runs):
    save(runs["a"], 50)
    assert find_resume_point(runs, first_checkpoint=50).step == 0
    assert steps(runs["a"]) == []


def test_a_run_added_to_others_that_have_begun_is_refused_and_nothing_is_lost(runs):
    save(runs["a"], 50)
    save(runs["a"], 100)
    with pytest.raises(CheckpointError, match="run b has not begun but a is at step 100"):
        find_resume_point(runs, first_checkpoint=50)
    assert steps(runs["a"]) == [50, 100]


@pytest.mark.parametrize("state", [{"finished": True}, {"stopped": "L0 was under 1"}])
def test_a_run_that_has_ended_is_left_alone(runs, state):
    save(runs["a"], 200, **state)
    save(runs["b"], 50)
    save(runs["b"], 100)
    point = find_resume_point(runs, first_checkpoint=50)
    assert (point.step, list(point.sources)) == (100, ["b"])
    assert steps(runs["a"]) == [200]


def test_a_run_added_to_finished_ones_starts_at_the_beginning(runs):
    save(runs["a"], 200, finished=True)
    assert find_resume_point(runs, first_checkpoint=50).sources == {"b": None}


def test_a_damaged_checkpoint_is_named(runs):
    save(runs["a"], 50)
    save(runs["b"], 50)
    path = checkpoints(runs["b"])[0].path / STATE_FILE
    path.write_text(path.read_text().replace("50", "51"))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        find_resume_point(runs, first_checkpoint=50)


def test_a_half_written_checkpoint_does_not_count(runs):
    def fail(directory: Path) -> None:
        (directory / STATE_FILE).write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(runs["a"], 50, fail)
    assert list((runs["a"] / "checkpoints").iterdir()) == []
    (runs["a"] / "checkpoints/00000025.partial").mkdir()
    assert steps(runs["a"]) == []
    save(runs["a"], 50)
    assert [path.name for path in (runs["a"] / "checkpoints").iterdir()] == ["00000050"]


def test_a_checkpoint_is_replaced_and_pruned_whole(runs):
    for step in (50, 100, 150, 150):
        save(runs["a"], step)
    prune_checkpoints(runs["a"], keep=2)
    assert steps(runs["a"]) == [100, 150]
    assert all(damage(checkpoint.path) == [] for checkpoint in checkpoints(runs["a"]))


def test_every_so_many_steps_one_is_kept_besides_the_newest(runs):
    for step in (50, 100, 137, 150, 200, 250, 300):
        save(runs["a"], step)
    prune_checkpoints(runs["a"], 2, keep_every_steps=100)
    assert steps(runs["a"]) == [100, 200, 250, 300]
    save(runs["b"], 250)
    assert find_resume_point(runs, first_checkpoint=50).step == 250
    assert steps(runs["a"]) == [100, 200, 250]  # of what is older nothing goes


def test_what_does_not_belong_to_a_checkpoint_is_found(runs):
    save(runs["a"], 50)
    checkpoint = checkpoints(runs["a"])[0].path
    (checkpoint / "more.bin").touch()
    (problem,) = damage(checkpoint)
    assert "more.bin: not part of the checkpoint" in problem
    (checkpoint / "more.bin").unlink()
    (checkpoint / STATE_FILE).unlink()
    assert "missing" in damage(checkpoint)[0]


def test_metrics_after_the_resume_point_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_metrics(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
