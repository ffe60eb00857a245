"""A real Slurm of two nodes on this host: its daemons, and all that they write, live below one directory and end with the block."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY")
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=10
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MessageTimeout=20
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=8 RealMemory=4000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@dataclass
class Cluster:
    """The daemons, and what a user of them types."""

    folder: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen]

    def run(self, *words: str | Path, cwd: Path | None = None) -> str:
        """What a command prints; one that fails fails the test."""
        done = subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, check=False, env=self.environment, cwd=cwd or self.folder
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of one job."""
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def state(self, job: str) -> str:
        """Its state: PENDING, RUNNING, COMPLETED, ..."""
        return self.show(job)["JobState"]

    def wait(self, job: str, states: Sequence[str] = ENDED, timeout_seconds: float = 240) -> str:
        """The state, once it is one of these."""
        until = time.monotonic() + timeout_seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < until, f"job {job} is {state}: {self.show(job)}\n{self.output(job)}"
            time.sleep(0.3)
        return state

    def output(self, job: str) -> str:
        """What it wrote so far."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.nodes[name] = subprocess.Popen(
            ["slurmd", "-D", "-N", name], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill_node(self, name: str) -> None:
        """SIGKILL to a node's daemon; what it started lives on."""
        self.nodes[name].kill()
        self.nodes[name].wait()


def why_not() -> str | None:
    """Why this machine cannot have one."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}; Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root here"


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Both nodes are idle when the block begins; jobs left at its end are cancelled."""
    host = socket.gethostname()
    (folder / "state").mkdir()
    for name in NODES:
        (folder / f"spool-{name}").mkdir()
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, host=host, ports=_free_ports()))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with ExitStack() as stack:
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
        munged += [f"--{each}-file={folder}/munge.{each}" for each in ("pid", "seed", "log")]
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        for daemon in (munged, ["slurmctld", "-D"]):
            process = subprocess.Popen(daemon, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGTERM)
            time.sleep(0.5)
        slurm = Cluster(folder, environment, {})
        stack.callback(_end, slurm)
        for name in NODES:
            slurm.start_node(name)
        until = time.monotonic() + 60
        while "idle" not in _node_states(slurm) or set(_node_states(slurm).split()) != {"idle"}:
            assert time.monotonic() < until, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield slurm


def _node_states(slurm: Cluster) -> str:
    done = subprocess.run(["sinfo", "-N", "-h", "-o", "%T"], capture_output=True, text=True, check=False, env=slurm.environment)
    return done.stdout


def _end(slurm: Cluster) -> None:
    subprocess.run(["scancel", "-u", "root"], env=slurm.environment, check=False)
    until = time.monotonic() + 30
    while subprocess.run(["squeue", "-h"], capture_output=True, env=slurm.environment, check=False).stdout and time.monotonic() < until:
        time.sleep(0.3)
    for process in slurm.nodes.values():
        process.terminate()
        process.wait()


def _free_ports() -> list[int]:
    """Three ports that nobody listens at, the last two next to each other."""
    with ExitStack() as stack:
        while True:
            places = [stack.enter_context(socket.socket()) for _ in range(3)]
            places[0].bind(("127.0.0.1", 0))
            places[1].bind(("127.0.0.1", 0))
            first = places[1].getsockname()[1]
            try:
                places[2].bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return [places[0].getsockname()[1], first, first + 1]
