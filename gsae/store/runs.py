"""Run directories on disk: what training writes and evaluation, report and verify read.

`<output>/<site>/<run>/` holds `run.json` (what is trained), `config.yaml`, `metrics.jsonl`, `checkpoints/<step>/` and later
`results.json`. A checkpoint is written aside, fsynced and renamed, and lists the SHA-256 of its files: it is whole or absent.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae.errors import CheckpointError
from gsae.store.durable import fsync_directory, fsync_file, make_directory
from gsae.store.lease import require as require_lease
from gsae.world import Group

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
PILOTS_DIRECTORY = "pilots.partial"
"""Beside the runs of a site while pilots look for lambdas: directories like those of runs, which are none."""
CONTENTS_FILE = "checkpoint.json"
CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint directory."""

    path: Path
    step: int


def find_runs(directory: Path) -> list[Path]:
    """All run directories at or below `directory`, in path order; not those of pilots."""
    found = (path.parent for path in directory.rglob(RUN_FILE))
    return sorted(path for path in found if PILOTS_DIRECTORY not in path.relative_to(directory).parts)


def checkpoints(run: Path) -> list[Checkpoint]:
    """The finished checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    names = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return [Checkpoint(path, int(path.name)) for path in sorted(names)]


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest finished checkpoint, its files checked against their hashes.

    Raises:
        CheckpointError: there is none, or its files are damaged.
    """
    found = checkpoints(run)
    if not found:
        raise CheckpointError(f"run {run} has no checkpoint yet; run gsae train with its config first")
    require_whole(found[-1].path)
    return found[-1]


def write_checkpoint(run: Path, step: int, write: Callable[[Path], None]) -> Checkpoint:
    """Let `write` fill a directory aside, then hash, fsync and rename it to `checkpoints/<step>`.

    Only one rank calls this. A checkpoint of the same step is replaced. Where writing fails, what was written aside is removed.
    """
    aside = _begin(run, step)
    try:
        write(aside)
        hashes = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
        return _finish(aside, step, hashes)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_checkpoint_in_parts(
    run: Path, step: int, write: Callable[[Path], Sequence[str]], describe: Callable[[Path, Mapping[str, str]], None], writers: Group
) -> None:
    """As `write_checkpoint`, by several ranks at once, each of which writes, hashes and fsyncs its own files. A collective.

    The checkpoint has its name only when all of them are done, so that one that dies or fails leaves the one before.

    Args:
        run: the run.
        step: the step.
        write: fills the directory aside with this rank's files, and names them.
        describe: adds the rest on the first rank, given the hashes of all files by name.
        writers: the ranks.

    Raises:
        OSError, GsaeError: a file could not be written, here or on another rank; nothing is left of it.
    """
    aside = writers.on_first(lambda: _begin(run, step))
    try:
        with writers.together():
            hashes = {}
            for name in write(aside):
                fsync_file(aside / name)
                hashes[name] = _sha256(aside / name)
        parts = writers.gather_objects(hashes)

        def finish() -> None:
            hashes = {name: each for part in parts for name, each in part.items()}
            describe(aside, hashes)
            rest = {path.name: _sha256(path) for path in aside.iterdir() if path.name not in hashes}
            _finish(aside, step, dict(sorted((hashes | rest).items())))

        writers.on_first(finish)
    except BaseException:
        if writers.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _begin(run: Path, step: int) -> Path:
    """An empty directory aside; what a killed process left is removed."""
    folder = run / "checkpoints"
    make_directory(folder)
    for left_over in folder.glob("*.partial"):
        shutil.rmtree(left_over)
    aside = folder / f"{step:08d}.partial"
    aside.mkdir()
    return aside


def _finish(aside: Path, step: int, hashes: Mapping[str, str]) -> Checkpoint:
    """List the hashes, wait until all is on the disk, and give the directory its name."""
    body = {"format": CHECKPOINT_FORMAT, "step": step, "sha256": dict(hashes)}
    (aside / CONTENTS_FILE).write_text(json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n")
    for path in aside.iterdir():
        fsync_file(path)
    fsync_directory(aside)
    final = aside.with_name(f"{step:08d}")
    require_lease(final)
    if final.exists():
        remove_checkpoint(final)
    aside.rename(final)
    fsync_directory(final.parent)
    return Checkpoint(final, step)


def prune_checkpoints(run: Path, keep: int, keep_every_steps: int | None = None) -> None:
    """Delete checkpoints.

    Args:
        run: the run.
        keep: how many of the newest stay.
        keep_every_steps: those of its multiples stay too; None: no others.
    """
    for old in checkpoints(run)[:-keep]:
        if keep_every_steps is None or old.step % keep_every_steps:
            remove_checkpoint(old.path)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that it is never half there under its name."""
    require_lease(checkpoint)
    doomed = checkpoint.with_name(f"{checkpoint.name}.old.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint directory: missing, added or changed files. Empty when it is whole."""
    try:
        contents = json.loads((checkpoint / CONTENTS_FILE).read_text())
        body = {key: contents[key] for key in ("format", "step", "sha256")}
        hashes: dict[str, str] = dict(body["sha256"])
        digest_holds = contents["digest"] == _digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{checkpoint / CONTENTS_FILE}: unreadable ({error})"]
    if not digest_holds:
        return [f"{checkpoint / CONTENTS_FILE}: changed after it was written"]
    if body["format"] != CHECKPOINT_FORMAT:
        return [f"{checkpoint}: format {body['format']}, this version reads {CHECKPOINT_FORMAT}"]
    problems = [f"{checkpoint / name}: missing" for name in hashes if not (checkpoint / name).is_file()]
    present = {path.name for path in checkpoint.iterdir()} - {CONTENTS_FILE}
    problems += [f"{checkpoint / name}: not part of the checkpoint" for name in sorted(present - hashes.keys())]
    changed = (name for name, wanted in hashes.items() if (checkpoint / name).is_file() and _sha256(checkpoint / name) != wanted)
    return problems + [f"{checkpoint / name}: SHA-256 differs from {CONTENTS_FILE}" for name in changed]


def require_whole(checkpoint: Path) -> None:
    """Raise CheckpointError when a checkpoint is damaged; the message names the file and the cure."""
    problems = damage(checkpoint)
    if problems:
        raise CheckpointError(f"{problems[0]}; delete {checkpoint} and run gsae train again to resume from the one before")


def read_run(run: Path) -> dict[str, Any]:
    """The object in `run.json`.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        value: dict[str, Any] = json.loads((run / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run / RUN_FILE}: {error}; give a run directory that gsae train wrote") from error
    return value


def find_difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first setting in which two objects of `run.json` differ, with both values; None when they are equal."""
    for name in sorted({*there, *wanted} - {"train_fingerprint"}):
        old, new = there.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            deeper = find_difference(old, new)
            if deeper is not None:
                return deeper if name == "settings" else f"{name}.{deeper}"
        elif old != new:
            return f"{name} {old!r}, this config has {new!r}"
    return None


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`; a half-written last one is passed over."""
    path = run / METRICS_FILE
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
