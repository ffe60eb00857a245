import re
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from gsae.report.plots import FIGURES, PANELS, _draw_figure, panel_svg, write_plots
from gsae.report.runs import read_runs


@pytest.fixture
def runs(tmp_path, fake_run):
    for lambda_, l0 in {0.12: 68.2, 0.175: 46.4}.items():
        fake_run(lambda_=lambda_, l0=l0).write(tmp_path)
        fake_run(lambda_=lambda_, l0=l0 + 2, resampling=True).write(tmp_path)
    fake_run(objective="gated-no-aux", l0=0.6, end="stopped").write(tmp_path)
    return read_runs([tmp_path])


def draw(panel, runs):
    axes = Figure().subplots()
    PANELS[panel](axes, runs)
    return axes


def legend_handles(runs):
    with matplotlib.rc_context():
        (legend,) = _draw_figure(["fvu"], [runs]).legends
        return legend.get_lines()


def points(axes):
    return {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() not in ("None", "")}


@pytest.mark.parametrize(("panel", "metric"), [("loss_recovered", "loss_recovered"), ("fvu", "fvu")])
def test_each_evaluated_run_is_a_point_and_a_stopped_one_is_not_drawn(runs, panel, metric):
    expected = {(run.metric("l0"), run.metric(metric)) for run in runs if run.state != "stopped"}
    assert len(expected) == 4
    assert points(draw(panel, runs)) == expected


def test_whiskers_span_the_95_percent_intervals(runs):
    axes = draw("loss_recovered", runs[:1])
    spans = [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axes.lines]
    l0, recovered = runs[0].metric("l0"), runs[0].metric("loss_recovered")
    assert (runs[0].interval("l0"), (recovered, recovered)) in spans
    assert ((l0, l0), runs[0].interval("loss_recovered")) in spans


def test_runs_that_differ_only_in_lambda_are_joined(runs):
    joined = [line for line in draw("fvu", runs).lines if line.get_marker() in ("None", "") and len(set(line.get_xdata())) == 2]
    spans = [tuple(line.get_xdata()) for line in joined]
    assert {(46.4, 68.2), (48.4, 70.2)} <= set(spans)  # without and with resampling


def test_runs_with_pre_activation_loss_are_a_line_and_look_like_themselves(tmp_path, fake_run):
    kinds = [(False, None), (True, None), (False, 0.03125), (True, 0.03125), (False, 0.1)]
    for number, (resampling, pre_activation_loss) in enumerate(kinds):
        for lambda_, l0 in {0.12: 60.0, 0.175: 40.0}.items():
            fake_run(lambda_=lambda_, l0=l0 + number, resampling=resampling, pre_activation_loss=pre_activation_loss).write(tmp_path)
    runs = read_runs([tmp_path])
    lines = [line for line in draw("fvu", runs).lines if line.get_marker() in ("None", "") and len(set(line.get_xdata())) == 2]
    assert {(40.0 + number, 60.0 + number) for number in range(5)} <= {tuple(line.get_xdata()) for line in lines}
    legend = {line.get_label(): (line.get_linestyle(), line.get_markerfacecolor()) for line in legend_handles(runs)}
    assert len(legend) == len(set(legend.values())) == 4


def test_a_pale_marker_follows_the_theme(tmp_path, fake_run):
    fake_run(pre_activation_loss=0.03125).write(tmp_path)
    svg = panel_svg("fvu", read_runs([tmp_path]), "panel")
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert re.search(r"fill: var\(--gated\);[^>]*fill-opacity: 0.35", svg)


def test_an_empty_panel_says_why(runs, tmp_path, fake_run):
    assert [text.get_text() for text in draw("loss_recovered", [runs[-1]]).texts] == ["no evaluated run"]
    directory = fake_run("resid.28", is_evaluated=False).write(tmp_path / "new")
    (directory / "metrics.jsonl").unlink()
    assert [text.get_text() for text in draw("training_l0", read_runs([directory])).texts] == ["no logged step"]


def test_curves_show_the_run_to_its_end_and_mark_resampling(runs):
    axes = draw("training_l0", [run for run in runs if run.resampling])
    curves = [line for line in axes.lines if line.get_linestyle() == "--"]
    events = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[-1] for line in curves] == [run.curves["rows"][-1] for run in runs if run.resampling]
    assert events == [512 * 147]  # the refused and the idle event are no event for the curve


def test_a_long_curve_is_thinned_and_keeps_its_end(runs):
    run = runs[0]
    for name in run.curves:
        run.curves[name].resize(5003, refcheck=False)
    run.curves["rows"][:] = range(5003)
    (line,) = draw("training_fvu", [run]).lines
    assert len(line.get_xdata()) <= 240
    assert line.get_xdata()[-1] == 5002


def test_wide_ranges_get_logarithmic_axes(runs):
    assert draw("training_l0", runs).get_yscale() == "log"
    assert draw("fvu", runs).get_xscale() == "linear"


def test_a_panel_stands_in_a_page_without_disturbing_it(runs):
    svg = panel_svg("loss_recovered", runs, "first")
    other = panel_svg("fvu", runs, "second")
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.get("width") is None
    assert root.get("role") == "img"
    assert "<style" not in svg
    assert "http" not in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "all colours follow the theme"
    identifiers = re.findall(r'\bid="([^"]*)"', svg)
    assert not set(identifiers) & set(re.findall(r'\bid="([^"]*)"', other))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', svg)) <= set(identifiers)


def test_a_point_tells_its_run(runs):
    titles = re.findall(r"<title>(.*?)</title>", panel_svg("loss_recovered", runs, "panel"))
    assert len(titles) == 4
    assert any(title.startswith("gated-m2304-l0.12-s0: L0 68.2, loss recovered 0.9") for title in titles)


def test_the_same_runs_give_the_same_bytes(runs):
    assert panel_svg("fvu", runs, "panel") == panel_svg("fvu", runs, "panel")


def test_figures_are_written_as_png_and_svg(runs, tmp_path):
    write_plots(runs[:2], tmp_path / "plots")
    found = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert found == sorted(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg"))
    for name in FIGURES:
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / "plots" / f"{name}.svg").read_text()
        ElementTree.fromstring(svg)
        assert tmp_path.name not in svg, "plots name no path of this machine"
