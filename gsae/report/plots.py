"""The report's plots. In: runs. Out: panels of one site as SVG for the page, and figures of all sites as PNG and SVG files.

A panel is drawn on an `Axes` and knows nothing of where it will stand. Colour and marker tell the objective, a hollow marker
or a dashed line resampling, a pale marker or a dash-dotted line pre-activation loss, a fainter line a smaller lambda.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

from gsae.report.numbers import decimals, plain, short_count, significant
from gsae.report.runs import Run
from gsae.store.durable import write_aside

_INK, _MUTED, _RULE, _SURFACE = "#1d2329", "#667080", "#e2e5e9", "#fefefe"
_COLOURS = {"relu": "#7a8491", "gated": "#2b64c5", "gated-no-aux": "#bd6a14", "gated-norm-weighted": "#20856c"}
_GUEST_MARKERS = {"saelens": "P", "dictionary_learning": "X"}
_MARKERS = {"relu": "o", "gated": "s", "gated-no-aux": "^", "gated-norm-weighted": "D"}
_THEME = {
    _INK: "--ink",
    _MUTED: "--muted",
    _RULE: "--rule",
    _SURFACE: "--surface",
    **{colour: f"--{objective}" for objective, colour in _COLOURS.items()},
}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "figure.facecolor": _SURFACE,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}
_MAX_CURVE_POINTS = 240
_PALE = 0.35
"""Opacity of what is neither filled nor hollow, as in page.css."""
_TITLES = {"loss_recovered": "loss recovered", "fvu": "FVU", "l0": "L0", "dead_fraction": "dead share"}

Panel = Callable[[Axes, Sequence[Run]], None]


def panel_svg(panel: str, runs: Sequence[Run], identifier: str) -> str:
    """One panel of one site as an SVG element to stand in the page: colours follow the page's theme, points tell their run.

    Args:
        panel: a key of `PANELS`.
        runs: runs of one site.
        identifier: prefix that keeps the element's ids apart from other panels'.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": identifier}):
        figure = Figure(figsize=(4.3, 3.0), layout="constrained")
        PANELS[panel](figure.subplots(), runs)
        svg = _save_svg(figure, transparent=True)
    label = f"{PANEL_TITLES[panel]} at {runs[0].site}"
    return _fit_into_page(svg, identifier, label, {_identifier(run): _summary(run) for run in runs})


def write_plots(runs: Sequence[Run], directory: Path) -> list[str]:
    """Write each figure, one panel a site, as `<name>.png` and `<name>.svg`; returns the names."""
    sites = [list(of_site) for _, of_site in groupby(runs, key=lambda run: run.site)]
    for name, panels in FIGURES.items():
        with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = _draw_figure(panels, sites)
            with write_aside(directory / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=160)
            figure.set_layout_engine("none")  # it is laid out now: the SVG need not do so again
            with write_aside(directory / f"{name}.svg") as file:
                file.write(_save_svg(figure, transparent=False).encode())
    return list(FIGURES)


def _draw_figure(panels: Sequence[str], sites: Sequence[Sequence[Run]]) -> Figure:
    figure = Figure(figsize=(4.3 * len(sites), 3.0 * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), len(sites), squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes, runs in zip(row, sites, strict=True):
            PANELS[panel](axes, runs)
            axes.set_title(runs[0].site)
    series = {run.series: run for runs in sites for run in runs}
    handles = [Line2D([], [], label=label, **_line_look(run), **_marker_look(run)) for label, run in series.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * len(sites)))
    return figure


def _draw_tradeoff(axes: Axes, runs: Sequence[Run], metric: str) -> None:
    """L0 against a metric with 95 % intervals; the runs that differ only in lambda are joined. Stopped runs are left out."""
    drawn = [run for run in runs if run.state != "stopped" and _is_finite(run.metric("l0")) and _is_finite(run.metric(metric))]
    axes.set(xlabel="L0", ylabel=_TITLES[metric])
    if not drawn:
        _say_empty(axes, "no evaluated run")
        return
    for line in _lines_of(drawn):
        points = [(_value(run, "l0"), _value(run, metric)) for run in line]
        axes.plot(*zip(*sorted(points), strict=True), alpha=0.5, **_line_look(line[0]))
        for run, (l0, value) in zip(line, points, strict=True):
            look: dict[str, Any] = {"color": _colour(run), "linewidth": 0.8, "alpha": 0.7}
            axes.plot(run.interval("l0") or (l0, l0), (value, value), **look)
            axes.plot((l0, l0), run.interval(metric) or (value, value), **look)
            axes.plot([l0], [value], gid=_identifier(run), linestyle="none", **_marker_look(run))
    _set_log_if_wide(axes, "x", [_value(run, "l0") for run in drawn])


