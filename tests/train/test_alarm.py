"""What becomes of all ranks when one of a training fails, dies, stops or hangs; and that none of it is seen where nothing happens."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from broken_rows import break_row, row_of_step
from conftest import small_settings, write_config, write_text
from hurry import complaints, hurry
from ranks import Ranks, gsae, run_gsae, started
from trained_runs import again, assert_equal, num_lines

from gsae.store.progress import progress_path
from gsae.store.runs import checkpoints, damage, find_runs
from gsae.store.windows import LaneReader
from gsae.train import checkpoint
from gsae.train.bank import Bank
from gsae.train.chores import Log
from gsae.world import World

ROOT = Path(__file__).parents[2]
HOST = os.uname().nodename
LONG_SECONDS = 120.0
"""A time-out that no test waits for."""
Wound = Callable[[Path], None]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Path:
    """A folder with a store of many small shards, a config, and a config to train two sites of it, with windows that end soon."""
    folder = tmp_path_factory.mktemp("harvested")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"] |= {"store": str(folder / "store"), "contexts_per_shard": 4}
    sweep = {"objective": "gated", "expansions": [2], "lambdas": {"*": [0.2]}, "resampling": True}
    settings["train"] |= {"total_rows": 32_000, "window_rows": 256, "sweeps": [sweep]}
    config = write_config(folder / "config.yaml", settings)
    run_gsae(2, ["harvest", config])
    return folder


def config_for(harvested: Path, folder: Path, stall_timeout_seconds: float = LONG_SECONDS, **train) -> Path:
    """A config that trains into another folder, with other settings."""
    config = again(harvested, folder, **train)
    return write_config(config, yaml.safe_load(config.read_text()) | {"stall_timeout_seconds": stall_timeout_seconds})


def hurried(*words: str) -> None:
    hurry()
    gsae(*words)


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.002)


def wait_for_lines(output: Path, count: int) -> None:
    """Until so many lines of metrics are written: the training is under way."""
    wait_until(lambda: num_lines(output) >= count)


def remove(shard: Path) -> None:
    shard.unlink()


def cut(shard: Path) -> None:
    os.truncate(shard, 5000)


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@contextmanager
def wounded(harvested: Path, wound: Wound, lane: int, site: str = "resid.1") -> Iterator[str]:
    """A block in which a shard of a lane is not what it was; its name."""
    shard = harvested / "store" / site / f"{lane:04d}-000005.tar"
    content = shard.read_bytes()
    wound(shard)
    try:
        yield f"{site}/{shard.name}"
    finally:
        shard.write_bytes(content)


def assert_nothing_is_half_written(output: Path) -> None:
    assert list(output.rglob("*.partial")) == []
    for run in find_runs(output):
        assert all(damage(each.path) == [] for each in checkpoints(run))


def hurried_at_a_walk(*words: str) -> None:
    """So that neither group is through with its site before the other one has been broken and noticed."""
    plain_run = Log.run

    def slow_run(log: Log, bank: Bank) -> None:
        time.sleep(0.2)
        plain_run(log, bank)

    Log.run = slow_run
    hurried(*words)


def test_what_breaks_a_training_of_two_groups_is_named_and_costs_it_nothing(harvested, tmp_path):
    """A row broken, a shard lost, a rank killed, a rank stopped, one after another, each in a training that continues the one before."""
    run_gsae(4, ["train", config_for(harvested, tmp_path / "uninterrupted", groups=2)])
    config, output = config_for(harvested, tmp_path, stall_timeout_seconds=3, groups=2), tmp_path / "runs"
    advice = "look at its log, then run the same again: the training continues from its last checkpoint"

    def assert_ended(ranks: Ranks, codes: list[int], said: str) -> None:
        assert ranks.wait(30) == codes
        (line,) = complaints(ranks)
        assert re.match(said, line), line
        assert "Traceback" not in "".join(map(ranks.output, range(4)))
        assert_nothing_is_half_written(output)

    with broken_row(harvested / "store", "resid.2") as name, started(4, hurried_at_a_walk, "train", str(config)) as ranks:
        assert_ended(ranks, [2] * 4, rf"gsae: (rank 2: )?resid\.2, step 23: {re.escape(name)} is NaN or infinite; run gsae verify ")
    with started(4, hurried_at_a_walk, "train", str(config)) as ranks:
        wait_for_lines(output, num_lines(output) + 8)
        with wounded(harvested, remove, lane=1, site="resid.2") as name:
            assert_ended(ranks, [2] * 4, rf"gsae: rank [13]: shard {name} is missing in {harvested}/store; ")
    with started(4, hurried_at_a_walk, "train", str(config)) as ranks:
        wait_for_lines(output, num_lines(output) + 8)
        ranks.processes[2].kill()
        lost = rf"gsae: rank 2 on {re.escape(HOST)} has died or is out of reach \(last: [\d,]+ batches\); {advice}$"
        assert_ended(ranks, [2, 2, -signal.SIGKILL, 2], lost)
    with started(4, hurried_at_a_walk, "train", str(config)) as ranks:
        wait_for_lines(output, num_lines(output) + 8)
        os.kill(ranks.processes[3].pid, signal.SIGSTOP)
        for rank in (0, 1, 2):
            ranks.processes[rank].join(30)
        assert ranks.wait(0) == [2, 2, 2, None]
        os.kill(ranks.processes[3].pid, signal.SIGCONT)
        stopped = (
            rf"gsae: rank 3 on {re.escape(HOST)} has got no further for 3 s \(last: [\d,]+ batches\); {advice} \(stall_timeout_seconds\)$"
        )
        assert_ended(ranks, [2] * 4, stopped)
    run_gsae(4, ["train", config])
    assert_equal(output, tmp_path / "uninterrupted" / "runs")


@contextmanager
def broken_row(store: Path, site: str) -> Iterator[str]:
    """A block in which a row of step 23 is not finite; its name."""
    origin = row_of_step(store, site, step=23, place=9, batch_rows=64, window_rows=256, seed=0)
    changed = {path: path.read_bytes() for path in (origin.tar, progress_path(store, origin.lane), store / "manifest.json")}
    break_row(store, site, origin)
    try:
        yield str(origin)
    finally:
        for path, content in changed.items():
            path.write_bytes(content)


@pytest.mark.parametrize("wound", [flip, cut])
def test_a_shard_that_changes_in_mid_training_ends_all_ranks_with_its_name(harvested, tmp_path, wound):
    config, output = config_for(harvested, tmp_path, total_rows=640_000), tmp_path / "runs"
    with started(2, hurried, "train", str(config)) as ranks:
        wait_for_lines(output, 20)
        with wounded(harvested, wound, lane=1) as name:
            assert ranks.wait(30) == [2] * 2
        (line,) = complaints(ranks)
        assert line.startswith(f"gsae: rank 1: shard {name}")
        assert "Traceback" not in "".join(map(ranks.output, range(2)))
    assert_nothing_is_half_written(output)


def test_under_accelerate_too_one_line_names_the_shard(harvested, tmp_path):
    config, output = config_for(harvested, tmp_path, total_rows=640_000, groups=2), tmp_path / "runs"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/accelerate/cpu.yaml")]
    command = [*launch, "--num_processes", "4", "--main_process_port", "0", "-m", "gsae", "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as launcher:
        try:
            wait_for_lines(output, 20)
            with wounded(harvested, remove, lane=1) as name:
                shown, _ = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    (line,) = [line for line in shown.splitlines() if "gsae: " in line]
    assert re.match(rf"gsae: rank [13]: shard {name} is missing", line)
    assert_nothing_is_half_written(output)


@pytest.mark.parametrize(("size", "victim"), [(2, 1), (4, 0)])
def test_a_killed_rank_is_named_long_before_the_time_out(harvested, tmp_path, size, victim):
    config, output = config_for(harvested, tmp_path, total_rows=640_000), tmp_path / "runs"
    with started(size, hurried, "train", str(config)) as ranks:
        wait_for_lines(output, 20)
        ranks.processes[victim].kill()
        assert ranks.wait(30) == [-signal.SIGKILL if rank == victim else 2 for rank in range(size)]
        said = complaints(ranks)
        death = rf"gsae: (rank \d: )?rank {victim} on {re.escape(HOST)} has died or is out of reach \(last: [\d,]+ batches\); "
        advice = "look at its log, then run the same again: the training continues from its last checkpoint"
        assert all(re.fullmatch(death + advice, line) for line in said)
        assert len(said) == (3 if victim == 0 else 1), "where the first rank is gone, who else lives is not known, so all speak"
        assert "Traceback" not in "".join(map(ranks.output, range(size)))


def hurried_with_load(load: Callable[[int], None], *words: str) -> None:
    """A command on ranks of which the second one's reading of windows is preceded by `load(number of the window)`."""
    numbers, plain_load = itertools.count(), LaneReader.load

    def other_load(*arguments) -> None:
        load(next(numbers))
        plain_load(*arguments)

    if dist.get_rank() == 1:
        LaneReader.load = other_load
    hurried(*words)


