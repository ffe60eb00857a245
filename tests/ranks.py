"""Real ranks for tests: processes under gloo with a file rendezvous, forked from a server that has imported everything once.

A rank runs a command line of gsae as `accelerate launch` would start it, or a function of a test, and can be killed.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["gsae.harvest.run", "gsae.train.run", "gsae.evaluate.run", "ranks"])


@dataclass(frozen=True)
class Ranks:
    """Started processes."""

    processes: list[ForkServerProcess]
    logs: list[Path]

    def wait(self, timeout_seconds: float = 120) -> list[int | None]:
        """Exit codes, in rank order; None for one that is still running."""
        until = time.monotonic() + timeout_seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in self.processes:
            process.kill()
        self.wait()

    def output(self, rank: int = 0) -> str:
        """What a rank wrote, on stdout and stderr."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""


@contextmanager
def started(size: int, work: Callable[..., Any], *arguments: Any) -> Iterator[Ranks]:
    """`size` ranks that call `work(*arguments)`; those still running at the end of the block are killed."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(size)]
        places = [(rank, size, f"{folder}/rendezvous", str(logs[rank])) for rank in range(size)]
        processes = [_SERVER.Process(target=_be_rank, args=(*place, work, arguments)) for place in places]
        for process in processes:
            process.start()
        ranks = Ranks(processes, logs)
        try:
            yield ranks
        finally:
            ranks.kill()


def run(size: int, work: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120) -> str:
    """Run to the end; the first rank's output. A rank that fails fails the test with its output."""
    with started(size, work, *arguments) as ranks:
        codes = ranks.wait(timeout_seconds)
        assert codes == [0] * size, "\n".join(f"rank {rank} ended with {codes[rank]}:\n{ranks.output(rank)}" for rank in range(size))
        return ranks.output()


def gsae(*words: str) -> None:
    """A rank's command line."""
    from gsae.cli import main

    main(words)


def run_gsae(size: int, words: Sequence[str | Path], timeout_seconds: float = 120) -> str:
    """`gsae WORDS...` on so many ranks."""
    return run(size, gsae, *map(str, words), timeout_seconds=timeout_seconds)


def _be_rank(rank: int, size: int, rendezvous: str, log: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    dist.barrier()  # one that leaves while others still connect to it ends them
    work(*arguments)
    sys.stdout.flush()
