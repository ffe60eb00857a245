"""`gsae verify`. In: a store, a run directory, or a directory that holds runs. Out: what is wrong with them, one line each."""

from dataclasses import dataclass
from pathlib import Path

from gsae.errors import CheckpointError
from gsae.store.manifest import IDENTITY_FILE
from gsae.store.runs import checkpoints, damage, find_runs
from gsae.store.verify import verify as verify_store


@dataclass(frozen=True)
class Verification:
    """What was read, and what is wrong with it."""

    checked: str
    problems: list[str]


def verify(path: Path) -> Verification:
    """Read everything below `path` again, byte for byte.

    Raises:
        CheckpointError: there is neither a store nor a run.
    """
    stores = sorted({found.parent for found in path.rglob(IDENTITY_FILE)})
    runs = find_runs(path)
    if not stores and not runs:
        raise CheckpointError(f"{path} holds neither an activation store nor a run; give a directory that gsae harvest or gsae train wrote")
    problems = [problem for store in stores for problem in verify_store(store)]
    found = [checkpoint for run in runs for checkpoint in checkpoints(run)]
    problems += [problem for checkpoint in found for problem in damage(checkpoint.path)]
    return Verification(f"{len(stores)} stores, {len(runs)} runs with {len(found)} checkpoints", problems)
