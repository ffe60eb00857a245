"""The JSON that describes a store. In: a harvest's settings, or a store's directory. Out: `Manifest`, or the name of what is missing.

`identity.json` is there from the moment a harvest starts, so that another harvest into the same directory is refused before it
writes; `manifest.json` from the moment the harvest is whole (gsae.store.finish writes it).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from gsae.errors import StoreError
from gsae.llm.site import Site
from gsae.store.durable import write_json_atomically
from gsae.store.mirror import mirror_of
from gsae.store.progress import is_complete, read_records
from gsae.store.shards import HARVEST_AGAIN, short_name, tar_path
from gsae.store.statistics import decode_vector, encode_vector

STORE_FORMAT = 1
IDENTITY_FILE = "identity.json"
MANIFEST_FILE = "manifest.json"

_NUMBERS = ("rows", "scale", "scale_unit_mean_square", "median_norm", "max_norm")


@dataclass(frozen=True)
class Layout:
    """What a reader must know of a store before it reads rows."""

    sites: tuple[Site, ...]
    d_model: int
    num_lanes: int
    context_length: int
    dtype: str
    """Storage type: `bfloat16`, `float16`, `float32` or `int8`."""
    outlier_multiple: float
    """Rows whose norm exceeds so many times the site's median norm are dropped."""


@dataclass(frozen=True)
class Share:
    """A part of some rows."""

    rows_fraction: float
    squared_norm_fraction: float


@dataclass(frozen=True, eq=False)
class SiteManifest:
    """One site of a store."""

    name: str
    layer: int
    module: str
    rows: int
    """Kept rows."""
    mean: Float[Tensor, " d_model"]
    """Mean of the kept rows, float64."""
    scale: float
    """Makes E|x - mean|^2 = 1 over kept rows."""
    scale_unit_mean_square: float
    """Makes E|x|^2 = 1 over kept rows."""
    median_norm: float
    """Of the calibration sample."""
    max_norm: float
    """Rows with a larger norm are dropped: outlier_multiple x median_norm."""
    storage_fvu: float
    """Share of the kept rows' variance that is lost by storing them; 0 in stores older than this record."""
    dropped: dict[str, int]
    """Rows dropped, by reason."""
    kept_above: dict[int, Share]
    """Share of the kept rows whose norm exceeds so many times the median."""
    candidates_above: dict[int, Share]
    """The same among the rows that the mask would keep if it did not look at norms."""


@dataclass(frozen=True)
class LaneManifest:
    """One lane of a store."""

    shards: int
    progress_sha256: str
    """Of its progress log."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """A whole store."""

    format: int
    identity: dict[str, Any]
    """All settings that decide what the rows are: the layout's and the harvest's."""
    fingerprint: str
    """Hash of the identity."""
    d_model: int
    num_lanes: int
    context_length: int
    dtype: str
    outlier_multiple: float
    sites: dict[str, SiteManifest]
    """In layer order."""
    lanes: tuple[LaneManifest, ...]


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that change with any value of `identity` (plain JSON values), not with the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def complete_identity(layout: Layout, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a store: the layout's fields and the harvest's other settings (plain JSON values, no absolute paths)."""
    own = {**asdict(layout), "sites": {site.name: {"layer": site.layer, "module": site.module} for site in layout.sites}}
    clashes = sorted(own.keys() & settings.keys())
    if clashes:
        raise ValueError(f"settings repeat fields of the layout: {clashes}")
    identity: dict[str, Any] = json.loads(json.dumps({**own, **settings}))
    return identity


