"""Training as a whole: real ranks, real kills. Its numbers are DESIGN's invariants 1, 2, 6 and 7."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_config
from ranks import gsae, run_gsae, started
from trained_runs import again, assert_equal, assert_near, final_states, lines, num_lines, train_small

from gsae.store import manifest as manifests
from gsae.store.runs import checkpoints, find_runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_train_the_same_weights(trained, tmp_path, size):
    run_gsae(size, ["train", again(trained, tmp_path)])
    assert_near(tmp_path / "runs", trained / "runs")
    events = [[line for line in run if line["kind"].startswith("resampling")] for run in lines(trained / "runs").values()]
    assert any(event.get("resampled") for run in events for event in run), "no feature was resampled, so the draw was not tested"
    assert events == [[line for line in run if line["kind"].startswith("resampling")] for run in lines(tmp_path / "runs").values()]

    assert steps_taken(tmp_path / "runs") == steps_taken(trained / "runs"), "the ranks' density is the group's, not their own"


def steps_taken(output: Path) -> dict[str, list[bool]]:
    """Whether the sparse step was in use at each log line."""
    return {run: [line["is_sparse"] for line in found if line["kind"] == "step"] for run, found in lines(output).items()}


def test_the_sparse_step_trains_what_the_dense_one_trains(trained, tmp_path):
    run_gsae(1, ["train", again(trained, tmp_path, sparse_below_density=0)])
    taken = steps_taken(trained / "runs").values()
    assert any(True in run and False in run for run in taken), "no run went over to the sparse step"
    assert not any(True in run for run in steps_taken(tmp_path / "runs").values())
    assert_near(tmp_path / "runs", trained / "runs")
    for run, curve in curves(tmp_path / "runs").items():
        assert curve == [pytest.approx(other, rel=1e-9, abs=1e-9) for other in curves(trained / "runs")[run]]


def curves(output: Path) -> dict[str, list[list[float]]]:
    """The numbers of each run's lines."""
    return {
        run: [[value for value in line.values() if type(value) in (int, float)] for line in found] for run, found in lines(output).items()
    }


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_train_what_whole_batches_train(trained, tmp_path, size):
    run_gsae(size, ["train", again(trained, tmp_path, micro_batch_rows=13)])
    assert_near(tmp_path / "runs", trained / "runs")


def test_max_rows_trains_on_the_first_rows_alone(trained, tmp_path):
    """A training that may use all rows and one that may use as many as there are agree; one on fewer rows does not depend on the others."""
    assert "max_rows" not in json.loads((find_runs(trained / "runs")[0] / "run.json").read_text())["settings"]
    for name, rows in (("all", 10**9), ("few", 400), ("poisoned", 400)):
        config = again(trained, tmp_path / name, max_rows=rows, sites=[1], verify_shards=False)
        if name == "poisoned":  # the last shard of each lane, beyond its first 100 rows
            settings = yaml.safe_load(config.read_text())
            shutil.copytree(trained / "store", tmp_path / "store")
            for lane in range(4):
                last = sorted((tmp_path / "store/resid.1").glob(f"{lane:04d}-*.tar"))[-1]
                assert last.name != f"{lane:04d}-000000.tar"
                last.write_bytes(b"\xff" * last.stat().st_size)
            settings["harvest"]["store"] = str(tmp_path / "store")
            write_config(config, settings)
        run_gsae(2, ["train", config])
    of_site = {run: tensors for run, tensors in final_states(trained / "runs").items() if run.startswith("resid.1/")}
    assert_states_near(final_states(tmp_path / "all/runs"), of_site)
    assert_equal(tmp_path / "poisoned/runs", tmp_path / "few/runs")


def assert_states_near(states, wanted) -> None:
    assert states.keys() == wanted.keys()
    for run, tensors in wanted.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(states[run][name], tensor, rtol=0, atol=1e-9 if tensor.is_floating_point() else 0)


