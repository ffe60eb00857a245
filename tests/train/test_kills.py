"""SIGKILL inside a checkpoint write, inside a resampling event and anywhere: a training ends as an uninterrupted one, bit for bit."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from ranks import gsae, run_gsae, started
from trained_runs import again, assert_equal, train_small

from gsae.sae.gated import GatedSAE
from gsae.sae.relu import ReluSAE
from gsae.store import runs as run_directories
from gsae.store.runs import checkpoints, damage, find_runs
from gsae.train import bank as banks
from gsae.train import checkpoint, resample, saving
from gsae.train.bank import Bank
from gsae.train.optim import SAEOptimizer

EVENTS = {"event_fractions": [0.1, 0.2, 0.3, 0.4, 0.5], "min_interval_rows": 1000, "dead_after_rows": 500}
PLACES = ("half a file", "before its name", "between two runs", "before pruning", "half a deletion")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"))


def killed_at(place: str, step: int, *words: str) -> None:
    """A rank that kills itself at a place in the writing of a step's checkpoint, once training has gone on for three steps."""
    plain_tensors, plain_write, plain_prune = checkpoint.write_tensors, checkpoint.write_checkpoint, checkpoint.prune_checkpoints
    plain_fsync, plain_step = run_directories.fsync_directory, banks.train_step
    has_gone_on, written = threading.Event(), []

    def die() -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert has_gone_on.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(path: Path, tensors: dict) -> None:
        plain_tensors(path, tensors)
        if place == "half a file" and path.parent.name == f"{step:08d}.partial" and written.count(step) == 1:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def write(run: Path, at: int, fill: Callable) -> None:
        plain_write(run, at, fill)
        written.append(at)
        if place == "between two runs" and at == step:
            die()

    def fsync(directory: Path) -> None:
        plain_fsync(directory)
        if place == "before its name" and directory.name == f"{step:08d}.partial" and written.count(step) == 1:
            die()

    def prune(*arguments) -> None:
        if place == "before pruning" and step in written:
            die()
        plain_prune(*arguments)

    def remove(directory: Path, **options) -> None:
        if place == "half a deletion" and directory.name.endswith(".old.partial") and step in written:
            next(directory.glob("*.safetensors")).unlink()
            die()
        shutil.rmtree(directory, **options)

    def train_step(bank: Bank, *arguments) -> None:
        plain_step(bank, *arguments)
        if bank.step >= step + 3:
            has_gone_on.set()

    checkpoint.write_tensors, checkpoint.write_checkpoint, checkpoint.prune_checkpoints = write_half, write, prune
    run_directories.fsync_directory, run_directories.shutil, banks.train_step = fsync, SimpleNamespace(rmtree=remove), train_step
    gsae(*words)


LEFT = {
    "half a file": ([20, 40, 60], [20, 40], [20, 40]),
    "before its name": ([40, 60, 80], [40, 60], [40, 60]),
    "between two runs": ([60, 80, 100], [60, 80], [60, 80]),
    "before pruning": ([80, 100, 120],) * 3,
    "half a deletion": ([100, 120, 140], [80, 100, 120, 140], [80, 100, 120, 140]),
}
"""Checkpoints of the three runs after each of the kills, one after another."""


@pytest.mark.parametrize(("size", "places"), [(1, PLACES), (2, PLACES), (4, PLACES[2:4])])
def test_killed_inside_checkpoint_writes_it_ends_as_an_uninterrupted_one(trained, tmp_path, size, places):
    config, output, reference = again(trained, tmp_path, sites=[1]), tmp_path / "runs", tmp_path / "uninterrupted"
    run_gsae(size, ["train", again(trained, reference, sites=[1])])
    for place in places:
        with started(size, killed_at, place, LEFT[place][0][-1], "train", str(config)) as ranks:
            ranks.processes[0].join(60)
            assert ranks.processes[0].exitcode == -signal.SIGKILL, ranks.output()
            ranks.kill()
        found = [[each.step for each in checkpoints(run)] for run in find_runs(output)]
        if places == PLACES:
            assert found == list(LEFT[place])
        assert len(set.intersection(*map(set, found))) > 0
        assert all(damage(each.path) == [] for run in find_runs(output) for each in checkpoints(run))
    run_gsae(size, ["train", config])
    assert list(output.rglob("*.partial")) == []
    assert_equal(output, reference / "runs")


def marked(folder: str, *words: str) -> None:
    """A training with slow checkpoints and slow events. The first rank leaves a mark while it is inside of either."""
    marks = Path(folder)

    def slow(work: Callable, mark: str | None = None) -> Callable:
        def do(*arguments, **options) -> object:
            if mark and dist.get_rank() == 0:
                (marks / mark).touch()
            time.sleep(0.03)
            result = work(*arguments, **options)
            time.sleep(0.03)
            if mark and dist.get_rank() == 0:
                (marks / mark).unlink()
            return result

        return do

    saving.write_snapshots = slow(saving.write_snapshots, "writing")
    run_directories.fsync_file, run_directories.fsync_directory = map(slow, (run_directories.fsync_file, run_directories.fsync_directory))
    run_directories.remove_checkpoint = slow(run_directories.remove_checkpoint)
    resample.apply = slow(resample.apply, "resampling")
    ReluSAE.replace_features, GatedSAE.replace_features = slow(ReluSAE.replace_features), slow(GatedSAE.replace_features)
    SAEOptimizer.reset_slices = slow(SAEOptimizer.reset_slices)
    gsae(*words)


def kill_inside(mark: str, size: int, config: Path, folder: Path, generator: random.Random) -> bool:
    """SIGKILL to all ranks at a random moment after the training has come to what the mark stands for; whether they were inside of it."""
    for left_over in folder.iterdir():
        left_over.unlink()
    with started(size, marked, str(folder), "train", str(config)) as ranks:
        until = time.monotonic() + 60
        while not (folder / mark).exists() and time.monotonic() < until and ranks.processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(generator.random() * 0.15)
        assert ranks.processes[0].is_alive(), ranks.output()
        ranks.kill()
    return (folder / mark).exists()


@pytest.mark.parametrize(("size", "kills"), [(1, 8), (2, 8), (4, 4)])
def test_killed_at_random_moments_it_ends_as_an_uninterrupted_one(trained, tmp_path, size, kills):
    """Twenty in all, half of them at checkpoints and half at events."""
    (marks := tmp_path / "marks").mkdir()
    settings = {"sites": [1], "resampling": EVENTS, "checkpoint_every_fraction": 0.065}
    config, generator = again(trained, tmp_path, **settings), random.Random(size)
    inside = dict.fromkeys(("writing", "resampling"), 0)
    for _ in range(kills // 2):
        for mark in inside:
            inside[mark] += kill_inside(mark, size, config, marks, generator)
    assert min(inside.values()) >= 1, inside
    run_gsae(size, ["train", config])
    run_gsae(size, ["train", again(trained, tmp_path / "uninterrupted", **settings)])
    assert_equal(tmp_path / "runs", tmp_path / "uninterrupted/runs")
