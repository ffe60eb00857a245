"""What a run's steps measured since the last log line. In: forward passes and gradient reports. Out: their means over steps and ranks."""

from dataclasses import dataclass

import torch

from gsae.sae.objective import Forward
from gsae.train.optim import GradientReport
from gsae.world import Group


@dataclass(frozen=True)
class Reading:
    """Means over the steps since the last line, over all ranks of the group."""

    reconstruction: float
    sparsity: float
    auxiliary: float
    l0: float
    """Features on per row."""
    gradient_norm: float
    non_finite_step: int | None
    """The first step whose gradient was not finite, so that it made no update."""


class Meter:
    """Sums on the device; the host reads them at the log interval only, and before each checkpoint, so that a checkpoint holds none."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)  # the five measures, then the number of steps
        self._non_finite_step = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, forward: Forward, report: GradientReport, step: int) -> None:
        """Add one step."""
        losses = forward.losses
        l0 = (forward.f > 0).sum(dtype=torch.float64) / len(forward.f)
        measures = (losses.reconstruction, losses.sparsity, losses.auxiliary, l0, report.norm, torch.ones_like(l0))
        self._sums += torch.stack([measure.detach().double() for measure in measures])
        is_first = ~report.is_finite & (self._non_finite_step < 0)
        self._non_finite_step.masked_fill_(is_first, step)

    def read(self, group: Group) -> Reading:
        """The means since the last call, and begin anew. A collective."""
        *sums, steps = group.reduce(self._sums, "sum").tolist()
        first = int(self._non_finite_step)
        self._sums.zero_()
        reconstruction, sparsity, auxiliary, l0, gradient_norm = (value / steps for value in sums)
        return Reading(reconstruction, sparsity, auxiliary, l0, gradient_norm, first if first >= 0 else None)
