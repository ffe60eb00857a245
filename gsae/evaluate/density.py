"""How often features are on, and which point the same way. In: firing counts, L0, directions. Out: integer sums and the metrics."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gsae.sae.part import Part

DENSE_ONE_IN = 10
"""A feature that is on for more than one in so many rows is dense."""
BINS_A_DECADE = 4
"""Bins of the density histogram in each factor of ten."""
SLICE_FEATURES = 1024
"""Directions compared with all others at once."""


@dataclass(frozen=True)
class FiringCounts:
    """Integer sums over kept rows: exact in any order, so ranks add them at the end."""

    features: Int[Tensor, " features"]
    """Rows on which each feature is on."""
    l0_histogram: Int[Tensor, " l0"]
    """Rows on which exactly 0, 1, 2, ..., num_features features are on."""
    gates: Int[Tensor, "3"]
    """(row, feature) pairs of a gated SAE with the gate open, with a positive magnitude, and with both; 0 without gates."""

    @classmethod
    def none(cls, num_features: int, device: torch.device, total_features: int | None = None) -> "FiringCounts":
        """The counts over no rows; of a part of a dictionary, its features and those of the whole."""
        counts = torch.zeros((total_features or num_features) + 1, dtype=torch.int64, device=device)
        return cls(counts.new_zeros(num_features), counts, counts.new_zeros(3))

    def __add__(self, other: "FiringCounts") -> "FiringCounts":
        return FiringCounts(self.features + other.features, self.l0_histogram + other.l0_histogram, self.gates + other.gates)


@dataclass(frozen=True)
class DensityHistogram:
    """Seen features by the log10 of their density."""

    edges: list[float]
    """Of the bins, in log10 of the share of rows; the last is 0."""
    counts: list[int]
    """Features with edges[i] < log10(density) <= edges[i + 1]."""


@dataclass(frozen=True)
class DensityMetrics:
    """Of one SAE, over the kept rows of the evaluation."""

    l0_median: Annotated[int, "smallest L0 that at least half of the kept rows do not exceed"]
    l0_p90: Annotated[int, "smallest L0 that at least 90 % of the kept rows do not exceed"]
    not_seen_fraction: Annotated[float, "share of features that are on at none of the kept rows of this evaluation (counts.kept_rows)"]
    dense_fraction: Annotated[float, "share of features that are on at more than 10 % of kept rows"]
    max_decoder_cosine_mean: Annotated[float, "mean over features of the largest cosine between its direction and another feature's"]


def count_l0(l0: Int[Tensor, " rows"], kept: Bool[Tensor, " rows"], num_features: int) -> Int[Tensor, " l0"]:
    """The L0 histogram of a batch's kept rows."""
    return torch.bincount(l0[kept], minlength=num_features + 1)


def l0_quantile(histogram: Int[Tensor, " l0"], percent: int) -> int:
    """The smallest L0 that at least `percent` of the rows do not exceed."""
    cumulative = histogram.cumsum(0)
    wanted_rows = -(-percent * int(cumulative[-1]) // 100)
    return int(torch.searchsorted(cumulative, wanted_rows).item())


def density_histogram(features: Int[Tensor, " features"], rows: int) -> DensityHistogram:
    """Seen features in bins of a quarter of a decade, from one row in `rows` to all of them."""
    decades = max(1, math.ceil(math.log10(rows))) if rows else 1
    edges = [-decades + i / BINS_A_DECADE for i in range(decades * BINS_A_DECADE + 1)]
    density = (features[features > 0].double() / rows).log10()
    bins = torch.bucketize(density, torch.tensor(edges[1:-1], dtype=torch.float64))
    return DensityHistogram(edges, torch.bincount(bins, minlength=len(edges) - 1).tolist())


@torch.no_grad()
def max_decoder_cosine_mean(W_dec: Float[Tensor, "features d_model"], part: Part | None = None) -> float:
    """Mean over i of max over j != i of the cosine between rows i and j of W_dec: near 1 means duplicates; 0 for a single feature.

    Where W_dec is a part of a dictionary a collective of its holders: a slice of directions at a time goes round.
    """
    directions = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
    total, first = (len(directions), 0) if part is None else (part.total, part.first)
    if total < 2:
        return 0.0
    largest = []
    for start in range(0, total, SLICE_FEATURES):
        stop = min(start + SLICE_FEATURES, total)
        rows = _rows_of_all(directions, start, stop, part)
        cosines = rows @ directions.T
        own = torch.arange(max(start, first), min(stop, first + len(directions)), device=rows.device)
        cosines[own - start, own - first] = -math.inf
        of_part = cosines.amax(1)
        largest.append(of_part if part is None else part.holders.reduce(of_part, "max"))
    return float(torch.cat(largest).double().mean().item())


def _rows_of_all(directions: Tensor, start: int, stop: int, part: Part | None) -> Tensor:
    """Rows of the whole dictionary, which may be in several parts."""
    if part is None:
        return directions[start:stop]
    rows = directions.new_zeros(stop - start, directions.shape[1])
    low, high = max(start, part.first), min(stop, part.first + len(directions))
    if low < high:
        rows[low - start : high - start] = directions[low - part.first : high - part.first]
    return part.reduce(rows)


def density_metrics(counts: FiringCounts, W_dec: Float[Tensor, "features d_model"], part: Part | None = None) -> DensityMetrics:
    """From the counts over all ranks and features. Where W_dec is a part of a dictionary a collective of its holders."""
    rows = int(counts.l0_histogram.sum())
    num_features = len(counts.features)
    return DensityMetrics(
        l0_median=l0_quantile(counts.l0_histogram, 50),
        l0_p90=l0_quantile(counts.l0_histogram, 90),
        not_seen_fraction=int((counts.features == 0).sum()) / num_features,
        dense_fraction=int((counts.features > rows // DENSE_ONE_IN).sum()) / num_features,
        max_decoder_cosine_mean=max_decoder_cosine_mean(W_dec, part),
    )
