"""`gsae verify`. In: a store, a run directory, or a directory that holds runs. Out: what is wrong with them, one line each."""

from dataclasses import dataclass
from pathlib import Path

from gsae.errors import CheckpointError
from gsae.store.manifest import IDENTITY_FILE
from gsae.store.repair import repair as repair_store
from gsae.store.runs import checkpoints, damage, find_runs
from gsae.store.verify import verify as verify_store


@dataclass(frozen=True)
class Verification:
    """What was read, what is wrong with it, and what was done about it."""

    checked: str
    problems: list[str]
    removed: list[str]
    """What a repair took out of the stores."""
    num_repaired: int
    """Problems that are gone, or will be after a harvest with the same config."""


def verify(path: Path, repair: bool = False) -> Verification:
    """Read everything below `path` again, byte for byte.

    Args:
        path: a store, a run, or a directory that holds some.
        repair: whether to remove what is broken in stores, so that a harvest rebuilds it; checkpoints are left alone.

    Raises:
        CheckpointError: there is neither a store nor a run.
    """
    stores = sorted({found.parent for found in path.rglob(IDENTITY_FILE)})
    runs = find_runs(path)
    if not stores and not runs:
        raise CheckpointError(f"{path} holds neither an activation store nor a run; give a directory that gsae harvest or gsae train wrote")
    problems, removed, num_repaired = [], [], 0
    for store in stores:
        findings = verify_store(store)
        problems += [finding.problem for finding in findings]
        if repair:
            removed += repair_store(store, findings)
            num_repaired += sum(finding.cure != "none" for finding in findings)
    found = [checkpoint for run in runs for checkpoint in checkpoints(run)]
    problems += [problem for checkpoint in found for problem in damage(checkpoint.path)]
    checked = f"{len(stores)} stores, {len(runs)} runs with {len(found)} checkpoints"
    return Verification(checked, problems, removed, num_repaired)
