"""The report stage. In: directories that hold runs. Out: report.html, report.md, results.csv and plots/ in one directory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from gsae import __version__
from gsae.errors import CheckpointError
from gsae.report import numbers, plots, summary, tables
from gsae.report.runs import Run, read_runs
from gsae.store.durable import write_aside

PAGE_FILE = "report.html"


def run_report(directories: Sequence[Path], output: Path | None) -> Path:
    """Write the report of all runs at or below some directories.

    Args:
        directories: run directories, or directories that hold some.
        output: where the report goes; None takes the directory that holds all the given ones.

    Returns:
        Path of the page.

    Raises:
        CheckpointError: a directory is missing, holds no run, or a run's files cannot be read; or there is no place for the report.
    """
    runs = read_runs(directories)
    output = output or _common_directory(directories)
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: is a file; give a directory for the report")
    plots.write_plots(runs, output / "plots")
    templates = _templates()
    facts = _facts(runs)
    _write(output / "results.csv", tables.results_csv(runs))
    _write(output / "report.md", templates.get_template("page.md").render(facts))
    _write(output / PAGE_FILE, templates.get_template("page.html").render(facts, panels=_panels(runs)))
    return output / PAGE_FILE


def _common_directory(directories: Sequence[Path]) -> Path:
    if len(directories) == 1:
        return directories[0]
    common = Path(os.path.commonpath([directory.resolve() for directory in directories]))
    if common == Path(common.anchor):
        raise CheckpointError(
            f"{', '.join(map(str, directories))}: no directory holds all of them; say where the report goes with --output"
        )
    return common


def _facts(runs: Sequence[Run]) -> dict[str, Any]:
    """What both templates show."""
    return {
        "version": __version__,
        "title": summary.title(runs),
        "states": summary.states(runs),
        "evaluations": summary.evaluations(runs),
        "sites": summary.by_site(runs),
        "site_facts": summary.site_facts,
        "definitions": summary.definitions(runs),
        "columns": tables.COLUMNS,
        "more_columns": tables.MORE_COLUMNS,
        "l0_cell": tables.l0_cell,
        "series": list({run.series: run for run in runs}.values()),
        "figures": plots.FIGURES,
        "panel_titles": plots.PANEL_TITLES,
        "stopped": [run for run in runs if run.state == "stopped"],
        "resampled": [run for run in runs if run.resampling],
    }


def _panels(runs: Sequence[Run]) -> dict[str, dict[str, Markup]]:
    """Each panel of each site as an element of the page, by panel and site."""
    sites = list(enumerate(summary.by_site(runs)))
    return {
        panel: {site: Markup(plots.panel_svg(panel, of_site, f"{panel}-{i}")) for i, (site, of_site) in sites} for panel in plots.PANELS
    }


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(count=numbers.count, short_count=numbers.short_count, percent=numbers.percent, plain=numbers.plain)
    return templates


def _write(path: Path, text: str) -> None:
    with write_aside(path) as file:
        file.write(text.encode())
