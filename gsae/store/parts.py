"""A store in parts, for a corpus whose activations do not fit on the disk. In: its directory. Out: its parts, as they come and go.

    <store>/manifest.json             what all parts share: identity, and each site's mean, scale and median norm in the calibration sample
    <store>/part-0000/                a store as any other, of visit 0; visit v holds part v mod n
    <store>/parts.json                how many visits are used up
    <store>/manifests/part-0000.json  the manifest of a visit that is used up; its store is gone

A harvest writes visits that are neither whole nor used up, a training reads whole ones, and only the training says that one is used up:
the two may run at the same time, on two machines.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae.errors import StoreError
from gsae.store.durable import fsync_directory, make_directory, write_json_atomically
from gsae.store.manifest import IDENTITY_FILE, MANIFEST_FILE, STORE_FORMAT, Manifest, identity_differences, load, read_json

USED_FILE = "parts.json"
KEPT_FOLDER = "manifests"
WAITING_FILE = "waiting.json"
"""In the output directory while training waits for a part."""
_HARVEST_ELSEWHERE = "give harvest.store another directory and harvest again"


@dataclass(frozen=True)
class Used:
    """What training is done with."""

    visits: int = 0
    """Visits that are used up: no run will need them again, and their stores are gone or going."""
    is_over: bool = False
    """Whether training has ended, so that no more visits are wanted."""


def num_parts(manifest: Manifest) -> int:
    """The number of parts of a store; 1 where it is not in parts."""
    return int(manifest.identity["corpus"].get("parts", 1))


def is_in_parts(store: Path) -> bool:
    """Whether a directory is a store in parts: it has a manifest, but no harvest of its own."""
    return (store / MANIFEST_FILE).exists() and not (store / IDENTITY_FILE).exists()


def visit_directory(store: Path, visit: int) -> Path:
    """Where the store of a visit is."""
    return store / f"part-{visit:04d}"


def read_used(store: Path) -> Used:
    """What training is done with."""
    path = store / USED_FILE
    if not path.exists():
        return Used()
    content = read_json(path)
    return Used(content["used"], content["is_over"])


def write_used(store: Path, used: Used) -> None:
    """Record what training is done with, before anything of it is removed. One rank of the training calls this."""
    write_json_atomically(store / USED_FILE, {"format": STORE_FORMAT, "used": used.visits, "is_over": used.is_over})


def remove_used(store: Path) -> None:
    """Remove the stores of the visits that are used up, or what an interrupted removal left of them.

    Their manifests are moved away first, so that a store that is half removed is not whole. Harvest and training may do this at once.
    """
    used = read_used(store).visits
    for visit, directory in enumerate(visit_directory(store, number) for number in range(used)):
        if not directory.exists():
            continue
        if (directory / MANIFEST_FILE).exists():
            make_directory(store / KEPT_FOLDER)
            with suppress(FileNotFoundError):
                (directory / MANIFEST_FILE).replace(_kept_manifest(store, visit))
                fsync_directory(store / KEPT_FOLDER)
                fsync_directory(directory)
        shutil.rmtree(directory, onerror=_let_be_gone)
        fsync_directory(store)


def _let_be_gone(function: object, path: str, failure: tuple[type[BaseException], BaseException, object]) -> None:
    """What another process has removed in the meantime is gone as wanted."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def is_used(directory: Path) -> bool:
    """Whether a directory is what is left of a visit that is used up."""
    store = directory.parent
    return is_in_parts(store) and any(directory == visit_directory(store, visit) for visit in range(read_used(store).visits))


def _kept_manifest(store: Path, visit: int) -> Path:
    return store / KEPT_FOLDER / f"part-{visit:04d}.json"


def rows_of_visit(store: Path, visit: int, site: str) -> int | None:
    """Kept rows of a visit that is whole or used up; None of one that is to come."""
    for path in (visit_directory(store, visit) / MANIFEST_FILE, _kept_manifest(store, visit)):  # moved from the first to the second
        if path.exists():
            return int(read_json(path)["sites"][site]["rows"])
    return None


def load_visit(store: Path, manifest: Manifest, visit: int) -> Manifest | None:
    """The manifest of a visit's own store; None where that is not whole yet.

    Raises:
        StoreError: it is damaged, or was harvested with other settings or another calibration than the store's manifest says.
    """
    directory = visit_directory(store, visit)
    if not (directory / MANIFEST_FILE).exists():
        return None
    found = load(directory)
    difference = next(iter(identity_differences(found.identity, visit_identity(manifest.identity, visit)).items()), None)
    if difference:
        name, (there, here) = difference
        raise StoreError(f"store {directory} was harvested with {name} {there}, {store / MANIFEST_FILE} has {here}; {_HARVEST_ELSEWHERE}")
    for site in manifest.sites.values():
        if found.sites[site.name].median_norm != site.median_norm:
            raise StoreError(f"store {directory} was harvested with another calibration of {site.name} than {store}; {_HARVEST_ELSEWHERE}")
    return found


def visit_identity(identity: dict[str, Any], visit: int) -> dict[str, Any]:
    """The identity of a visit's own store, from that of the store in parts."""
    corpus = identity["corpus"]
    return {**identity, "corpus": {**corpus, "part": visit % corpus["parts"]}}


def require_identity(store: Path, identity: dict[str, Any]) -> None:
    """Refuse a directory that holds a store of another identity, where one of the two is in parts; `check_identity` compares the others.

    Raises:
        StoreError: naming the first field that differs, with both values.
    """
    path = next((store / name for name in (IDENTITY_FILE, MANIFEST_FILE) if (store / name).exists()), None)
    if path is None or not ("parts" in identity["corpus"] or is_in_parts(store)):
        return
    difference = next(iter(identity_differences(read_json(path)["identity"], identity).items()), None)
    if difference:
        name, (there, here) = difference
        raise StoreError(
            f"store {store} was harvested with {name} {there}, this config has {here}; "
            "give harvest.store another directory, or restore the setting"
        )
