"""The stage as a whole: a harvested store, made-up checkpoints, real ranks."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from untrained import write_run

from gsae.errors import CheckpointError
from gsae.evaluate.compare import run_compare
from gsae.evaluate.results import evaluation_identity, find_trained_runs, is_evaluated
from gsae.llm.load import describe
from gsae.settings import read_config
from gsae.store import manifest
from gsae.store.runs import newest_checkpoint


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
        for name in ("results.json", "density.safetensors", "blocks.safetensors")
        for path in sorted(folder.rglob(name))
    }


@pytest.mark.parametrize("size", [2, 4])
def test_results_do_not_depend_on_the_number_of_ranks(whole, tmp_path, size):
    config = copied(whole, tmp_path)
    for path in map(tmp_path.joinpath, ["runs/" + name for name in outcome(tmp_path / "runs")]):
        path.unlink()
    run_gsae(size, ["evaluate", config])
    assert outcome(tmp_path / "runs") == outcome(whole / "runs")
    assert len(outcome(tmp_path / "runs")) == 12


def test_results_hold_what_the_report_reads(whole):
    for path in (whole / "runs").rglob("results.json"):
        results = json.loads(path.read_text())
        metrics, counts = results["metrics"], results["counts"]
        assert set(metrics) <= set(results["definitions"])
        of_gates = {"gate_open_magnitude_zero_fraction", "gate_magnitude_agreement"}
        assert {name for name, value in metrics.items() if value is None} == (of_gates if "relu" in str(path) else set())
        for table in (results["by_position"], results["by_norm_decile"]):
            assert sum(line["rows"] for line in table) == counts["kept_rows"]
            assert sum(line["rows"] * line["l0"] for line in table) == pytest.approx(counts["kept_rows"] * metrics["l0"])
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


def compare(*words: object) -> str:
    return run_gsae(1, ["compare", *words])


def test_compare_shows_two_runs_of_a_site(whole, tmp_path):
    copied(whole, tmp_path)
    write_run(tmp_path / "runs", manifest.load(whole / "runs/store"), "resid.1", "relu", seed=1)
    run_gsae(1, ["evaluate", tmp_path / "config.yaml"])
    first, second = (tmp_path / f"runs/resid.1/relu-m32-l0.1-s{seed}" for seed in (0, 1))
    found = json.loads(compare(first, second, "--json").strip().splitlines()[-1])
    for name, each in found["metrics"].items():
        values = [json.loads((run / "results.json").read_text())["metrics"][name] for run in (first, second)]
        assert [each["first"], each["second"]] == pytest.approx(values, rel=1e-6), name
        assert each["interval"]["low"] < each["difference"] < each["interval"]["high"]
    seen = [json.loads((run / "results.json").read_text())["metrics"]["not_seen_fraction"] for run in (first, second)]
    assert [found[way]["features"] for way in ("first_in_second", "second_in_first")] == [round(32 * (1 - share)) for share in seen]
    same = json.loads(compare(first, first, "--json").strip().splitlines()[-1])
    assert same["first_in_second"]["share_above_0_9"] == 1
    assert not found["has_same_start"]
    assert same["has_same_start"]
    assert "95 %, paired" in compare(first, second)


def test_compare_refuses_what_cannot_be_compared(whole, tmp_path):
    copied(whole, tmp_path)
    first, other = (tmp_path / f"runs/{site}/relu-m32-l0.1-s0" for site in ("resid.1", "resid.2"))
    gated = first.with_name("gated-m32-l0.1-s0")
    with pytest.raises(CheckpointError, match=r"resid\.1, .* of resid\.2; compare runs of one site"):
        run_compare(first, other, as_json=True)
    results = json.loads((gated / "results.json").read_text())
    results["identity"]["context_length"] = 7
    (gated / "results.json").write_text(json.dumps(results))
    with pytest.raises(CheckpointError, match=r"with another context_length \(.* and 7\)"):
        run_compare(first, gated, as_json=True)
    results["format"] = 1
    (gated / "results.json").write_text(json.dumps(results))
    with pytest.raises(CheckpointError, match=r"format is 1, gsae compare reads 2; run gsae evaluate"):
        run_compare(first, gated, as_json=True)
    (gated / "results.json").unlink()
    with pytest.raises(CheckpointError, match=r"what gsae evaluate leaves is missing or damaged"):
        run_compare(gated, first, as_json=True)
    shutil.rmtree(newest_checkpoint(first).path)
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 20 that was evaluated is gone; run gsae evaluate again"):
        run_compare(first, first, as_json=True)
