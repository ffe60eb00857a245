"""Training with products from bfloat16 factors: as good as without, resumed to the bit, on ranks."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from trained_runs import again, assert_equal, final_states, lines, num_lines

from gsae.config import TrainConfig
from gsae.errors import ConfigError
from gsae.store.runs import find_runs

SEEDS = [0, 1, 2]
SWEEPS = [
    {"objective": objective, "expansions": [3], "lambdas": {"1": [lambda_]}, "seeds": SEEDS}
    for objective, lambda_ in (("gated", 0.2), ("relu", 0.2))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a store, a config, and runs of two objectives and three seeds that one rank trained: 200 dense steps in bfloat16."""
    folder = tmp_path_factory.mktemp("products")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"]["store"] = str(folder / "store")
    settings["train"] |= {"sweeps": SWEEPS, "dtype": "float32", "products": "bfloat16", "sparse_below_density": 0}
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    run_gsae(1, ["train", config])
    return folder


def ends(output: Path, objective: str) -> list[dict]:
    """The last reading of each run of an objective, in order of the seeds."""
    found = {run.rpartition("/")[2]: [line for line in metrics if line["kind"] == "step"][-1] for run, metrics in lines(output).items()}
    return [end for name, end in sorted(found.items()) if name.startswith(objective)]


@pytest.mark.parametrize("objective", ["gated", "relu"])
def test_fvu_and_l0_are_within_the_noise_between_seeds(trained, tmp_path, objective):
    sweeps = [sweep for sweep in SWEEPS if sweep["objective"] == objective]
    run_gsae(1, ["train", again(trained, tmp_path, products="float32", sweeps=sweeps)])
    exact, rounded = ends(tmp_path / "runs", objective), ends(trained / "runs", objective)
    assert len(exact) == len(rounded) == len(SEEDS)
    for reading in ("fvu", "l0"):
        wanted, found = ([end[reading] for end in found_ends] for found_ends in (exact, rounded))
        noise = max(wanted) - min(wanted)
        assert found != wanted, "nothing was rounded"
        assert abs(sum(found) - sum(wanted)) / len(SEEDS) <= noise, f"{reading}: {found} instead of {wanted}"


def test_weights_and_optimizer_stay_in_float32(trained):
    for tensors in final_states(trained / "runs").values():
        assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.float32}
    for run in find_runs(trained / "runs"):
        assert json.loads((run / "run.json").read_text())["settings"]["products"] == "bfloat16"


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_training_ends_as_an_uninterrupted_one(trained, tmp_path, size):
    config, output, reference = again(trained, tmp_path), tmp_path / "runs", trained
    if size > 1:
        reference = tmp_path / "uninterrupted"
        run_gsae(size, ["train", again(trained, reference)])
    midway = num_lines(trained / "runs") // 2
    with started(size, gsae, "train", str(config)) as ranks:
        until = time.monotonic() + 60
        while num_lines(output) < midway and time.monotonic() < until:
            time.sleep(0.002)
        assert ranks.processes[0].is_alive(), "the training was over before it could be killed"
        ranks.kill()
    run_gsae(size, ["train", config])
    assert_equal(output, reference / "runs")


def test_two_ranks_end_within_one_percent(trained, tmp_path):
    run_gsae(2, ["train", again(trained, tmp_path)])
    for objective in ("gated", "relu"):
        for one, two in zip(ends(trained / "runs", objective), ends(tmp_path / "runs", objective), strict=True):
            assert two["fvu"] == pytest.approx(one["fvu"], rel=0.01)
            assert two["l0"] == pytest.approx(one["l0"], rel=0.01)


def test_a_run_is_not_continued_with_other_products(trained, tmp_path):
    run_gsae(1, ["train", again(trained, tmp_path, sweeps=SWEEPS[:1], total_rows=640)])
    with started(1, gsae, "train", str(again(trained, tmp_path, sweeps=SWEEPS[:1], total_rows=640, products="float32"))) as ranks:
        assert ranks.wait() == [2]
        assert "was trained with products 'bfloat16', this config has 'float32'" in ranks.output()


def test_float64_has_no_bfloat16_products():
    with pytest.raises(ConfigError, match=r"train\.products is bfloat16 but train\.dtype is float64; set train\.dtype to float32"):
        TrainConfig(products="bfloat16", dtype="float64")
