"""A run's state to and from a checkpoint directory. In: a `Run` at a step. Out: the same run, bit for bit, on any number of ranks.

Beside the SAE itself (`sae.safetensors`, `sae.json`) stand `state.safetensors` (optimizer, firing counters; with `train.ema_decay`
also the weights and their average, since the SAE is then made of the average) and `state.json` (the run's counters). All of it is
the same on every rank when it is taken, so it does not depend on their number.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gsae.config import ObjectiveName
from gsae.errors import CheckpointError
from gsae.sae.formats import read_sae, save_sae, write_tensors
from gsae.sae.objective import SAE, SAE_CLASS, UNIT_NORM
from gsae.store.durable import fsync_file, write_aside
from gsae.store.runs import METRICS_FILE, checkpoints, prune_checkpoints, read_run, remove_checkpoint, require_whole, write_checkpoint
from gsae.train.alive import CONTINUES
from gsae.train.averaging import WeightAverage
from gsae.train.bank import Bank, Position, Run

STATE_TENSORS_FILE = "state.safetensors"
STATE_FILE = "state.json"
COUNTERS = ("event_step", "low_l0_steps", "high_fvu_steps", "seconds", "stopped", "finished")
"""The fields of a Run that are plain values."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a bank continues."""

    step: int
    """The newest step that every unfinished run has whole; 0 starts anew."""
    sources: dict[str, Path | None]
    """The checkpoint of that step of each unfinished run; None at step 0."""
    position: Position | None
    """Where in a store in parts that is; None at step 0, and in a store that is not in parts."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints of a run stay when a new one is on the disk."""

    newest: int
    """So many, with the new one."""
    every_steps: int | None
    """Besides them those of its multiples; None: no others."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run's state at a step, on the host, that training does not change any more."""

    directory: Path
    """Of the run."""
    objective: ObjectiveName
    step: int
    rows: int
    """Rows taken, over all ranks."""
    ema_decay: float | None
    """Of the average of the weights, if there is one."""
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    """What goes into `state.json`."""


