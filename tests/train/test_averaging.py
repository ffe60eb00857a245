"""The moving average of the weights: against its formula, through resampling and a resume, over ranks, and where it is read."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config, write_text
from ranks import gsae, run, run_gsae, started
from safetensors.torch import load_file
from trained_runs import again, assert_equal, assert_near, final_states, lines, num_lines

from gsae import load_sae
from gsae.config import TrainConfig
from gsae.errors import ConfigError
from gsae.sae.formats import fold_scale, read_sae
from gsae.sae.objective import SAE_CLASS, UNIT_NORM, build
from gsae.store.runs import checkpoints, find_runs
from gsae.train.averaging import WeightAverage
from gsae.train.optim import SAEOptimizer
from gsae.train.step import TrainingModule, update
from gsae.world import start

D_MODEL, FEATURES, DECAY = 6, 10, 0.9
# Learning rates at which features die and are resampled, at steps 50 and 100 of 200; checkpoints are every 20.
SWEEPS = [
    {"objective": objective, "expansions": [8], "lambdas": {"1": [0.9]}, "resampling": True, "learning_rate": 0.1}
    for objective in ("gated", "relu")
]
RESAMPLING = {"event_fractions": [0.25, 0.5], "min_interval_rows": 1000, "dead_after_rows": 500}


def drifting_sae(name, step):
    """Another SAE at each step."""
    return build(name, D_MODEL, FEATURES, seed=100 + step, dtype=torch.float64)


def averaged(name="gated", steps=150):
    average = WeightAverage(drifting_sae(name, -1), DECAY, unit_norm=name in UNIT_NORM)
    for step in range(steps):
        average.update(drifting_sae(name, step), step)
    return average


@pytest.mark.parametrize("name", SAE_CLASS)
def test_it_is_the_average_of_the_formula(name):
    """By the weight of each update's own weights: 1 - d_t, times d of all updates since. d_t < 0.9 up to update 80."""
    steps, found = 150, averaged(name).state_tensors()
    decays = [min(DECAY, t / (t + 9)) for t in range(steps)]
    wanted = {key: torch.zeros_like(value) for key, value in found.items()}
    total = 0.0
    for step in range(steps):
        share = 1 - decays[step]
        for later in decays[step + 1 :]:
            share *= later
        total += share
        for key, value in drifting_sae(name, step).state_dict().items():
            wanted[key] += share * value
    assert total == pytest.approx(1), "the initial weights have no share"
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


def test_the_first_update_is_taken_over_whole():
    found, wanted = averaged(steps=1).state_tensors(), drifting_sae("gated", 0).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize("name", SAE_CLASS)
