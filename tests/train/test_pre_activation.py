"""The pre-activation loss in training as a whole: real ranks and a real kill, while features are dead."""

import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from safetensors.torch import load_file
from trained_runs import again, assert_equal, assert_near, final_states, lines, num_lines

from gsae.store.runs import checkpoints, find_runs

# A learning rate so high that features die.
SWEEPS = [
    {"objective": objective, "expansions": [8], "lambdas": {"1": [0.9]}, "learning_rate": 0.1, "pre_activation_loss": 0.03}
    for objective in ("gated", "relu")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a store, a config, and the runs that one rank trained in float64: 200 steps, a checkpoint every 7."""
    folder = tmp_path_factory.mktemp("pre_activation")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"]["store"] = str(folder / "store")
    settings["train"] |= {"sweeps": SWEEPS, "checkpoint_every_fraction": 0.035}
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    run_gsae(1, ["train", config])
    return folder


def weights(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {run.name: load_file(checkpoints(run)[-1].path / "sae.safetensors") for run in find_runs(output)}


def steps_with_dead(output: Path, run: str) -> list[int]:
    """The lines of the log over whose steps the term was at work."""
    return [line["step"] for line in lines(output)[run] if line["kind"] == "step" and line["pre_activation"] > 0]


def test_the_term_is_at_work_because_features_are_dead(trained):
    for run, tensors in final_states(trained / "runs").items():
        assert len(tensors["dead"]) > 0, f"{run}: no feature is dead, so the other tests say little"
        assert len(steps_with_dead(trained / "runs", run)) > 20


def test_dead_means_not_on_for_dead_after_rows(trained):
    """They were last found at step 190, after 12,160 rows; what features did before that is still known of those not on since."""
    for run, tensors in final_states(trained / "runs").items():
        last_fired, is_dead = tensors["firing.last_fired"], torch.zeros(128, dtype=torch.bool)
        is_dead[tensors["dead"]] = True
        known = last_fired <= 12_160
        assert torch.equal(is_dead[known], 12_160 - last_fired[known] >= 500), run
        assert (known & ~is_dead).any()


def test_a_killed_training_ends_as_an_uninterrupted_one(trained, tmp_path):
    """SIGKILL while features are dead; checkpoints are every 7 steps and the dead features found anew every 10, so they must be stored."""
    config, output = again(trained, tmp_path), tmp_path / "runs"
    midway = num_lines(trained / "runs") // 2
    with started(1, gsae, "train", str(config)) as ranks:
        until = time.monotonic() + 60
        while num_lines(output) < midway and time.monotonic() < until:
            time.sleep(0.002)
        assert ranks.processes[0].is_alive(), "the training was over before it could be killed"
        ranks.kill()
    for run, tensors in final_states(output).items():
        assert len(tensors["dead"]) > 0, f"{run}: no feature was dead at the kill"
    run_gsae(1, ["train", config])
    assert_equal(output, trained / "runs")


def test_a_run_is_not_continued_with_another_definition_of_dead(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    resampling = yaml.safe_load((trained / "config.yaml").read_text())["train"]["resampling"]
    config = again(trained, tmp_path, resampling=resampling | {"dead_after_rows": 300})
    with started(1, gsae, "train", str(config)) as ranks:
        assert ranks.wait() == [2]
        assert "was trained with resampling.dead_after_rows 500, this config has 300" in ranks.output()


def test_two_ranks_train_the_same_weights(trained, tmp_path):
    run_gsae(2, ["train", again(trained, tmp_path)])
    assert_near(tmp_path / "runs", trained / "runs")


def test_micro_batches_add_up(trained, tmp_path):
    run_gsae(1, ["train", again(trained, tmp_path, micro_batch_rows=24)])
    assert_near(tmp_path / "runs", trained / "runs")


def test_weight_0_changes_nothing_and_another_weight_does(trained, tmp_path):
    without = [{key: value for key, value in sweep.items() if key != "pre_activation_loss"} for sweep in SWEEPS]
    run_gsae(1, ["train", again(trained, tmp_path / "without", sweeps=without)])
    run_gsae(1, ["train", again(trained, tmp_path / "zero", sweeps=[sweep | {"pre_activation_loss": 0.0} for sweep in SWEEPS])])
    assert_equal(tmp_path / "zero" / "runs", tmp_path / "without" / "runs")
    for run, metrics in lines(tmp_path / "zero" / "runs").items():
        assert max(line["dead_fraction"] for line in metrics if line["kind"] == "step") > 0.05, f"{run}: nothing died without the term"
        assert all(line["pre_activation"] == 0 for line in metrics if line["kind"] == "step")
    plain, taught = weights(tmp_path / "zero" / "runs"), weights(trained / "runs")
    for objective in ("gated", "relu"):
        assert not torch.equal(
            plain[f"{objective}-m128-l0.9-r0.1-s0"]["W_dec"], taught[f"{objective}-preact0.03-m128-l0.9-r0.1-s0"]["W_dec"]
        )


def test_the_term_leaves_a_run_alone_in_which_nothing_dies(trained, tmp_path):
    healthy = {"objective": "gated", "expansions": [3], "lambdas": {"1": [0.05]}, "learning_rate": 2e-3}
    run_gsae(1, ["train", again(trained, tmp_path, sweeps=[healthy, healthy | {"pre_activation_loss": 0.5}])])
    plain, taught = weights(tmp_path / "runs").values()
    for name, tensor in plain.items():
        assert torch.equal(tensor, taught[name]), name
    assert all(line["dead_fraction"] == 0 for metrics in lines(tmp_path / "runs").values() for line in metrics if line["kind"] == "step")