def test_groups_train_what_one_rank_trains(trained, tmp_path):
    run_gsae(2, ["train", again(trained, tmp_path), "--train.groups", "2"])
    assert_equal(tmp_path / "runs", trained / "runs")


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_training_ends_as_an_uninterrupted_one(trained, tmp_path, size):
    """SIGKILL after a few lines of each of three starts, so at other steps than a checkpoint's."""
    config, reference = again(trained, tmp_path), trained
    if size > 1:
        reference = tmp_path / "uninterrupted"
        run_gsae(size, ["train", again(trained, reference)])
    killed = 0
    for _ in range(3):
        with started(size, gsae, "train", str(config)) as ranks:
            before, until = num_lines(tmp_path / "runs"), time.monotonic() + 60
            while num_lines(tmp_path / "runs") < before + 12 and time.monotonic() < until and any(map(is_alive, ranks.processes)):
                time.sleep(0.002)
            killed += any(map(is_alive, ranks.processes))
            ranks.kill()
    assert killed == 3, "the training was over before it could be killed"
    run_gsae(size, ["train", config])
    assert_equal(tmp_path / "runs", reference / "runs")


def is_alive(process) -> bool:
    return process.is_alive()


def test_a_run_moves_from_1_to_2_to_4_ranks_in_mid_epoch(trained, tmp_path):
    config, output = again(trained, tmp_path), tmp_path / "runs"
    places = []
    for size in (1, 2):
        stop_after_some_lines(config, output, size)
        stopped = json.loads((output / "stopped.json").read_text())
        epoch_rows = manifests.load(trained / "store").sites[stopped["site"]].rows
        places.append((stopped["site"], stopped["step"], stopped["step"] * 64 / epoch_rows))
    assert places[0] < places[1], "the second session got no further than the first"
    assert all(0.02 < epochs % 1 < 0.98 for _, _, epochs in places), places
    run_gsae(4, ["train", config])
    assert_near(output, trained / "runs")


def stop_after_some_lines(config: Path, output: Path, size: int) -> None:
    """SIGTERM to one rank only; all stop together."""
    with started(size, gsae, "train", str(config)) as ranks:
        enough, until = num_lines(output) + 6, time.monotonic() + 60
        while num_lines(output) < enough and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(ranks.processes[-1].pid, signal.SIGTERM)
        assert ranks.wait(25) == [0] * size, ranks.output()


def test_sigterm_checkpoints_and_says_so(trained, tmp_path):
    config, output = again(trained, tmp_path), tmp_path / "runs"
    stop_after_some_lines(config, output, size=2)
    stopped = json.loads((output / "stopped.json").read_text())
    steps = {checkpoints(run)[-1].step for run in find_runs(output / stopped["site"])}
    assert steps == {stopped["step"]}
    assert 0 < stopped["step"] < 200
    run_gsae(2, ["train", config])
    assert not (output / "stopped.json").exists()
    assert all(run[-1]["kind"] == "finished" for run in lines(output).values())


