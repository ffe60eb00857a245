"""The contexts in which features are strongest. In: activations of chosen features, batch by batch. Out: the top k of each.

A context counts once for a feature, with its largest activation. Memory is that of k windows a feature. Of equal activations the earlier
context comes first, and in it the earlier row, so the outcome does not depend on which rank saw what.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Peak:
    """A feature's largest activation in a context."""

    activation: float
    """In the units of the SAE's own features, on scaled rows."""
    context: int
    """Index among the contexts of the evaluation."""
    column: int
    """The row in the context."""
    around: tuple[float | None, ...]
    """Activations from `window` rows before it to as many after; None at rows that are not kept or of another segment."""

    @property
    def rank(self) -> tuple[float, int, int]:
        """Sorts the strongest first."""
        return (-self.activation, self.context, self.column)


class Strongest:
    """The strongest contexts of some features so far.

    Args:
        num_features: how many features are looked at.
        count: contexts to keep of each.
        window: rows to keep on either side of a peak.
    """

    def __init__(self, num_features: int, count: int, window: int) -> None:
        self.peaks: list[list[Peak]] = [[] for _ in range(num_features)]
        self._count, self._window = count, window

    def add(
        self,
        f: Float[Tensor, "contexts length features"],
        kept: Bool[Tensor, "contexts length"],
        positions: Int[Tensor, "contexts length"],
        first_context: int,
    ) -> None:
        """Look at a batch, whose first context is number `first_context`; batches come in order."""
        f = torch.where(kept[..., None], f, 0.0).cpu()
        kept, starts = kept.cpu(), _segment_starts(positions.cpu())
        largest = f.amax(1)
        columns = (f == largest[:, None]).int().argmax(1)
        for feature, peaks in enumerate(self.peaks):
            least = peaks[-1].activation if len(peaks) == self._count else 0.0
            candidates = (largest[:, feature] > least).nonzero()[:, 0].tolist()
            for row in candidates:
                of_row = _Row(f[row, :, feature], kept[row], starts[row])
                peaks.append(self._peak(of_row, first_context + row, int(columns[row, feature])))
            self.peaks[feature] = sorted(peaks, key=lambda peak: peak.rank)[: self._count]

    def _peak(self, row: "_Row", context: int, column: int) -> Peak:
        around: list[float | None] = []
        for near in range(column - self._window, column + self._window + 1):
            is_there = 0 <= near < len(row.f) and bool(row.kept[near]) and bool(row.starts[near] == row.starts[column])
            around.append(row.f[near].item() if is_there else None)
        return Peak(row.f[column].item(), context, column, tuple(around))


@dataclass(frozen=True)
class _Row:
    """A feature in a context."""

    f: Float[Tensor, " length"]
    kept: Bool[Tensor, " length"]
    starts: Int[Tensor, " length"]


def _segment_starts(positions: Int[Tensor, "contexts length"]) -> Int[Tensor, "contexts length"]:
    """The column where each row's segment begins."""
    return torch.arange(positions.shape[1]).expand_as(positions) - positions


def merge(parts: Iterable[Sequence[Sequence[Peak]]], count: int) -> list[list[Peak]]:
    """The strongest of several ranks' strongest, feature by feature."""
    of_features = (itertools.chain(*of_feature) for of_feature in zip(*parts, strict=True))
    return [sorted(peaks, key=lambda peak: peak.rank)[:count] for peaks in of_features]
