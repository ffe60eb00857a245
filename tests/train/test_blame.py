"""Gradients that are not finite: by whose fault, what the user is told, and what is left of the training."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from broken_rows import break_row, row_of_step
from conftest import small_settings, write_config, write_text
from hurry import complaints, hurry
from ranks import gsae, run_gsae, started
from store_servers import web
from trained_runs import again, assert_equal, lines

from gsae.cli import main
from gsae.errors import StoreError
from gsae.sae.objective import SAE_CLASS, build
from gsae.store.origin import Origin
from gsae.store.runs import checkpoints, damage, find_runs, read_metrics
from gsae.train.averaging import WeightAverage
from gsae.train.feed import Feed
from gsae.train.optim import SAEOptimizer
from gsae.train.step import TrainingModule, update
from gsae.world import start

BATCH_ROWS = 64
ORDER = {"batch_rows": BATCH_ROWS, "window_rows": 256, "seed": 0}
SWEEP = {"objective": "relu", "expansions": [2], "lambdas": {"*": [0.1]}, "resampling": True}


def settings_of(folder: Path) -> dict:
    settings = small_settings(folder)
    settings["harvest"] |= {"store": str(folder / "store"), "contexts_per_shard": 4}
    settings["train"] |= {"total_rows": 6400, "window_rows": ORDER["window_rows"], "checkpoint_every_fraction": 0.1, "sweeps": [SWEEP]}
    return settings


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Path:
    """A folder with a store of two sites, and a config to train a run of 100 steps at each."""
    folder = tmp_path_factory.mktemp("harvested")
    write_text(folder / "text")
    config = write_config(folder / "config.yaml", settings_of(folder))
    run_gsae(2, ["harvest", config])
    return folder


def with_store(harvested: Path, folder: Path, **train) -> Path:
    """A config that trains from a copy of the store."""
    shutil.copytree(harvested / "store", folder / "store")
    config = again(harvested, folder, **train)
    settings = yaml.safe_load(config.read_text())
    settings["harvest"]["store"] = str(folder / "store")
    return write_config(config, settings)


def broken_at(store: Path, site: str, step: int, value: float = math.nan, **order) -> Origin:
    """Break the tenth row of the batch of a step, the first that training meets."""
    origin = row_of_step(store, site, step, place=9, **(ORDER | order))
    break_row(store, site, origin, value)
    return origin


def alone(capsys, *words: str | Path) -> tuple[int, str, str]:
    """A command in this process: its exit code, and what it wrote."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def hurried(*words: str) -> None:
    hurry()
    gsae(*words)


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("feature_ranks", [1, 2])
def test_a_broken_row_ends_the_training_with_its_name_and_once_it_is_mended_all_is_as_if_nothing_had_been(
    harvested, tmp_path, feature_ranks
):
    settings = {"sites": [-2], "feature_ranks": feature_ranks}
    config, store, output = with_store(harvested, tmp_path, **settings), tmp_path / "store", tmp_path / "runs"
    origin = broken_at(store, "resid.2", step=23)
    with started(2, hurried, "train", str(config)) as ranks:
        assert ranks.wait(60) == [2] * 2
        (line,) = complaints(ranks)
        assert "Traceback" not in ranks.output(0) + ranks.output(1)
    run = output / "resid.2" / "relu-resampled-m32-l0.1-s0"
    rows = run / "non-finite-00000023.jsonl"
    where = f"resid.2, step 23: row {origin.row} of context {origin.context} in resid.2/{origin.tar.name}"
    cure = f"run gsae verify {store} --repair, gsae harvest and gsae train again, which goes on from its last checkpoint"
    said = f"{where} (lane {origin.lane}, document {origin.document}) is NaN or infinite; {cure} (all its rows: {rows})"
    assert line == f"gsae: {said}"
    (broken,) = [row for row in listed(rows) if not row["is_finite"]]
    assert broken == {
        **{"lane": origin.lane, "shard": f"resid.2/{origin.tar.name}", "context": origin.key, "row": origin.row},
        **{"document": origin.document, "is_finite": False, "norm": None},
    }
    assert [checkpoint.step for checkpoint in checkpoints(run)] == [10, 20]
    assert list(output.rglob("*.partial")) == []
    assert all(damage(each.path) == [] for each in checkpoints(run))
    assert "stopped" not in {line["kind"] for line in read_metrics(run)}, "the run goes on once the store is mended"
    with started(1, gsae, "verify", str(store), "--repair") as ranks:
        assert ranks.wait() == [0]
        assert f"context {origin.context} has values that are NaN or infinite" in ranks.output()
    run_gsae(2, ["harvest", config])
    run_gsae(2, ["train", config])
    run_gsae(2, ["train", again(harvested, tmp_path / "uninterrupted", **settings)])
    assert_equal(output, tmp_path / "uninterrupted" / "runs")


