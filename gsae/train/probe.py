"""A small evaluation while training goes on. In: a bank every so many steps. Out: metrics lines of the kind `evaluation`.

What evaluates is handed in: stages do not know each other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gsae.console import TrainingView
from gsae.heartbeat import Heartbeat
from gsae.sae.objective import SAE
from gsae.train.bank import Bank
from gsae.train.chores import write_metrics
from gsae.world import Group

SHOWN = {"loss recovered": "loss_recovered", "FVU": "fvu", "L0": "l0"}
"""Metrics shown on the console, by the words they are shown with."""


@dataclass(frozen=True)
class ProbedRun:
    """A run as it is at the moment."""

    name: str
    sae: SAE
    scale: float
    """Rows are multiplied by it before they reach the SAE."""


class Probe(Protocol):
    """A fixed evaluation; it leaves the SAEs as they are and draws no random numbers."""

    def __call__(self, group: Group, site: str, runs: list[ProbedRun]) -> Mapping[str, Mapping[str, float | None]]:
        """Metrics by name of the run, None where not finite, on the group's first rank; elsewhere nothing. All ranks call this."""


class Evaluate:
    """Held-out text through the LLM with the runs spliced in, every `train.evaluate_every_fraction` of the run and at its end."""

    def __init__(self, probe: Probe, view: TrainingView, beats: Heartbeat) -> None:
        self._probe, self._view, self._beats = probe, view, beats

    def is_due(self, bank: Bank) -> bool:
        """Not for pilots."""
        fraction, total = bank.config.evaluate_every_fraction, bank.spec.total_steps
        if fraction is None or bank.spec.is_pilot:
            return False
        return bank.step % max(1, math.ceil(total * fraction)) == 0 or bank.step == total

    def run(self, bank: Bank) -> None:
        """Write and show what was found."""
        runs = {run.spec.name: run for run in bank.unstopped_runs}
        probed = [ProbedRun(name, run.sae, bank.spec.scale) for name, run in runs.items()]
        with self._beats.busy():
            found = self._probe(bank.group, bank.spec.site, probed)
        for name, metrics in found.items():
            write_metrics(bank, runs[name], "evaluation", dict(metrics))
            shown = ", ".join(f"{word} {metrics[key]:.4g}" for word, key in SHOWN.items() if metrics[key] is not None)
            self._view.say(f"{name}, step {bank.step}: {shown} on {metrics['tokens']:,} held-out tokens")
