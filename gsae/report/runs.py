"""Run directories as plain data. In: directories. Out: one `Run` for each run.json below them."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from gsae.errors import CheckpointError
from gsae.store.runs import METRICS_FILE, RESULTS_FILE, RUN_FILE, find_runs, read_metrics

State = Literal["finished", "stopped", "unfinished", "from elsewhere"]
Curve = np.ndarray[Any, np.dtype[np.float64]]
OBJECTIVES = ("relu", "gated", "gated-no-aux", "gated-norm-weighted")
_CURVES = ("l0", "fvu", "dead_fraction")
_FORMATS = {RUN_FILE: (1, 2), RESULTS_FILE: (1, 2)}


@dataclass(frozen=True)
class ResamplingEvent:
    """One resampling event of a run, and what became of the features it resampled."""

    rows: int
    """Rows of the run before the event."""
    dead: int
    dead_rows: int
    """Rows without firing after which a feature counted as dead."""
    candidate_rows: int
    resampled: int
    refused: str | None
    """Why the event was refused, if it was."""
    alive: int | None
    """Of the resampled features, those on again at `outcome_rows`; None before that."""
    outcome_rows: int | None


@dataclass(frozen=True)
class Results:
    """What evaluation found, as it stands in results.json."""

    metrics: Mapping[str, float]
    """Numbers by name; one that could not be computed is absent."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % intervals by name of the metric."""
    counts: Mapping[str, int]
    checks: Mapping[str, float]
    definitions: Mapping[str, str]
    identity: Mapping[str, Any]
    """LLM, text and settings: the same for all runs of an evaluation."""
    step: int
    """Step of the checkpoint that was evaluated."""
    histogram_edges: tuple[float, ...]
    """Edges of the bins of log10 density, rising."""
    histogram_counts: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One run: what was asked, how training went, and what evaluation found."""

    directory: Path
    name: str
    label: str
    """Its name, or where runs of several pipelines share it, its path."""
    site: str
    layer: int
    objective: str
    resampling: bool
    pre_activation_loss: float
    """Weight of the pre-activation loss of dead features, in multiples of lambda; 0 is without."""
    lambda_: float | None
    """None for a guest whose own files do not say."""
    library: str | None
    """Whose a guest is; None for runs that gsae trained here."""
    seed: int
    num_features: int
    d_model: int
    step: int
    """Steps made so far."""
    rows: int
    """Rows trained on so far."""
    state: State
    stop_reason: str | None
    dead_fraction: float | None
    dead_rows: int | None
    """The rows of the dead share's definition."""
    curves: Mapping[str, Curve]
    """`rows`, `l0`, `fvu` and `dead_fraction` over training, one value a logged step; NaN where there is none."""
    events: tuple[ResamplingEvent, ...]
    results: Results | None

    @property
    def series(self) -> str:
        """What the runs of one line in a plot share."""
        return (
            (f"{self.objective} of {self.library}" if self.library else self.objective)
            + (" + pre-activation loss" if self.pre_activation_loss else "")
            + (" + resampling" if self.resampling else "")
        )

    @property
    def evaluation_text(self) -> str:
        """What to know of its evaluation: nothing when the weights at the end of training were evaluated."""
        if self.results is None:
            return "not evaluated"
        return "" if self.results.step == self.step else f"evaluated at step {self.results.step}"

    @property
    def state_text(self) -> str:
        """Its state in words."""
        return f"{self.state}, {self.evaluation_text}" if self.evaluation_text else self.state

    @property
    def order(self) -> tuple[Any, ...]:
        """Key that sorts runs by site, objective and lambda."""
        rank = OBJECTIVES.index(self.objective) if self.objective in OBJECTIVES else len(OBJECTIVES)
        return (
            self.layer,
            self.site,
            self.library or "",  # guests come last
            rank,
            self.objective,
            self.resampling,
            self.pre_activation_loss,
            self.num_features,
            self.lambda_ or 0.0,
            self.seed,
            str(self.directory),
        )

    def metric(self, name: str) -> float | None:
        """A number of the evaluation, or None."""
        return self.results.metrics.get(name) if self.results else None

    def interval(self, name: str) -> tuple[float, float] | None:
        """A 95 % interval of the evaluation, or None."""
        return self.results.intervals.get(name) if self.results else None

    def last(self, name: str) -> float | None:
        """The last finite value of a training curve, or None."""
        values = self.curves[name]
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else None


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """All runs at or below the directories, by site, objective and lambda.

    Raises:
        CheckpointError: a directory is missing or holds no run, or a run's files cannot be read.
    """
    paths: dict[Path, Path] = {}
    for directory in directories:
        found = find_runs(directory)
        if not found:
            problem = "no run.json in it or below" if directory.is_dir() else "no such directory"
            raise CheckpointError(f"{directory}: {problem}; give run directories, or a directory that holds some (the config's output)")
        paths.update((path.resolve(), path) for path in found)
    runs = [_read_run(path) for path in paths.values()]
    return sorted(_with_labels(runs), key=lambda run: run.order)


