"""From a harvest's progress logs to a whole store. In: the logs of all lanes, the calibration. Out: the manifest, and warnings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gsae.errors import StoreError
from gsae.llm.site import Site
from gsae.store.durable import write_json_atomically
from gsae.store.manifest import (
    MANIFEST_FILE,
    STORE_FORMAT,
    LaneManifest,
    Manifest,
    Share,
    SiteManifest,
    fingerprint,
    load,
    read_identity,
    read_json,
    site_to_json,
)
from gsae.store.progress import has_tars, progress_sha256, read_records, require_complete, require_rows
from gsae.store.shards import HARVEST_AGAIN
from gsae.store.statistics import SiteStatistics, Tally, no_rows

LARGE_NORM_MULTIPLE = 2
MAX_LARGE_NORM_FRACTION = 0.1
"""Share of the squared norm that kept rows above LARGE_NORM_MULTIPLE x the median may hold without a warning."""
MAX_STORAGE_FVU = 0.01
"""Share of a site's variance that may be lost by storing its rows without a warning."""
CALIBRATION_FILE = "calibration.json"


def write_calibration(store: Path, median_norms: Mapping[str, float]) -> None:
    """Record the median norm of each site, so that a resumed harvest masks by the same ones. One rank calls this.

    Raises:
        StoreError: a median is not a positive number.
    """
    for site, norm in median_norms.items():
        if not (math.isfinite(norm) and norm > 0):
            raise StoreError(f"{site}: the median norm of the calibration sample is {norm}; set llm.dtype to bfloat16 or float32")
    write_json_atomically(store / CALIBRATION_FILE, {"format": STORE_FORMAT, "median_norms": dict(median_norms)})


def read_calibration(store: Path) -> dict[str, float] | None:
    """The median norm of each site, or None where it has not been taken yet."""
    if not (store / CALIBRATION_FILE).exists():
        return None
    median_norms: dict[str, float] = read_json(store / CALIBRATION_FILE)["median_norms"]
    return median_norms


def finish(store: Path) -> Manifest:
    """Add up the progress logs in the order of lane and shard and write the manifest. One rank calls this.

    Raises:
        StoreError: a lane is not complete or has no rows at some site, or the calibration is missing.
    """
    identity = read_identity(store)
    median_norms = read_calibration(store)
    if median_norms is None:
        raise StoreError(f"store {store} is not whole: {CALIBRATION_FILE} is missing; {HARVEST_AGAIN}")
    totals = {site: no_rows(identity["d_model"]) for site in identity["sites"]}
    lanes = []
    for lane in range(identity["num_lanes"]):
        records = read_records(store, lane)
        require_complete(store, lane, records)
        for site in totals:
            require_rows(site, lane, identity["num_lanes"], sum(record.sites[site].tar.rows for record in records))
            for record in records:
                totals[site] += record.sites[site].statistics
        lanes.append(LaneManifest(len(records), progress_sha256(store, lane)))
    return write_manifest(store, identity, totals, median_norms, lanes)


def write_manifest(
    store: Path,
    identity: Mapping[str, Any],
    totals: Mapping[str, SiteStatistics],
    median_norms: Mapping[str, float],
    lanes: Sequence[LaneManifest],
) -> Manifest:
    """Write the manifest of rows whose statistics at each site are known."""
    sites = {
        name: _describe(Site(name=name, **identity["sites"][name]), total, median_norms[name], identity["outlier_multiple"])
        for name, total in totals.items()
    }
    content = {
        "format": STORE_FORMAT,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "sites": {name: site_to_json(site) for name, site in sites.items()},
        "lanes": [asdict(lane) for lane in lanes],
    }
    write_json_atomically(store / MANIFEST_FILE, {**content, "digest": fingerprint(content)})
    return load(store)


def is_finished(store: Path) -> bool:
    """Whether a harvest of this store has nothing left to do: it is whole, and every tar has its full size."""
    try:
        lanes = enumerate(load(store).lanes)
        return all(
            progress_sha256(store, lane) == described.progress_sha256
            and all(has_tars(store, record) for record in read_records(store, lane))
            for lane, described in lanes
        )
    except (StoreError, FileNotFoundError):
        return False


def warnings(manifest: Manifest) -> list[str]:
    """What a person should know of a store before training on it; empty when all is well."""
    lines = []
    for site in manifest.sites.values():
        share = site.kept_above[LARGE_NORM_MULTIPLE].squared_norm_fraction
        if share > MAX_LARGE_NORM_FRACTION:
            lines.append(
                f"{site.name}: kept rows above {LARGE_NORM_MULTIPLE} x the median norm hold {share:.0%} of the squared norm; "
                f"a lower harvest.outlier_multiple than {manifest.outlier_multiple:g} would drop more of them"
            )
        if site.storage_fvu > MAX_STORAGE_FVU:
            lines.append(
                f"{site.name}: {site.storage_fvu:.1%} of the variance is lost by storing rows as {manifest.dtype}; "
                "set harvest.storage_dtype to bfloat16 and harvest into another directory"
            )
        non_finite = site.dropped.get("non_finite", 0)
        if non_finite:
            lines.append(f"{site.name}: {non_finite} rows were NaN or infinite and were dropped; set llm.dtype to bfloat16 or float32")
    return lines


def _describe(site: Site, total: SiteStatistics, median_norm: float, outlier_multiple: float) -> SiteManifest:
    if not total.variance > 0:
        raise StoreError(f"{site.name}: all kept rows are equal, so they have no scale; check the LLM's weights")
    return SiteManifest(
        **asdict(site),
        rows=total.kept.rows,
        mean=total.mean,
        scale=total.variance**-0.5,
        scale_unit_mean_square=total.mean_square**-0.5,
        median_norm=median_norm,
        max_norm=outlier_multiple * median_norm,
        storage_fvu=total.storage_fvu,
        dropped=total.dropped,
        kept_above={multiple: _share(part, total.kept) for multiple, part in total.kept_above.items()},
        candidates_above={multiple: _share(part, total.candidates) for multiple, part in total.candidates_above.items()},
    )


def _share(part: Tally, whole: Tally) -> Share:
    return Share(part.rows / whole.rows, part.squared_norm / whole.squared_norm)
