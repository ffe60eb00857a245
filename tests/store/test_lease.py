"""One job at a time writes in a directory; one that lost its lease writes no more."""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import started

from gsae.errors import ConfigError, GsaeError
from gsae.store import durable, lease
from gsae.world import start


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    hurry()


def hurry() -> None:
    """Tenths of the real waits."""
    lease.RENEW_SECONDS, lease.LOST_SECONDS, lease.EXPIRED_SECONDS = 0.3, 0.9, 1.2
    lease.SETTLE_SECONDS, lease.LOOK_SECONDS, lease.TRUST_SECONDS = 0.5, 0.1, 0.0


@pytest.fixture
def everyone():
    with start("cpu") as world:
        yield world.everyone


def held(directory: Path, everyone, stage: str = "train"):
    return lease.lease(directory, stage, "output", everyone, lambda line: None)


def as_job(monkeypatch, job: str, restart: int = 0) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def leave(directory: Path, stage: str = "train", **changed) -> Path:
    """The lease of a job on another host that is gone."""
    holder = {"job": "7", "restart": 0, "host": "n9", "pid": 1, "began": 1.0, "kernel": "another", "nonce": "theirs"} | changed
    path = directory / f"{stage}.lease"
    path.write_text(json.dumps(holder))
    return path


def test_it_says_who_holds_it_and_is_gone_at_the_end(tmp_path, everyone, monkeypatch):
    as_job(monkeypatch, "12", restart=3)
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    with held(tmp_path, everyone):
        holder = json.loads((tmp_path / "train.lease").read_text())
        assert (holder["job"], holder["restart"], holder["host"], holder["pid"]) == ("12", 3, "n4", os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_it_is_renewed_while_it_is_held(tmp_path, everyone):
    with held(tmp_path, everyone):
        before = (tmp_path / "train.lease").stat().st_mtime_ns
        time.sleep(1)
        assert (tmp_path / "train.lease").stat().st_mtime_ns > before


def hold(directory: str) -> None:
    """A job that holds it until it is killed."""
    hurry()
    with start("cpu") as world, held(Path(directory), world.everyone):
        (Path(directory).parent / f"held-{os.getpid()}").touch()
        time.sleep(100)


def test_a_second_job_is_refused_while_the_first_lives_and_not_after_it_was_killed(tmp_path, everyone):
    (directory := tmp_path / "runs").mkdir()
    tmp_path = directory
    with started(1, hold, str(tmp_path)) as other:
        pid = other.processes[0].pid
        while not (tmp_path.parent / f"held-{pid}").exists():
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=rf"output is .*, where .* \(process {pid}\) writes; wait for it, or end that process"):
            held(tmp_path, everyone).__enter__()
        with held(tmp_path, everyone, "evaluate"):
            pass  # another stage is another lease
        other.kill()
        began = time.monotonic()
        with held(tmp_path, everyone):
            assert time.monotonic() - began < lease.EXPIRED_SECONDS, "a process that is known to be dead is waited for"


def test_a_job_of_another_host_is_waited_for_until_it_has_not_been_renewed(tmp_path, everyone):
    leave(tmp_path)
    began = time.monotonic()
    with held(tmp_path, everyone):
        assert time.monotonic() - began >= lease.EXPIRED_SECONDS


def test_the_message_says_how_to_end_a_job_of_slurm(tmp_path, everyone):
    path = leave(tmp_path)
    if (pid := os.fork()) == 0:
        for _ in range(20):
            time.sleep(0.2)
            os.utime(path)
        os._exit(0)
    try:
        with pytest.raises(ConfigError, match=r"where job 7 on n9 \(process 1\) writes; wait for it, or scancel 7, or give output another"):
            held(tmp_path, everyone).__enter__()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert list(tmp_path.iterdir()) == [path]


def test_a_requeued_job_takes_over_from_its_previous_life_which_writes_no_more(tmp_path, everyone, monkeypatch):
    as_job(monkeypatch, "12", restart=0)
    with held(tmp_path, everyone):
        durable.write_json_atomically(tmp_path / "results.json", 1)
        path = tmp_path / "train.lease"
        path.write_text(path.read_text())  # as if renewed just now
        as_job(monkeypatch, "12", restart=1)
        began = time.monotonic()
        with held(tmp_path, everyone):
            assert time.monotonic() - began >= lease.SETTLE_SECONDS, "the previous life had no time to notice"
            held_first = lease._HELD[0]
            with pytest.raises(GsaeError, match=r"was taken over by job 12 on .*, so this job writes nothing more there"):
                held_first.require()
    assert not path.exists()


