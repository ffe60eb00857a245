"""A store read again, byte for byte. In: its directory. Out: everything that is wrong with it, one line each."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gsae.errors import StoreError
from gsae.store.durable import PARTIAL_SUFFIX
from gsae.store.manifest import Manifest, load
from gsae.store.progress import ShardRecord, progress_path, progress_sha256, read_records
from gsae.store.shards import DTYPES, HARVEST_AGAIN, context_key, map_tar, read_tar, short_name, tar_path
from gsae.store.statistics import SiteStatistics

_TOLERANCE = 1e-9
"""Of sums over a shard in float64, relative: another order of summing is within it, other rows are not."""


def verify(store: Path) -> list[str]:
    """What is wrong with a store: hashes, counts, offsets, values that are not finite, statistics that are not those of the rows.

    Empty when all is well. A store that is not whole gives the one line that says what is missing.
    """
    try:
        manifest = load(store)
    except StoreError as error:
        return [str(error)]
    problems = [
        f"{path.relative_to(store)}: left over from an interrupted write; delete it" for path in sorted(store.rglob(f"*{PARTIAL_SUFFIX}"))
    ]
    rows = dict.fromkeys(manifest.sites, 0)
    for lane in range(manifest.num_lanes):
        log = progress_path(store, lane)
        if not log.exists() or progress_sha256(store, lane) != manifest.lanes[lane].progress_sha256:
            problems.append(f"{log.relative_to(store)}: missing, or changed after the manifest was written; {HARVEST_AGAIN}")
            continue
        for record in read_records(store, lane):
            for site in manifest.sites:
                rows[site] += record.sites[site].tar.rows
                problems.extend(_problems_of_shard(store, manifest, site, record))
    for site, count in rows.items():
        if count != manifest.sites[site].rows:
            problems.append(f"{site}: {count} rows in the progress logs, {manifest.sites[site].rows} in the manifest")
    return problems


def _problems_of_shard(store: Path, manifest: Manifest, site: str, record: ShardRecord) -> Iterator[str]:
    path = tar_path(store, site, record.lane, record.shard)
    described = record.sites[site]
    try:
        views = map_tar(path, described.tar, DTYPES[manifest.dtype], manifest.d_model, verify=True)
    except StoreError as error:
        yield str(error)
        return
    members = list(read_tar(path))
    if [member.key for member in members] != [context_key(record.lane, record.shard, context) for context in range(record.contexts)]:
        yield f"shard {short_name(path)}: its members are not the {record.contexts} contexts of the progress log"
    elif any(not torch.equal(view.view(torch.uint8), member.rows.x.view(torch.uint8)) for view, member in zip(views, members, strict=True)):
        yield f"shard {short_name(path)}: the offsets of the progress log do not point at its rows"
    else:
        x = torch.cat([torch.empty(0, manifest.d_model), *views])
        yield from (f"shard {short_name(path)}: {problem}" for problem in _problems_of_rows(x.double(), described.statistics))


def _problems_of_rows(x: Float[Tensor, "rows d_model"], statistics: SiteStatistics) -> Iterator[str]:
    if not torch.isfinite(x).all():
        yield "it has values that are NaN or infinite"
        return
    squared_norm = float(x.square().sum())
    bound = (len(x) * squared_norm) ** 0.5  # of each component of the sum, by Cauchy-Schwarz
    if (
        len(x) != statistics.kept.rows
        or abs(squared_norm - statistics.kept.squared_norm) > _TOLERANCE * squared_norm
        or bool((x.sum(dim=0) - statistics.sum).abs().max() > _TOLERANCE * bound)
    ):
        yield "its statistics are not those of its rows"
