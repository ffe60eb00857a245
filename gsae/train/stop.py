"""The chore that stops a training on request. In: what the ranks were told. Out: the step at which they agree to stop, and a checkpoint."""

import time

from gsae.store.stopping import StopRequest
from gsae.train.bank import Bank
from gsae.train.chores import Log, is_checkpoint_due
from gsae.train.saving import Saver


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
            if bank.group.is_first:
                self._request.record(site=bank.spec.site, step=bank.step)
