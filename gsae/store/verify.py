"""A store read again, byte for byte. In: its directory. Out: everything that is wrong with it, and what each thing's cure is."""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from gsae.errors import StoreError
from gsae.store.durable import PARTIAL_SUFFIX
from gsae.store.encoding import Encoded
from gsae.store.finish import CALIBRATION_FILE, read_calibration
from gsae.store.manifest import IDENTITY_FILE, MANIFEST_FILE, fingerprint, identity_differences, read_identity, read_json
from gsae.store.progress import ShardRecord, is_complete, progress_path, progress_sha256, read_records
from gsae.store.shards import HARVEST_AGAIN, context_key, map_tar, read_tar, short_name, tar_path

_TOLERANCE = 1e-9
"""Of sums over a shard in float64, relative: another order of summing is within it, other rows are not."""
_TAR_NAME = re.compile(r"\d{4,}-\d{6,}")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store."""

    problem: str
    """In one line: what, where, what to do."""
    cure: Literal["harvest", "delete", "none"] = "harvest"
    """`harvest`: a harvest with the same config makes it anew, once `lane` and `file` are out of its way; `delete`: the store is whole
    without `file`; `none`: nothing here can mend it."""
    lane: int | None = None
    """The lane in which a shard is broken ..."""
    shard: int = 0
    """... and which one."""
    and_later: bool = False
    """Whether the log is not to be trusted from that shard on."""
    file: Path | None = None
    """A file that is to go."""


@dataclass(frozen=True)
class _Lane:
    """One lane, once its shards have been read: a few numbers, since a store may have 100,000 shards."""

    rows: list[dict[str, int] | None]
    """Of each shard past a doubt about the log as a whole, by site; None for a gap."""
    is_complete: bool
    is_doubtful: bool


def verify(store: Path) -> list[Finding]:
    """What is wrong with a store, whole or not; empty when all is well and it is whole.

    Compared are the SHA-256 of tars, logs and manifest; rows, contexts and offsets in tar, log and manifest; the statistics with the
    rows; the identity with the manifest; the tars with the lines of the logs. Values that are not finite are found.
    """
    try:
        identity = read_identity(store)
    except StoreError as error:
        return [Finding(str(error), cure="none")]
    except (KeyError, TypeError) as error:
        return [Finding(f"{store / IDENTITY_FILE} is damaged ({error!r}); harvest into another directory", cure="none")]
    manifest, findings = _read_manifest(store, identity)
    findings += _about_calibration(store, manifest)
    lanes = []
    for lane in range(identity["num_lanes"]):
        records, doubts = _read_lane(store, lane, manifest)
        findings += doubts + [finding for record in records for finding in _about_shard(store, identity, record)]
        rows = [None if record.is_gap else {name: site.tar.rows for name, site in record.sites.items()} for record in records]
        lanes.append(_Lane(rows, is_complete(records), bool(doubts)))
    if not (store / MANIFEST_FILE).exists():
        findings.append(_why_not_whole(store, lanes))
    if manifest is not None and not any(lane.is_doubtful or None in lane.rows for lane in lanes):
        findings += _about_counts(store, identity, manifest, lanes)
    return findings + _left_over(store, identity, lanes)


def _read_manifest(store: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The manifest, if it is there, unchanged and this store's: nothing is judged by another one."""
    path = store / MANIFEST_FILE
    if not path.exists():
        return None, []
    try:
        content = read_json(path)
    except StoreError as error:
        return None, [Finding(str(error), file=path)]
    digest = content.pop("digest", None)
    differences = identity_differences(content.get("identity", {}), identity)
    if digest != fingerprint(content):
        problem = "was changed after it was written"
    elif differences:
        name, (there, here) = next(iter(differences.items()))
        others = f" (also different: {', '.join([*differences][1:])})" if len(differences) > 1 else ""
        problem = f"is of another store, with {name} {there}; {IDENTITY_FILE} has {here}{others}"
    elif content.get("fingerprint") != fingerprint(identity):
        problem = f"has fingerprint {content.get('fingerprint')}, its identity has {fingerprint(identity)}"
    else:
        return content, []
    return None, [Finding(f"{MANIFEST_FILE}: {problem}; delete it and {HARVEST_AGAIN}", file=path)]