def read_last(run: Path) -> dict:
    return list(read_metrics(run))[-1]


def test_a_run_that_diverges_stops_alone_and_lists_its_rows(harvested, tmp_path):
    """What the other one trains does not change by it, though the stream goes back and forth for the rows."""
    for name, size, lambdas in (("both", 2, [0.1, 1e308]), ("one", 2, [0.1]), ("alone", 1, [0.1, 1e308])):
        sweeps = [SWEEP | {"lambdas": {"1": lambdas}}]
        schedule = {"lambda_warmup_fraction": 0.0}
        config = again(harvested, tmp_path / name, sweeps=sweeps, schedule=schedule, learning_rate=0.05)
        shown = run_gsae(size, ["train", config])
        if name != "one":
            diverged = tmp_path / name / "runs/resid.1/relu-resampled-m32-l1e+308-s0"
            end = read_last(diverged)
            assert end["kind"] == "stopped"
            step = int(end["reason"].split()[4])
            rows = f"non-finite-{step:08d}.jsonl"
            assert end["reason"] == (
                f"the gradient of step {step} was not finite, so the weights did not move by it, "
                f"but all rows of its batch ({rows}) are: the run diverged; lower its learning rate or its lambda"
            )
            assert f"resid.1: {diverged.name} stopped at step 10: {end['reason']}" in shown
            assert re.search(rf"resid.1 {re.escape(diverged.name)}: rows .* state stopped", shown)
            (warning,) = [line.partition("warning: ")[2] for line in shown.splitlines() if "warning: " in line]
            assert warning == f"1 of 2 runs was stopped before its end, for the reason in metrics.jsonl: resid.1/{diverged.name}"
            assert all(row["is_finite"] for row in listed(diverged / rows))
            assert shown.splitlines()[-1].endswith("training: no site is left")
            assert shown.splitlines()[-2].endswith(warning)
    here, there = (listed(tmp_path / name / "runs/resid.1/relu-resampled-m32-l1e+308-s0" / rows) for name in ("both", "alone"))
    assert here == there
    wanted = [row_of_step(harvested / "store", "resid.1", step, place, **ORDER) for place in (0, 17, BATCH_ROWS - 1)]
    assert [(wanted.key, wanted.row) for wanted in wanted] == [(here[place]["context"], here[place]["row"]) for place in (0, 17, 63)]
    shutil.rmtree(tmp_path / "both/runs/resid.1/relu-resampled-m32-l1e+308-s0")
    assert_equal(tmp_path / "both/runs", tmp_path / "one/runs")


@pytest.mark.parametrize(("storage", "max_rows"), [("int8", None), ("float32", 2000)])
def test_the_values_that_training_sees_are_looked_at(harvested, tmp_path, capsys, storage, max_rows):
    settings = settings_of(tmp_path) | {"corpus": small_settings(harvested)["corpus"]}
    settings["harvest"] |= {"sites": [1], "storage_dtype": storage}
    settings["train"] |= {"max_rows": max_rows}
    config = write_config(tmp_path / "config.yaml", settings)
    assert alone(capsys, "harvest", config)[0] == 0
    origin = broken_at(tmp_path / "store", "resid.1", 24, math.inf, max_rows=max_rows)
    code, _, told = alone(capsys, "train", config)
    assert code == 2
    assert f"gsae: resid.1, step 24: {origin} is NaN or infinite; run gsae verify " in told


