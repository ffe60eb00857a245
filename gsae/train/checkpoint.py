"""A run's state to and from a checkpoint directory. In: a `Run` at a step. Out: the same run, bit for bit, on any number of ranks.

Beside the SAE itself (`sae.safetensors`, `sae.json`) stand `state.safetensors` (optimizer, firing counters) and `state.json`
(the run's counters). All of it is the same on every rank when it is taken, so it does not depend on their number.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gsae.sae.formats import load_sae, save_sae
from gsae.store.runs import (
    METRICS_FILE,
    Checkpoint,
    checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_run,
    require_whole,
    write_checkpoint,
)
from gsae.train.bank import Bank, Run

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
    """The checkpoint of each run: of that step, or the last one of a run that has ended; None at step 0."""


def save_run(bank: Bank, run: Run) -> None:
    """Write a checkpoint of one run. A collective: counters are brought together, the first rank writes, all ranks wait."""
    run.firing.synchronise(bank.group)
    bank.group.on_first(lambda: _write(bank, run))


def _write(bank: Bank, run: Run) -> None:
    def fill(directory: Path) -> None:
        described = {key: value for key, value in read_run(run.directory).items() if key not in ("format", "settings")}
        save_sae(directory, run.sae, {**described, "step": bank.step, "rows": bank.rows})
        optimizer = {f"optimizer.{name}": value.cpu().contiguous() for name, value in run.optimizer.state_tensors().items()}
        firing = {f"firing.{name}": value.cpu().contiguous() for name, value in run.firing.state_tensors().items()}
        save_file({**optimizer, **firing, "resampled": run.resampled.cpu()}, directory / STATE_TENSORS_FILE)
        counters = {name: getattr(run, name) for name in COUNTERS}
        (directory / STATE_FILE).write_text(json.dumps({"step": bank.step, **counters}, indent=1) + "\n")

    write_checkpoint(run.directory, bank.step, fill)
    prune_checkpoints(run.directory, bank.config.keep_checkpoints)


def find_resume_point(directories: dict[str, Path]) -> ResumePoint:
    """Where the runs in these directories, by name, can all continue. Files only; one rank calls this.

    Raises:
        CheckpointError: the newest checkpoint of a run is damaged.
    """
    ended: dict[str, Path | None] = {}
    unfinished: dict[str, dict[int, Checkpoint]] = {}
    for name, directory in directories.items():
        found = checkpoints(directory)
        newest = newest_checkpoint(directory) if found else None
        if newest is not None and _has_ended(newest.path):
            ended[name] = newest.path
        else:
            unfinished[name] = {checkpoint.step: checkpoint for checkpoint in found}
    common = set.intersection(*(set(steps) for steps in unfinished.values())) if unfinished else set()
    step = max(common, default=0)
    for steps in unfinished.values():
        if step:
            require_whole(steps[step].path)
    return ResumePoint(step, ended | {name: steps[step].path if step else None for name, steps in unfinished.items()})


def _has_ended(checkpoint: Path) -> bool:
    state = _read_state(checkpoint)
    return bool(state["finished"]) or state["stopped"] is not None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    return state


def restore_run(run: Run, checkpoint: Path) -> None:
    """Take over a checkpoint's state. Every rank calls this."""
    saved = load_sae(checkpoint)
    run.sae.load_state_dict(saved.sae.state_dict())
    tensors = load_file(checkpoint / STATE_TENSORS_FILE)
    run.optimizer.load_state_tensors(_below("optimizer.", tensors))
    run.firing.load_state_tensors(_below("firing.", tensors))
    run.resampled = tensors["resampled"].to(run.resampled.device)
    state = _read_state(checkpoint)
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
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
