"""The stage as a whole: a harvested store, made-up checkpoints, real ranks."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started

from gsae.errors import CheckpointError
from gsae.evaluate.results import evaluation_identity, find_trained_runs, is_evaluated
from gsae.llm.load import describe
from gsae.sae.formats import save_sae
from gsae.sae.objective import build
from gsae.settings import read_config
from gsae.store import manifest
from gsae.store.runs import write_checkpoint


def write_run(runs: Path, store: manifest.Manifest, site: str, objective: str, seed: int, step: int = 20) -> Path:
    """A run directory with an untrained SAE of random biases."""
    described = store.sites[site]
    directory = runs / site / f"{objective}-m32-l0.1-s{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    run = {
        "format": 1,
        "name": directory.name,
        "site": site,
        "layer": described.layer,
        "objective": objective,
        "resampling": False,
        "num_features": 32,
        "d_model": 16,
        "lambda": 0.1,
        "seed": seed,
        "total_steps": 20,
        "batch_rows": 64,
        "store_fingerprint": store.fingerprint,
        "scale": described.scale,
    }
    (directory / "run.json").write_text(json.dumps(run))
    lines = [
        {"kind": "step", "step": 10, "rows": 640, "dead_fraction": 0.5, "dead_rows": 500},
        {"kind": "finished", "step": 20, "rows": 1280, "dead_fraction": 0.25, "dead_rows": 600, "seconds": 1.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sae = build(objective, 16, 32, seed + step)
    with torch.no_grad():
        sae.b_dec.copy_(described.mean * described.scale)
    write_checkpoint(directory, step, lambda folder: save_sae(folder, sae, run))
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with text, config, store and four runs at two sites, evaluated by one rank."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_text(folder / "text", num_documents=60)
    config = write_config(folder / "config.yaml", small_settings(folder))
    run_gsae(1, ["harvest", config])
    store = manifest.load(folder / "runs/store")
    for site in store.sites:
        write_run(folder / "runs", store, site, "relu", seed=0)
        write_run(folder / "runs", store, site, "gated", seed=0)
    run_gsae(1, ["evaluate", config])
    return folder


def copied(whole: Path, folder: Path, **evaluate) -> Path:
    """The config of a copy of the runs; the store stays where it is."""
    shutil.copytree(whole / "runs", folder / "runs", ignore=shutil.ignore_patterns("store"))
    settings = yaml.safe_load((whole / "config.yaml").read_text())
    settings["output"], settings["harvest"]["store"] = str(folder / "runs"), str(whole / "runs/store")
    settings["evaluate"] |= evaluate
    return write_config(folder / "config.yaml", settings)


def outcome(folder: Path) -> dict[str, bytes]:
    """What evaluation wrote, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("results.json", "density.safetensors")
        for path in sorted(folder.rglob(name))
    }


@pytest.mark.parametrize("size", [2, 4])
def test_results_do_not_depend_on_the_number_of_ranks(whole, tmp_path, size):
    config = copied(whole, tmp_path)
    for path in [*tmp_path.rglob("results.json"), *tmp_path.rglob("density.safetensors")]:
        path.unlink()
    run_gsae(size, ["evaluate", config])
    assert outcome(tmp_path / "runs") == outcome(whole / "runs")
    assert len(outcome(tmp_path / "runs")) == 8


def test_results_hold_what_the_report_reads(whole):
    for path in (whole / "runs").rglob("results.json"):
        results = json.loads(path.read_text())
        metrics, counts = results["metrics"], results["counts"]
        assert set(metrics) <= set(results["definitions"])
        assert all(isinstance(value, float | int) for value in metrics.values())
        assert (metrics["dead_fraction"], metrics["dead_rows"]) == (0.25, 600)
        assert results["checks"] == {"identity_loss_recovered": 1.0, "zero_loss_recovered": 0.0}
        assert set(results["intervals"]) == {"loss_recovered", "delta_ce", "fvu", "l0"}
        for name, (low, high) in results["intervals"].items():
            assert low < metrics[name] < high
        assert counts["kept_rows"] + counts["dropped_rows"] == counts["tokens"]
        assert counts["tokens"] > counts["targets"] > 1000
        assert results["identity"]["within_these_documents"] is (counts["documents"] < 30)
        histogram = results["density_log10_histogram"]
        assert sum(histogram["counts"]) == round((1 - metrics["not_seen_fraction"]) * 32)
        assert results["identity"]["checkpoint"]["step"] == 20
        assert "/" not in json.dumps(results["identity"])


