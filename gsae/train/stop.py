"""Stopping on request. In: SIGTERM or SIGUSR1 to any rank. Out: the step at which all ranks agree to stop, and `stopped.json`."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from gsae.store.runs import STOPPED_FILE
from gsae.train.bank import Bank
from gsae.train.chores import Log, is_checkpoint_due
from gsae.train.saving import Saver
from gsae.world import Group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """What this process was told; one a process, from before the first bank to after the last."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._received = 0

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """A block in which the signals ask for a stop instead of killing the process."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def is_made(self, group: Group, steps_a_second: int = 1) -> tuple[bool, int]:
        """Whether any rank of the group was told to stop, and the largest `steps_a_second`. A collective."""
        received, steps = group.reduce(torch.tensor([self._received, steps_a_second]), "max").tolist()
        self._received = max(self._received, received)  # a signal may have come while the ranks talked: the next question finds it
        return received > 0, steps

    def record(self, group: Group, site: str | None, step: int) -> None:
        """Write `stopped.json`; groups that stop at once write the same file, and the last one stays."""
        if group.is_first:
            text = json.dumps({"signal": signal.Signals(self._received).name, "site": site, "step": step}) + "\n"
            partial = self._output / f"stopped-{os.getpid()}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._output / STOPPED_FILE)


class StopOnRequest:
    """The chore: the ranks ask each other about once a second; how many steps that is, they agree on too."""

    def __init__(self, request: StopRequest, log: Log, saver: Saver) -> None:
        self._request, self._log, self._saver = request, log, saver
        self._every_steps = 1
        self._step: int | None = None
        self._time = time.monotonic()

    def is_due(self, bank: Bank) -> bool:
        """Every so many steps, and after a checkpoint, which may have waited; not after the last one, which ends the bank anyway."""
        return (bank.step % self._every_steps == 0 or is_checkpoint_due(bank)) and bank.step < bank.spec.total_steps

    def run(self, bank: Bank) -> None:
        """Checkpoint and stop if any rank was told to; adjust how often to ask. A checkpoint that failed meanwhile ends all ranks."""
        self._saver.check(bank.group)
        now = time.monotonic()
        num_steps = 1 if self._step is None else bank.step - self._step
        steps_a_second = max(1, int(num_steps / max(now - self._time, 1e-6)))
        is_made, steps = self._request.is_made(bank.group, steps_a_second)
        self._step, self._time, self._every_steps = bank.step, now, min(steps, 10 * self._every_steps)
        if is_made:
            bank.stopping = True
            self._log.run(bank)
            if not is_checkpoint_due(bank):
                self._saver.save(bank, bank.active_runs)
            self._saver.finish(bank.group)
            self._request.record(bank.group, bank.spec.site, bank.step)
