"""Stopping on request. In: SIGTERM or SIGUSR1 to any rank. Out: when all ranks stop, and `stopped.json`.

Ranks that meet at every step ask each other in a collective; those that hardly meet, as in a harvest, leave the request on a board.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gsae.store import lease
from gsae.world import Board, Group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED_FILE = "stopped.json"
"""In the output directory, or a harvest's store, while a stage that was stopped on request waits to be continued."""
TOLD = "GSAE_TOLD"
"""Environment variable: a file that is there when the job was told to stop before this process listened. Slurm jobs set it."""
CONTINUES = "stopped on request; the same command continues from here"
_KEY = "signal"


class StopRequest:
    """What this process was told; one a process, from before a stage's work to after it.

    Args:
        stage: whose.
        directory: where `stopped.json` is written.
    """

    def __init__(self, stage: str, directory: Path) -> None:
        self._stage, self._directory = stage, directory
        self._received = 0

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """A block in which the signals ask for a stop instead of killing the process."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        if os.path.exists(os.environ.get(TOLD, "")):  # noqa: PTH110
            self._received = signal.SIGUSR1
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def is_made(self, group: Group, other: int = 0) -> tuple[bool, int]:
        """Whether any rank of the group was told to stop, and the largest `other` of the ranks. A collective."""
        received, largest = group.reduce(torch.tensor([self._received, other]), "max").tolist()
        self._received = max(self._received, received)  # a signal may have come while the ranks talked: the next question finds it
        return received > 0, largest

    def is_left(self, board: Board) -> bool:
        """Whether any rank that asks at this board was told to stop, as far as it has asked since. Not a collective."""
        with suppress(ConnectionError):  # the ranks' rendezvous is gone: the heartbeat says so
            if self._received:
                board.write(_KEY, str(self._received))
            else:
                self._received = int(board.read([_KEY])[0] or 0)
        return self._received > 0

    def record(self, **place: Any) -> None:
        """Write `stopped.json`, with how far the work came; where several ranks stop at once the last file stays."""
        path = self._directory / STOPPED_FILE
        lease.require(path)
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        text = json.dumps({"stage": self._stage, "signal": signal.Signals(self._received).name, "time": now, **place}) + "\n"
        partial = self._directory / f"stopped-{os.getpid()}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def forget(self) -> None:
        """Remove the `stopped.json` of an earlier stop: the stage goes on. One rank calls this."""
        (self._directory / STOPPED_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class Stop:
    """A stage that was stopped and waits to be continued."""

    stage: str
    time: str


def read_stop(directory: Path) -> Stop | None:
    """What is recorded in a directory; None where nothing is."""
    try:
        recorded: dict[str, Any] = json.loads((directory / STOPPED_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return Stop(recorded.get("stage", "train"), recorded.get("time", ""))
