"""What a store holds. In: its directory. Out: of each site the rows a lane, norms, shares of large rows, what was dropped, how windows mix.

The manifest and the progress logs say nearly all; only norms and documents of kept rows are read from the shards, of contexts here and
there in the store, so that the time does not grow with it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from gsae.errors import StoreError
from gsae.inspect.mixing import Batching, Mixing, MixingMeter
from gsae.store.manifest import Manifest, SiteManifest, load
from gsae.store.progress import ShardRecord, progress_sha256, read_records
from gsae.store.shards import map_tar, short_name, tar_path
from gsae.store.statistics import NORM_BINS_AN_OCTAVE, SiteStatistics, norm_bins

MAX_NORM_ROWS = 2**19
"""Kept rows of a site whose norms are read, about: a store with more gives every second context, or every third, ..."""
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Dropped:
    """The rows of a site that one reason kept out of the store."""

    rows: int
    tokens: list[tuple[str, int]] | None
    """Each token, as the tokenizer spells it, with its rows, the commonest first; None where the store does not say."""
    norms: dict[int, int] | None
    """Rows by `gsae.store.statistics.norm_bins`, finite ones; None where the store does not say."""


@dataclass(frozen=True)
class SiteInspection:
    """One site of a store."""

    manifest: SiteManifest
    lane_rows: list[int]
    """Kept rows of each lane."""
    norm_rows: int
    """Kept rows whose norms were read."""
    quantiles: dict[float, float]
    """Norms of those rows, by the share of rows below, and the largest at 1."""
    norms: dict[int, int]
    """Those rows by `gsae.store.statistics.norm_bins`."""
    dropped: dict[str, Dropped]
    """By reason."""
    mixing: Mixing


@dataclass(frozen=True)
class Inspection:
    """A whole store."""

    manifest: Manifest
    sites: list[SiteInspection]
    """In layer order."""

    def to_json(self, num_tokens: int = 100) -> dict[str, Any]:
        """As plain JSON values; of each reason's dropped tokens the commonest `num_tokens`."""
        return {
            "fingerprint": self.manifest.fingerprint,
            "identity": self.manifest.identity,
            "sites": {site.manifest.name: _site_to_json(site, num_tokens) for site in self.sites},
        }


def norm_of_bin(number: float) -> float:
    """Where a bin of norms begins, in multiples of the site's median norm."""
    return float(2 ** (number / NORM_BINS_AN_OCTAVE))


def median_of_bins(bins: dict[int, int]) -> float:
    """The median norm of the rows in some bins, in multiples of the site's median, to half a bin (9 %); at least one row."""
    ordered = sorted(bins)
    middle = int(np.searchsorted(np.cumsum([bins[number] for number in ordered]), sum(bins.values()) / 2))
    return norm_of_bin(ordered[middle] + 0.5)


def inspect_store(store: Path, batching: Batching) -> Inspection:
    """Look at a whole store, and at how training would take batches from it.

    Raises:
        StoreError: there is none, it is not whole, a log was changed, a shard has another size or is damaged, or a stored value is not
            finite.
        ConfigError: `batching` does not fit the number of lanes.
    """
    manifest = load(store)
    sites = {name: _Site(store, manifest, site, batching) for name, site in manifest.sites.items()}
    for lane, described in enumerate(manifest.lanes):
        if progress_sha256(store, lane) != described.progress_sha256:
            raise StoreError(
                f"progress log of lane {lane} in {store} was changed after the manifest was written; run gsae verify {store} --repair"
            )
        records = read_records(store, lane)
        for site in sites.values():
            site.add(lane, records)
    return Inspection(manifest, [site.result() for site in sites.values()])