@pytest.mark.parametrize("restart", [0, 2])
def test_a_life_that_is_not_a_later_one_waits_as_any_other_job(tmp_path, everyone, monkeypatch, restart):
    leave(tmp_path, job="12", restart=2)
    as_job(monkeypatch, "12", restart)
    began = time.monotonic()
    with held(tmp_path, everyone):
        assert time.monotonic() - began >= lease.EXPIRED_SECONDS


@pytest.mark.parametrize("write", ["write_json_atomically", "append_line"])
def test_nothing_is_written_once_the_lease_is_lost(tmp_path, everyone, write):
    with held(tmp_path, everyone):
        getattr(durable, write)(tmp_path / "before", "text")
        leave(tmp_path)
        with pytest.raises(GsaeError, match=r"taken over by job 7 on n9"):
            getattr(durable, write)(tmp_path / "after", "text")
        getattr(durable, write)(tmp_path.parent / f"{tmp_path.name}-elsewhere", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "train.lease"], "the other's lease is not removed"


def test_nothing_is_written_when_it_could_not_be_renewed(tmp_path, everyone, monkeypatch):
    def fail(*arguments) -> None:
        raise OSError

    with held(tmp_path, everyone):
        monkeypatch.setattr(lease.os, "utime", fail)
        time.sleep(lease.LOST_SECONDS + 0.2)
        with pytest.raises(GsaeError, match="could not be renewed for"):
            durable.append_line(tmp_path / "after", "text")


def test_of_two_that_find_an_expired_lease_one_gets_it(tmp_path):
    (directory := tmp_path / "runs").mkdir()
    leave(directory)
    with started(1, hold, str(directory)) as one, started(1, hold, str(directory)) as other:
        until = time.monotonic() + 30
        while time.monotonic() < until and one.processes[0].is_alive() and other.processes[0].is_alive():
            time.sleep(0.05)
        winner, loser = (one, other) if one.processes[0].is_alive() else (other, one)
        assert "ConfigError: output is" in loser.output()
        until = time.monotonic() + 30
        while time.monotonic() < until and not list(tmp_path.glob("held-*")):
            time.sleep(0.05)
        assert list(tmp_path.glob("held-*")) == [tmp_path / f"held-{winner.processes[0].pid}"]


@pytest.mark.parametrize(("content", "what"), [("{", "is damaged .*"), ("", "is empty;")])
def test_a_lease_that_is_no_lease_is_named(tmp_path, everyone, content, what):
    (tmp_path / "train.lease").write_text(content)
    with pytest.raises(ConfigError, match=rf"train.lease {what} see that no job writes there, then delete it"):
        held(tmp_path, everyone).__enter__()


def test_other_ranks_see_that_the_lease_is_lost(tmp_path):
    with started(2, lose, str(tmp_path)) as ranks:
        assert ranks.wait(60) == [0, 0], ranks.output(1)
        assert all("taken over" in ranks.output(rank) for rank in (0, 1))


def lose(directory: str) -> None:
    hurry()
    with start("cpu") as world, held(Path(directory), world.everyone):
        world.everyone.barrier()
        if world.is_first:
            leave(Path(directory))
        world.everyone.reduce(torch.zeros(1), "sum")
        try:
            durable.append_line(Path(directory) / f"rank-{world.everyone.rank}", "text")
        except GsaeError as error:
            sys.stdout.write(str(error))
        world.everyone.barrier()


def test_a_file_system_without_links_will_do(tmp_path, everyone, monkeypatch):
    def fail(*arguments) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(lease.os, "link", fail)
    with held(tmp_path, everyone):
        assert json.loads((tmp_path / "train.lease").read_text())["pid"] == os.getpid()
    path = leave(tmp_path)
    began = time.monotonic()
    with held(tmp_path, everyone):
        assert time.monotonic() - began >= lease.EXPIRED_SECONDS
    assert not path.exists()
