"""Runs at trackers that people watch. In: the lines of their metrics, on the first rank of a group. Out: the same at TensorBoard and wandb.

    training --a queue--> a thread --accelerate's trackers--> event files, wandb

accelerate's trackers speak for the main process of the job; here each run has its own, on the first rank of the group that trains it.
`metrics.jsonl` stays the record: whatever a tracker does, training neither waits for it nor ends by it.
"""

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from gsae.config import TrackerName
from gsae.errors import ConfigError

TENSORBOARD_DIRECTORY = "tensorboard"
"""In a run's directory: its event files."""
WANDB_ID_FILE = "wandb/id"
"""In a run's directory: what wandb knows the run by."""
LEAVING_SECONDS = 8.0
"""How long the end of a site waits for trackers."""
UPLOAD_SECONDS = 5.0
"""How long wandb waits for the network when a run ends, and once more when the process does."""


_RECORD = "metrics.jsonl has it all"


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it."""

    name: str
    site: str
    directory: Path
    settings: Mapping[str, Any]
    """What it is trained by, as plain JSON values."""
    lines: Sequence[Mapping[str, Any]]
    """The lines of its metrics up to where it continues. Trackers get all of them in each session, so that none is missing or there
    twice, whatever the session before had given them when it ended."""


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ConfigError where the package of a tracker is missing, or where wandb has no credentials and is to go online."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"train.trackers has {name}, but its package is not installed: pip install 'gsae[{name}]', or take it out of train.trackers"
            )
    if "wandb" in names:
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True)).settings
        if settings.mode in ("online", "run") and not wandb.login(prompt=False, verify=False):
            raise ConfigError("train.trackers has wandb, which has no API key: run wandb login on this host, or set WANDB_MODE=offline")


class Tracking:
    """The trackers of the runs of one bank. Without names it does nothing.

    Args:
        names: what to track with.
        warn: says a line to the user, from any thread; called once for a tracker that fails, which is then left out.
    """

    def __init__(self, names: Sequence[TrackerName] = (), warn: Callable[[str], None] = lambda text: None) -> None:
        self._working, self._warn = set(names), warn
        self._trackers: dict[tuple[TrackerName, str], GeneralTracker] = {}
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: a tracker that hangs does not keep the process.
        self._thread = threading.Thread(target=self._work, daemon=True, name="tracking")
        if names:
            self._thread.start()

    def begin(self, run: TrackedRun) -> None:
        """Track a run from now on."""
        for name in tuple(self._working):
            self._jobs.put(partial(self._attempt, name, partial(self._start, name, run)))

    def log(self, run: str, line: Mapping[str, Any]) -> None:
        """A line of the metrics of the run of that name."""
        for name in tuple(self._working):
            self._jobs.put(partial(self._attempt, name, partial(self._log, name, run, line)))

    def close(self) -> None:
        """Wait a while until all is taken."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(LEAVING_SECONDS)
            if self._thread.is_alive():
                left = " and ".join(sorted(self._working))
                self._working.clear()
                self._warn(f"{left} did not take everything within {LEAVING_SECONDS:g} s of the end; {_RECORD}")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        ends = [threading.Thread(target=self._attempt, args=(name, run.finish), daemon=True) for (name, _), run in self._trackers.items()]
        for end in ends:
            end.start()
        for end in ends:
            end.join()

    def _attempt(self, name: TrackerName, job: Callable[[], None]) -> None:
        if name not in self._working:
            return
        try:
            job()
        except Exception as error:
            if name in self._working:
                self._working.discard(name)
                reason = " ".join(str(error).split()) or type(error).__name__
                self._warn(f"{name} takes no more, and training goes on without it; {_RECORD} ({reason})")

    def _start(self, name: TrackerName, run: TrackedRun) -> None:
        tracker = _TensorBoard(run) if name == "tensorboard" else _WandB(run)
        tracker.start()
        self._trackers[name, run.name] = tracker
        tracker.store_init_configuration(dict(_flat(run.settings, ".")))
        for line in run.lines:
            self._log(name, run.name, line)

    def _log(self, name: TrackerName, run: str, line: Mapping[str, Any]) -> None:
        values = {key: value for key, value in line.items() if key not in ("kind", "step")}
        self._trackers[name, run].log(dict(_flat({line["kind"]: values}, "/")), step=line["step"])


class _TensorBoard(TensorBoardTracker):  # type: ignore[misc]
    """An event file of a run. Those of earlier sessions stay, but readers pass over all that they say."""

    main_process_only = False

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(TENSORBOARD_DIRECTORY, run.directory, purge_step=0)

    def start(self) -> None:
        """Open the event file."""
        threading.excepthook = _but_for_tensorboard
        super().start()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Hyper-parameters of the run itself; accelerate would make another run of them, named by the time."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, {}):  # type: ignore[no-untyped-call]
            self.writer.file_writer.add_summary(summary)


class _WandB(WandBTracker):  # type: ignore[misc]
    """A run of a project, which a later session continues; wandb drops steps that it has."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        # The console is the training's.
        settings = wandb.Settings(console="off", silent=True, init_timeout=30, finish_timeout=UPLOAD_SECONDS)
        place = {"name": f"{run.site}/{run.name}", "group": run.site, "dir": run.directory}
        project = os.environ.get("WANDB_PROJECT", "gsae")
        super().__init__(project, id=_wandb_id(run.directory), resume="allow", reinit="create_new", settings=settings, **place)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The run's own config; accelerate would take the process' one."""
        self.run.config.update(values, allow_val_change=True)


def _but_for_tensorboard(failure: threading.ExceptHookArgs) -> None:
    """No traceback of a thread that could not write an event file: the next call raises what it met."""
    if not type(failure.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failure)


def _wandb_id(directory: Path) -> str:
    path = directory / WANDB_ID_FILE
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial_path = path.with_name(f"{path.name}.partial")
        partial_path.write_text(secrets.token_hex(8))
        partial_path.replace(path)
    return path.read_text()


def _flat(values: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, words and switches by their paths; lists as JSON, nothing for null."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, separator, f"{prefix}{name}{separator}")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else json.dumps(value)
