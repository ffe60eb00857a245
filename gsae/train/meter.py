"""What a run's steps measured since the last log line. In: reports of steps. Out: their means over steps and ranks."""

from dataclasses import dataclass

import torch

from gsae.train.step import StepReport
from gsae.world import Group


@dataclass(frozen=True)
class Reading:
    """Means over the steps since the last line, over all ranks of the group."""

    reconstruction: float
    sparsity: float
    auxiliary: float
    pre_activation: float
    """The pre-activation loss of dead features, before its weight; 0 where the run has none or no feature is dead."""
    l0: float
    """Features on per row."""
    gradient_norm: float
    non_finite_step: int | None
    """The first step whose gradient was not finite, so that it made no update."""


class Meter:
    """Sums on the device; the host reads them at the log interval only, and before each checkpoint, so that a checkpoint holds none."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64, device=device)  # the six measures, then the number of steps
        self._non_finite_step = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, report: StepReport, step: int) -> None:
        """Add one step."""
        l0 = report.fired.sum(dtype=torch.float64) / report.num_rows
        rest = torch.stack([l0, report.gradient.norm, torch.ones_like(l0)])
        self._sums += torch.cat([report.measures, rest])
        is_first = ~report.gradient.is_finite & (self._non_finite_step < 0)
        self._non_finite_step.masked_fill_(is_first, step)

    def read(self, group: Group) -> Reading:
        """The means since the last call, and begin anew. A collective."""
        # The other measures of a part are those of the whole; sums over its features are not.
        parts = 1 if group.features is None else group.features.size
        of_features = torch.tensor([1, parts, 1, parts, parts, 1, 1], dtype=torch.float64, device=self._sums.device)
        *sums, steps = (group.reduce(self._sums, "sum") * of_features).tolist()
        first = int(self._non_finite_step)
        self._sums.zero_()
        reconstruction, sparsity, auxiliary, pre_activation, l0, gradient_norm = (value / steps for value in sums)
        return Reading(reconstruction, sparsity, auxiliary, pre_activation, l0, gradient_norm, first if first >= 0 else None)
