"""`gsae status`: how far each stage of a config is. In: a config, and what is on the disk. Out: a line a stage; for scripts two words.

Nothing is loaded, hashed or changed, so it may be asked while a stage runs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
from safetensors import SafetensorError

from gsae.config import Config
from gsae.errors import StoreError
from gsae.evaluate.progress import PROGRESS_FILE
from gsae.evaluate.results import TrainedRun, evaluation_identity, is_evaluated
from gsae.llm.load import describe
from gsae.sae.formats import DESCRIPTION_FILE
from gsae.store import manifest as manifests
from gsae.store.finish import is_finished
from gsae.store.opening import store_of
from gsae.store.parts import KEPT_FOLDER, WAITING_FILE, num_parts, read_used
from gsae.store.progress import read_records
from gsae.store.runs import PILOTS_DIRECTORY, Checkpoint, checkpoints, find_runs, read_metrics, read_run
from gsae.store.stopping import read_stop
from gsae.train.ledger import PILOTS_FILE, read_entries
from gsae.train.plan import BankSpec, outline, plan_banks

State = Literal["ended", "stopped", "waiting", "unfinished"]
"""Nothing is left to do; stopped on request; waiting for a part of the store; under way, killed, or not begun."""


@dataclass(frozen=True)
class Status:
    """How far a stage is."""

    state: State
    text: str
    """How much is done of how much."""
    mark: str
    """One word that changes whenever more is done."""
    stopped_at: str = ""
    """When it was stopped."""


def harvest_status(config: Config) -> Status:
    """Of the harvest, by its shards."""
    store = Path(config.store_directory)
    if config.harvest.is_remote:
        return Status("ended", f"the store is at {config.store_directory}", "remote")
    kept = [json.loads(path.read_text()) for path in sorted((store / KEPT_FOLDER).glob("part-*.json"))]
    stores = [store] if config.corpus.parts == 1 else sorted(store.glob("part-[0-9]*"))
    lanes = [(each, int(path.stem)) for each in stores for path in sorted((each / "progress").glob("*.jsonl"))]
    shards = sum(not record.is_gap for each, lane in lanes for record in read_records(each, lane))
    shards += sum(lane["shards"] for content in kept for lane in content["lanes"])
    text = f"{shards:,} shards in {store}"
    is_over = is_finished(store) if config.corpus.parts == 1 else read_used(store).is_over
    if is_over:
        return Status("ended", text, str(shards))
    is_waiting = config.corpus.parts > 1 and bool(stores) and all(is_finished(each) for each in stores)
    return _open_status("harvest", store, is_waiting, text, str(shards))


def train_status(config: Config) -> Status:
    """Of the training, by the steps of the runs' last checkpoints."""
    output = Path(config.output)
    try:
        manifest = manifests.load(store_of(config))
    except StoreError:
        return Status("unfinished", "there is no whole store yet", "0")
    banks = plan_banks(config, outline(manifest))
    runs = [(output / bank.site / run.name, bank.total_steps) for bank in banks for run in bank.runs]
    lasts = [_last_line(directory) for directory, _ in runs]
    ended = sum(last is not None and last["kind"] in ("finished", "stopped") for last in lasts)
    done = sum(_newest_step(directory) for directory, _ in runs)
    pilots = sum(_pilot_steps(output, bank) for bank in banks)
    of_pilots = f", {pilots:,} steps of pilots" if pilots else ""
    text = f"{ended} of {len(runs)} runs have ended, {done:,} of {sum(steps for _, steps in runs):,} steps are saved{of_pilots}"
    mark = f"{ended}/{done}/{pilots}"
    if ended == len(runs):
        return Status("ended", text, mark)
    return _open_status("train", output, num_parts(manifest) > 1 and (output / WAITING_FILE).exists(), text, mark)


def evaluate_status(config: Config) -> Status:
    """Of the evaluation, by the runs that have results, and the batches of one that is under way."""
    output = Path(config.output)
    found = [run for run in find_runs(output) if checkpoints(run)]
    if not found:
        return Status("unfinished", "there is no run yet", "0")
    try:
        manifest = manifests.load(store_of(config))
    except StoreError:
        return Status("unfinished", "there is no whole store", "0")
    identity = evaluation_identity(config, manifest, describe(config.llm))
    done = sum(is_evaluated(_trained(run, checkpoints(run)[-1]), identity) for run in found)
    text, mark = f"{done} of {len(found)} runs have the results of their newest checkpoint", f"{done}"
    if done == len(found):
        return Status("ended", text, mark)
    batches = _evaluated_batches(output / PROGRESS_FILE)
    if batches:
        text, mark = f"{text}, {batches:,} batches of the others are saved", f"{done}/{batches}"
    return _open_status("evaluate", output, False, text, mark)


STATUS: dict[str, Callable[[Config], Status]] = {"harvest": harvest_status, "train": train_status, "evaluate": evaluate_status}
"""By the name of the stage."""


def _open_status(stage: str, directory: Path, is_waiting: bool, text: str, mark: str) -> Status:
    """Of a stage that has not ended."""
    stop = read_stop(directory)
    if stop is not None and stop.stage == stage:
        return Status("stopped", text, mark, stop.time)
    return Status("waiting" if is_waiting else "unfinished", text, mark)


def _last_line(run: Path) -> dict[str, Any] | None:
    last = None
    for last in read_metrics(run):  # noqa: B007
        pass
    return last


def _newest_step(run: Path) -> int:
    return max((checkpoint.step for checkpoint in checkpoints(run)), default=0)


def _pilot_steps(output: Path, bank: BankSpec) -> int:
    """Steps of the pilots that have ended, and of the checkpoints of those that have not."""
    folder = output / bank.site
    ended = sum(pilot.rows for entry in read_entries(folder / PILOTS_FILE).values() for pilot in entry.pilots) // bank.batch_rows
    begun = folder / PILOTS_DIRECTORY
    return ended + sum(_newest_step(run.parent) for run in begun.rglob("run.json"))


def _trained(run: Path, checkpoint: Checkpoint) -> TrainedRun:
    """The run, its files not hashed."""
    sha256 = json.loads((checkpoint.path / DESCRIPTION_FILE).read_text())["sha256"]
    return TrainedRun(run, read_run(run), checkpoint.path, checkpoint.step, sha256)


def _evaluated_batches(path: Path) -> int:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return int(json.loads(file.metadata()["progress"])["batches"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return 0