def _read_lane(store: Path, lane: int, manifest: Mapping[str, Any] | None) -> tuple[list[ShardRecord], list[Finding]]:
    """A lane's log, and what makes it doubtful as a whole.

    Its hash is the manifest's, or it is one that an interrupted harvest or repair ended early.
    """
    log = progress_path(store, lane)
    name = log.relative_to(store)
    if not log.exists():
        missing = Finding(f"{name}: missing; {HARVEST_AGAIN}", lane=lane, and_later=True)
        return [], [missing] if manifest is not None else []
    try:
        records = read_records(store, lane)
    except StoreError as error:
        return [], [Finding(str(error), lane=lane, and_later=True)]
    if manifest is None or progress_sha256(store, lane) == manifest["lanes"][lane]["progress_sha256"]:
        return records, []
    if is_complete(records):  # what it says of the text cannot be compared with anything else
        changed = f"{name}: changed after the manifest was written; delete it and {HARVEST_AGAIN}"
        return [], [Finding(changed, lane=lane, and_later=True)]
    count = manifest["lanes"][lane]["shards"]
    if len(records) == count:  # the gaps are found one by one
        return records, []
    cut = Finding(
        f"{name}: {len(records)} shards, the manifest has {count}; {HARVEST_AGAIN}", lane=lane, shard=len(records), and_later=True
    )
    return records, [cut]


def _about_calibration(store: Path, manifest: Mapping[str, Any] | None) -> Iterator[Finding]:
    path = store / CALIBRATION_FILE
    wanted = None if manifest is None else {name: site["median_norm"] for name, site in manifest["sites"].items()}
    try:
        found = read_calibration(store)
    except (StoreError, KeyError) as error:
        problem = str(error) if isinstance(error, StoreError) else f"{path} is damaged ({error!r}); delete it and {HARVEST_AGAIN}"
        yield Finding(problem, file=path)
        return
    if found is None and (store / "progress").exists():
        yield Finding(f"{CALIBRATION_FILE}: missing; {HARVEST_AGAIN}")
    elif found is not None and wanted is not None and found != wanted:
        yield Finding(f"{CALIBRATION_FILE}: its median norms are not the manifest's; delete it and {HARVEST_AGAIN}", file=path)


def _about_shard(store: Path, identity: Mapping[str, Any], record: ShardRecord) -> Iterator[Finding]:
    """At most one finding a site."""
    if record.is_gap:
        lost = f"shard {record.lane:04d}-{record.shard:06d} was lost or taken out; {HARVEST_AGAIN}"
        yield Finding(lost, lane=record.lane, shard=record.shard)
        return
    if record.sites.keys() != identity["sites"].keys():
        where = f"{progress_path(store, record.lane).relative_to(store)} line {record.shard + 1}"
        problem = f"{where}: its sites are {', '.join(record.sites)}, the store's {', '.join(identity['sites'])}; {HARVEST_AGAIN}"
        yield Finding(problem, lane=record.lane, shard=record.shard)
        return
    for site in record.sites:
        path = tar_path(store, site, record.lane, record.shard)
        try:
            views = map_tar(path, record.sites[site].tar, identity["dtype"], identity["d_model"], verify=True)
            what = _problem_of_rows(path, record, site, views)
        except StoreError as error:
            yield Finding(str(error), lane=record.lane, shard=record.shard)
            continue
        except (ValueError, TypeError, tarfile.TarError, SafetensorError) as error:
            what = f"unreadable ({' '.join(str(error).split())})"
        if what:
            yield Finding(f"shard {short_name(path)}: {what}; delete it and {HARVEST_AGAIN}", lane=record.lane, shard=record.shard)


