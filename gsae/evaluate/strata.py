"""FVU and L0 by position and by norm. In: values a row. Out: sums a stratum, and from totals a table.

Where in its segment a row stands, and how long it is, decide how hard it is to reconstruct; one FVU hides that. Positions go by powers
of two. Norms go by fine bins, 64 a factor of two below the store's bound, from whose integer counts deciles are made at the end: edges
need no second pass and do not depend on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.evaluate.sums import RunSums, SiteSums, Values

POSITION_STRATA = 24
"""Of positions 1, 2 to 3, 4 to 7, ..."""
BINS_AN_OCTAVE = 64
NORM_BINS = 16 * BINS_AN_OCTAVE
"""Rows shorter than 2^-16 of the bound are in the lowest."""
DECILES = 10


@dataclass(frozen=True)
class RowStrata:
    """Where each row belongs; what rows that are not kept say does not matter, their values are 0."""

    position: Int[Tensor, " rows"]
    norm: Int[Tensor, " rows"]


@dataclass(frozen=True)
class StratumSums:
    """Two float64 values of the kept rows of each stratum: of a site, rows and |x - mean|^2; of a run, |x - x_hat|^2 and L0."""

    position: Float[Tensor, "2 positions"]
    norm: Float[Tensor, "2 norms"]

    def __add__(self, other: "StratumSums") -> "StratumSums":
        return StratumSums(self.position + other.position, self.norm + other.norm)


@dataclass(frozen=True)
class Stratum:
    """A line of a table."""

    low: float
    """Least position; or norm above which rows are."""
    high: float
    """Largest position; or norm up to which rows are."""
    rows: int
    l0: float
    """Mean over the rows."""
    fvu: float | None
    """sum |x - x_hat|^2 / sum |x - mean|^2, mean being that of the store's kept rows."""


def row_strata(positions: Int[Tensor, " rows"], x: Float[Tensor, "rows d_model"], max_norm: float) -> RowStrata:
    """The strata of rows at `positions` of their segments; `max_norm` is the site's bound."""
    position = positions.clamp_min(1).double().log2().floor().long().clamp_max(POSITION_STRATA - 1)
    norms = torch.linalg.vector_norm(x.double(), dim=-1)
    octaves = (norms / max_norm).clamp_min(torch.finfo(torch.float64).tiny).log2()
    below = (-octaves * BINS_AN_OCTAVE).floor().clamp(0, NORM_BINS - 1).long()
    return RowStrata(position.cpu(), (NORM_BINS - 1 - below).cpu())


def site_strata(strata: RowStrata, site: SiteSums) -> StratumSums:
    """Of a site's values a row."""
    return _add_up(strata, site.kept_rows, site.squared_distance)


def run_strata(strata: RowStrata, run: RunSums) -> StratumSums:
    """Of a run's values a row."""
    return _add_up(strata, run.squared_error, run.l0)


def _add_up(strata: RowStrata, *values: Values) -> StratumSums:
    def by(index: Tensor, count: int) -> Tensor:
        # numpy adds in the order of the rows, on every machine
        parts = [np.bincount(index.numpy(), weights=value.cpu().numpy(), minlength=count) for value in values]
        return torch.from_numpy(np.stack(parts))

    return StratumSums(by(strata.position, POSITION_STRATA), by(strata.norm, NORM_BINS))


def by_position(site: StratumSums, run: StratumSums) -> list[Stratum]:
    """The strata of positions that have rows."""
    parts = [slice(number, number + 1) for number in range(POSITION_STRATA)]
    bounds = [(2.0**number, 2.0 ** (number + 1) - 1) for number in range(POSITION_STRATA)]
    return _table(parts, bounds, site.position, run.position)


def by_norm_decile(site: StratumSums, run: StratumSums, max_norm: float) -> list[Stratum]:
    """Tenths of the kept rows by norm, as nearly as the bins allow; fewer lines where more than a tenth is in one bin."""
    cumulative = site.norm[0].cumsum(0)
    wanted = cumulative[-1] * torch.arange(1, DECILES + 1, dtype=torch.float64) / DECILES
    ends = (torch.searchsorted(cumulative, wanted.clamp_max(cumulative[-1].item())) + 1).clamp_max(NORM_BINS).tolist()
    cuts = sorted({0, *ends})
    edges = [max_norm * 2 ** ((cut - NORM_BINS) / BINS_AN_OCTAVE) if cut else 0.0 for cut in cuts]
    parts = [slice(low, high) for low, high in pairwise(cuts)]
    return _table(parts, list(pairwise(edges)), site.norm, run.norm)


def _table(parts: Sequence[slice], bounds: Sequence[tuple[float, float]], site: Tensor, run: Tensor) -> list[Stratum]:
    found = []
    for part, (low, high) in zip(parts, bounds, strict=True):
        (rows, distance), (error, l0) = site[:, part].sum(1).tolist(), run[:, part].sum(1).tolist()
        if rows:
            found.append(Stratum(low, high, int(rows), l0 / rows, error / distance if distance else None))
    return found


DEFINITIONS = {
    "by_position": "kept rows by position in their segment, low to high: rows, mean L0, and fvu = sum |x - x_hat|^2 / sum |x - mean|^2, "
    "mean being that of the store's kept rows",
    "by_norm_decile": "the same by tenths of |x|, above low and up to high, as nearly as bins of 1/64 of a factor of two allow",
}