def test_a_broken_row_of_a_part_is_named_with_the_part(harvested, tmp_path, capsys):
    settings = settings_of(tmp_path)
    settings["corpus"] = small_settings(harvested)["corpus"] | {"parts": 2}
    settings["harvest"]["sites"] = [1]
    config = write_config(tmp_path / "config.yaml", settings | {"train": settings["train"] | {"total_rows": 19_200}})
    assert alone(capsys, "harvest", config)[0] == 0
    store = tmp_path / "store/part-0001"
    origin = broken_at(store, "resid.1", step=8)  # of another order than the training's, so it meets it at some other step
    code, _, told = alone(capsys, "train", config)
    assert code == 2
    assert f": {origin} is NaN or infinite; run gsae verify {store} --repair" in told
    step = int(told.split()[3].rstrip(":"))
    left = json.loads(sorted((tmp_path / "runs").rglob("state.json"))[-1].read_text())
    assert left["position"]["visit"] == 1
    assert step >= left["step"]
    assert alone(capsys, "verify", store, "--repair")[0] == 0
    assert alone(capsys, "harvest", config)[0] == 0
    assert alone(capsys, "train", config)[0] == 0
    assert {run[-1]["step"] > step for run in lines(tmp_path / "runs").values()} == {True}


def test_of_a_store_at_a_url_the_one_to_repair_is_named(harvested, tmp_path, capsys):
    config = with_store(harvested, tmp_path, sites=[1])
    origin = broken_at(tmp_path / "store", "resid.1", step=12)
    with web(tmp_path / "store") as server:
        settings = yaml.safe_load(config.read_text())
        settings["harvest"] |= {"store": server.url, "cache": str(tmp_path / "cache"), "cache_gigabytes": 1.0}
        code, _, told = alone(capsys, "train", write_config(config, settings))
    assert code == 2
    name = str(origin)
    assert f"step 12: {name} is NaN or infinite; repair the store that {server.url} is a copy of, copy it again, then run gsae" in told


def lose_rows_on_1(*words: str) -> None:
    def read_again(feed: Feed, rows_taken: int) -> None:
        raise StoreError("shard resid.1/0001-000000.tar is missing")

    if dist.get_rank() == 1:
        Feed.read_again = read_again
    hurried(*words)


def test_rows_that_cannot_be_read_again_end_the_training_with_the_step(harvested, tmp_path):
    schedule = {"lambda_warmup_fraction": 0.0}
    sweeps = [SWEEP | {"lambdas": {"1": [0.1, 1e308]}}]
    with started(2, lose_rows_on_1, "train", str(again(harvested, tmp_path, sweeps=sweeps, schedule=schedule))) as ranks:
        assert ranks.wait(60) == [2, 2]
        (line,) = complaints(ranks)
    lost = "the gradient was not finite, and its rows cannot be read again: shard resid.1/0001-000000.tar is missing (on rank 1)"
    assert line.startswith("gsae: resid.1, step ")
    assert line.endswith(f": {lost}")
    assert final_steps(tmp_path / "runs") == {0}


def final_steps(output: Path) -> set[int]:
    return {max((checkpoint.step for checkpoint in checkpoints(run)), default=0) for run in find_runs(output)}


@pytest.fixture
def group():
    with start("cpu") as world:
        yield world.group


@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("micro_batch_rows", [None, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_after_a_broken_row_a_run_is_where_it_would_be_without_that_step(group, name, is_sparse, micro_batch_rows, value):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(12, 6, dtype=torch.float64, generator=generator) for _ in range(3)]
    broken = batches[1].clone()
    broken[5, 2] = value

    def trained(batches) -> dict[str, torch.Tensor]:
        unit_norm = name != "gated-norm-weighted"
        sae = build(name, 6, 20, seed=0, dtype=torch.float64)
        module = TrainingModule(sae, name)
        module.is_sparse = is_sparse
        optimizer = SAEOptimizer(sae, betas=(0.9, 0.999), eps=1e-8, unit_norm=unit_norm, clip_gradient_norm=1.0)
        average, wrapped = WeightAverage(sae, 0.9, unit_norm=unit_norm), group.wrap(module)
        for x in batches:
            report = update(wrapped, optimizer, x, lambda_=0.2, learning_rate=0.01, micro_batch_rows=micro_batch_rows)
            assert bool(report.gradient.is_finite) == bool(torch.isfinite(x).all())
            average.update(sae, 5)
        assert all(torch.isfinite(tensor).all() for tensor in average.state_tensors().values())
        return {**sae.state_dict(), **optimizer.state_tensors()}

    found, wanted = trained([batches[0], broken, batches[2]]), trained([batches[0], batches[2]])
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