def check_identity(store: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a directory that holds, in whole or in part, a store of another identity. An empty or missing directory passes.

    Raises:
        StoreError: naming the first field that differs, with both values.
    """
    if not (store / IDENTITY_FILE).exists():
        if (store / "progress").exists():
            raise StoreError(f"{store} holds progress logs but no {IDENTITY_FILE}; give harvest.store another directory")
        return
    differences = identity_differences(read_identity(store), identity)
    if differences:
        name, (there, here) = next(iter(differences.items()))
        others = f" (also different: {', '.join([*differences][1:])})" if len(differences) > 1 else ""
        raise StoreError(
            f"store {store} was harvested with {name} {there}, this config has {here}{others}; "
            "give harvest.store another directory, or restore the setting"
        )


def identity_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The fields in which two identities differ, nested keys joined by dots, with both values as JSON, or `absent`."""
    there, here = _flatten(one), _flatten(other)
    shown = {name: (_show(there, name), _show(here, name)) for name in sorted(there.keys() | here.keys())}
    return {name: values for name, values in shown.items() if values[0] != values[1]}


def begin(store: Path, layout: Layout, settings: Mapping[str, Any]) -> None:
    """Claim a directory for a harvest, or join the one that an earlier harvest of the same identity began. One rank calls this.

    Raises:
        StoreError: the directory holds a store of another identity.
    """
    identity = complete_identity(layout, settings)
    check_identity(store, identity)
    if not (store / IDENTITY_FILE).exists():
        write_json_atomically(store / IDENTITY_FILE, {"format": STORE_FORMAT, "fingerprint": fingerprint(identity), "identity": identity})


def load(store: Path) -> Manifest:
    """The manifest of a whole store. Every tar is looked for by name, but in a mirror, which has few; none is opened.

    Raises:
        StoreError: there is no store, it is not whole (the message names what is missing), or the manifest is damaged.
    """
    if not (store / MANIFEST_FILE).exists():
        raise StoreError(_why_no_manifest(store))
    content = read_json(store / MANIFEST_FILE)
    digest = content.pop("digest", None)
    if digest != fingerprint(content):
        raise StoreError(f"{store / MANIFEST_FILE} was changed after it was written; delete it and {HARVEST_AGAIN}")
    identity = content["identity"]
    lanes = tuple(LaneManifest(**lane) for lane in content["lanes"])
    if mirror_of(store) is None:
        _require_tars(store, list(identity["sites"]), lanes)
    return Manifest(
        format=content["format"],
        identity=identity,
        fingerprint=content["fingerprint"],
        sites={name: _site_from_json(name, place, content["sites"][name]) for name, place in identity["sites"].items()},
        lanes=lanes,
        **{name: identity[name] for name in ("d_model", "num_lanes", "context_length", "dtype", "outlier_multiple")},
    )


def site_to_json(site: SiteManifest) -> dict[str, Any]:
    """A site as it stands in manifest.json; the mean as base64 of little-endian float64."""
    return {
        **{name: getattr(site, name) for name in _NUMBERS},
        "storage_fvu": site.storage_fvu,
        "mean": encode_vector(site.mean),
        "dropped": site.dropped,
        "kept_above": {str(multiple): asdict(share) for multiple, share in site.kept_above.items()},
        "candidates_above": {str(multiple): asdict(share) for multiple, share in site.candidates_above.items()},
    }


def _site_from_json(name: str, place: Mapping[str, Any], value: Mapping[str, Any]) -> SiteManifest:
    return SiteManifest(
        name=name,
        layer=place["layer"],
        module=place["module"],
        **{number: value[number] for number in _NUMBERS},
        mean=decode_vector(value["mean"]),
        storage_fvu=value.get("storage_fvu", 0.0),
        dropped=value["dropped"],
        kept_above={int(multiple): Share(**share) for multiple, share in value["kept_above"].items()},
        candidates_above={int(multiple): Share(**share) for multiple, share in value["candidates_above"].items()},
    )


def _require_tars(store: Path, sites: Sequence[str], lanes: Sequence[LaneManifest]) -> None:
    for site in sites:
        there = {path.name for path in (store / site).glob("*.tar")}
        wanted = (tar_path(store, site, lane, shard) for lane, described in enumerate(lanes) for shard in range(described.shards))
        missing = [path for path in wanted if path.name not in there]
        if missing:
            others = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
            raise StoreError(f"shard {short_name(missing[0])}{others} missing in {store}; {HARVEST_AGAIN}")


def read_identity(store: Path) -> dict[str, Any]:
    """The identity that a harvest wrote when it began."""
    if not (store / IDENTITY_FILE).exists():
        raise StoreError(f"there is no activation store at {store}; run gsae harvest first, or correct harvest.store")
    content = read_json(store / IDENTITY_FILE)
    identity: dict[str, Any] = content["identity"]
    if content["fingerprint"] != fingerprint(identity):
        raise StoreError(f"{store / IDENTITY_FILE} was changed after it was written; harvest into another directory")
    return identity


def read_json(path: Path) -> dict[str, Any]:
    """One of the store's JSON files.

    Raises:
        StoreError: it is not JSON, or of another format.
    """
    try:
        content = json.loads(path.read_text())
        number = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); delete it and {HARVEST_AGAIN}") from error
    if number != STORE_FORMAT:
        raise StoreError(f"{path} has format {number}, this version of gsae reads {STORE_FORMAT}; harvest again")
    return cast(dict[str, Any], content)


def _why_no_manifest(store: Path) -> str:
    num_lanes = int(read_identity(store)["num_lanes"])
    incomplete = [lane for lane in range(num_lanes) if not is_complete(read_records(store, lane))]
    if not incomplete:
        return f"store {store} is not whole: {MANIFEST_FILE} is missing; {HARVEST_AGAIN}"
    others = f" and {len(incomplete) - 1} of the {num_lanes} others are" if len(incomplete) > 1 else " is"
    return f"store {store} is not whole: lane {incomplete[0]}{others} not harvested to the end; {HARVEST_AGAIN}"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner})
    return flat


def _show(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "absent"
