"""Training on two hosts as docs/launch.md says: one launcher on each, with the shipped config."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hosts
import psutil
import pytest
from hosts import Host
from trained_runs import again, assert_equal, assert_near, num_lines, train_small

ROOT = Path(__file__).parents[1]
REASON = hosts.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    with hosts.two_hosts() as both:
        yield both


class Launchers:
    """One a host."""

    def __init__(self, processes: list[subprocess.Popen], logs: list[Path]) -> None:
        self.processes, self.logs = processes, logs

    def wait(self, timeout_seconds: float = 120) -> list[int]:
        """Exit codes."""
        until = time.monotonic() + timeout_seconds
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def output(self, number: int) -> str:
        """What a launcher and its ranks wrote."""
        return self.logs[number].read_text()

    def rank(self, number: int) -> psutil.Process:
        """The one rank of a host."""
        (rank,) = psutil.Process(self.processes[number].pid).children()
        return rank


@contextmanager
def launched(pair: list[Host], folder: Path, config: Path, *words: str) -> Iterator[Launchers]:
    """`gsae train CONFIG WORDS...` on both hosts, one rank each."""
    processes, logs = [], [folder / f"{host.name}.log" for host in pair]
    for number, host in enumerate(pair):
        launcher = (
            f"{sys.executable} -m accelerate.commands.launch --config_file {ROOT}/launch/accelerate/multi_node.yaml --num_processes 2"
        )
        place = f"--machine_rank {number} --main_process_ip {pair[0].address} --main_process_port 29500"
        command = host.command(*launcher.split(), *place.split(), "-m", "gsae", "train", str(config), *words)
        with logs[number].open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    try:
        yield Launchers(processes, logs)
    finally:
        for process in processes:
            for left in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
                left.kill()
            process.wait()


def wait_for_lines(output: Path, number: int) -> None:
    until = time.monotonic() + 90
    while num_lines(output) < number and time.monotonic() < until:
        time.sleep(0.002)


def test_two_hosts_train_what_one_rank_trains_and_only_the_first_speaks(trained, tmp_path, pair):
    with launched(pair, tmp_path, again(trained, tmp_path)) as launchers:
        assert launchers.wait() == [0, 0], launchers.output(0) + launchers.output(1)
        shown = [launchers.output(number) for number in (0, 1)]
    assert_near(tmp_path / "runs", trained / "runs")
    assert shown[0].count("training: no site is left") == 1
    assert "resid." not in shown[1]
    assert "training" not in shown[1]


def test_a_group_on_each_host_trains_what_one_rank_trains(trained, tmp_path, pair):
    with launched(pair, tmp_path, again(trained, tmp_path), "--train.groups", "2") as launchers:
        assert launchers.wait() == [0, 0], launchers.output(0) + launchers.output(1)
        assert all(("resid.1" in launchers.output(number)) != ("resid.2" in launchers.output(number)) for number in (0, 1))
    assert_equal(tmp_path / "runs", trained / "runs")


@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_sigterm_to_launchers_stops_the_ranks_of_both_hosts(trained, tmp_path, pair, told):
    """A launcher that was not told then waits for the one that is gone, up to five minutes: PyTorch's way."""
    with launched(pair, tmp_path, again(trained, tmp_path, total_rows=1_280_000)) as launchers:
        wait_for_lines(tmp_path / "runs", 12)
        ranks = [launchers.rank(number) for number in (0, 1)]
        for number in told:
            launchers.processes[number].send_signal(signal.SIGTERM)
        assert psutil.wait_procs(ranks, 25)[1] == [], launchers.output(0)
        assert [launchers.processes[number].wait(25) for number in told] == [1] * len(told)
        assert "stopped on request; the same command continues from here" in launchers.output(0)
    stopped = json.loads((tmp_path / "runs" / "stopped.json").read_text())
    assert stopped["signal"] == "SIGTERM"
    assert 0 < stopped["step"] < 20_000


def test_a_rank_killed_on_one_host_is_named_on_the_other(trained, tmp_path, pair):
    config = again(trained, tmp_path, total_rows=1_280_000)
    with launched(pair, tmp_path, config) as launchers:
        wait_for_lines(tmp_path / "runs", 12)
        launchers.rank(1).kill()
        codes = launchers.wait(60)
        said = [line for line in launchers.output(0).splitlines() if line.startswith("gsae: ")]
    assert codes == [1, 1]
    assert len(said) == 1, said
    assert said[0].startswith("gsae: rank 1 on host-2 has died or is out of reach")


@pytest.mark.parametrize(
    ("first", "size", "interface"),
    [
        (hosts.ADDRESSES[0], 2, "cable"),
        (hosts.ADDRESSES[1], 2, "cable"),
        ("localhost", 2, "cable"),  # as a host's own name often is on that host
        ("127.0.0.1", 2, "lo"),
        (hosts.ADDRESSES[0], 1, "None"),
        ("no-such-host", 2, "None"),
    ],
)
def test_the_interface_that_leads_to_the_first_rank_is_chosen(pair, first, size, interface):
    code = "import os; from gsae.world.network import choose_interface; choose_interface(); print(os.environ.get('GLOO_SOCKET_IFNAME'))"
    environment = {**os.environ, "MASTER_ADDR": first, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "1"}
    shown = subprocess.run(pair[0].command(sys.executable, "-c", code), capture_output=True, text=True, env=environment, check=True)
    assert shown.stdout.strip() == interface
