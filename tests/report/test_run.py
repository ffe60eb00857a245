import json

import pytest

from gsae.errors import CheckpointError
from gsae.report.run import run_report


@pytest.fixture
def quick_plots(monkeypatch):
    """Plots take most of a report's time; these tests are about the rest."""
    monkeypatch.setattr("gsae.report.run.plots.panel_svg", lambda panel, runs, identifier: "<svg></svg>")
    monkeypatch.setattr("gsae.report.run.plots.write_plots", lambda runs, directory: None)


@pytest.mark.usefixtures("quick_plots")
def test_the_report_goes_to_the_directory_that_holds_all_and_names_no_path_of_this_machine(tmp_path, fake_run):
    first, second = fake_run().write(tmp_path), fake_run("resid.2").write(tmp_path)
    assert run_report([first, second], None) == tmp_path / "report.html"
    written = {path for path in tmp_path.iterdir() if path.is_file()}
    assert {path.name for path in written} == {"report.html", "report.md", "results.csv"}
    for path in written:
        assert tmp_path.name not in path.read_text()


@pytest.mark.usefixtures("quick_plots")
def test_the_report_goes_where_it_is_told(tmp_path, fake_run):
    fake_run().write(tmp_path / "runs")
    assert run_report([tmp_path / "runs"], tmp_path / "a" / "b") == tmp_path / "a" / "b" / "report.html"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"resid.15"}


@pytest.mark.usefixtures("quick_plots")
def test_pre_activation_loss_is_named_and_defined(tmp_path, fake_run):
    fake_run(pre_activation_loss=0.03125).write(tmp_path)
    html = run_report([tmp_path], None).read_text()
    assert '<span class="series">gated + pre-activation loss</span>' in html
    assert "<dt>pre-activation loss</dt>" in html
    assert 'class="swatch gated pale"' in html


@pytest.mark.usefixtures("quick_plots")
def test_a_report_that_fails_leaves_the_old_one_whole(tmp_path, fake_run, monkeypatch):
    fake_run().write(tmp_path)
    page = run_report([tmp_path], None)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("gsae.store.durable.os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        run_report([tmp_path], None)
    assert page in before
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_in_the_report_s_place_is_an_error(tmp_path, fake_run):
    fake_run().write(tmp_path / "runs")
    (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match="out: is a file; give a directory"):
        run_report([tmp_path / "runs"], tmp_path / "out")


def test_directories_with_nothing_in_common_need_an_output(tmp_path, fake_run, monkeypatch):
    first, second = fake_run().write(tmp_path / "a"), fake_run().write(tmp_path / "b")
    monkeypatch.setattr("gsae.report.run.os.path.commonpath", lambda paths: "/")
    with pytest.raises(CheckpointError, match="say where the report goes with --output"):
        run_report([first, second], None)


@pytest.mark.usefixtures("quick_plots")
def test_what_runs_say_is_text_not_markup(tmp_path, fake_run):
    directory = fake_run(end="stopped").write(tmp_path)
    end = {"kind": "stopped", "step": 180, "rows": 92_160, "reason": "<script>alert(1)</script> & more"}
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(end) + "\n")
    page = run_report([tmp_path], None).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


@pytest.mark.usefixtures("quick_plots")
def test_without_an_evaluation_the_report_says_so_and_shows_no_quality(tmp_path, fake_run):
    fake_run(is_evaluated=False).write(tmp_path)
    page = run_report([tmp_path], None)
    for text in (page.read_text(), (tmp_path / "report.md").read_text()):
        assert "No run has been evaluated yet" in text
        assert "Quality at a given sparsity" not in text
        assert "not evaluated" in text
