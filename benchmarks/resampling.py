"""What resampling does where features die. In: the run directories of a study. Out: one JSON line a setting and objective.

    bash launch/demo.sh
    .venv/bin/gsae train configs/study/resampling.yaml
    .venv/bin/python benchmarks/resampling.py runs/study/resampling

Runs with and without resampling are told apart by run.json. For each seed, the runs without at several lambdas give FVU as a function of L0
(linear in log L0 between neighbours, and beyond the ends by the nearest two); a run with resampling is compared with it at its own L0. FVU
and L0 are means over the last tenth of training, on training rows; dead shares come with the rows of their definition.
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
    """Share that each event found dead; without resampling, that at the same steps."""


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
    """At the run's own L0."""
    fvu_with: list[float]
    fvu_change_at_matched_l0: list[float]
    """With minus without."""
    halves_dead_share: bool
    """In the median over seeds."""


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
    plain = {run.seed: [other for other in runs if other.seed == run.seed and not other.is_resampled] for run in resampled}
    ended = [run.stopped for run in [*resampled, *itertools.chain(*plain.values())] if run.stopped]
    if ended:
        raise SystemExit(f"a run of {key} was stopped ({ended[0]}): this is not a setting to compare in")
    same = [next(other for other in plain[run.seed] if other.lambda_ == lambda_) for run in resampled]
    without, with_ = [run.dead for run in same], [run.dead for run in resampled]
    site, objective, learning_rate = key
    return Outcome(
        site=site,
        objective=objective,
        learning_rate=learning_rate,
        lambda_=lambda_,
        seeds=[run.seed for run in resampled],
        dead_rows=resampled[0].dead_rows,
        dead_at_events=[list(run.dead_at_events) for run in resampled],
        dead_without=without,
        dead_with=with_,
        l0_without=[run.l0 for run in same],
        l0_with=[run.l0 for run in resampled],
        fvu_without=[run.fvu for run in same],
        fvu_with=[run.fvu for run in resampled],
        fvu_change_at_matched_l0=[run.fvu - _at_l0(run.l0, plain[run.seed]) for run in resampled],
        halves_dead_share=statistics.median(with_) <= statistics.median(without) / 2,
    )


def _at_l0(l0: float, runs: Sequence[Ended]) -> float:
    """FVU that these runs would have at another L0."""
    curve = sorted((math.log(run.l0), run.fvu) for run in runs)
    upper = min(max(sum(x < math.log(l0) for x, _ in curve), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[upper - 1], curve[upper]
    return y0 + (y1 - y0) * (math.log(l0) - x0) / (x1 - x0)


if __name__ == "__main__":
    main()
