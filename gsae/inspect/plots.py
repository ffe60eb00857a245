"""The picture of a store. In: an inspection. Out: norms.png and norms.svg: the norms by layer, and a histogram a site.

Norms of dropped rows are there where the store records them: attention sinks are the first rows of segments, far to the right.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gsae.inspect.measure import Inspection, SiteInspection, median_of_bins, norm_of_bin
from gsae.store.durable import write_aside

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "norms",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e2e5e9",
    "legend.frameon": False,
}
_KEPT = "#2b64c5"
_REASONS = {
    "first": ("#20856c", "o", "first of a segment"),
    "outlier": ("#bd6a14", "^", "outlier"),
    "special": ("#7a8491", "s", "special token"),
}
"""Colour, marker and name of what is dropped; rows that are not finite have no norm."""
_COLUMNS = 4


def write_plots(inspection: Inspection, directory: Path) -> list[Path]:
    """Write the picture as `norms.png` and `norms.svg`; returns their paths."""
    paths = [directory / "norms.png", directory / "norms.svg"]
    with mpl.rc_context(_STYLE):
        figure = _draw(inspection)
        for path in paths:
            metadata: dict[str, Any] = {"Date": None, "Creator": None} if path.suffix == ".svg" else {}
            with write_aside(path) as file:
                figure.savefig(file, format=path.suffix[1:], dpi=160, metadata=metadata)
    return paths


def _draw(inspection: Inspection) -> Figure:
    num_panels = 1 + len(inspection.sites)
    columns = min(num_panels, _COLUMNS if num_panels > _COLUMNS else 2)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    _draw_layers(next(panels), inspection.sites)
    for site in inspection.sites:
        _draw_histogram(next(panels), site, inspection.manifest.outlier_multiple)
    for unused in panels:
        unused.set_axis_off()
    named = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
    return figure


def _draw_layers(axes: Axes, sites: list[SiteInspection]) -> None:
    """Median norm of kept rows with the range of 80 % of them, and the median norm of dropped ones, by layer."""
    layers = [site.manifest.layer for site in sites]
    axes.set(title="norms by layer", xlabel="layer", ylabel="norm", yscale="log", xticks=layers if len(layers) < 10 else None)
    low, middle, high = ([site.quantiles[share] for site in sites] for share in (0.1, 0.5, 0.9))
    axes.fill_between(layers, low, high, color=_KEPT, alpha=0.25, linewidth=0, label="80 % of kept rows")
    axes.plot(layers, middle, color=_KEPT, marker="D", markersize=5, label="kept rows")
    for reason, (colour, marker, name) in _REASONS.items():
        points = [
            (site.manifest.layer, median_of_bins(bins) * site.manifest.median_norm)
            for site in sites
            if (bins := site.dropped[reason].norms if reason in site.dropped else None)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linestyle="--", label=f"dropped: {name}")
    _label_plainly(axes.yaxis)


def _label_plainly(axis: Axis) -> None:
    """Numbers at 1, 2 and 5 (at 1 only over more than two decades) of a logarithmic axis, as they are written."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _draw_histogram(axes: Axes, site: SiteInspection, outlier_multiple: float) -> None:
    """Rows by norm in multiples of the median, both logarithmic; kept rows that were not read are taken to be like those that were."""
    axes.set(title=site.manifest.name, xlabel="norm / median norm", ylabel="rows", xscale="log", yscale="log")
    _draw_bins(axes, site.norms, site.manifest.rows / site.norm_rows, color=_KEPT, fill=True, alpha=0.45)
    for reason, (colour, _, _) in _REASONS.items():
        bins = site.dropped[reason].norms if reason in site.dropped else None
        if bins:
            _draw_bins(axes, bins, 1.0, color=colour, linewidth=1.4)
    axes.axvline(outlier_multiple, color="#667080", linewidth=0.8, linestyle=":", label="bound on kept rows")
    axes.set_ylim(bottom=0.7)
    _label_plainly(axes.xaxis)


def _draw_bins(axes: Axes, bins: dict[int, int], weight: float, **look: Any) -> None:
    numbers = range(min(bins), max(bins) + 2)
    counts = [weight * bins.get(number, 0) for number in numbers[:-1]]
    axes.stairs(counts, [norm_of_bin(number) for number in numbers], baseline=0.5, **look)
