"""A run's state to and from a checkpoint directory. In: a `Run` at a step. Out: the same run, bit for bit, on any number of ranks.

Beside the SAE itself (`sae.safetensors`, `sae.json`) stand `state.safetensors` (optimizer, firing counters; with `train.ema_decay`
also the weights and their average, since the SAE is then made of the average) and `state.json` (the run's counters). All of it is
the same on every rank when it is taken, so it does not depend on their number.

Where features are split, each holder writes `sae-00001-of-00004.safetensors` and `state-00001-of-00004.safetensors` of its own, all at
once. Whatever the split that wrote a checkpoint, a rank reads of it the features that it is to hold, and no others.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gsae.config import ObjectiveName
from gsae.errors import CheckpointError
from gsae.sae.formats import WEIGHTS_FILE, describe_parts, part_file, read_features, read_sae, save_sae, write_tensors
from gsae.sae.objective import SAE, SAE_CLASS, UNIT_NORM
from gsae.sae.part import Part
from gsae.store.durable import fsync_file, write_aside
from gsae.store.runs import (
    METRICS_FILE,
    checkpoints,
    prune_checkpoints,
    read_run,
    remove_checkpoint,
    require_whole,
    write_checkpoint,
    write_checkpoint_in_parts,
)
from gsae.train.alive import CONTINUES
from gsae.train.averaging import WeightAverage
from gsae.train.bank import Bank, Position, Run
from gsae.world import Group

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
    part: Part | None = None
    """The features that `tensors` are of; None: all."""


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
    first = 0 if run.sae.part is None else run.sae.part.first
    tensors |= {"resampled": run.resampled + first, "dead": run.training.dead + first}
    counters = {name: getattr(run, name) for name in COUNTERS} | {"is_sparse": run.training.is_sparse}
    if bank.position is not None:
        counters["position"] = asdict(bank.position)
    decay = None if run.average is None else run.average.decay
    state = {"step": bank.step, **counters}
    return Snapshot(run.directory, run.spec.objective, bank.step, bank.rows, decay, to_host(tensors), state, run.sae.part)


def write_snapshots(snapshots: Sequence[Snapshot], keep: Keep, writers: Group | None = None) -> None:
    """Write a checkpoint of each run, then delete old ones. Files only; one rank calls this, or all that hold a part of the features.

    Old ones go only when all runs have the new step, so a step that all of them have whole is left wherever a kill strikes.

    Args:
        snapshots: of the runs.
        keep: the checkpoints that stay.
        writers: the ranks that hold a part each, for this thread alone; with them it is a collective.

    Raises:
        CheckpointError: the disk is full, or something cannot be written.
    """
    for snapshot in snapshots:
        with _on_disk(snapshot):
            if writers is None:
                fsync_file(snapshot.directory / METRICS_FILE)
                write_checkpoint(snapshot.directory, snapshot.step, partial(_fill, snapshot))
            else:
                writers.on_first(lambda: fsync_file(snapshot.directory / METRICS_FILE))  # noqa: B023
                own, rest = partial(_fill_part, snapshot), partial(_describe, snapshot)
                write_checkpoint_in_parts(snapshot.directory, snapshot.step, own, rest, writers)
    if writers is None or writers.is_first:
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
    sae, tensors = _contents(snapshot)
    save_sae(directory, sae, _description(snapshot))
    write_tensors(directory / STATE_TENSORS_FILE, tensors)
    _write_state(snapshot, directory)


def _fill_part(snapshot: Snapshot, directory: Path) -> list[str]:
    """Write this rank's part; the names of its files."""
    assert snapshot.part is not None
    holders = snapshot.part.holders
    names = [part_file(name, holders.rank, holders.size) for name in (WEIGHTS_FILE, STATE_TENSORS_FILE)]
    sae, tensors = _contents(snapshot)
    with _on_disk(snapshot):  # so that the other ranks say it too
        write_tensors(directory / names[0], sae.state_dict())
        write_tensors(directory / names[1], tensors)
    return names


def _describe(snapshot: Snapshot, directory: Path, hashes: Mapping[str, str]) -> None:
    """Write the files beside those of the parts, on the first rank."""
    assert snapshot.part is not None
    count = snapshot.part.holders.size
    sae, _ = _contents(snapshot)
    of_parts = [hashes[part_file(WEIGHTS_FILE, number, count)] for number in range(count)]
    describe_parts(directory, sae, _description(snapshot), of_parts)
    _write_state(snapshot, directory)


def _contents(snapshot: Snapshot) -> tuple[SAE, dict[str, Tensor]]:
    """The SAE that users get, and the tensors besides."""
    tensors, sae = snapshot.tensors, _sae_of(snapshot.objective, _below("weights.", snapshot.tensors))
    if snapshot.ema_decay is None:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("weights.")}
    else:
        average = _sae_of(snapshot.objective, _below("average.", tensors))
        sae = WeightAverage(average, snapshot.ema_decay, unit_norm=snapshot.objective in UNIT_NORM).to_sae()
    sae.part = snapshot.part
    return sae, tensors


def _description(snapshot: Snapshot) -> dict[str, Any]:
    described = {key: value for key, value in read_run(snapshot.directory).items() if key not in ("format", "settings")}
    described |= {"step": snapshot.step, "rows": snapshot.rows}
    return described if snapshot.ema_decay is None else {**described, "ema_decay": snapshot.ema_decay}


def _write_state(snapshot: Snapshot, directory: Path) -> None:
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
    """Take over a checkpoint's state, of the features that the run holds. Every rank calls this."""
    features = None if run.sae.part is None else run.sae.part.features
    files = _state_files(checkpoint)
    tensors = read_features(files, partial(_axis_in_state, run.sae.FEATURE_AXIS), features)
    if run.average is None:
        run.sae.load_state_dict(read_sae(checkpoint, features).sae.state_dict())
    else:
        run.sae.load_state_dict(_below("weights.", tensors))
        run.average.load_state_tensors(_below("average.", tensors))
    run.optimizer.load_state_tensors(_below("optimizer.", tensors))
    run.firing.load_state_tensors(_below("firing.", tensors))
    run.resampled = _numbers("resampled", files, features).to(run.resampled.device)
    run.training.dead = _numbers("dead", files, features).to(run.training.dead.device)
    state = _read_state(checkpoint)
    run.training.is_sparse = state["is_sparse"]
    for name in COUNTERS:
        setattr(run, name, state[name])


def _state_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's tensors beside the SAE's, in the order of their features."""
    whole = checkpoint / STATE_TENSORS_FILE
    return [whole] if whole.exists() else sorted(checkpoint.glob(part_file(STATE_TENSORS_FILE, 0, 2).replace("00001-of-00002", "*")))


def _axis_in_state(axes: Mapping[str, int], name: str) -> int | None:
    """The axis of features of a tensor of `state.safetensors`: `weights.<parameter>`, `optimizer.<parameter>.exp_avg`, `firing.fired`."""
    kind, _, rest = name.partition(".")
    parameter, _, moment = rest.partition(".")
    if kind == "firing":
        return None if rest == "position" else 0
    return None if moment == "step" else axes.get(parameter)


def _numbers(name: str, files: Sequence[Path], features: range | None) -> Tensor:
    """A list of features in a checkpoint: those that are asked for, numbered from the first of them."""
    parts = []
    for path in files:
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor(name))
    numbers = torch.cat(parts)
    return numbers if features is None else numbers[(numbers >= features.start) & (numbers < features.stop)] - features.start


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
