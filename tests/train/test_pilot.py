"""A target L0: pilots find lambda, on any ranks the same, through kills and stops; what is recorded, and what is refused."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import small_settings, write_config, write_text
from in_parts import begin, fail_with
from ranks import gsae, run_gsae, started
from trained_runs import again, assert_equal, assert_near, lines

from gsae.config import ResamplingConfig, ScheduleConfig, TrainConfig
from gsae.settings import read_config
from gsae.store import manifest as manifests
from gsae.store.parts import rows_of_visit
from gsae.store.runs import PILOTS_DIRECTORY, find_runs
from gsae.train.grid import extrapolate, interpolate
from gsae.train.ledger import read_entries
from gsae.train.pilot import pilot_config

TARGETS = {
    "sites": [1],
    "total_rows": 6_400,
    "learning_rate": 2e-2,
    "target_l0": {"*": [4, 8]},
    "sweeps": [{"objective": "gated", "expansions": [3], "seeds": [0, 1]}],
    "pilot": {"fraction": 0.5, "lambdas": [0.1, 0.2]},  # L0 4 takes about 0.6: one round more
}
GIVEN = {"sites": [1], "total_rows": 640, "sweeps": [{"objective": "gated", "expansions": [3], "lambdas": {"*": [0.2]}}]}
NAMES = [f"resid.1/gated-m48-t{target}-s{seed}" for target in (4, 8) for seed in (0, 1)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a store and a run whose lambda is given."""
    folder = tmp_path_factory.mktemp("small")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"]["store"] = str(folder / "store")
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    run_gsae(1, ["train", again(folder, folder / "given", **GIVEN)])
    return folder


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory) -> Path:
    """A folder with runs that one rank trained to their targets, and what it said."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "said").write_text(run_gsae(1, ["train", again(small, folder, **TARGETS)]))
    return folder


def run_json(output: Path, name: str) -> dict:
    return json.loads((output / name / "run.json").read_text())


def lambdas(output: Path) -> dict[str, float]:
    return {name: run_json(output, name)["lambda"] for name in NAMES}


def test_runs_end_near_their_targets(trained):
    for name, metrics in lines(trained / "runs").items():
        ends = [line["l0"] for line in metrics if line["kind"] == "step"][-2:]
        assert sum(ends) / 2 == pytest.approx(run_json(trained / "runs", name)["target_l0"], rel=0.15)
    assert list(lines(trained / "runs")) == NAMES


def test_what_pilots_found_is_recorded_and_answers_follow_from_it(trained):
    (entry,) = read_entries(trained / "runs/resid.1/pilots.json").values()
    assert {pilot.rows for pilot in entry.pilots} == {1600, 3200}
    assert max(pilot.lambda_ for pilot in entry.pilots) > 0.5, "no further round was needed"
    short, long = ([pilot for pilot in entry.pilots if pilot.rows == rows] for rows in (1600, 3200))
    for target in (4, 8):
        wanted = extrapolate(interpolate(short, target), interpolate(long, target), 0.5)
        assert entry.answers[target] == wanted
        assert {lambdas(trained / "runs")[name] for name in NAMES if f"-t{target}-" in name} == {wanted}
    assert interpolate(short, 4) > interpolate(long, 4), "short runs end with more L0"
    assert not (trained / "runs/resid.1" / PILOTS_DIRECTORY).exists()


def test_console_and_metrics_say_what_pilots_found(trained):
    said = (trained / "said").read_text()
    for target in (4, 8):
        (line,) = [line for line in said.splitlines() if f"L0 {target} at lambda" in line]
        first = lines(trained / "runs")[f"resid.1/gated-m48-t{target}-s0"][0]
        assert (first["kind"], first["step"], first["target_l0"]) == ("pilots", 0, target)
        assert line.endswith(first["found"])
        assert f"lambda {first['lambda']:g} (" in line


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_find_the_same_lambda_and_train_the_same_weights(small, trained, tmp_path, size):
    run_gsae(size, ["train", again(small, tmp_path, **TARGETS)])
    assert lambdas(tmp_path / "runs") == lambdas(trained / "runs")
    (one,) = read_entries(trained / "runs/resid.1/pilots.json").values()
    (many,) = read_entries(tmp_path / "runs/resid.1/pilots.json").values()
    assert [pilot.lambda_ for pilot in many.pilots] == [pilot.lambda_ for pilot in one.pilots]
    assert [pilot.l0 for pilot in many.pilots] == [pytest.approx(pilot.l0, rel=1e-9) for pilot in one.pilots]
    assert_near(tmp_path / "runs", trained / "runs")


def test_killed_and_stopped_among_pilots_it_ends_as_an_uninterrupted_one(small, trained, tmp_path):
    config, output = again(small, tmp_path, **TARGETS), tmp_path / "runs"
    for ending, enough in ((signal.SIGKILL, 20), (signal.SIGTERM, 40)):
        with started(1, gsae, "train", str(config)) as ranks:
            until = time.monotonic() + 60
            while num_pilot_lines(output) < enough and time.monotonic() < until:
                time.sleep(0.002)
            assert num_pilot_lines(output) >= enough
            os.kill(ranks.processes[0].pid, ending)
            assert ranks.wait(25) == [-signal.SIGKILL if ending == signal.SIGKILL else 0], ranks.output()
        assert find_runs(output) == [], "pilots are no runs"
        assert not any((output / name / "run.json").exists() for name in NAMES)
    assert json.loads((output / "stopped.json").read_text())["site"] == "resid.1"
    run_gsae(1, ["train", config])
    assert_equal(output, trained / "runs")
    assert (output / "resid.1/pilots.json").read_text() == (trained / "runs/resid.1/pilots.json").read_text()


def test_groups_look_for_the_lambdas_of_their_sites(small, trained, tmp_path):
    run_gsae(2, ["train", again(small, tmp_path, **{**TARGETS, "sites": [], "groups": 2})])
    assert lambdas(tmp_path / "runs") == lambdas(trained / "runs")
    assert [run.parent.name for run in find_runs(tmp_path / "runs")] == ["resid.1"] * 4 + ["resid.2"] * 4


def num_pilot_lines(output: Path) -> int:
    return sum(path.read_text().count("\n") for path in output.glob(f"*/{PILOTS_DIRECTORY}/*/*/metrics.jsonl"))


def test_a_seed_that_is_added_takes_the_lambda_that_was_found(small, trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    sweeps = [{**TARGETS["sweeps"][0], "seeds": [0, 1, 2]}]
    said = run_gsae(1, ["train", again(small, tmp_path, **{**TARGETS, "sweeps": sweeps, "target_l0": {1: [4]}})])
    assert "looks for lambda" not in said
    assert "L0 4 at lambda" in said
    assert "as found before" in said
    assert run_json(tmp_path / "runs", "resid.1/gated-m48-t4-s2")["lambda"] == lambdas(trained / "runs")[NAMES[0]]


def test_a_target_that_is_added_leaves_the_lambda_of_the_others(small, trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    sweeps = [{**TARGETS["sweeps"][0], "seeds": [2]}]
    run_gsae(1, ["train", again(small, tmp_path, **{**TARGETS, "sweeps": sweeps, "target_l0": {1: [4, 6]}})])
    assert run_json(tmp_path / "runs", "resid.1/gated-m48-t4-s2")["lambda"] == lambdas(trained / "runs")[NAMES[0]]
    between = run_json(tmp_path / "runs", "resid.1/gated-m48-t6-s2")["lambda"]
    assert lambdas(trained / "runs")[NAMES[2]] < between < lambdas(trained / "runs")[NAMES[0]]
    (entry,) = read_entries(tmp_path / "runs/resid.1/pilots.json").values()
    assert entry.seed == 0


def test_a_second_call_does_nothing(small, trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*") if path.is_file()}
    assert "all 4 runs have ended before" in run_gsae(1, ["train", trained / "config.yaml"])
    assert {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*") if path.is_file()} == before


def test_runs_whose_lambda_is_given_are_described_as_before(small):
    run = run_json(small / "given/runs", "resid.1/gated-m48-l0.2-s0")
    assert "target_l0" not in run
    assert "pilot" not in run["settings"]
    assert "target_l0" not in run["settings"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pilot": {"fraction": 0.4, "lambdas": [0.1, 0.2]}}, "was trained with pilot.fraction 0.5, this config has 0.4"),
        ({"learning_rate": 1e-2}, "was trained with learning_rate 0.02"),
        ({"target_l0": {1: [48]}}, "train.target_l0 is 48 at resid.1, where runs have 48 features; lower it"),
        ({"target_l0": {1: [0.5]}}, "train.target_l0 of 1 is [0.5]; give numbers of at least 1"),
        ({"target_l0": {}}, "the sweep of 'gated' has no lambdas"),
        ({"pilot": {"lambdas": [0.2]}}, "give at least two rising positive numbers"),
    ],
)
def test_bad_input_is_one_line(small, trained, tmp_path, change, words):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    assert words in fail_with(1, "train", again(small, tmp_path, **TARGETS | change))


def test_findings_of_other_settings_are_refused_before_anything_is_trained(small, trained, tmp_path):
    (tmp_path / "runs/resid.2").mkdir(parents=True)
    shutil.copy(trained / "runs/resid.1/pilots.json", tmp_path / "runs/resid.2")
    config = again(small, tmp_path, **{**TARGETS, "sites": [1, -2]})
    assert "resid.2/pilots.json: pilots of gated-m48-r0.02 were trained with other settings" in fail_with(1, "train", config)
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_a_target_beyond_all_that_is_tried_is_one_line(small, tmp_path):
    changes = {"target_l0": {"*": [47]}, "total_rows": 1280, "learning_rate": 2e-3}
    line = fail_with(2, "train", again(small, tmp_path, **TARGETS | changes))
    assert "resid.1 gated-m48-r0.002, 320 rows: pilots with lambda 0.001 to 0.2 ended with L0" in line
    assert "so none is near train.target_l0 47; give a target within, or other train.pilot.lambdas" in line


def test_a_target_is_refused_at_a_site_whose_other_runs_have_begun(small, tmp_path):
    given = {"objective": "gated", "expansions": [2], "lambdas": {1: [0.2]}}
    output = tmp_path / "runs"
    with started(1, gsae, "train", str(again(small, tmp_path, **{**TARGETS, "sweeps": [given]}))) as ranks:
        until = time.monotonic() + 60
        while not (output / "resid.1/gated-m32-l0.2-s0/checkpoints/00000030").exists() and time.monotonic() < until:
            time.sleep(0.002)
        ranks.kill()
    line = fail_with(1, "train", again(small, tmp_path, **{**TARGETS, "sweeps": [given, *TARGETS["sweeps"]]}))
    assert "has not begun but gated-m32-l0.2-s0 is at step" in line
    assert not (output / "resid.1" / PILOTS_DIRECTORY).exists()
    assert not (output / "resid.1/pilots.json").exists(), "pilots were trained before"


def test_of_a_store_in_parts_pilots_read_the_first(tmp_path):
    sweep = {"objective": "relu", "expansions": [3]}
    config = begin(tmp_path, sites=[1], sweeps=[sweep], learning_rate=2e-2, target_l0={"*": [8]}, pilot={"fraction": 0.9})
    run_gsae(1, ["harvest", config])
    run_gsae(2, ["train", config])
    (entry,) = read_entries(tmp_path / "runs/resid.1/pilots.json").values()
    steps = rows_of_visit(tmp_path / "runs/store", 0, "resid.1") // 64
    assert {pilot.rows for pilot in entry.pilots} == {steps * 64, steps // 2 * 64}
    (metrics,) = lines(tmp_path / "runs").values()
    assert metrics[-1]["step"] > steps
    assert (tmp_path / "runs/waiting.json").exists()


def test_a_pilot_is_the_run_made_shorter(small, tmp_path):
    """What counts steps or rows keeps its share: warm-ups, events, what counts as dead."""
    config = read_config("train", [str(again(small, tmp_path, total_rows=64_000))])
    pilot = pilot_config(config, "resid.1", 100)  # of 1000 steps
    assert pilot.train.total_rows == 6_400
    whole, short = config.train, pilot.train
    defaults = (ScheduleConfig(), TrainConfig())
    assert short.schedule.max_warmup_steps == defaults[0].max_warmup_steps // 10
    assert short.schedule.max_lambda_warmup_steps == defaults[0].max_lambda_warmup_steps // 10
    assert short.resampling.dead_after_rows == whole.resampling.dead_after_rows // 10
    assert short.resampling.min_interval_rows == whole.resampling.min_interval_rows // 10
    assert short.resampling.max_candidate_rows == ResamplingConfig().max_candidate_rows // 10
    assert (short.resampling.event_fractions, short.schedule.warmup_fraction) == ([0.25, 0.5], 0.05)


def test_raw_rows_are_tried_with_lambdas_of_their_size(small, tmp_path):
    changes = {"scale_activations": False, "target_l0": {"*": [8]}, "sweeps": [{"objective": "relu", "expansions": [3]}]}
    config = again(small, tmp_path, **TARGETS | changes)
    with suppress(AssertionError):  # raw rows take another learning rate than this one
        run_gsae(1, ["train", config])
    scale = manifests.load(small / "store").sites["resid.1"].scale
    assert not 0.9 < scale < 1.1
    (entry,) = read_entries(tmp_path / "runs/resid.1/pilots.json").values()
    tried = [pilot.lambda_ for pilot in entry.pilots]
    assert all(any(lambda_ == pytest.approx(first / scale, rel=1e-3) for lambda_ in tried) for first in (0.1, 0.2))
