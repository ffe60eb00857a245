"""What trackers are told of the runs of a bank. In: a bank where it continues. Out: its metrics at trackers besides the files."""

from collections.abc import Iterator
from contextlib import contextmanager

from gsae.console import Console
from gsae.heartbeat import Heartbeat
from gsae.store.runs import read_metrics, read_run
from gsae.train.bank import Bank
from gsae.world.tracking import TrackedRun, Tracking


@contextmanager
def tracked(bank: Bank, console: Console, beats: Heartbeat) -> Iterator[None]:
    """A block in which the runs of a bank are tracked, on the group's first rank; pilots are not.

    Args:
        bank: the bank; the metrics of its runs end at its step.
        console: where a tracker that fails is named.
        beats: of this rank, which may wait for trackers at the end.
    """
    site, names = bank.spec.site, bank.config.trackers if bank.group.is_first and not bank.spec.is_pilot else []
    bank.tracking = Tracking(names, lambda text: console.write(f"warning: {site}: {text}", style="yellow"))
    if names:
        for run in bank.runs:
            settings, lines = read_run(run.directory), list(read_metrics(run.directory))
            bank.tracking.begin(TrackedRun(run.spec.name, site, run.directory, settings, lines))
    try:
        yield
    finally:
        with beats.busy():
            bank.tracking.close()