def hang(number: int) -> None:
    time.sleep(1000 if number > 100 else 0)


def test_a_rank_that_hangs_while_it_reads_is_named_alone(harvested, tmp_path):
    config = config_for(harvested, tmp_path, stall_timeout_seconds=3, total_rows=640_000)
    with started(2, hurried_with_load, hang, "train", str(config)) as ranks:
        assert ranks.wait(60) == [2, 2]
        (line,) = complaints(ranks)
        assert line.startswith(f"gsae: rank 1 on {HOST} has got no further for 3 s (last: ")


def be_slow_at_first(number: int) -> None:
    time.sleep(5 if number == 0 else 0)


def hurried_with_slow_checkpoints(*words: str) -> None:
    plain_write = checkpoint.write_checkpoint

    def slow_write(*arguments):
        time.sleep(5)
        return plain_write(*arguments)

    checkpoint.write_checkpoint = slow_write
    hurried_with_load(be_slow_at_first, *words)


def test_a_first_window_and_checkpoints_due_or_asked_for_may_take_longer_than_the_time_out(harvested, tmp_path):
    few = {"sites": [1], "total_rows": 128_000, "checkpoint_every_fraction": 0.05}  # one of 2000 steps, so at step 100
    config, output = config_for(harvested, tmp_path, stall_timeout_seconds=3, **few), tmp_path / "runs"
    with started(2, hurried_with_slow_checkpoints, "train", str(config)) as ranks:
        wait_for_lines(output, 11)  # so the first window is past, and the first checkpoint
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
        assert ranks.wait(60) == [0, 0], complaints(ranks)
    (run,) = find_runs(output)
    first, asked_for = (each.step for each in checkpoints(run))
    assert first == 100 < asked_for