def _draw_curve(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """A training curve of every run; dotted lines stand where features were resampled."""
    axes.set(xlabel="rows", ylabel=_TITLES[name])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    seen: list[float] = []
    for run in runs:
        # The last line always stays in.
        every = max(1, -(-len(run.curves["rows"]) // _MAX_CURVE_POINTS))
        rows, values = run.curves["rows"][::-every][::-1], run.curves[name][::-every][::-1]
        axes.plot(rows, values, alpha=_strength(run, runs), gid=_identifier(run), **_line_look(run))
        seen.extend(values[np.isfinite(values)])
    if not seen:
        _say_empty(axes, "no logged step")
    axes.set_xlim(left=0)
    for event_rows in sorted({event.rows for run in runs for event in run.events if event.resampled}):
        axes.axvline(event_rows, color=_MUTED, linewidth=0.8, linestyle=":")
    if name == "dead_fraction":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set_ylim(bottom=0, top=None if any(seen) else 0.01)
    else:
        _set_log_if_wide(axes, "y", seen)


def _draw_density(axes: Axes, runs: Sequence[Run]) -> None:
    """Histogram of the features' density, over evaluation."""
    axes.set(xlabel="density (share of rows a feature is on)", ylabel="features")
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:.0f}}}$"))
    drawn = [run for run in runs if run.results and run.results.histogram_counts and run.state != "stopped"]
    for run in drawn:
        assert run.results is not None, "only evaluated runs are drawn"
        edges = np.array(run.results.histogram_edges)
        middles = (edges[:-1] + edges[1:]) / 2
        axes.plot(middles, run.results.histogram_counts, alpha=_strength(run, runs), gid=_identifier(run), **_line_look(run))
    if not drawn:
        _say_empty(axes, "no evaluated run")


PANELS: dict[str, Panel] = {
    "loss_recovered": lambda axes, runs: _draw_tradeoff(axes, runs, "loss_recovered"),
    "fvu": lambda axes, runs: _draw_tradeoff(axes, runs, "fvu"),
    "training_fvu": lambda axes, runs: _draw_curve(axes, runs, "fvu"),
    "training_l0": lambda axes, runs: _draw_curve(axes, runs, "l0"),
    "training_dead": lambda axes, runs: _draw_curve(axes, runs, "dead_fraction"),
    "density": _draw_density,
}
PANEL_TITLES = {
    "loss_recovered": "L0 against loss recovered",
    "fvu": "L0 against FVU",
    "training_fvu": "FVU over training",
    "training_l0": "L0 over training",
    "training_dead": "dead share over training",
    "density": "density of features",
}
FIGURES = {
    "l0_loss_recovered": ["loss_recovered"],
    "l0_fvu": ["fvu"],
    "training_curves": ["training_fvu", "training_l0", "training_dead"],
    "density": ["density"],
}


def _lines_of(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs that differ only in lambda."""

    def key(run: Run) -> tuple[str, float, int, int]:
        return (run.series, run.pre_activation_loss, run.num_features, run.seed)

    for _, line in groupby(sorted(runs, key=key), key=key):
        yield list(line)


def _colour(run: Run) -> str:
    return _INK if run.library else _COLOURS.get(run.objective, _INK)


def _line_look(run: Run) -> dict[str, Any]:
    return {"color": _colour(run), "linestyle": "-." if run.pre_activation_loss else "--" if run.resampling else "-"}


def _marker_look(run: Run) -> dict[str, Any]:
    colour = _colour(run)
    face = _SURFACE if run.resampling else mpl.colors.to_rgba(colour, _PALE) if run.pre_activation_loss else colour
    marker = _GUEST_MARKERS.get(run.library, "p") if run.library else _MARKERS.get(run.objective, "v")
    return {"marker": marker, "markersize": 6, "markeredgecolor": colour, "markerfacecolor": face}


def _strength(run: Run, runs: Sequence[Run]) -> float:
    """Opacity that rises with lambda among the runs of a series."""
    lambdas = sorted({other.lambda_ or 0.0 for other in runs if other.series == run.series})
    return 1.0 if len(lambdas) == 1 else 0.4 + 0.6 * lambdas.index(run.lambda_ or 0.0) / (len(lambdas) - 1)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _value(run: Run, metric: str) -> float:
    value = run.metric(metric)
    assert value is not None, "only runs that have the metric are drawn"
    return value


def _set_log_if_wide(axes: Axes, axis: str, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span more than a factor of ten."""
    if not values or min(values) <= 0 or max(values) < 10 * min(values):
        return
    steps = (1.0, 2.0, 5.0) if max(values) < 200 * min(values) else (1.0,)
    target = axes.xaxis if axis == "x" else axes.yaxis
    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    target.set_major_locator(LogLocator(subs=steps))
    target.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    target.set_minor_locator(NullLocator())


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_MUTED)
    axes.set(xticks=[], yticks=[])


def _identifier(run: Run) -> str:
    return "run-" + re.sub(r"[^A-Za-z0-9]+", "-", f"{run.site}-{run.label}")


def _summary(run: Run) -> str:
    l0, recovered, fvu = (run.metric(name) for name in ("l0", "loss_recovered", "fvu"))
    if l0 is None:
        return run.label
    return f"{run.label}: L0 {significant(l0)}, loss recovered {decimals(4)(recovered)}, FVU {decimals(3)(fvu)}"


def _save_svg(figure: Figure, transparent: bool) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def _fit_into_page(svg: str, identifier: str, label: str, titles: Mapping[str, str]) -> str:
    """The `<svg>` element alone: sized by the page, in its colours and font, ids prefixed, a title on what stands for a run."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">', svg, count=1)
    for run_id, title in titles.items():
        svg = svg.replace(f'<g id="{run_id}">', f'<g id="{run_id}"><title>{escape(title)}</title>')
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{identifier}-", svg)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("'DejaVu Sans'", "inherit")