def test_firing_counts_agree_with_l0(whole):
    for path in (whole / "runs").rglob("results.json"):
        results = json.loads(path.read_text())
        tensors = safetensors.torch.load_file(path.with_name("density.safetensors"))
        rows = results["counts"]["kept_rows"]
        assert tensors["firing_counts"].sum() / rows == pytest.approx(results["metrics"]["l0"])
        assert tensors["l0_histogram"].sum() == rows


def test_a_second_call_evaluates_only_what_is_new(whole, tmp_path):
    config = copied(whole, tmp_path)
    before = outcome(tmp_path / "runs")
    said = run_gsae(1, ["evaluate", config])
    assert "all 4 runs" in said
    assert outcome(tmp_path / "runs") == before
    write_run(tmp_path / "runs", manifest.load(whole / "runs/store"), "resid.1", "relu", seed=0, step=40)
    run_gsae(1, ["evaluate", config])
    after = outcome(tmp_path / "runs")
    changed = {Path(name).parent.as_posix() for name in before if before[name] != after[name]}
    assert changed == {"resid.1/relu-m32-l0.1-s0"}


def test_other_settings_are_another_evaluation(whole, tmp_path):
    config = read_config("evaluate", [str(copied(whole, tmp_path))])
    store = manifest.load(whole / "runs/store")
    runs = find_trained_runs(tmp_path / "runs", store)
    identity = evaluation_identity(config, store, describe(config.llm))
    assert all(is_evaluated(run, identity) for run in runs)
    other = replace(config, evaluate=replace(config.evaluate, seed=1))
    assert not any(is_evaluated(run, evaluation_identity(other, store, describe(config.llm))) for run in runs)
    (runs[0].directory / "results.json").write_text('{"format": 1, "ident')
    assert not is_evaluated(runs[0], identity)


def test_an_output_without_runs_is_refused(whole, tmp_path):
    with pytest.raises(CheckpointError, match=r"no run below .*; run gsae train with this config first"):
        find_trained_runs(tmp_path / "nothing", manifest.load(whole / "runs/store"))


def test_a_run_without_a_checkpoint_is_named(whole, tmp_path):
    copied(whole, tmp_path)
    shutil.rmtree(tmp_path / "runs/resid.1/relu-m32-l0.1-s0/checkpoints")
    with pytest.raises(CheckpointError, match=r"run .*resid\.1/relu-m32-l0\.1-s0 has no checkpoint yet"):
        find_trained_runs(tmp_path / "runs", manifest.load(whole / "runs/store"))


def test_a_run_of_another_store_is_refused(whole, tmp_path):
    copied(whole, tmp_path)
    path = tmp_path / "runs/resid.1/relu-m32-l0.1-s0/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"store_fingerprint": "0123456789abcdef"}))
    with pytest.raises(CheckpointError, match=r"was trained at resid\.1 on store 0123456789abcdef"):
        find_trained_runs(tmp_path / "runs", manifest.load(whole / "runs/store"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluate.min_documents", "1000"], "evaluate.min_documents is 1000"),
        (["--corpus.seed", "1"], "corpus: the store .* was harvested with seed 0, this config has 1"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(whole, tmp_path, words, message):
    with started(2, gsae, "evaluate", str(copied(whole, tmp_path, seed=7)), *words) as ranks:
        assert ranks.wait() == [2, 2]
        said = ranks.output(0) + ranks.output(1)
        assert len(re.findall(message, said)) == 1
        assert "Traceback" not in said