def test_a_group_that_is_through_waits_for_the_others(harvested, tmp_path):
    config = config_for(harvested, tmp_path, stall_timeout_seconds=1.5, sites=[1], groups=2)
    with started(2, hurried, "train", str(config)) as ranks:
        assert ranks.wait(60) == [0, 0]
        assert complaints(ranks) == []
        assert ranks.output().splitlines()[-1].endswith("training: no site is left")


def hurried_where_the_first_is_late(folder: Path, *words: str) -> None:
    """The first rank comes when the other one has the only site, and leaves a file when it knows."""
    plain_ticket = World.next_ticket

    def late_ticket(world: World, queue: str) -> int:
        time.sleep(1 if world.is_first else 0)
        ticket = plain_ticket(world, queue)
        if world.is_first and ticket > 0:
            (folder / "is late").touch()
        return ticket

    World.next_ticket = late_ticket
    hurried(*words)


def test_a_request_stops_the_group_that_trains_and_the_first_rank_says_so(harvested, tmp_path):
    config, output = config_for(harvested, tmp_path, sites=[1], groups=2, total_rows=640_000), tmp_path / "runs"
    with started(2, hurried_where_the_first_is_late, tmp_path, "train", str(config)) as ranks:
        wait_until((tmp_path / "is late").exists)
        wait_for_lines(output, 20)
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGUSR1)
        assert ranks.wait(30) == [0, 0]
        assert "stopped on request" in ranks.output().splitlines()[-1]
    assert (output / "stopped.json").exists()
    assert_nothing_is_half_written(output)


def hurried_with_bug(*words: str) -> None:
    if dist.get_rank() == 1:
        Log.run = lambda self, bank: 1 // 0
    hurried(*words)


def test_a_bug_shows_its_traceback_and_ends_all_ranks(harvested, tmp_path):
    with started(4, hurried_with_bug, "train", str(config_for(harvested, tmp_path, groups=2))) as ranks:
        assert ranks.wait(30) == [2, 1, 2, 2]
        assert "Traceback" in ranks.output(1)
        assert complaints(ranks) == ["gsae: ZeroDivisionError integer division or modulo by zero (on rank 1)"]
        assert "Traceback" not in ranks.output(0) + ranks.output(2) + ranks.output(3)
