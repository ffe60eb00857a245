"""Split dictionaries under evaluation: what `gsae evaluate`, `gsae features` and evaluations in training find, against one rank."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hurry import complaints
from ranks import gsae, run_gsae, started
from safetensors.torch import load_file
from trained_runs import again, lines, train_small

from gsae.evaluate import run as evaluate
from gsae.store.runs import find_runs

LAYOUTS = {"1x2": (2, 2), "2x2": (4, 2), "1x4": (4, 4)}
"""Ranks, and those of them that share the features."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = train_small(tmp_path_factory.mktemp("trained"))
    run_gsae(1, ["evaluate", folder / "config.yaml"])
    run_gsae(1, ["features", folder / "config.yaml", "--features", "0,17,40,47"])
    return folder


def copied(trained: Path, folder: Path) -> Path:
    """A config over the same runs without results."""
    shutil.copytree(trained / "runs", folder / "runs")
    for name in ("results.json", "density.safetensors", "blocks.safetensors", "features.json"):
        for path in (folder / "runs").rglob(name):
            path.unlink()
    return again(trained, folder)


def assert_alike(found: object, wanted: object, where: str = "") -> None:
    """Equal but for the last digits of floats."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_alike(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(found, list)
        assert len(found) == len(wanted), where
        for number, value in enumerate(wanted):
            assert_alike(found[number], value, f"{where}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9), where
    else:
        assert found == wanted, where


def assert_same_results(output: Path, trained: Path) -> None:
    for run in find_runs(output):
        reference = trained / "runs" / run.relative_to(output)
        assert_alike(json.loads((run / "results.json").read_text()), json.loads((reference / "results.json").read_text()))
        found, wanted = (load_file(each / "density.safetensors") for each in (run, reference))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_results_are_those_of_one_rank(trained, tmp_path, layout):
    ranks, features = LAYOUTS[layout]
    config = copied(trained, tmp_path)
    run_gsae(ranks, ["evaluate", config, "--train.feature_ranks", features])
    assert_same_results(tmp_path / "runs", trained)
    run_gsae(ranks, ["features", config, "--train.feature_ranks", features, "--features", "0,17,40,47"])
    for run in find_runs(tmp_path / "runs"):
        reference = trained / "runs" / run.relative_to(tmp_path / "runs")
        assert_alike(*(json.loads((each / "features.json").read_text()) for each in (run, reference)))


def test_an_evaluation_in_training_is_that_of_one_rank(trained, tmp_path):
    words = {"evaluate_every_fraction": 0.5, "evaluate_tokens": 400, "sites": [1]}
    for name, ranks, features in (("alone", 1, 1), ("split", 4, 2)):
        run_gsae(ranks, ["train", again(trained, tmp_path / name, feature_ranks=features, **words)])
    alone, split = (
        [line for of_run in lines(tmp_path / name / "runs").values() for line in of_run if line["kind"] == "evaluation"]
        for name in ("alone", "split")
    )
    assert len(alone) == 6
    assert_alike(split, alone)


def interrupted(*words: str) -> None:
    """A rank that saves after every round, and dies after the second."""
    saved = []
    plain = evaluate.save_progress

    def save(*arguments) -> None:
        plain(*arguments)
        saved.append(1)
        if len(saved) == 2:
            os._exit(9)

    evaluate.SAVE_EVERY_SECONDS, evaluate.save_progress = 0.0, save
    gsae(*words)


def test_an_evaluation_goes_on_under_another_split(trained, tmp_path):
    config = copied(trained, tmp_path)
    for ranks, features in ((2, 2), (1, 1), (4, 2)):
        with started(ranks, interrupted, "evaluate", str(config), "--train.feature_ranks", str(features)) as going:
            assert going.wait(60) == [9] * ranks, going.output()
    output = run_gsae(4, ["evaluate", config, "--train.feature_ranks", "4"])
    assert "continues at batch 8" in output  # two rounds of 1, 1 and 2 batches
    assert_same_results(tmp_path / "runs", trained)


def test_runs_that_cannot_be_split_so_are_refused_in_a_line(trained, tmp_path):
    with started(3, gsae, "evaluate", str(copied(trained, tmp_path)), "--train.feature_ranks", "3") as ranks:
        assert ranks.wait(60) == [2, 2, 2]
        (said,) = complaints(ranks)
    assert "train.feature_ranks (3) does not divide the 128 features of resid." in said
