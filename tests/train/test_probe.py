"""The small evaluation while training goes on: what it writes, and that it changes nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import small_settings, write_config, write_text
from ranks import run_gsae

from gsae.store.runs import newest_checkpoint

SWEEPS = [
    {"objective": "gated", "expansions": [2], "lambdas": {"*": [0.05, 0.1]}, "resampling": True},
    {"objective": "relu", "expansions": [2], "lambdas": {"*": [0.05]}},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder with text, a store, and settings."""
    folder = tmp_path_factory.mktemp("probe")
    write_text(folder / "text", num_documents=60)
    settings = small_settings(folder)
    run_gsae(1, ["harvest", write_config(folder / "config.yaml", settings)])
    return folder


def trained(store: Path, folder: Path, size: int = 1, **train) -> Path:
    """The output of a training on `size` ranks."""
    settings = yaml.safe_load((store / "config.yaml").read_text())
    settings["output"], settings["harvest"]["store"] = str(folder), str(store / "runs/store")
    base = {"sweeps": SWEEPS, "total_rows": 64 * 40, "batch_rows": 64, "window_rows": 1024, "log_every_steps": 7}
    settings["train"] = {**settings.get("train", {}), **base, **train}
    folder.mkdir(parents=True, exist_ok=True)
    run_gsae(size, ["train", write_config(folder / "config.yaml", settings)])
    return folder


def lines_of(output: Path) -> dict[str, list[dict]]:
    """The evaluation lines of each run."""
    found = {}
    for path in sorted(output.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.parent.relative_to(output))] = [line for line in lines if line["kind"] == "evaluation"]
    return found


def weights_of(output: Path) -> dict[str, bytes]:
    runs = sorted(path.parent for path in output.rglob("run.json"))
    return {str(run.relative_to(output)): (newest_checkpoint(run).path / "sae.safetensors").read_bytes() for run in runs}


@pytest.fixture(scope="module")
def probed(store, tmp_path_factory) -> Path:
    return trained(store, tmp_path_factory.mktemp("probed"), evaluate_every_fraction=0.25, evaluate_tokens=1500)


def test_training_is_the_same_to_the_last_bit(store, probed, tmp_path):
    assert weights_of(trained(store, tmp_path / "plain")) == weights_of(probed)


def test_a_line_every_so_often_and_at_the_end(probed):
    lines = lines_of(probed)
    assert len(lines) == 6
    for of_run in lines.values():
        assert [line["step"] for line in of_run] == [10, 20, 30, 40]
        assert len({line["tokens"] for line in of_run}) == len({line["ce_clean"] for line in of_run}) == 1
        assert len({line["fvu"] for line in of_run}) == 4
        assert 0 < of_run[0]["tokens"] < 1500 + 64  # whole segments
        assert of_run[-1]["rows"] == 64 * 40


def test_the_last_line_is_what_gsae_evaluate_finds_on_the_same_text(probed, store):
    config = yaml.safe_load((probed / "config.yaml").read_text())
    config["evaluate"] |= {"max_tokens": 1500, "min_documents": 1}
    run_gsae(1, ["evaluate", write_config(probed / "evaluate.yaml", config)])
    for name, of_run in lines_of(probed).items():
        results = json.loads((probed / name / "results.json").read_text())
        assert results["counts"]["tokens"] == of_run[-1]["tokens"]
        for metric in ("loss_recovered", "delta_ce", "ce_clean", "ce_spliced", "fvu", "l0", "gamma"):
            assert of_run[-1][metric] == pytest.approx(results["metrics"][metric], rel=1e-12), metric


@pytest.mark.parametrize(("size", "groups"), [(2, 1), (2, 2), (4, 2)])
def test_lines_do_not_depend_on_ranks_and_groups(store, probed, tmp_path, size, groups):
    """Weights differ in their last bits between layouts with several ranks a group, and not between groups."""
    output = trained(store, tmp_path / "other", size, groups=groups, evaluate_every_fraction=0.25, evaluate_tokens=1500)
    tolerance = 1e-12 if size == groups else 1e-3
    there, here = lines_of(probed), lines_of(output)
    assert list(there) == list(here)
    for name, of_run in there.items():
        for one, other in zip(of_run, here[name], strict=True):
            assert one.keys() == other.keys()
            assert all(other[key] == pytest.approx(one[key], rel=tolerance) for key in one if key != "kind"), name


def test_a_resumed_training_has_the_same_lines(store, probed, tmp_path):
    settings = {"evaluate_every_fraction": 0.25, "evaluate_tokens": 1500, "checkpoint_every_fraction": 0.125, "keep_checkpoints": 9}
    output = trained(store, tmp_path / "whole", **settings)
    assert lines_of(output) == lines_of(probed)
    for run in [path.parent for path in output.rglob("run.json")]:
        for checkpoint in sorted((run / "checkpoints").iterdir())[4:]:
            shutil.rmtree(checkpoint)
    assert lines_of(trained(store, tmp_path / "whole", **settings)) == lines_of(probed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.evaluate_every_fraction", "2"], "train.evaluate_every_fraction is 2.0; give a share in (0, 1], or null for none"),
        (["--train.evaluate_every_fraction", "0.5", "--corpus.seed", "77"], "was harvested with seed"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_trained(store, tmp_path, words, message):
    command = [sys.executable, "-m", "gsae", "train", str(store / "config.yaml"), "--output", str(tmp_path / "out"), *words]
    done = subprocess.run([*command, "--harvest.store", str(store / "runs/store")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").rglob("checkpoints"))
