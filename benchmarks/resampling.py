"""What resampling does where features die. In: the run directories of a study. Out: one JSON line a setting and objective.

    bash launch/demo.sh
    .venv/bin/gsae train configs/study/resampling.yaml
    .venv/bin/python benchmarks/resampling.py runs/study/resampling

Runs with and without resampling are told apart by run.json. A run with it is compared with the one without of its seed and lambda, whose
FVU is moved to the same L0: how FVU goes with log L0 is a least-squares slope over the runs without resampling of a seed that has several
lambdas. FVU and L0 are means over the last tenth of training, on training rows; dead shares come with the rows of their definition.
"""

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gsae.store.runs import find_runs, read_metrics, read_run

LAST_FRACTION = 0.1
"""Share of the run over which FVU and L0 are averaged."""


@dataclass(frozen=True)
class Ended:
    """How a run went."""

    lambda_: float
    seed: int
    is_resampled: bool
    stopped: str | None
    fvu: float
    l0: float
    dead: float
    """Share of features at the end."""
    dead_rows: int
    dead_at_events: tuple[float, ...]
    """Share that each event found dead; none without resampling."""


@dataclass(frozen=True)
class Outcome:
    """What resampling did in one setting, a value a seed."""

    site: str
    objective: str
    learning_rate: float
    lambda_: float
    seeds: list[int]
    dead_rows: int
    dead_at_events: list[list[float]]
    dead_without: list[float]
    dead_with: list[float]
    l0_without: list[float]
    l0_with: list[float]
    fvu_without: list[float]
    """At their own L0."""
    fvu_with: list[float]
    fvu_per_log_l0: float
    """Change of FVU with the natural logarithm of L0, without resampling."""
    fvu_change_at_matched_l0: list[float]
    """With minus without, at the L0 of the run with."""
    dead_ratio: list[float]
    """With over without."""


def main() -> None:
    """Read the runs below each directory and print a line for each setting and objective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path)
    settings: dict[tuple[Any, ...], list[Ended]] = defaultdict(list)
    for run in itertools.chain.from_iterable(map(find_runs, parser.parse_args().directories)):
        described = read_run(run)
        if not described["pre_activation_loss"]:
            key = (described["site"], described["objective"], described["learning_rate"])
            settings[key].append(_read(run, described))
    for key, runs in sorted(settings.items()):
        for lambda_ in sorted({run.lambda_ for run in runs if run.is_resampled}):
            print(json.dumps({"benchmark": "resampling", **asdict(_compare(key, lambda_, runs))}))


def _read(run: Path, described: dict[str, Any]) -> Ended:
    metrics = list(read_metrics(run))
    steps = [line for line in metrics if line["kind"] == "step"]
    last = [line for line in steps if line["step"] > (1 - LAST_FRACTION) * steps[-1]["step"]]
    events = [line["dead"] / described["num_features"] for line in metrics if line["kind"] == "resampling"]
    stopped = next((line["reason"] for line in metrics if line["kind"] == "stopped"), None)
    return Ended(
        lambda_=described["lambda"],
        seed=described["seed"],
        is_resampled=described["resampling"],
        stopped=stopped,
        fvu=statistics.fmean(line["fvu"] for line in last),
        l0=statistics.fmean(line["l0"] for line in last),
        dead=steps[-1]["dead_fraction"],
        dead_rows=steps[-1]["dead_rows"],
        dead_at_events=tuple(events),
    )


def _compare(key: tuple[Any, ...], lambda_: float, runs: Sequence[Ended]) -> Outcome:
    resampled = sorted((run for run in runs if run.is_resampled and run.lambda_ == lambda_), key=lambda run: run.seed)
    without = [run for run in runs if not run.is_resampled]
    ended = [run.stopped for run in [*resampled, *without] if run.stopped]
    if ended:
        raise SystemExit(f"a run of {key} was stopped ({ended[0]}): this is not a setting to compare in")
    pairs = [(next(run for run in without if (run.lambda_, run.seed) == (lambda_, each.seed)), each) for each in resampled]
    site, objective, learning_rate = key
    slope = _fvu_per_log_l0(without)
    return Outcome(
        site=site,
        objective=objective,
        learning_rate=learning_rate,
        lambda_=lambda_,
        seeds=[run.seed for run in resampled],
        dead_rows=resampled[0].dead_rows,
        dead_at_events=[list(run.dead_at_events) for run in resampled],
        dead_without=[plain.dead for plain, _ in pairs],
        dead_with=[run.dead for run in resampled],
        l0_without=[plain.l0 for plain, _ in pairs],
        l0_with=[run.l0 for run in resampled],
        fvu_without=[plain.fvu for plain, _ in pairs],
        fvu_with=[run.fvu for run in resampled],
        fvu_per_log_l0=slope,
        fvu_change_at_matched_l0=[run.fvu - plain.fvu - slope * math.log(run.l0 / plain.l0) for plain, run in pairs],
        dead_ratio=[run.dead / plain.dead for plain, run in pairs],
    )


def _fvu_per_log_l0(runs: Sequence[Ended]) -> float:
    by_seed = [[run for run in runs if run.seed == seed] for seed in {run.seed for run in runs}]
    points = [(math.log(run.l0), run.fvu) for run in max(by_seed, key=len)]
    if len(points) < 2:
        raise SystemExit("no seed has runs without resampling at two lambdas, so FVU is not known at other L0s")
    return statistics.linear_regression(*zip(*points, strict=True)).slope


if __name__ == "__main__":
    main()
