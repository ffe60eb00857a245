"""Runs that start from their neighbour's weights: which, how long, and that a resumed chain is that of an uninterrupted one."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config
from ranks import gsae, run_gsae, started
from safetensors.torch import load_file
from trained_runs import again, assert_equal, assert_near, final_states, lines, num_lines, train_small

from gsae.store.runs import checkpoints, find_runs

LAMBDAS = [0.1, 0.2, 0.4]
NAMES = [f"gated-warm-m48-l{lambda_:g}-s0" for lambda_ in LAMBDAS]
SWEEPS = [
    {"objective": "gated", "expansions": [3], "lambdas": {"*": LAMBDAS}, "warm_start": True},
    {"objective": "relu", "expansions": [3], "lambdas": {"*": [0.2]}},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def warm(store, tmp_path_factory) -> Path:
    """The output of a chain of three lambdas, and one cold run, at two sites, trained by one rank."""
    folder = tmp_path_factory.mktemp("warm")
    run_gsae(1, ["train", again(store, folder, sweeps=SWEEPS, keep_checkpoints=100, warm_start_fraction=0.4)])
    return folder / "runs"


def described(output: Path, name: str) -> dict:
    return json.loads((output / "resid.1" / name / "run.json").read_text())


def test_each_run_but_the_first_starts_from_the_one_before_and_is_shorter(warm):
    runs = [described(warm, name) for name in NAMES]
    assert [run.get("starts_from") for run in runs] == [None, NAMES[0], NAMES[1]]
    assert [run["total_steps"] for run in runs] == [200, 80, 80]
    assert [len(checkpoints(warm / "resid.1" / name)) for name in NAMES] == [10, 10, 10]
    assert "starts_from" not in described(warm, "relu-m48-l0.2-s0")


def test_its_first_weights_are_those_with_which_the_other_ended(store, warm, tmp_path):
    """A learning rate that moves nothing shows where a run began."""
    config = again(store, tmp_path, sweeps=SWEEPS[:1], warm_start_fraction=0.01, sites=[1], learning_rate=1e-300)
    run_gsae(1, ["train", config])
    first, *others = (tensors for _, tensors in sorted(final_states(tmp_path / "runs").items()))
    for name in ("W_dec", "W_gate", "b_dec"):
        assert all(torch.allclose(other[name], first[name], rtol=0, atol=1e-12) for other in others)
    for before, name in itertools.pairwise(NAMES):
        begun = load_file(checkpoints(warm / "resid.1" / name)[0].path / "sae.safetensors")
        source = load_file(checkpoints(warm / "resid.1" / before)[-1].path / "sae.safetensors")
        cold = load_file(checkpoints(warm / "resid.1" / NAMES[0])[0].path / "sae.safetensors")
        assert (begun["W_dec"] - source["W_dec"]).norm() < 0.2 * (begun["W_dec"] - cold["W_dec"]).norm()


def test_lambda_is_whole_from_the_first_step(warm):
    first, second = (lines(warm)[f"resid.1/{name}"] for name in NAMES[:2])
    assert first[0]["lambda"] < LAMBDAS[0]
    assert second[0]["lambda"] == LAMBDAS[1]


@pytest.mark.parametrize(("size", "groups"), [(2, 1), (2, 2)])
def test_ranks_train_the_same_chain(store, warm, tmp_path, size, groups):
    run_gsae(size, ["train", again(store, tmp_path, sweeps=SWEEPS, warm_start_fraction=0.4, groups=groups)])
    assert_near(tmp_path / "runs", warm)


def test_a_killed_chain_ends_as_an_uninterrupted_one(store, warm, tmp_path):
    config = again(store, tmp_path, sweeps=SWEEPS, keep_checkpoints=100, warm_start_fraction=0.4)
    for wanted in (15, 45, 60):  # in the first bank, and in later ones
        with started(1, gsae, "train", str(config)) as ranks:
            until = time.monotonic() + 60
            while num_lines(tmp_path / "runs") < wanted and time.monotonic() < until and ranks.processes[0].is_alive():
                time.sleep(0.002)
            assert ranks.processes[0].is_alive(), ranks.output()
            ranks.kill()
    run_gsae(1, ["train", config])
    assert_equal(tmp_path / "runs", warm)


def test_a_chain_ends_where_a_second_call_finds_nothing_to_do(store, warm, tmp_path):
    before = {path: path.stat().st_mtime_ns for run in find_runs(warm) for path in (run / "checkpoints").rglob("*")}
    config = again(store, tmp_path, sweeps=SWEEPS, keep_checkpoints=100, warm_start_fraction=0.4, groups=1)
    run_gsae(1, ["train", config, "--output", str(warm)])
    assert {path: path.stat().st_mtime_ns for run in find_runs(warm) for path in (run / "checkpoints").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"sweeps": [{"warm_start": True}], "target_l0": {"*": [8]}}}, "warm_start goes from lambda to lambda"),
        ({"train": {"sweeps": SWEEPS, "warm_start_fraction": 0}}, "train.warm_start_fraction is 0.0; give a share in (0, 1]"),
        ({"train": {"sweeps": SWEEPS}, "corpus": {"parts": 2}}, "warm_start reads the store again for each lambda"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, change, words):
    settings = small_settings(tmp_path)
    for section, values in change.items():
        settings[section] |= values
    with started(1, gsae, "train", str(write_config(tmp_path / "config.yaml", settings))) as ranks:
        assert ranks.wait(60) == [2]
        (line,) = [line for line in ranks.output().splitlines() if line.startswith("gsae: ")]
        assert words in line