def test_what_is_saved_is_the_function_of_the_averaged_weights_with_directions_of_norm_1(name):
    average = averaged(name)
    exact, saved = build(name, D_MODEL, FEATURES, seed=0, dtype=torch.float64), average.to_sae()
    exact.load_state_dict(average.state_tensors())
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(saved(x), exact(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(saved.encode(x) > 0, exact.encode(x) > 0)
    norms = saved.W_dec.norm(dim=1)
    assert exact.W_dec.norm(dim=1).max() < 0.9, "the average of different unit vectors is shorter"
    torch.testing.assert_close(norms, torch.ones_like(norms) if name in UNIT_NORM else exact.W_dec.norm(dim=1))
    saved.W_dec.data.zero_()
    assert average.state_tensors()["W_dec"].abs().max() > 0, "what is saved is a copy"


def test_resampled_features_start_anew_and_others_do_not():
    average, new, features = averaged(), drifting_sae("gated", 1000), torch.tensor([2, 7])
    before = {key: value.clone() for key, value in average.state_tensors().items()}
    average.take_over(new, features)
    for key, axis in new.FEATURE_AXIS.items():
        found, old, weights = (value.movedim(axis, 0) for value in (average.state_tensors()[key], before[key], new.get_parameter(key)))
        assert torch.equal(found[features], weights[features])
        assert torch.equal(found[[0, 1, 3, 4, 5, 6, 8, 9]], old[[0, 1, 3, 4, 5, 6, 8, 9]])
    assert torch.equal(average.state_tensors()["b_dec"], before["b_dec"])


def average_on_ranks(products: str) -> None:
    """Some updates in float32, then the weights and averages of all ranks side by side."""
    with start("cpu") as world:
        group = world.group
        sae = build("gated", 32, 96, seed=0)
        module, average = TrainingModule(sae, "gated", products=products), WeightAverage(sae, DECAY, unit_norm=True)
        optimizer, wrapped = SAEOptimizer(sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=True), group.wrap(module)
        generator = torch.Generator().manual_seed(group.rank)
        for step in range(30):
            x = torch.randn(40, 32, generator=generator)
            update(wrapped, optimizer, x, lambda_=0.1, learning_rate=1e-2, micro_batch_rows=None)
            average.update(sae, step)
        for tensors in (sae.state_dict(), average.state_tensors()):
            flat = torch.cat([value.flatten() for value in tensors.values()])
            of_ranks = group.gather(flat[None])
            assert len(of_ranks) == group.size > 1
            assert all(torch.equal(of_rank, flat) for of_rank in of_ranks)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_weights_and_averages_of_all_ranks_are_the_same_bits(products):
    run(4, average_on_ranks, products)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a store, a config, and the runs that one rank trained in float64 with an average; all checkpoints are kept."""
    folder = tmp_path_factory.mktemp("averaging")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"]["store"] = str(folder / "store")
    settings["train"] |= {"sweeps": SWEEPS, "resampling": RESAMPLING, "ema_decay": DECAY, "keep_checkpoints": 20}
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    run_gsae(1, ["train", config])
    return folder


def test_without_it_the_same_weights_are_trained_and_saved(trained, tmp_path):
    run_gsae(1, ["train", again(trained, tmp_path, ema_decay=None)])
    assert lines(tmp_path / "runs") == lines(trained / "runs")
    plain, states = final_states(tmp_path / "runs"), final_states(trained / "runs")
    for name, tensors in plain.items():
        extra = {key for key in states[name] if key.startswith(("weights.", "average."))}
        assert states[name].keys() - extra == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(states[name].get(f"weights.{key}", states[name][key]), value), key
        assert not torch.equal(states[name]["W_dec"], tensors["W_dec"])
        settings = json.loads((tmp_path / "runs" / name / "run.json").read_text())["settings"]
        assert not {"ema_decay", "products"} & settings.keys(), "runs begun before there were these settings have to resume"


def test_a_run_of_one_step_averages_its_weights_alone(trained, tmp_path):
    run_gsae(1, ["train", again(trained, tmp_path, total_rows=64, sweeps=[sweep | {"resampling": False} for sweep in SWEEPS])])
    for directory in find_runs(tmp_path / "runs"):
        state = state_of(checkpoints(directory)[-1].path)
        names = [key.removeprefix("weights.") for key in state if key.startswith("weights.")]
        assert "W_dec" in names
        assert all(torch.equal(state[f"average.{name}"], state[f"weights.{name}"]) for name in names)


def test_at_an_event_the_average_of_resampled_features_is_their_weights(trained):
    for directory in find_runs(trained / "runs"):
        event = next(found for found in checkpoints(directory) if found.step == 100)
        state = state_of(event.path)
        features = state["resampled"]
        assert len(features) > 0, "no feature was resampled"
        others = torch.ones(128, dtype=torch.bool)
        others[features] = False
        assert torch.equal(state["average.W_dec"][features], state["weights.W_dec"][features])
        assert not torch.isclose(state["average.W_dec"][others], state["weights.W_dec"][others]).all(dim=1).any()


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "state.safetensors")


def test_what_is_used_is_the_average_and_says_so(trained):
    for directory in find_runs(trained / "runs"):
        newest = checkpoints(directory)[-1].path
        saved, state = read_sae(newest), state_of(newest)
        average = build(saved.description["objective"], 16, 128, seed=0, dtype=torch.float64)
        average.load_state_dict({key.removeprefix("average."): value for key, value in state.items() if key.startswith("average.")})
        for key, value in fold_scale(average, 1.0).state_dict().items():
            assert torch.equal(saved.sae.state_dict()[key], value)
        assert saved.description["ema_decay"] == DECAY
        assert (saved.sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
        x, scale = torch.randn(20, 16, dtype=torch.float64), saved.description["scale"]
        torch.testing.assert_close(load_sae(directory)(x), average(x * scale) / scale)


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


def test_two_ranks_average_the_same_weights(trained, tmp_path):
    run_gsae(2, ["train", again(trained, tmp_path)])
    assert_near(tmp_path / "runs", trained / "runs")


@pytest.mark.parametrize("decay", [0.5, None])
def test_a_run_is_not_continued_with_another_decay(trained, tmp_path, decay):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    with started(1, gsae, "train", str(again(trained, tmp_path, ema_decay=decay))) as ranks:
        assert ranks.wait() == [2]
        assert f"was trained with ema_decay 0.9, this config has {decay}" in ranks.output()


@pytest.mark.parametrize("decay", [0.0, 1.0, float("nan")])
def test_a_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(ConfigError, match=r"train\.ema_decay is .*; give a share between 0 and 1"):
        TrainConfig(ema_decay=decay)
