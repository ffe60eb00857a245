"""`gsae verify`. In: a store, a run directory, or a directory that holds runs. Out: what is wrong with them, one line each."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gsae.config.location import is_remote
from gsae.errors import CheckpointError, ConfigError, StoreError
from gsae.store.finish import CALIBRATION_FILE
from gsae.store.manifest import IDENTITY_FILE, MANIFEST_FILE, load, read_identity
from gsae.store.mirror import mirror_of
from gsae.store.opening import open_store
from gsae.store.parts import is_in_parts, is_used, load_visit, read_used
from gsae.store.progress import progress_path
from gsae.store.remote import MissingError
from gsae.store.repair import repair as repair_store
from gsae.store.runs import checkpoints, damage, find_runs
from gsae.store.verify import Finding
from gsae.store.verify import verify as verify_store

_NO_REPAIR = "gsae verify --repair is for directories; repair the store that {} is a copy of, and copy it again"


@dataclass(frozen=True)
class Verification:
    """What was read, what is wrong with it, and what was done about it."""

    checked: str
    problems: list[str]
    removed: list[str]
    """What a repair took out of the stores."""
    num_repaired: int
    """Problems that are gone, or will be after a harvest with the same config."""


def run_verify(location: str, cache: Path, cache_gigabytes: float, repair: bool) -> Verification:
    """`verify` of what is at a path, or of a store at a URL, read through a mirror in `cache`; raises also what `open_store` does.

    Raises:
        ConfigError: what is at a URL is to be repaired.
    """
    if repair and is_remote(location, "PATH"):
        raise ConfigError(_NO_REPAIR.format(location))
    return verify(open_store(location, cache, cache_gigabytes), repair)


def verify(path: Path, repair: bool = False) -> Verification:
    """Read everything below `path` again, byte for byte.

    Args:
        path: a store, a run, or a directory that holds some.
        repair: whether to remove what is broken in stores, so that a harvest rebuilds it; checkpoints are left alone.

    Raises:
        CheckpointError: there is neither a store nor a run.
        ConfigError: the mirror of a store at a URL is to be repaired.
    """
    in_parts = sorted(found.parent for found in path.rglob(MANIFEST_FILE) if is_in_parts(found.parent))
    stores = sorted(found.parent for found in path.rglob(IDENTITY_FILE) if not is_used(found.parent))
    runs = find_runs(path)
    if not in_parts and not stores and not runs:
        raise CheckpointError(f"{path} holds neither an activation store nor a run; give a directory that gsae harvest or gsae train wrote")
    mirrors = [mirror for mirror in map(mirror_of, stores) if mirror is not None]
    if repair and mirrors:
        raise ConfigError(_NO_REPAIR.format(mirrors[0].url))
    removed, num_repaired = [], 0
    problems = [problem for store in in_parts for problem in _about_parts(store)]
    for store in stores:
        findings = _verify_store(store)
        problems += [finding.problem for finding in findings]
        if repair:
            removed += repair_store(store, findings)
            num_repaired += sum(finding.cure != "none" for finding in findings)
    found = [checkpoint for run in runs for checkpoint in checkpoints(run)]
    problems += [problem for checkpoint in found for problem in damage(checkpoint.path)]
    checked = f"{len(stores)} stores, {len(runs)} runs with {len(found)} checkpoints"
    if in_parts:
        checked = f"{len(in_parts)} stores in parts, {checked}"
    return Verification(checked, problems, removed, num_repaired)


def _verify_store(store: Path) -> list[Finding]:
    """What is wrong with a store; of a mirror, with the store that it stands for."""
    mirror = mirror_of(store)
    if mirror is None:
        return verify_store(store)
    lanes = range(read_identity(store)["num_lanes"])
    for path in (store / CALIBRATION_FILE, *(progress_path(store, lane) for lane in lanes)):
        with suppress(MissingError):
            mirror.fetch(path)
    return [finding for finding in verify_store(store) if finding.cure != "delete"]  # those are files on their way


def _about_parts(store: Path) -> list[str]:
    """What is wrong with what the parts of a store share, and with parts that are not of this store; they are read as other stores are."""
    try:
        manifest, used = load(store), read_used(store)
        visits = sorted(int(directory.name.partition("-")[2]) for directory in store.glob("part-[0-9]*"))
    except StoreError as error:
        return [str(error)]
    problems = []
    for visit in visits:
        try:
            if visit >= used.visits:
                load_visit(store, manifest, visit)
        except StoreError as error:
            problems.append(str(error))
    return problems
