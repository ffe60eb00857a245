"""An evaluation that is told to stop, or killed, and goes on where it was."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors
import yaml
from conftest import small_settings, write_config, write_text
from hurry import complaints, hurry
from ranks import gsae, run_gsae, started
from untrained import write_run

from gsae.evaluate import run
from gsae.store import manifest

RESULTS = ("results.json", "density.safetensors", "blocks.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with text, config, store and three runs at two sites, evaluated by one rank."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_text(folder / "text", num_documents=60)
    settings = small_settings(folder)
    settings["evaluate"] |= {"max_tokens": 4000, "batch_contexts": 2}
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    store = manifest.load(folder / "runs/store")
    first, second = store.sites
    for site, objective in ((first, "relu"), (first, "gated"), (second, "gated")):
        write_run(folder / "runs", store, site, objective, seed=0)
    run_gsae(1, ["evaluate", config])
    return folder


def without_results(whole: Path, folder: Path) -> Path:
    """The config of a copy of the runs without their results."""
    shutil.copytree(whole / "runs", folder / "runs", ignore=shutil.ignore_patterns("store", *RESULTS))
    settings = yaml.safe_load((whole / "config.yaml").read_text())
    settings["output"], settings["harvest"]["store"] = str(folder / "runs"), str(whole / "runs/store")
    return write_config(folder / "config.yaml", settings)


def outcome(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for name in RESULTS for path in sorted(folder.rglob(name))}


def slow(save_every_seconds: float, *words: str) -> None:
    """A rank whose batches take a while."""
    plain = run.evaluate_batch

    def evaluate_batch(*arguments, **options):
        time.sleep(0.1)
        return plain(*arguments, **options)

    hurry()
    run.evaluate_batch, run.SAVE_EVERY_SECONDS = evaluate_batch, save_every_seconds
    gsae(*words)


def saved_batches(output: Path) -> int:
    path = output / "evaluation.safetensors"
    if not path.exists():
        return 0
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["progress"])["batches"]


def wait_for(is_true, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not is_true() and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_it_goes_on_to_the_same_bytes_on_any_number_of_ranks(whole, tmp_path, sizes):
    config, output = without_results(whole, tmp_path), tmp_path / "runs"
    with started(sizes[0], slow, 1000.0, "evaluate", str(config)) as ranks:
        wait_for(lambda: "evaluate: 3 runs" in ranks.output() and "%" in ranks.output())
        os.kill(ranks.processes[-1].pid, signal.SIGUSR1)
        assert ranks.wait(25) == [0] * sizes[0], ranks.output()
        assert f"evaluate: stopped on request; the same command continues from here ({output / 'stopped.json'})" in ranks.output()
    stopped = json.loads((output / "stopped.json").read_text())
    assert (stopped["stage"], stopped["batches"]) == ("evaluate", saved_batches(output))
    assert stopped["batches"] > 0
    assert outcome(output) == {}
    shown = run_gsae(sizes[1], ["evaluate", config])
    assert f"evaluate: continues at batch {stopped['batches']} of" in shown
    assert outcome(output) == outcome(whole / "runs")
    assert [path.name for path in output.iterdir() if path.is_file()] == []


def test_a_killed_one_goes_on_where_it_last_saved(whole, tmp_path):
    config, output = without_results(whole, tmp_path), tmp_path / "runs"
    with started(2, slow, 0.3, "evaluate", str(config)) as ranks:
        wait_for(lambda: saved_batches(output) > 0)
        ranks.kill()
    saved = saved_batches(output)
    assert f"evaluate: continues at batch {saved} of" in run_gsae(2, ["evaluate", config])
    assert outcome(output) == outcome(whole / "runs")


@pytest.mark.parametrize("changed", [["--evaluate.max_tokens", "3000"], ["--evaluate.batch_contexts", "4"]])
def test_another_evaluation_begins_anew(whole, tmp_path, changed):
    config, output = without_results(whole, tmp_path), tmp_path / "runs"
    with started(1, slow, 0.1, "evaluate", str(config)) as ranks:
        wait_for(lambda: saved_batches(output) > 0)
        ranks.kill()
    assert "continues at batch" not in run_gsae(1, ["evaluate", config, *changed])


def test_runs_that_have_their_results_are_left_out(whole, tmp_path):
    """Killed while it wrote them, for one."""
    config, output = without_results(whole, tmp_path), tmp_path / "runs"
    with started(1, slow, 0.1, "evaluate", str(config)) as ranks:
        wait_for(lambda: saved_batches(output) > 0)
        ranks.kill()
    done = next(path for path in outcome(whole / "runs") if path.endswith("results.json"))
    for name in RESULTS:
        shutil.copy((whole / "runs" / done).with_name(name), (output / done).with_name(name))
    shown = run_gsae(1, ["evaluate", config])
    assert "evaluate: 2 runs" in shown
    assert "continues at batch" in shown
    assert outcome(output) == outcome(whole / "runs")


def test_a_damaged_file_is_no_progress(whole, tmp_path):
    config, output = without_results(whole, tmp_path), tmp_path / "runs"
    (output / "evaluation.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    run_gsae(1, ["evaluate", config])
    assert outcome(output) == outcome(whole / "runs")


def test_a_rank_that_dies_is_named(whole, tmp_path):
    config = without_results(whole, tmp_path)
    with started(2, slow, 1000.0, "evaluate", str(config)) as ranks:
        wait_for(lambda: "%" in ranks.output())
        ranks.processes[1].kill()
        assert ranks.wait(60)[0] == 2, ranks.output()
        said = complaints(ranks)
    assert len(said) == 1, said
    assert "rank 1 on" in said[0]
    assert said[0].endswith("then run the same again: the evaluation continues where it was")


def test_a_stopped_training_is_not_evaluated_and_a_stopped_evaluation_is(whole, tmp_path):
    config, output = without_results(whole, tmp_path), tmp_path / "runs"
    (output / "stopped.json").write_text('{"stage": "train", "signal": "SIGTERM"}')
    with started(1, gsae, "evaluate", str(config)) as ranks:
        assert ranks.wait(60) == [2]
        assert "was stopped before its end; run gsae train again" in ranks.output()
    (output / "stopped.json").write_text('{"stage": "evaluate", "signal": "SIGTERM"}')
    run_gsae(1, ["evaluate", config])
    assert not (output / "stopped.json").exists()
