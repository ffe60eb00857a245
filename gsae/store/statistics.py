"""Sums over rows of a site. In: candidate rows, batch by batch. Out: what the manifest says of the site's mean, scale and norms.

All sums are float64 and added in a fixed order, so they depend neither on the ranks nor on the number of threads.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NORM_MULTIPLES = (2, 3, 5, 10)
"""Multiples of the median norm above which rows are counted."""


@dataclass(frozen=True)
class Tally:
    """Some rows, and what they weigh."""

    rows: int
    squared_norm: float
    """Sum of |x|^2 over them."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.rows + other.rows, self.squared_norm + other.squared_norm)


NORM_BINS_AN_OCTAVE = 4
LOWEST_NORM_BIN = -10 * NORM_BINS_AN_OCTAVE
"""It also counts the rows below it."""


@dataclass(frozen=True)
class DroppedRows:
    """What the rows were that one reason kept out: their vectors are not stored."""

    tokens: dict[str, int]
    """Rows by token, as the tokenizer spells it."""
    norms: dict[int, int]
    """Rows by `norm_bins`; rows that are not finite are in none."""

    def __add__(self, other: "DroppedRows") -> "DroppedRows":
        return DroppedRows(_add_counts(self.tokens, other.tokens), _add_counts(self.norms, other.norms))


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Sums over the rows of one site: of a batch, a shard, or a whole store.

    Candidates are the rows that the mask would keep if it did not look at norms; the kept ones are those of them within the norm.
    """

    sum: Float[Tensor, " d_model"]
    """Sum of x over kept rows, float64."""
    kept: Tally
    candidates: Tally
    kept_above: dict[int, Tally]
    """Kept rows whose norm exceeds so many times the site's median."""
    candidates_above: dict[int, Tally]
    """The same of candidates."""
    dropped: dict[str, int]
    """Rows that are not kept, by reason."""
    dropped_rows: dict[str, DroppedRows] = field(default_factory=dict)
    """What they were, by reason; empty in stores older than this record."""

    def __add__(self, other: "SiteStatistics") -> "SiteStatistics":
        return SiteStatistics(
            self.sum + other.sum,
            self.kept + other.kept,
            self.candidates + other.candidates,
            {multiple: self.kept_above[multiple] + other.kept_above[multiple] for multiple in NORM_MULTIPLES},
            {multiple: self.candidates_above[multiple] + other.candidates_above[multiple] for multiple in NORM_MULTIPLES},
            _add_counts(self.dropped, other.dropped),
            {
                reason: self.dropped_rows.get(reason, _NO_DROPPED_ROWS) + other.dropped_rows.get(reason, _NO_DROPPED_ROWS)
                for reason in sorted({*self.dropped_rows, *other.dropped_rows})
            },
        )

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Mean of the kept rows, float64."""
        return self.sum / self.kept.rows

    @property
    def mean_square(self) -> float:
        """E|x|^2 over kept rows."""
        return self.kept.squared_norm / self.kept.rows

    @property
    def variance(self) -> float:
        """E|x - mean|^2 = E|x|^2 - |mean|^2 over kept rows, summed over d_model."""
        return self.mean_square - float(self.mean.square().sum())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; the sum as base64 of little-endian float64."""
        return {
            "sum": encode_vector(self.sum),
            "kept": _tally_to_json(self.kept),
            "candidates": _tally_to_json(self.candidates),
            "kept_above": {str(multiple): _tally_to_json(tally) for multiple, tally in self.kept_above.items()},
            "candidates_above": {str(multiple): _tally_to_json(tally) for multiple, tally in self.candidates_above.items()},
            "dropped": self.dropped,
            "dropped_rows": {
                reason: {"tokens": rows.tokens, "norms": {str(number): count for number, count in rows.norms.items()}}
                for reason, rows in self.dropped_rows.items()
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SiteStatistics":
        """The statistics that `to_json` wrote, bit for bit."""
        return cls(
            decode_vector(value["sum"]),
            Tally(*value["kept"]),
            Tally(*value["candidates"]),
            {multiple: Tally(*value["kept_above"][str(multiple)]) for multiple in NORM_MULTIPLES},
            {multiple: Tally(*value["candidates_above"][str(multiple)]) for multiple in NORM_MULTIPLES},
            dict(value["dropped"]),
            {
                reason: DroppedRows(dict(rows["tokens"]), {int(number): count for number, count in rows["norms"].items()})
                for reason, rows in value.get("dropped_rows", {}).items()
            },
        )


def no_rows(d_model: int) -> SiteStatistics:
    """The statistics of nothing: of a lane without text, or the start of a sum."""
    nothing = Tally(0, 0.0)
    above = dict.fromkeys(NORM_MULTIPLES, nothing)
    return SiteStatistics(torch.zeros(d_model, dtype=torch.float64), nothing, nothing, above, above, {})


def site_statistics(
    x: Float[Tensor, "candidates d_model"],
    kept: Bool[Tensor, " candidates"],
    median_norm: float,
    dropped: Mapping[str, int],
) -> SiteStatistics:
    """The statistics of a batch of rows.

    Args:
        x: the candidate rows, converted to the storage type, so that the statistics are those of what is stored; on any device.
        kept: which of them are kept; a row that is not finite is never kept.
        median_norm: the site's median norm, from the calibration sample.
        dropped: rows that were no candidates, by reason. Added here: `outlier`, and `non_finite` for NaN or infinite rows, which
            count neither as candidates nor as outliers.
    """
    x64 = x.to(torch.float64)
    squared_norms = x64.square().sum(dim=1).cpu().numpy()
    is_kept = kept.cpu().numpy()
    is_candidate = np.isfinite(squared_norms)
    if np.any(is_kept & ~is_candidate):
        raise ValueError("a row that is NaN or infinite is marked as kept")
    bounds = {multiple: (multiple * median_norm) ** 2 for multiple in NORM_MULTIPLES}
    counts = {**dropped, "outlier": int(np.sum(is_candidate & ~is_kept)), "non_finite": int(np.sum(~is_candidate))}
    return SiteStatistics(
        x64[kept].sum(dim=0).cpu(),
        _tally(squared_norms, is_kept),
        _tally(squared_norms, is_candidate),
        {multiple: _tally(squared_norms, is_kept & (squared_norms > bound)) for multiple, bound in bounds.items()},
        {multiple: _tally(squared_norms, is_candidate & (squared_norms > bound)) for multiple, bound in bounds.items()},
        counts,
    )


def norm_bins(norms: Float[np.ndarray, " rows"], median_norm: float) -> Int[np.ndarray, " rows"]:
    """The bin of each norm: bin k holds norms from 2^(k/4) to 2^((k+1)/4) times the site's median norm; all norms are finite."""
    with np.errstate(divide="ignore"):  # a row of zeros lies in the lowest bin
        octaves = np.log2(norms.astype(np.float64) / median_norm)
    bins: Int[np.ndarray, " rows"] = np.floor(np.maximum(NORM_BINS_AN_OCTAVE * octaves, LOWEST_NORM_BIN)).astype(np.int64)
    return bins


def dropped_rows(x: Float[Tensor, "rows d_model"], tokens: Sequence[str], median_norm: float) -> DroppedRows:
    """What the rows are that one reason keeps out.

    Args:
        x: the rows, converted to the storage type; on any device.
        tokens: the token of each, as the tokenizer spells it.
        median_norm: the site's median norm, from the calibration sample.
    """
    norms = x.to(torch.float64).square().sum(dim=1).sqrt().cpu().numpy()
    bins: list[int] = norm_bins(norms[np.isfinite(norms)], median_norm).tolist()
    return DroppedRows(_add_counts({}, Counter(tokens)), _add_counts({}, Counter(bins)))


def merge(parts: Iterable[SiteStatistics]) -> SiteStatistics:
    """The statistics of all parts together, added in their order; at least one."""
    return reduce(SiteStatistics.__add__, parts)


_Key = TypeVar("_Key", str, int)


def _add_counts(one: Mapping[_Key, int], other: Mapping[_Key, int]) -> dict[_Key, int]:
    """Both counts together, in the order of the keys."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted(set(one) | set(other))}


_NO_DROPPED_ROWS = DroppedRows({}, {})


def _tally(squared_norms: np.ndarray[Any, np.dtype[np.float64]], chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Tally:
    return Tally(int(np.sum(chosen)), float(np.sum(squared_norms[chosen])))


def _tally_to_json(tally: Tally) -> list[float]:
    return [tally.rows, tally.squared_norm]


def encode_vector(vector: Float[Tensor, " d"]) -> str:
    """A vector as base64 of little-endian float64."""
    return base64.b64encode(vector.to("cpu", torch.float64).numpy().astype("<f8").tobytes()).decode()


def decode_vector(text: str) -> Float[Tensor, " d"]:
    """The vector that `encode_vector` wrote, float64."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64))
