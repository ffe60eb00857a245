"""An inspection as a person reads it. In: an inspection. Out: tables on a terminal, one plain line a row of them elsewhere."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from gsae.inspect.measure import QUANTILES, Dropped, Inspection, SiteInspection, median_of_bins
from gsae.store.manifest import Share
from gsae.store.statistics import NORM_MULTIPLES

_SHOWN_TOKENS = 8
POOR_RATIO = 2.0
"""Times as many rows of one document in a batch as after a perfect shuffle, above which a larger window is advised."""


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(inspection: Inspection) -> list[Table]:
    """The tables of an inspection."""
    sites = inspection.sites
    quantiles = ["median" if share == 0.5 else f"{share:.0%} below" for share in QUANTILES]
    large = [f"above {multiple}x" for multiple in NORM_MULTIPLES]
    return [
        Table("rows a lane", ["site", "rows", "least", "mean", "most"], [_lane_cells(site) for site in sites]),
        Table(
            "what storing costs",
            ["site", "type", "share of the variance"],
            [[site.manifest.name, inspection.manifest.dtype, f"{site.manifest.storage_fvu:.2g}"] for site in sites],
        ),
        Table(
            "norms of kept rows",
            ["site", "scale", *quantiles, "largest", "calibrated median", "bound", "rows read"],
            [_norm_cells(site) for site in sites],
        ),
        Table("share of rows / of squared norm", ["site", "of", *large], [cells for site in sites for cells in _large_cells(site)]),
        Table(
            "dropped rows",
            ["site", "reason", "rows", "median norm", "commonest tokens"],
            [
                [site.manifest.name, reason, *_dropped_cells(dropped)]
                for site in sites
                for reason, dropped in site.dropped.items()
                if dropped.rows
            ],
        ),
        Table(
            "mixing",
            ["site", "batch rows", "window rows", "others of a row's document in its batch", "after a perfect shuffle", "ratio"],
            [_mixing_cells(site) for site in sites],
        ),
    ]


def advice(inspection: Inspection) -> str | None:
    """What to change in training, in one line."""
    poor = {
        site.manifest.name: site.mixing.ratio
        for site in inspection.sites
        if site.mixing.ratio and site.mixing.ratio > POOR_RATIO and site.mixing.window_rows < site.manifest.rows
    }
    if not poor:
        return None
    (name, ratio), window_rows = max(poor.items(), key=lambda item: item[1]), inspection.sites[0].mixing.window_rows
    return (
        f"windows of {window_rows:,} rows mix poorly: rows of one document meet {ratio:.1f} times as often as after a perfect shuffle "
        f"({name}); raise train.window_rows"
    )


def show(inspection: Inspection) -> None:
    """Write the tables and the advice to stdout."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _show_rich(tables(inspection))
    else:
        _show_plainly(tables(inspection))
    line = advice(inspection)
    if line:
        sys.stdout.write(f"{line}\n")


def _show_plainly(shown: list[Table]) -> None:
    for table in shown:
        for name, *cells in table.rows:
            values = ", ".join(f"{column} {cell}" for column, cell in zip(table.columns[1:], cells, strict=True))
            sys.stdout.write(f"{name}, {table.title}: {values}\n")


def _show_rich(shown: list[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for table in shown:
        grid = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
        for number, name in enumerate(table.columns):
            is_text = number == 0 or name in ("of", "reason", "commonest tokens")
            grid.add_column(name, justify="left" if is_text else "right")
        for cells in table.rows:
            grid.add_row(*map(Text, cells))  # tokens may look like markup
        console.print(grid)
        console.print()


def _lane_cells(site: SiteInspection) -> list[str]:
    rows = site.lane_rows
    ends = [f"{count:,} (lane {rows.index(count)})" for count in (min(rows), max(rows))]
    return [site.manifest.name, f"{sum(rows):,}", ends[0], f"{sum(rows) / len(rows):,.0f}", ends[1]]


def _norm_cells(site: SiteInspection) -> list[str]:
    described = site.manifest
    norms = [*site.quantiles.values(), described.median_norm, described.max_norm]
    return [described.name, f"{described.scale:.4g}", *(f"{norm:,.4g}" for norm in norms), f"{site.norm_rows:,}"]


def _large_cells(site: SiteInspection) -> Iterator[list[str]]:
    for label, shares in (("kept", site.manifest.kept_above), ("kept and outliers", site.manifest.candidates_above)):
        yield [site.manifest.name, label, *(_share_cell(shares[multiple]) for multiple in NORM_MULTIPLES)]


def _share_cell(share: Share) -> str:
    return f"{_percent(share.rows_fraction)} / {_percent(share.squared_norm_fraction)}"


def _percent(fraction: float) -> str:
    return "0" if fraction == 0 else "<0.01%" if fraction < 0.0001 else f"{fraction:.2%}"


def _dropped_cells(dropped: Dropped) -> list[str]:
    norm = f"{median_of_bins(dropped.norms):.3g}x" if dropped.norms else "-"
    if dropped.tokens is None:
        tokens = "not recorded in this store"
    else:
        tokens = " ".join(f"{json.dumps(token, ensure_ascii=False)} {rows:,}" for token, rows in dropped.tokens[:_SHOWN_TOKENS])
    return [f"{dropped.rows:,}", norm, tokens or "-"]


def _mixing_cells(site: SiteInspection) -> list[str]:
    mixing = site.mixing
    part = f" (from {mixing.perfect_from_rows:,} rows)" if mixing.perfect_from_rows < site.manifest.rows else ""
    ratio = "-" if mixing.ratio is None else f"{mixing.ratio:.2f}"
    others = [f"{mixing.same_document_rows:.3g}", f"{mixing.perfect_same_document_rows:.3g}{part}"]
    return [site.manifest.name, f"{mixing.batch_rows:,}", f"{mixing.window_rows:,}", *others, ratio]
