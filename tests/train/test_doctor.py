"""What binds a training: each thing made slow on purpose, on one rank of two where the others would wait for it."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import yaml
from conftest import small_settings, write_config, write_text
from ranks import run_gsae, started
from trained_runs import again, num_lines

from gsae import world
from gsae.store.encoding import Encoded
from gsae.store.runs import find_runs, read_metrics
from gsae.store.stream import Stream
from gsae.train import doctor
from gsae.train.clock import Seconds
from gsae.train.step import TrainingModule
from gsae.world import Group

SECONDS = 0.04
NUM_STEPS = 20


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Path:
    """A folder with a store and a config of two runs of 20 steps, with one checkpoint."""
    folder = tmp_path_factory.mktemp("harvested")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"] |= {"store": str(folder / "store"), "sites": [1]}
    settings["train"] |= {
        "sweeps": [{"objective": "relu", "expansions": [2], "lambdas": {"*": [0.1, 0.2]}}],
        "total_rows": 64 * NUM_STEPS,
        "checkpoint_every_fraction": 1.0,
    }
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    return folder


def after_a_nap(work: Callable) -> Callable:
    """The same function, but late."""

    def late(*arguments, **named):
        time.sleep(SECONDS)
        return work(*arguments, **named)

    return late


def delay_sums() -> None:
    """Every sum of gradients arrives late, while nothing is computed."""
    wrap = Group.wrap

    def arrive(summed: dist.Work, values: torch.Tensor, late: torch.futures.Future) -> None:
        summed.wait()
        time.sleep(SECONDS)
        late.set_result(values)

    def slow_wrap(group: Group, module: torch.nn.Module) -> torch.nn.Module:
        wrapped = wrap(group, module)

        def sum_late(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            late: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            summed = dist.all_reduce(bucket.buffer().div_(group.size), group=group.process_group, async_op=True)
            threading.Thread(target=arrive, args=(summed, bucket.buffer(), late)).start()
            return late

        wrapped.register_comm_hook(None, sum_late)
        return wrapped

    Group.wrap = slow_wrap


def train_slowly(slow: str, size: int, config: str) -> None:
    """A rank's training; only the last one is slow, but for sums, which are everybody's."""
    if slow == "communicating":
        delay_sums()
    elif dist.get_rank() == size - 1:
        place, name = {
            "waiting": (Stream, "next_batch"),
            "copying": (Encoded, "decode"),
            "computing": (TrainingModule, "forward"),
        }[slow]
        setattr(place, name, after_a_nap(getattr(place, name)))
    ranks.gsae("train", config)


@pytest.mark.parametrize(
    ("slow", "size"), [*((slow, size) for slow in ("waiting", "copying", "computing") for size in (1, 2)), ("communicating", 2)]
)
def test_what_was_made_slow_binds(harvested, tmp_path, slow, size):
    said = ranks.run(size, train_slowly, slow, size, str(again(harvested, tmp_path)))
    name = "waiting for data" if slow == "waiting" else slow
    (share,) = re.findall(rf"resid\.1: {name} binds \((\d+) % of the time; ", said)
    assert int(share) > 50
    found = shares(tmp_path / "runs")
    assert len(found) == 2 * 2, "two runs, two lines"
    for of_line in found:
        assert sum(of_line.values()) == pytest.approx(1)
        assert max(of_line, key=of_line.get) == slow
        if size == 1:
            assert of_line["communicating"] == 0
        elif slow != "communicating":
            assert of_line["communicating"] < 0.25, "the rank that waited for the slow one is not what binds"


def shares(output: Path) -> list[dict[str, float]]:
    return [line["shares"] for run in find_runs(output) for line in read_metrics(run) if line["kind"] == "step"]


def count_decodes(config: str) -> None:
    decode, counted = Encoded.decode, []
    Encoded.decode = lambda *arguments: counted.append(1) or decode(*arguments)
    with suppress(SystemExit):
        ranks.gsae("train", config)
    assert len(counted) == NUM_STEPS


def test_rows_are_decoded_once_for_all_runs_of_a_bank(harvested, tmp_path):
    ranks.run(1, count_decodes, str(again(harvested, tmp_path)))


def test_a_training_that_is_stopped_says_once_what_bound_it(harvested, tmp_path):
    config = again(harvested, tmp_path)
    settings = yaml.safe_load(config.read_text())
    settings["train"]["sweeps"][0]["lambdas"] = {"*": [1e308]}  # its gradient is not finite
    said = ranks.run(1, train_slowly, "computing", 1, str(write_config(config, settings)))
    assert "stopped at step" in said
    assert said.count("computing binds") == 1


def test_a_training_that_is_asked_to_stop_says_once_what_bound_it(harvested, tmp_path):
    config = again(harvested, tmp_path, total_rows=64 * 10_000, log_every_steps=1)
    with started(2, train_slowly, "waiting", 2, str(config)) as slow:
        until = time.monotonic() + 60
        while num_lines(tmp_path / "runs") < 4 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(slow.processes[0].pid, signal.SIGTERM)
        assert slow.wait(60) == [0, 0]
        assert slow.output().count("waiting for data binds") == 1


def check_critical_path() -> None:
    with world.start("cpu") as here:
        own = [Seconds(waiting=5, copying=0.5, computing=3, communicating=0.5, chores=1), Seconds(0, 1, 3, 5, 1)][here.everyone.rank]
        # The first rank waited 5 s for rows, and the other 4.5 s for the first; both took 10 s, of which 10 - 5 - 1 - 0.5 - 1 are left.
        assert doctor.critical_path(own, here.everyone) == Seconds(waiting=5, copying=1, computing=2.5, communicating=0.5, chores=1)
        held_up_by_different_things = [Seconds(waiting=6, computing=1), Seconds(copying=6, computing=1)][here.everyone.rank]
        assert doctor.critical_path(held_up_by_different_things, here.everyone).computing == 0


def test_over_ranks_the_slowest_counts_and_who_waited_for_it_does_not():
    ranks.run(2, check_critical_path)


def test_a_verdict_names_what_binds_first():
    seconds = Seconds(waiting=2, copying=1, computing=180, communicating=12, chores=5)
    assert doctor.verdict(seconds) == "computing binds (90 % of the time; waiting for data 1 %, copying 0 %, communicating 6 %, chores 2 %)"
    assert doctor.verdict(Seconds(chores=3, computing=1)).startswith("chores bind (75 % of the time; waiting for data 0 %,")
    assert doctor.brief(seconds) == "waiting 1%, copying 0%, computing 90%, communicating 6%, chores 2%"