class _Site:
    """What is known of a site after some of its lanes."""

    def __init__(self, store: Path, manifest: Manifest, site: SiteManifest, batching: Batching) -> None:
        self._store, self._manifest, self._site = store, manifest, site
        self._mixing = MixingMeter(store, site.name, site.rows, manifest.num_lanes, batching)
        self._every = -(-site.rows // MAX_NORM_ROWS)
        self._contexts = 0
        self._lane_rows: list[int] = []
        self._norms: list[Float64[np.ndarray, " rows"]] = []
        self._tokens: dict[str, Counter[str]] = {}
        self._bins: dict[str, Counter[int]] = {}

    def add(self, lane: int, records: Sequence[ShardRecord]) -> None:
        """The shards of the next lane."""
        tars = [record.sites[self._site.name].tar for record in records]
        self._lane_rows.append(sum(tar.rows for tar in tars))
        self._mixing.add(lane, tars)
        for record in records:
            self._add_dropped(record.sites[self._site.name].statistics)
            self._norms += self._read_norms(record)
            self._contexts += record.contexts

    def _add_dropped(self, statistics: SiteStatistics) -> None:
        for reason, rows in statistics.dropped_rows.items():
            self._tokens.setdefault(reason, Counter()).update(rows.tokens)
            self._bins.setdefault(reason, Counter()).update(rows.norms)

    def _read_norms(self, record: ShardRecord) -> Iterator[Float64[np.ndarray, " rows"]]:
        chosen = range(-self._contexts % self._every, record.contexts, self._every)
        if not chosen:
            return
        path = tar_path(self._store, self._site.name, record.lane, record.shard)
        views = map_tar(path, record.sites[self._site.name].tar, self._manifest.dtype, self._manifest.d_model)
        for context in chosen:
            norms = torch.linalg.vector_norm(views[context].decode().float(), dim=1).double().numpy()
            if not np.isfinite(norms).all():
                raise StoreError(f"shard {short_name(path)} has values that are NaN or infinite; run gsae verify {self._store} --repair")
            yield norms

    def result(self) -> SiteInspection:
        norms = np.concatenate(self._norms)
        quantiles = {share: float(np.quantile(norms, share)) for share in (*QUANTILES, 1.0)}
        bins = Counter(norm_bins(norms, self._site.median_norm).tolist())
        binned = dict(sorted(bins.items()))
        return SiteInspection(self._site, self._lane_rows, len(norms), quantiles, binned, self._dropped(), self._mixing.result())

    def _dropped(self) -> dict[str, Dropped]:
        found = {}
        for reason, rows in self._site.dropped.items():
            # A store that was begun before dropped rows were recorded speaks of a part of them, or of none.
            is_known = sum(self._tokens.get(reason, Counter()).values()) == rows
            tokens = sorted(self._tokens.get(reason, Counter()).items(), key=lambda item: (-item[1], item[0]))
            bins = dict(sorted(self._bins.get(reason, Counter()).items()))
            found[reason] = Dropped(rows, tokens, bins) if is_known else Dropped(rows, None, None)
        return found


def _site_to_json(site: SiteInspection, num_tokens: int) -> dict[str, Any]:
    described = site.manifest
    above = {
        name: {multiple: vars(share) for multiple, share in shares.items()}
        for name, shares in (("kept_above", described.kept_above), ("candidates_above", described.candidates_above))
    }
    return {
        "layer": described.layer,
        "rows": described.rows,
        "lane_rows": site.lane_rows,
        "scale": described.scale,
        "median_norm": described.median_norm,
        "max_norm": described.max_norm,
        "storage_fvu": described.storage_fvu,
        "norm_rows": site.norm_rows,
        "norm_quantiles": site.quantiles,
        "norms": _bins_to_json(site.norms),
        **above,
        "mixing": site.mixing.to_json(),
        "dropped": {
            reason: {
                "rows": dropped.rows,
                "tokens": None if dropped.tokens is None else dropped.tokens[:num_tokens],
                "norms": None if dropped.norms is None else _bins_to_json(dropped.norms),
            }
            for reason, dropped in site.dropped.items()
        },
    }


def _bins_to_json(bins: dict[int, int]) -> list[dict[str, float]]:
    """Bins that hold rows; their bounds in multiples of the median norm."""
    return [{"from": norm_of_bin(number), "to": norm_of_bin(number + 1), "rows": rows} for number, rows in bins.items()]