def _with_labels(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs, those that share site and name labelled by their paths below the directory that holds all."""
    times = Counter((run.site, run.name) for run in runs)
    common = os.path.commonpath([run.directory.resolve() for run in runs])
    for run in runs:
        is_unique = times[run.site, run.name] == 1
        yield run if is_unique else replace(run, label=run.directory.resolve().relative_to(common).as_posix())


def _read_run(directory: Path) -> Run:
    asked = _read_object(directory / RUN_FILE)
    lines = _read_lines(directory)
    results = _read_results(directory / RESULTS_FILE)
    try:
        return _assemble(directory, asked, lines, results)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: {RUN_FILE} or {METRICS_FILE} lacks or garbles {error}; it was not written by gsae train"
        ) from error


def _assemble(directory: Path, asked: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], results: Results | None) -> Run:
    steps = [line for line in lines if line["kind"] == "step"]
    ends = [line for line in lines if line["kind"] in ("stopped", "finished")]
    # A run that was stopped and then continued has steps after that line, and later another one.
    end = ends[-1] if ends and (not steps or steps[-1]["step"] <= ends[-1]["step"]) else None
    dead: Mapping[str, Any] = next((line for line in reversed([*steps, *ends]) if line.get("dead_fraction") is not None), {})
    return Run(
        directory=directory,
        name=str(asked["name"]),
        label=str(asked["name"]),
        site=str(asked["site"]),
        layer=int(asked["layer"]),
        objective=str(asked["objective"]),
        resampling=bool(asked["resampling"]),
        pre_activation_loss=float(asked.get("pre_activation_loss", 0.0)),  # runs of before there was pre-activation loss do not say
        lambda_=None if asked["lambda"] is None else float(asked["lambda"]),
        library=(asked.get("guest") or {}).get("library"),
        seed=int(asked["seed"]),
        num_features=int(asked["num_features"]),
        d_model=int(asked["d_model"]),
        step=max((int(line["step"]) for line in lines), default=0),
        rows=max((int(line["rows"]) for line in lines), default=0),
        state="from elsewhere" if asked.get("guest") else "unfinished" if end is None else end["kind"],
        stop_reason=end["reason"] if end is not None and end["kind"] == "stopped" else None,
        dead_fraction=dead.get("dead_fraction"),
        dead_rows=dead.get("dead_rows"),
        curves=_curves(steps),
        events=_events(lines),
        results=results,
    )


def _curves(steps: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    def column(name: str) -> Curve:
        return np.array([math.nan if step.get(name) is None else step[name] for step in steps], dtype=np.float64)

    return {name: column(name) for name in ("rows", *_CURVES)}


def _events(lines: Sequence[Mapping[str, Any]]) -> tuple[ResamplingEvent, ...]:
    outcomes = {line["event_step"]: line for line in lines if line["kind"] == "resampling_outcome"}
    events = []
    for line in lines:
        if line["kind"] == "resampling":
            outcome = outcomes.get(line["step"], {})
            events.append(
                ResamplingEvent(
                    rows=line["rows"],
                    dead=line["dead"],
                    dead_rows=line["dead_rows"],
                    candidate_rows=line["candidate_rows"],
                    resampled=line["resampled"],
                    refused=line["refused"],
                    alive=outcome.get("alive"),
                    outcome_rows=outcome.get("rows"),
                )
            )
    return tuple(events)


def _read_results(path: Path) -> Results | None:
    if not path.exists():
        return None
    found = _read_object(path)
    histogram = found.get("density_log10_histogram") or {"edges": [], "counts": []}
    try:
        return Results(
            metrics={name: float(value) for name, value in found["metrics"].items() if value is not None},
            intervals={name: (float(pair[0]), float(pair[1])) for name, pair in found["intervals"].items() if pair is not None},
            counts={name: int(value) for name, value in found["counts"].items()},
            checks={name: float(value) for name, value in found["checks"].items() if value is not None},
            definitions=dict(found["definitions"]),
            identity={name: value for name, value in found["identity"].items() if name != "checkpoint"},
            step=int(found["identity"]["checkpoint"]["step"]),
            histogram_edges=tuple(histogram["edges"]),
            histogram_counts=tuple(histogram["counts"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: lacks or garbles {error}; run gsae evaluate again") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, of the format this version reads."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); it was not written by gsae, or is damaged") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version not in _FORMATS[path.name]:
        known = " and ".join(map(str, _FORMATS[path.name]))
        raise CheckpointError(
            f"{path}: format is {version!r}, this version of gsae reads {known}; it was written by another program or version"
        )
    return cast(dict[str, Any], found)


def _read_lines(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics, in order."""
    try:
        return list(read_metrics(directory))
    except ValueError as error:
        raise CheckpointError(f"{directory / METRICS_FILE}: a line is not JSON ({error}); the file is damaged") from error
