"""What the training loop does every so many steps. In: a bank after a step. Out: metrics lines, resampled features, checkpoints, a stop.

The order is fixed: log, choose the step, resample, checkpoint, stop (stop.py). All ranks of the group do a chore at the same step;
the first rank writes.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gsae.config import TrainConfig
from gsae.console import TrainingView
from gsae.store.lease import require as require_lease
from gsae.store.runs import METRICS_FILE
from gsae.train import blame, doctor, resample
from gsae.train.bank import Bank, Run, fresh_rows
from gsae.train.clock import Seconds
from gsae.train.meter import Reading
from gsae.train.saving import Saver
from gsae.train.schedule import event_steps, warmup_steps

UNHEALTHY_FRACTION = 0.05
"""Share of the run after which one with L0 under 1 or FVU over 1 is stopped."""

CHOOSE_EVERY_STEPS = 10
"""Steps between two choices between the dense and the sparse step."""


def checkpoint_interval(total_steps: int, config: TrainConfig) -> int:
    """Steps between two checkpoints."""
    return max(1, math.ceil(total_steps * config.checkpoint_every_fraction))


def is_checkpoint_due(bank: Bank) -> bool:
    """Whether the step just made ends with a checkpoint; the last one does, and the last one of a part."""
    return bank.step % checkpoint_interval(bank.spec.total_steps, bank.config) == 0 or bank.step == bank.until


def write_metrics(bank: Bank, run: Run, kind: str, values: dict[str, Any]) -> None:
    """Append a line to the run's metrics.jsonl, and tell the trackers, on the group's first rank."""
    if bank.group.is_first:
        line = {"kind": kind, "step": bank.step, "rows": bank.rows, **values}
        require_lease(run.directory)
        with (run.directory / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        bank.tracking.log(run.spec.name, line)


@dataclass(frozen=True)
class DeadShare:
    """A share of dead features, never without the rows of its definition."""

    dead_fraction: float
    dead_rows: int
    """Rows without firing after which a feature counts as dead."""


def _dead_share(bank: Bank, run: Run) -> DeadShare:
    """The same definition for all runs, whether they resample or not. A collective."""
    run.firing.synchronise(bank.group)
    dead_rows = resample.dead_after(bank.config.resampling, bank.spec.total_rows, 0)
    return DeadShare(run.firing.dead_fraction(dead_rows, bank.group.features), dead_rows)


class Log:
    """A metrics line a run; stops runs that diverged, or were sick for too long; says at the end what bound the speed.

    A row that is not finite ends the training (blame.py).

    Also due before each checkpoint, so that a checkpoint need not hold half-summed measures.
    """

    def __init__(self, view: TrainingView, saver: Saver) -> None:
        self._view, self._saver = view, saver
        self._time = time.monotonic()
        self._step: int | None = None
        self._spent = Seconds()

    def is_due(self, bank: Bank) -> bool:
        """Every `train.log_every_steps`, and before a checkpoint."""
        if self._step is None:
            self._step = bank.step - 1
        return bank.step % bank.config.log_every_steps == 0 or is_checkpoint_due(bank)

    def run(self, bank: Bank) -> None:
        """Write and show a line for each run that trains."""
        assert self._step is not None
        now = time.monotonic()
        steps, seconds = bank.step - self._step, now - self._time
        if steps > 0:
            spent = doctor.critical_path(bank.clock.read(), bank.group)
            self._spent += spent
            self._view.show_times(doctor.brief(spent))
            readings = [(run, run.meter.read(bank.group)) for run in bank.active_runs]
            non_finite = [(run, reading.non_finite_step) for run, reading in readings if reading.non_finite_step is not None]
            blame.examine(bank, non_finite)
            for run, reading in readings:
                run.seconds += seconds
                self._log(bank, run, reading, steps, steps * bank.spec.batch_rows / seconds, doctor.shares(spent))
            self._time, self._step = time.monotonic(), bank.step
        if self._spent.total and (bank.step == bank.until or bank.stopping or not bank.active_runs):
            self._view.say(doctor.verdict(self._spent))
            self._spent = Seconds()

    def _log(self, bank: Bank, run: Run, reading: Reading, steps: int, rows_per_second: float, shares: dict[str, float]) -> None:
        dead = _dead_share(bank, run)
        if reading.non_finite_step is not None:
            self._stop(bank, run, dead, blame.divergence(reading.non_finite_step))
            return
        last, fvu = bank.step - 1, reading.reconstruction / bank.variance
        lambda_ = bank.lambda_(run, last)
        measured = {name: value for name, value in asdict(reading).items() if name != "non_finite_step"}
        settings = {"learning_rate": bank.learning_rate(run, last), "lambda": lambda_}
        times = {"rows_per_second": rows_per_second, "seconds": run.seconds, "shares": shares}
        penalty = reading.sparsity + run.spec.pre_activation_loss * reading.pre_activation
        loss = reading.reconstruction + lambda_ * penalty + reading.auxiliary
        measured |= {"loss": loss, "fvu": fvu, "is_sparse": run.training.is_sparse}
        write_metrics(bank, run, "step", {**measured, **asdict(dead), **settings, **times})
        self._show(bank, run, reading, fvu, dead, rows_per_second)
        sickness = self._sickness(bank, run, reading.l0, fvu, steps)
        if sickness is not None:
            self._stop(bank, run, dead, sickness)
        elif bank.step == bank.spec.total_steps:
            run.finished = True
            write_metrics(bank, run, "finished", {**asdict(dead), "seconds": run.seconds})

    def _show(self, bank: Bank, run: Run, reading: Reading, fvu: float, dead: DeadShare, rows_per_second: float) -> None:
        left = bank.spec.total_rows - bank.rows
        self._view.update(
            run.spec.name,
            rows=bank.rows,
            rows_per_second=rows_per_second,
            reconstruction=reading.reconstruction,
            sparsity=reading.sparsity,
            auxiliary=reading.auxiliary,
            l0=reading.l0,
            fvu=fvu,
            dead_fraction=dead.dead_fraction,
            eta_seconds=left / rows_per_second,
            state="running" if left else "finished",
        )

    def _sickness(self, bank: Bank, run: Run, l0: float, fvu: float, steps: int) -> str | None:
        """Why the run should stop, if it has been collapsed or worse than the mean for too long since the warm-ups.

        Not a pilot: those are to show where that begins, and are too short to judge.
        """
        if bank.spec.is_pilot or bank.step - steps < warmup_steps(bank.spec.total_steps, bank.config.schedule):
            return None  # an SAE begins with too many features on, and FVU over 1
        run.low_l0_steps = run.low_l0_steps + steps if l0 < 1 else 0
        run.high_fvu_steps = run.high_fvu_steps + steps if fvu > 1 else 0
        limit = UNHEALTHY_FRACTION * bank.spec.total_steps
        if run.low_l0_steps >= limit:
            return f"L0 was under 1 for {run.low_l0_steps} steps; lower its lambda"
        if run.high_fvu_steps >= limit:
            return f"FVU was over 1 for {run.high_fvu_steps} steps; lower its lambda or its learning rate"
        return None

    def _stop(self, bank: Bank, run: Run, dead: DeadShare, reason: str) -> None:
        run.stopped = reason
        write_metrics(bank, run, "stopped", {"reason": reason, **asdict(dead)})
        self._saver.save(bank, [run])
        self._view.set_state(run.spec.name, "stopped")
        self._view.say(f"{run.spec.name} stopped at step {bank.step}: {reason}")


class ChooseStep:
    """Dense or sparse step by the density over all ranks, and for the pre-activation loss which features are dead."""

    def is_due(self, bank: Bank) -> bool:
        """At fixed steps, so that a resumed run decides alike."""
        return bank.step % CHOOSE_EVERY_STEPS == 0

    def run(self, bank: Bank) -> None:
        """Decide for each run that trains."""
        for run in bank.active_runs:
            num_open = int(bank.group.reduce(run.num_open, "sum"))
            run.training.choose(num_open / (bank.spec.batch_rows * run.spec.num_features), bank.config.sparse_below_density)
            if run.spec.pre_activation_loss:
                run.firing.synchronise(bank.group)
                dead_rows = resample.dead_after(bank.config.resampling, bank.spec.total_rows, 0)
                run.training.dead = run.firing.dead(dead_rows).nonzero().flatten()


class Resample:
    """New directions for dead features at the events, and one firing interval later how many of them are alive."""

    def __init__(self, bank: Bank, view: TrainingView) -> None:
        self._view = view
        self._events = event_steps(bank.config.resampling.event_fractions, bank.spec.total_steps)
        before_last = (0, *self._events)[-2] if self._events else 0
        last_outcome = min(bank.spec.total_steps, 2 * self._events[-1] - before_last) if self._events else 0
        self._outcomes = {*self._events[1:], last_outcome}

    def is_due(self, bank: Bank) -> bool:
        """At the events, and at the end of the last one's firing interval."""
        return bank.step in self._events or bank.step in self._outcomes

    def run(self, bank: Bank) -> None:
        """Each run that asks for resampling, one after another."""
        for run in bank.unstopped_runs:
            if run.spec.resampling:
                run.firing.synchronise(bank.group)
                if bank.step in self._outcomes:
                    self._report_outcome(bank, run)
                if bank.step in self._events and run.is_active:
                    self._hold_event(bank, run, self._events.index(bank.step))

    def _report_outcome(self, bank: Bank, run: Run) -> None:
        if run.event_step is None:
            return
        counts = torch.tensor([int((run.firing.fired[run.resampled] > 0).sum()), len(run.resampled)])
        alive, resampled = (counts if bank.group.features is None else bank.group.features.reduce(counts, "sum")).tolist()
        if resampled == 0:
            return
        values = {"event_step": run.event_step, "resampled": resampled, "alive": alive, "interval_rows": run.firing.interval_rows}
        write_metrics(bank, run, "resampling_outcome", values)
        self._view.say(f"{run.spec.name}: {alive} of {resampled} features resampled at step {run.event_step} have fired since")
        run.resampled = run.resampled[:0]

    def _hold_event(self, bank: Bank, run: Run, event: int) -> None:
        config = bank.config.resampling
        found = resample.plan(run.firing, config, bank.spec.total_rows, event, bank.group.features)
        done = resample.apply(
            found,
            run.sae,
            run.optimizer,
            fresh_rows(bank, found.candidate_rows),
            config=config,
            seed=run.spec.seed,
            run_name=run.spec.name,
            group=bank.group,
        )
        if done.resampled:
            run.event_step, run.resampled = bank.step, done.features
            if run.average is not None:
                run.average.take_over(run.sae, done.features)
            run.training.is_sparse = False  # new gates may be open on half of all rows
        if done.refused is None:
            run.firing.start_interval()
        values = {"dead": done.dead, "resampled": done.resampled, "dead_rows": done.dead_rows, "candidate_rows": done.candidate_rows}
        write_metrics(bank, run, "resampling", {**values, "refused": done.refused})
        outcome = "nothing to resample"
        if done.refused or done.resampled:
            outcome = f"refused: {done.refused}" if done.refused else f"{done.resampled} resampled from {done.candidate_rows} rows"
        found_dead = f"{done.dead} of {run.spec.num_features} dead in {done.dead_rows} rows"
        self._view.say(f"{run.spec.name}, step {bank.step}: {found_dead}, {outcome}")


class SaveCheckpoints:
    """A checkpoint of every run that trains, or has just finished; it is written while training goes on."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def is_due(self, bank: Bank) -> bool:
        """Every `train.checkpoint_every_fraction` of the run, at the end of a part, and at the run's."""
        return is_checkpoint_due(bank)

    def run(self, bank: Bank) -> None:
        """Begin to write them."""
        self._saver.save(bank, bank.unstopped_runs)