def test_a_second_call_does_nothing(trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*") if path.is_file()}
    assert "have ended before" in run_gsae(1, ["train", trained / "config.yaml"])
    assert {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*") if path.is_file()} == before


def test_sick_runs_are_stopped_and_marked_while_the_others_go_on(trained, tmp_path):
    sweeps = [
        {"objective": "gated", "expansions": [2], "lambdas": {"1": [0.1, 3]}},
        {"objective": "relu", "expansions": [2], "lambdas": {"1": [0.1]}},
    ]
    run_gsae(2, ["train", again(trained, tmp_path, sweeps=sweeps, learning_rate=2e-3)])
    ends = {run.rpartition("/")[2]: metrics[-1] for run, metrics in lines(tmp_path / "runs").items()}
    assert ends["gated-m32-l0.1-s0"]["kind"] == ends["relu-m32-l0.1-s0"]["kind"] == "finished"
    sick = ends["gated-m32-l3-s0"]
    assert sick["kind"] == "stopped"
    assert "L0 was under 1" in sick["reason"]
    assert sick["step"] < 200


def test_a_gradient_that_is_not_finite_stops_its_run_before_the_weights_move(trained, tmp_path):
    sweeps = [{"objective": "relu", "expansions": [2], "lambdas": {"1": [0.1, 1e308]}}]
    schedule = {"lambda_warmup_fraction": 0.0}
    run_gsae(2, ["train", again(trained, tmp_path, sweeps=sweeps, schedule=schedule, learning_rate=2e-3)])
    ends = {run.rpartition("/")[2]: metrics[-1] for run, metrics in lines(tmp_path / "runs").items()}
    assert ends["relu-m32-l0.1-s0"]["kind"] == "finished"
    assert "not finite" in ends["relu-m32-l1e+308-s0"]["reason"]
    weights = final_states(tmp_path / "runs")["resid.1/relu-m32-l1e+308-s0"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point())


def test_the_outcome_of_an_event_in_mid_run_is_reported_at_the_end(trained, tmp_path):
    sweeps = [{"objective": "relu", "expansions": [8], "lambdas": {"1": [0.9]}, "resampling": True, "learning_rate": 0.1}]
    resampling = {"event_fractions": [0.5], "min_interval_rows": 1000, "dead_after_rows": 500}
    run_gsae(1, ["train", again(trained, tmp_path, sweeps=sweeps, resampling=resampling)])
    (metrics,) = lines(tmp_path / "runs").values()
    (event,) = [line for line in metrics if line["kind"] == "resampling"]
    (outcome,) = [line for line in metrics if line["kind"] == "resampling_outcome"]
    assert (event["step"], outcome["step"], outcome["event_step"]) == (100, 200, 100)
    assert 0 <= outcome["alive"] <= outcome["resampled"] == event["resampled"] > 0
    assert outcome["interval_rows"] == 100 * 64  # counted anew from the event


def test_a_lambda_added_to_a_finished_training_is_trained_alone(trained, tmp_path):
    sweeps = [{"objective": "relu", "expansions": [2], "lambdas": {"1": [0.1]}}]
    run_gsae(1, ["train", again(trained, tmp_path, sweeps=sweeps)])
    first = final_states(tmp_path / "runs")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    sweeps[0]["lambdas"]["1"].append(0.2)
    run_gsae(1, ["train", again(trained, tmp_path, sweeps=sweeps)])
    assert len(final_states(tmp_path / "runs")) == 2
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert first.keys() < final_states(tmp_path / "runs").keys()


@pytest.mark.parametrize("objective", ["relu", "gated", "gated-no-aux"])
def test_decoder_rows_end_at_norm_1(trained, tmp_path, objective):
    sweeps = [{"objective": objective, "expansions": [2], "lambdas": {"1": [0.05]}, "resampling": True}]
    run_gsae(1, ["train", again(trained, tmp_path, sweeps=sweeps, total_rows=6400)])
    (tensors,) = final_states(tmp_path / "runs").values()
    assert (tensors["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6


def test_a_run_of_another_version_is_not_continued(trained, tmp_path):
    config = again(trained, tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    path = find_runs(tmp_path / "runs")[0] / "run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in run.items() if key != "pre_activation_loss"} | {"format": 1}))
    with started(1, gsae, "train", str(config)) as ranks:
        assert ranks.wait() == [2]
        assert "was begun by another version of gsae (run format 1, this one has 2)" in ranks.output()
    assert final_states(tmp_path / "runs").keys() == final_states(trained / "runs").keys()


@pytest.mark.parametrize(
    ("change", "size", "words"),
    [
        ({"learning_rate": 1e-3}, 1, "was trained with"),
        ({"max_rows": 400}, 1, "was trained with"),
        ({"max_rows": 3}, 1, "train.max_rows (3) is under one row a lane; set it to at least 4"),
        ({"groups": 2}, 1, "train.groups is 2 but there are 1 ranks"),
        ({"sites": [0]}, 1, "is not in the store"),
        ({"sweeps": []}, 1, "no run"),
        ({"dtype": "float64"}, 3, "3 ranks in a group do not divide"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(trained, tmp_path, change, size, words):
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    settings["train"] |= change
    before = final_states(trained / "runs")
    with started(size, gsae, "train", str(write_config(tmp_path / "config.yaml", settings))) as ranks:
        assert ranks.wait() == [2] * size
        shown = [line for rank in range(size) for line in ranks.output(rank).splitlines()]
    (line,) = [line for line in shown if line.startswith("gsae: ")]
    assert words in line
    assert not any("Traceback" in line for line in shown)
    assert final_states(trained / "runs").keys() == before.keys()
