"""Runs as tables. In: runs. Out: the columns of the page and of report.md with their cells, and the lines of results.csv."""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gsae.report.numbers import Formatter, count, decimals, interval, percent, plain, short_count, significant
from gsae.report.runs import Run

_CSV_METRICS_FIRST = ("l0", "fvu", "mse", "gamma", "loss_recovered", "ce_clean", "ce_spliced", "ce_zero")
_CSV_METRICS_LAST = ("delta_ce", "not_seen_fraction")


@dataclass(frozen=True)
class Cell:
    """One number of one run."""

    text: str
    note: str
    """What stands below it in small print: its 95 % interval, or the rows it holds for."""
    sort: float | None
    """By what the column sorts; None goes last."""


@dataclass(frozen=True)
class Column:
    """One column of a table of runs."""

    title: str
    value: Callable[[Run], float | None]
    text: Formatter
    note: Callable[[Run], str] = lambda run: ""

    def cell(self, run: Run) -> Cell:
        """The cell of one run."""
        value = self.value(run)
        return Cell(self.text(value), self.note(run) if value is not None else "", value)


def _measured(title: str, metric: str, text: Formatter) -> Column:
    """A metric of the evaluation, with its 95 % interval where there is one."""
    return Column(title, lambda run: run.metric(metric), text, lambda run: interval(run.interval(metric), text))


def _measured_or_trained(title: str, metric: str, text: Formatter) -> Column:
    """A metric of the evaluation, or before it the last logged value of training, marked as such."""

    def note(run: Run) -> str:
        return interval(run.interval(metric), text) if run.results else "in training"

    return Column(title, lambda run: run.metric(metric) if run.results else run.last(metric), text, note)


def _rows_note(rows: float | None) -> str:
    return "" if rows is None else f"in {short_count(rows)} rows"


_L0 = _measured_or_trained("L0", "l0", significant)
COLUMNS = (
    Column("λ", lambda run: run.lambda_, plain),
    _L0,
    _measured_or_trained("FVU", "fvu", decimals(3)),
    _measured("loss recovered", "loss_recovered", decimals(4)),
    Column(
        "ΔCE", lambda run: run.metric("delta_ce"), decimals(3, signed=True), lambda run: interval(run.interval("delta_ce"), decimals(3))
    ),
    _measured("CE spliced", "ce_spliced", decimals(3)),
    _measured("\N{GREEK SMALL LETTER GAMMA}", "gamma", decimals(3)),
    Column("dead", lambda run: run.dead_fraction, percent, lambda run: _rows_note(run.dead_rows)),
    Column(
        "not seen",
        lambda run: run.metric("not_seen_fraction"),
        percent,
        lambda run: _rows_note(run.results.counts.get("kept_rows") if run.results else None),
    ),
)
MORE_COLUMNS = (
    _L0,
    _measured("L0 median", "l0_median", significant),
    _measured("L0 p90", "l0_p90", significant),
    _measured("MSE", "mse", significant),
    _measured("cosine", "cosine", decimals(3)),
    _measured("FVU, dropped rows", "fvu_dropped", decimals(3)),
    _measured("KL", "kl", decimals(3)),
    _measured("recovered, mean ablation", "loss_recovered_mean", decimals(4)),
    _measured("recovered, all rows", "loss_recovered_all_rows", decimals(4)),
    _measured("dense", "dense_fraction", percent),
    _measured("decoder cosine", "max_decoder_cosine_mean", decimals(3)),
    Column("pre-activation loss", lambda run: run.pre_activation_loss or None, plain),
    Column("features", lambda run: run.num_features, count),
    Column("rows", lambda run: run.rows, short_count),
)


def l0_cell(run: Run) -> Cell:
    """The run's L0, for tables that show nothing else of its quality."""
    return _L0.cell(run)


def results_csv(runs: Iterable[Run]) -> str:
    """One line a run, numbers in full; empty where a run was not evaluated."""
    buffer = io.StringIO()
    header = ["run", "site", "objective", "resampling", "pre_activation_loss", "lambda", "seed", "rows", "num_features"]
    header += [*_CSV_METRICS_FIRST, "dead_fraction", *_CSV_METRICS_LAST, "dead_rows", "state"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for run in runs:
        line: list[object] = [
            run.label,
            run.site,
            run.objective,
            str(run.resampling).lower(),
            run.pre_activation_loss,
            run.lambda_,
            run.seed,
            run.rows,
            run.num_features,
        ]
        line += [
            *map(run.metric, _CSV_METRICS_FIRST),
            run.dead_fraction,
            *map(run.metric, _CSV_METRICS_LAST),
            run.dead_rows,
            run.state_text,
        ]
        writer.writerow(line)
    return buffer.getvalue()