def take_snapshot(bank: Bank, run: Run, to_host: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Snapshot:
    """The run as it is now; its firing counts are synchronised.

    Args:
        bank: the bank, at its step.
        run: one of its runs.
        to_host: copies tensors by name.
    """
    average = None if run.average is None else run.average.state_tensors()
    parts = {"weights": run.sae.state_dict(), "average": average or {}, "optimizer": run.optimizer.state_tensors()}
    parts["firing"] = run.firing.state_tensors()
    tensors = {f"{part}.{name}": value for part, named in parts.items() for name, value in named.items()}
    tensors |= {"resampled": run.resampled, "dead": run.training.dead}
    counters = {name: getattr(run, name) for name in COUNTERS} | {"is_sparse": run.training.is_sparse}
    if bank.position is not None:
        counters["position"] = asdict(bank.position)
    decay = None if run.average is None else run.average.decay
    return Snapshot(run.directory, run.spec.objective, bank.step, bank.rows, decay, to_host(tensors), {"step": bank.step, **counters})


def write_snapshots(snapshots: Sequence[Snapshot], keep: Keep) -> None:
    """Write a checkpoint of each run, then delete old ones. Files only; one rank calls this.

    Old ones go only when all runs have the new step, so a step that all of them have whole is left wherever a kill strikes.

    Raises:
        CheckpointError: the disk is full, or something cannot be written.
    """
    for snapshot in snapshots:
        with _on_disk(snapshot):
            fsync_file(snapshot.directory / METRICS_FILE)
            write_checkpoint(snapshot.directory, snapshot.step, partial(_fill, snapshot))
    for snapshot in snapshots:
        with _on_disk(snapshot):
            prune_checkpoints(snapshot.directory, keep.newest, keep.every_steps)


@contextmanager
def _on_disk(snapshot: Snapshot) -> Iterator[None]:
    """A block whose failure to write is one line for the user."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} could not be written: {error.filename or snapshot.directory}: "
            f"{error.strerror or error}; free some space or mend the permissions, then run the same again: {CONTINUES}"
        ) from error


def _fill(snapshot: Snapshot, directory: Path) -> None:
    described = {key: value for key, value in read_run(snapshot.directory).items() if key not in ("format", "settings")}
    described |= {"step": snapshot.step, "rows": snapshot.rows}
    tensors, sae = snapshot.tensors, _sae_of(snapshot.objective, _below("weights.", snapshot.tensors))
    if snapshot.ema_decay is None:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("weights.")}
    else:
        described["ema_decay"] = snapshot.ema_decay
        average = _sae_of(snapshot.objective, _below("average.", tensors))
        sae = WeightAverage(average, snapshot.ema_decay, unit_norm=snapshot.objective in UNIT_NORM).to_sae()
    save_sae(directory, sae, described)
    write_tensors(directory / STATE_TENSORS_FILE, tensors)
    (directory / STATE_FILE).write_text(json.dumps(snapshot.state, indent=1) + "\n")


def _sae_of(objective: ObjectiveName, tensors: Mapping[str, Tensor]) -> SAE:
    """An SAE that consists of these tensors themselves."""
    num_features, d_model = tensors["W_dec"].shape
    with torch.device("meta"):
        sae = SAE_CLASS[objective](d_model, num_features)
    sae.load_state_dict(tensors, assign=True)
    return sae.requires_grad_(False)


def find_resume_point(directories: dict[str, Path], first_checkpoint: int) -> ResumePoint:
    """Where the runs in these directories, by name, can all continue; what is newer is deleted. Files only; one rank calls this.

    Raises:
        CheckpointError: a checkpoint to continue from is damaged, or a run was added to others that have already begun.
    """
    steps = _unfinished_steps(directories)
    step = _common_step(steps)
    ahead = [name for name, found in steps.items() if step == 0 and max(found, default=0) > first_checkpoint]
    if ahead:
        new = next((name for name, found in steps.items() if not found), ahead[0])
        raise CheckpointError(
            f"run {new} has not begun but {ahead[0]} is at step {max(steps[ahead[0]])}, and runs of a site train together; "
            "finish the others with their own config first, or give output another directory"
        )
    for found in steps.values():
        if step:
            require_whole(found[step])
        for newer in [path for at, path in found.items() if at > step]:
            remove_checkpoint(newer)
    position = next((_read_position(found[step]) for found in steps.values() if step), None)
    return ResumePoint(step, {name: found[step] if step else None for name, found in steps.items()}, position)


def find_resume_position(directories: dict[str, Path]) -> Position | None:
    """Where in a store in parts the runs in these directories will continue; None where all have ended. Nothing is changed.

    Raises:
        CheckpointError: a checkpoint to continue from is damaged.
    """
    steps = _unfinished_steps(directories)
    step = _common_step(steps)
    for found in steps.values():
        if step:
            require_whole(found[step])
    return next(((_read_position(found[step]) if step else None) or Position(0, 0) for found in steps.values()), None)


def _unfinished_steps(directories: dict[str, Path]) -> dict[str, dict[int, Path]]:
    """The checkpoints of each unfinished run, by step."""
    unfinished = {name: directory for name, directory in directories.items() if not _has_ended(directory)}
    return {name: {checkpoint.step: checkpoint.path for checkpoint in checkpoints(run)} for name, run in unfinished.items()}


def _common_step(steps: dict[str, dict[int, Path]]) -> int:
    """The newest step that all runs have; 0 where there is none."""
    return max(set.intersection(*map(set, steps.values())) if steps else (), default=0)


def _has_ended(run: Path) -> bool:
    found = checkpoints(run)
    if not found or not (found[-1].path / STATE_FILE).exists():
        return False
    state = _read_state(found[-1].path)
    return bool(state["finished"]) or state["stopped"] is not None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    except ValueError as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE}: {error}; delete {checkpoint} and train again") from error
    return state


def _read_position(checkpoint: Path) -> Position | None:
    position = _read_state(checkpoint).get("position")
    return Position(**position) if position else None


def restore_run(run: Run, checkpoint: Path) -> None:
    """Take over a checkpoint's state. Every rank calls this."""
    saved = read_sae(checkpoint)
    tensors = load_file(checkpoint / STATE_TENSORS_FILE)
    if run.average is None:
        run.sae.load_state_dict(saved.sae.state_dict())
    else:
        run.sae.load_state_dict(_below("weights.", tensors))
        run.average.load_state_tensors(_below("average.", tensors))
    run.optimizer.load_state_tensors(_below("optimizer.", tensors))
    run.firing.load_state_tensors(_below("firing.", tensors))
    run.resampled = tensors["resampled"].to(run.resampled.device)
    run.training.dead = tensors["dead"].to(run.training.dead.device)
    state = _read_state(checkpoint)
    run.training.is_sparse = state["is_sparse"]
    for name in COUNTERS:
        setattr(run, name, state[name])


def _below(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def truncate_metrics(directory: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, which the resumed run writes again. One rank calls this."""
    path = directory / METRICS_FILE
    if not path.exists():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    with write_aside(path) as file:
        file.write("".join(kept).encode())
