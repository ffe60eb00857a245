"""Sums over rows of a site. In: rows, batch by batch. Out: what the manifest says of the site's mean, scale and norms.

`measure_rows` takes what needs the vectors, on their device and without waiting for it; `site_statistics` counts the rest on the CPU. All
sums are float64 and added in a fixed order, so they depend neither on the ranks nor on the number of threads.
"""

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
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
    squared_error: float = 0.0
    """Sum of |x - stored x|^2 over kept rows, x as the LLM gave it; 0 in stores older than this record."""

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
            self.squared_error + other.squared_error,
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

    @property
    def storage_fvu(self) -> float:
        """Share of the kept rows' variance that is lost by storing them."""
        return self.squared_error / (self.kept.rows * self.variance)

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
            "squared_error": self.squared_error,
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
            value.get("squared_error", 0.0),
        )


def no_rows(d_model: int) -> SiteStatistics:
    """The statistics of nothing: of a lane without text, or the start of a sum."""
    nothing = Tally(0, 0.0)
    above = dict.fromkeys(NORM_MULTIPLES, nothing)
    return SiteStatistics(torch.zeros(d_model, dtype=torch.float64), nothing, nothing, above, above, {})


@dataclass(frozen=True, eq=False)
class RowMeasures:
    """What site_statistics must know of some rows beside which of them are kept; float64, on one device."""

    sum: Float64[Tensor, " d_model"]
    """Sum of x over kept rows."""
    squared_norms: Float64[Tensor, "contexts length"]
    """|x|^2 of every row."""
    squared_errors: Float64[Tensor, "contexts length"]
    """|original - x|^2 of every row; 0 where no original was given."""


def measure_rows(
    x: Float[Tensor, "contexts length d_model"],
    kept: Bool[Tensor, "contexts length"],
    original: Float[Tensor, "contexts length d_model"] | None = None,
) -> RowMeasures:
    """Measure a batch of rows on their device. Nothing here waits for it, and float64 copies are of one context at a time.

    Args:
        x: all rows as a reader of the store gets them (`Encoded.decode`), so that the statistics are those of what is stored.
        kept: which of them are kept; values of the others may be anything.
        original: the rows as the LLM gave them, where the error of storing is wanted.
    """
    sums, squared_norms, squared_errors = [], [], []
    for context in range(len(x)):
        x64 = x[context].double()
        squared_norms.append(x64.square().sum(dim=-1))
        sums.append(torch.where(kept[context, :, None], x64, 0.0).sum(dim=0))
        if original is not None:
            squared_errors.append((original[context].double() - x64).square().sum(dim=-1))
    norms = torch.stack(squared_norms)
    return RowMeasures(torch.stack(sums).sum(dim=0), norms, torch.stack(squared_errors) if squared_errors else torch.zeros_like(norms))


def site_statistics(
    measures: RowMeasures,
    kept: Bool[Tensor, "contexts length"],
    candidates: Bool[Tensor, "contexts length"],
    dropped: Mapping[str, Bool[Tensor, "contexts length"]],
    tokens: Int[Tensor, "contexts length"],
    spell: Callable[[list[int]], Iterable[str]],
    median_norm: float,
) -> SiteStatistics:
    """The statistics of a batch of rows. All tensors are on the CPU.

    Args:
        measures: from `measure_rows`.
        kept: which rows are kept; all of them are candidates, and finite.
        candidates: rows that are kept unless their norm is too large or they are not finite.
        dropped: rows that are no candidates, by reason; rows in none (padding) do not count. Added here: `outlier`, and `non_finite` for
            NaN or infinite rows, which count neither as candidates nor as outliers.
        tokens: the token of every row.
        spell: how the tokenizer spells tokens.
        median_norm: the site's median norm, from the calibration sample.
    """
    squared_norms, is_kept, may_be_kept = measures.squared_norms.numpy(), kept.numpy(), candidates.numpy()
    is_finite = np.isfinite(squared_norms)
    is_candidate = may_be_kept & is_finite
    if np.any(is_kept & ~is_candidate):
        raise ValueError("a row that is no candidate, NaN or infinite is marked as kept")
    out = {reason: mask.numpy() for reason, mask in dropped.items()}
    out |= {"outlier": is_candidate & ~is_kept, "non_finite": may_be_kept & ~is_finite}
    above = {multiple: squared_norms > (multiple * median_norm) ** 2 for multiple in NORM_MULTIPLES}
    return SiteStatistics(
        measures.sum,
        _tally(squared_norms, is_kept),
        _tally(squared_norms, is_candidate),
        {multiple: _tally(squared_norms, is_kept & is_above) for multiple, is_above in above.items()},
        {multiple: _tally(squared_norms, is_candidate & is_above) for multiple, is_above in above.items()},
        {reason: int(np.sum(mask)) for reason, mask in out.items()},
        {reason: _dropped_rows(squared_norms[mask], tokens.numpy()[mask], spell, median_norm) for reason, mask in out.items()},
        float(np.sum(measures.squared_errors.numpy()[is_kept])),
    )


def norm_bins(norms: Float[np.ndarray, " rows"], median_norm: float) -> Int[np.ndarray, " rows"]:
    """The bin of each norm: bin k holds norms from 2^(k/4) to 2^((k+1)/4) times the site's median norm; all norms are finite."""
    with np.errstate(divide="ignore"):  # a row of zeros lies in the lowest bin
        octaves = np.log2(norms.astype(np.float64) / median_norm)
    bins: Int[np.ndarray, " rows"] = np.floor(np.maximum(NORM_BINS_AN_OCTAVE * octaves, LOWEST_NORM_BIN)).astype(np.int64)
    return bins


def _dropped_rows(
    squared_norms: Float64[np.ndarray, " rows"],
    tokens: Int[np.ndarray, " rows"],
    spell: Callable[[list[int]], Iterable[str]],
    median_norm: float,
) -> DroppedRows:
    bins = _counts(norm_bins(np.sqrt(squared_norms[np.isfinite(squared_norms)]), median_norm))
    ids = _counts(tokens)
    spelled: dict[str, int] = {}
    for token, count in zip(spell(list(ids)), ids.values(), strict=True):
        spelled[token] = spelled.get(token, 0) + count
    return DroppedRows(dict(sorted(spelled.items())), bins)


def _counts(values: Int[np.ndarray, " rows"]) -> dict[int, int]:
    """How often each value occurs, in their order."""
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


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
