"""Jobs that are stopped, requeued, or lose a node: they end as if nothing had been."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import small_settings, write_config, write_text
from ranks import run_gsae
from slurm_cluster import Cluster
from trained_runs import again, final_states, num_lines
from trees import tree

ROOT = Path(__file__).parents[2]
RESULTS = ("results.json", "density.safetensors", "blocks.safetensors")


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Path:
    """A folder with a config, its store, and what two ranks trained of it and evaluated."""
    folder = tmp_path_factory.mktemp("reference")
    write_text(folder / "text", num_documents=60, num_words=600)
    settings = small_settings(folder)
    sweeps = [{"objective": "gated", "expansions": [8], "lambdas": {"*": [0.2]}, "resampling": True}]
    settings["train"] |= {"total_rows": 384_000, "sites": [1], "sweeps": sweeps}
    settings["evaluate"] |= {"max_tokens": 60_000, "max_document_tokens": 20_000}
    config = write_config(folder / "config.yaml", settings | {"harvest": {**settings["harvest"], "store": str(folder / "store")}})
    for stage in ("harvest", "train", "evaluate"):
        run_gsae(2, [stage, config], timeout_seconds=300)
    return folder


def submit(cluster: Cluster, stage: str, config: Path, *options: str, settings: tuple[str, ...] = ()) -> str:
    """One job of both nodes, a rank each."""
    of_all = ["--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={config.parent}/job.out"]
    return cluster.run("sbatch", *of_all, *options, ROOT / "slurm" / f"{stage}.sbatch", *settings, config, cwd=config.parent).strip()


def wait_until(cluster: Cluster, job: str, is_true: Callable[[], bool], timeout_seconds: float = 120) -> None:
    until = time.monotonic() + timeout_seconds
    while not is_true():
        assert time.monotonic() < until, f"{cluster.show(job)}\n{cluster.output(job)}"
        time.sleep(0.05)


def wait_for_steps(cluster: Cluster, job: str, output: Path, restarts: int) -> None:
    """Wait until the training of a job goes on after so many restarts."""
    wait_until(cluster, job, lambda: cluster.output(job).count("continues at step") == restarts)
    before = num_lines(output)
    wait_until(cluster, job, lambda: num_lines(output) > before)


def assert_same_weights(output: Path, expected: Path) -> None:
    """All tensors of the last checkpoints; a stop adds a line to the metrics."""
    states, wanted = final_states(output), final_states(expected)
    assert states.keys() == wanted.keys()
    for run, tensors in wanted.items():
        assert [name for name in tensors if not torch.equal(tensors[name], states[run][name])] == [], run


def test_a_training_that_is_told_to_stop_requeued_and_loses_a_node_ends_with_the_same_weights(cluster, harvested, tmp_path):
    output = tmp_path / "runs"
    job = submit(cluster, "train", again(harvested, tmp_path))
    wait_for_steps(cluster, job, output, 0)
    cluster.run("scancel", "--signal=USR1", job)
    wait_for_steps(cluster, job, output, 1)
    cluster.run("scontrol", "requeue", job)
    wait_for_steps(cluster, job, output, 2)
    cluster.kill_node("n2")
    wait_until(cluster, job, lambda: cluster.state(job) != "RUNNING")
    cluster.start_node("n2")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "3", cluster.output(job)
    assert_same_weights(output, harvested / "runs")
    assert cluster.output(job).count("slurm: train: stopped on request, requeued after life 1") == 1
    assert not (output / "stopped.json").exists()
    assert list(output.glob("*.lease")) == []


def test_a_training_whose_time_is_over_goes_on_in_its_next_life(cluster, harvested, tmp_path):
    job = submit(cluster, "train", again(harvested, tmp_path), "--time=1", "--signal=USR1@20")
    wait_until(cluster, job, lambda: cluster.show(job)["Restarts"] == "1")
    # Slurm looks at the clock every 30 s: on a slow machine every life of a minute would end while its ranks start.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1", cluster.output(job)
    assert "continues at step" in cluster.output(job)
    assert_same_weights(tmp_path / "runs", harvested / "runs")


def test_a_harvest_that_is_told_to_stop_goes_on_to_the_same_bytes(cluster, harvested, tmp_path):
    settings = yaml.safe_load((harvested / "config.yaml").read_text())
    settings["harvest"]["store"] = str(tmp_path / "store")
    job = submit(cluster, "harvest", write_config(tmp_path / "config.yaml", settings | {"output": str(tmp_path / "runs")}))
    wait_until(cluster, job, lambda: len(list((tmp_path / "store" / "progress").glob("*.jsonl"))) == 4)
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1", cluster.output(job)
    assert tree(tmp_path / "store") == tree(harvested / "store")


def test_an_evaluation_that_is_told_to_stop_goes_on_to_the_same_bytes(cluster, harvested, tmp_path):
    shutil.copytree(harvested / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns(*RESULTS))
    job = submit(cluster, "evaluate", again(harvested, tmp_path))
    wait_until(cluster, job, lambda: "evaluate: 0%" in cluster.output(job) or "evaluate: 1%" in cluster.output(job))
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1", cluster.output(job)
    assert "evaluate: continues at batch" in cluster.output(job)
    found, wanted = tree(tmp_path / "runs"), tree(harvested / "runs")
    assert {name: found[name] for name in wanted if name.endswith(RESULTS)} == {
        name: content for name, content in wanted.items() if name.endswith(RESULTS)
    }
    assert not (tmp_path / "runs" / "evaluation.safetensors").exists()


def test_a_job_that_is_requeued_again_and_again_without_progress_ends(cluster, harvested, tmp_path):
    job = submit(cluster, "train", again(harvested, tmp_path), settings=("max_idle_lives=1",))
    logs = tmp_path / "runs" / "logs" / f"train-{job}"
    for restarts in (0, 1):
        wait_until(cluster, job, lambda: cluster.show(job)["Restarts"] == str(restarts) and cluster.state(job) == "RUNNING")  # noqa: B023
        wait_until(cluster, job, lambda: restarts == 0 or (logs / "progress").exists())  # noqa: B023
        cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job) == "FAILED", cluster.output(job)
    assert f"gsae: train: given up, since job {job} got no further in its last 1 lives" in cluster.output(job)
