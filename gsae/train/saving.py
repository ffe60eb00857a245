"""Checkpoints written while training goes on. In: the runs of a bank at a step. Out: their checkpoints on the disk, a while later.

    runs --copy, in the order of the computation--> host memory --a thread of the group's first rank--> checkpoint directories

The copy is all that training waits for, unless the checkpoint before is not on the disk yet: there is one copy in memory. Where features
are split, each rank of the first row of the grid has such a thread, and writes its part.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gsae.heartbeat import Heartbeat
from gsae.train.bank import Bank, Run
from gsae.train.checkpoint import Keep, Snapshot, take_snapshot, write_snapshots
from gsae.world import Group

LEAVING_SECONDS = 15.0
"""How long a process that ends before its time waits for a checkpoint that is being written; cut off, it does not count."""


class Background:
    """One piece of work at a time on a thread of its own; use it in a `with` block."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin, once the work before has been waited for."""
        # A daemon: a disk that hangs does not keep the process.
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True, name="background")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what the work raised, if it has."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failure = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.join(LEAVING_SECONDS)


class Saver:
    """Saves the runs of one bank; its buffers stay as long as it does.

    Args:
        background: where they are written; one a process.
        keep: the checkpoints that stay when a new one is on the disk.
        beats: of this rank, which may wait for the disk longer than the time-out.
    """

    def __init__(self, background: Background, keep: Keep, beats: Heartbeat) -> None:
        self._background, self._keep, self._beats = background, keep, beats
        self._buffers: dict[str, Tensor] = {}

    def save(self, bank: Bank, runs: Sequence[Run]) -> None:
        """Begin a checkpoint of these runs of a bank as they are now, once the checkpoint before is on the disk. A collective.

        Raises:
            CheckpointError: the one before could not be written.
        """
        for run in runs:
            run.firing.synchronise(bank.group)
        with self._beats.busy(), bank.group.together():
            if bank.group.rows.is_first and runs:
                self._background.wait()
                snapshots = [take_snapshot(bank, run, partial(self._to_host, run.spec.name)) for run in runs]
                writers = () if bank.group.mesh is None else (bank.group.mesh.writers,)
                self._background.start(partial(_write, _end_of_copies(bank.group.device), snapshots, self._keep, *writers))

    def check(self, group: Group) -> None:
        """Raise on all ranks what went wrong so far, without waiting for the disk. A collective."""
        with group.together():
            if group.rows.is_first:
                self._background.raise_failure()

    def finish(self, group: Group) -> None:
        """Wait until all is on the disk. A collective.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        with self._beats.busy(), group.together():
            if group.rows.is_first:
                self._background.wait()

    @torch.no_grad()
    def _to_host(self, run: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in buffers that are used again. From a GPU they are only queued, before whatever changes the tensors next."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(f"{run}/{name}")
            if buffer is None or buffer.shape != tensor.shape:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copies[name] = self._buffers[f"{run}/{name}"] = buffer.copy_(tensor, non_blocking=True)
        return copies


def _end_of_copies(device: torch.device) -> torch.cuda.Event | None:
    """What the GPU passes when it has made the copies that are queued."""
    if device.type != "cuda":
        return None
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    return copied


def _write(copied: torch.cuda.Event | None, snapshots: Sequence[Snapshot], keep: Keep, *writers: Group) -> None:
    if copied is not None:
        copied.synchronize()
    write_snapshots(snapshots, keep, *writers)
