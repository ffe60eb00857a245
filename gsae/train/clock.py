"""What a rank's time goes for. In: the names of what it enters. Out: seconds of each since they were last asked for.

On a CPU they are read off the host's clock. On a GPU the host only queues work, so each entry is an event in the computation's own
queue, and times are read when they are asked for: no step waits for the device. What the queue does while it is empty, or stands
before a copy that is not there, counts for what was entered last.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch

Phase = Literal["waiting", "copying", "computing", "communicating", "chores"]

_MANY_EVENTS = 1024
"""Entries on a GPU after which those that have passed are added up."""


@dataclass(frozen=True)
class Seconds:
    """Time by what it went for."""

    waiting: float = 0.0
    """For rows from the store."""
    copying: float = 0.0
    """Rows to the device and the training type, as far as the computation waited for it."""
    computing: float = 0.0
    communicating: float = 0.0
    """Gradients summed over ranks, as far as the computation waited for it; reconstructions too, where features are split."""
    chores: float = 0.0
    """Log lines, resampling, copies of checkpoints and waiting for the disk."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.waiting + self.copying + self.computing + self.communicating + self.chores

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(**{phase: seconds + getattr(other, phase) for phase, seconds in asdict(self).items()})


class Clock:
    """One rank's clock; it is always in some phase."""

    def __init__(self, device: torch.device) -> None:
        self._times = _HostTimes() if device.type == "cpu" else _DeviceTimes(device)

    def enter(self, phase: Phase) -> None:
        """From now on time goes for this."""
        self._times.enter(phase)

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """A block for which time goes for this, and afterwards for what it went before."""
        before = self._times.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def read(self) -> Seconds:
        """The seconds since the last call, and begin anew in the same phase. On a GPU it waits for the work that is queued."""
        return Seconds(**self._times.read())


class _HostTimes:
    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.phase: Phase = "chores"
        self._since = time.perf_counter()

    def enter(self, phase: Phase) -> None:
        now = time.perf_counter()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    def read(self) -> dict[str, float]:
        self.enter(self.phase)
        seconds, self._seconds = self._seconds, {}
        return seconds


class _DeviceTimes:
    def __init__(self, device: torch.device) -> None:
        self._queue = torch.cuda.current_stream(device)  # the backward pass enters from a thread of its own
        self._seconds: dict[str, float] = {}
        self._entries: deque[tuple[Phase, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self.enter("chores")

    @property
    def phase(self) -> Phase:
        return self._entries[-1][0]

    def enter(self, phase: Phase) -> None:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._queue)
        self._entries.append((phase, event))
        if len(self._entries) > _MANY_EVENTS:
            self._add_up()

    def read(self) -> dict[str, float]:
        phase, _ = self._entries[-1]
        self.enter(phase)
        self._entries[-1][1].synchronize()
        self._add_up()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _add_up(self) -> None:
        """Add the phases whose end the device has passed."""
        while len(self._entries) > 1 and self._entries[1][1].query():  # type: ignore[no-untyped-call]
            phase, begin = self._entries.popleft()
            _, end = self._entries[0]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1000
            self._spare.append(begin)