def _problem_of_rows(path: Path, record: ShardRecord, site: str, views: Sequence[Encoded]) -> str | None:
    """What is wrong with a tar whose bytes are those of the log: member by member, so that one context is in memory at a time."""
    tar, statistics = record.sites[site].tar, record.sites[site].statistics
    num_rows, squared_norm, total = 0, 0.0, torch.zeros_like(statistics.sum)
    keys = []
    for context, member in enumerate(read_tar(path)):
        keys.append(member.key)
        rows = member.rows.encoded
        if context >= len(views) or member.key != context_key(record.lane, record.shard, context):
            return f"its members are not the {record.contexts} contexts of the progress log"
        if len(rows) != tar.context_rows[context]:
            return f"context {context} has {len(rows)} rows, the progress log says {tar.context_rows[context]}"
        if not views[context].has_same_bytes(rows):
            return "the offsets of the progress log do not point at its rows"
        x64 = rows.decode().double()
        if not torch.isfinite(x64).all():
            return f"context {context} has values that are NaN or infinite"
        num_rows += len(rows)
        squared_norm += float(x64.square().sum())
        total += x64.sum(dim=0)
    if not len(keys) == len(views) == record.contexts:
        return f"its members are not the {record.contexts} contexts of the progress log"
    bound = (num_rows * squared_norm) ** 0.5  # of each component of the sum, by Cauchy-Schwarz
    if (
        num_rows != statistics.kept.rows
        or abs(squared_norm - statistics.kept.squared_norm) > _TOLERANCE * squared_norm
        or bool((total - statistics.sum).abs().max() > _TOLERANCE * bound)
    ):
        return "its statistics are not those of its rows"
    return None


def _why_not_whole(store: Path, lanes: Sequence[_Lane]) -> Finding:
    incomplete = [number for number, lane in enumerate(lanes) if not lane.is_complete]
    if not incomplete:
        return Finding(f"store {store} is not whole: {MANIFEST_FILE} is missing; {HARVEST_AGAIN}")
    return Finding(
        f"store {store} is not whole: {len(incomplete)} of {len(lanes)} lanes, the first is {incomplete[0]}, are not harvested to the end; "
        + HARVEST_AGAIN
    )


def _about_counts(store: Path, identity: Mapping[str, Any], manifest: Mapping[str, Any], lanes: Sequence[_Lane]) -> Iterator[Finding]:
    path = store / MANIFEST_FILE
    for number, lane in enumerate(lanes):
        if len(lane.rows) != manifest["lanes"][number]["shards"]:
            counts = f"{len(lane.rows)} shards in the progress log, {manifest['lanes'][number]['shards']} in the manifest"
            yield Finding(f"{MANIFEST_FILE}: lane {number} has {counts}; delete it and {HARVEST_AGAIN}", file=path)
    for site in identity["sites"]:
        rows = sum(rows.get(site, 0) for lane in lanes for rows in lane.rows if rows is not None)
        if rows != manifest["sites"][site]["rows"]:
            counts = f"{rows} rows in the progress logs, {manifest['sites'][site]['rows']} in the manifest"
            yield Finding(f"{MANIFEST_FILE}: {site} has {counts}; delete it and {HARVEST_AGAIN}", file=path)


def _left_over(store: Path, identity: Mapping[str, Any], lanes: Sequence[_Lane]) -> list[Finding]:
    """Partial files, and tars that no line of a log speaks of. The tars of a log that cannot be read go with their lane."""
    logged = {
        tar_path(store, site, number, shard)
        for number, lane in enumerate(lanes)
        for shard, rows in enumerate(lane.rows)
        for site in identity["sites"]
        if rows is not None
    }
    doubtful = {number for number, lane in enumerate(lanes) if lane.is_doubtful}
    partial = sorted(path for path in store.rglob(f"*{PARTIAL_SUFFIX}") if path.is_file())
    unlogged = [
        path
        for path in sorted(store.glob("*/*.tar"))
        if _TAR_NAME.fullmatch(path.stem) and path not in logged and int(path.stem.partition("-")[0]) not in doubtful
    ]
    problems = {path: f"{path.relative_to(store)}: left over from an interrupted write; delete it" for path in partial}
    problems |= {path: f"shard {short_name(path)}: no line of the progress log speaks of it; delete it" for path in unlogged}
    return [Finding(problem, cure="delete", file=path) for path, problem in problems.items()]
