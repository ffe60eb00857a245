import json
from pathlib import Path

import numpy as np
import pytest

from gsae.errors import CheckpointError
from gsae.report.runs import read_runs


def append(directory, *lines):
    with (directory / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_runs_are_found_at_and_below_each_directory_once(tmp_path, fake_run, monkeypatch):
    run = fake_run().write(tmp_path)
    fake_run(lambda_=0.25).write(tmp_path)
    assert len(read_runs([tmp_path])) == 2
    assert len(read_runs([run])) == 1
    monkeypatch.chdir(tmp_path)
    assert len(read_runs([tmp_path, run, Path("resid.15")])) == 2


def test_runs_are_sorted_by_layer_objective_and_lambda(tmp_path, fake_run):
    for site, objective, lambda_ in [
        ("resid.15", "gated", 0.25),
        ("resid.15", "gated", 0.1),
        ("resid.15", "relu", 0.3),
        ("resid.2", "gated", 0.3),
    ]:
        fake_run(site, objective, lambda_).write(tmp_path)
    found = [(run.site, run.objective, run.lambda_) for run in read_runs([tmp_path])]
    assert found == [("resid.2", "gated", 0.3), ("resid.15", "relu", 0.3), ("resid.15", "gated", 0.1), ("resid.15", "gated", 0.25)]


def test_a_finished_run_is_read_whole(tmp_path, fake_run):
    fake = fake_run(l0=46.4)
    fake.write(tmp_path)
    (run,) = read_runs([tmp_path])
    assert (run.state, run.state_text, run.stop_reason) == ("finished", "finished", None)
    assert (run.step, run.rows) == (586, 586 * 512)
    assert run.dead_rows == 60_000
    assert run.metric("l0") == 46.4
    assert run.metric("max_decoder_cosine_mean") is None
    assert run.interval("l0") == (46.4 * 0.975, 46.4 * 1.025)
    assert run.interval("gamma") is None
    assert len(run.curves["rows"]) == len(run.curves["l0"])
    assert np.isnan(run.curves["dead_fraction"][0])


def test_pre_activation_loss_and_resampling_make_series_of_their_own_and_no_pre_activation_loss_is_0(tmp_path, fake_run):
    for resampling, pre_activation_loss in [(False, None), (False, 0.03125), (True, 0.03125), (True, 0.0)]:
        fake_run(resampling=resampling, pre_activation_loss=pre_activation_loss).write(tmp_path)
    assert [(run.series, run.pre_activation_loss) for run in read_runs([tmp_path])] == [
        ("gated", 0.0),
        ("gated + pre-activation loss", 0.03125),
        ("gated + resampling", 0.0),
        ("gated + pre-activation loss + resampling", 0.03125),
    ]


def test_a_run_without_results_is_not_evaluated(tmp_path, fake_run):
    fake_run(is_evaluated=False, end="unfinished").write(tmp_path)
    (run,) = read_runs([tmp_path])
    assert run.state_text == "unfinished, not evaluated"
    assert run.metric("l0") is None
    assert run.last("l0") == pytest.approx(46.4, rel=0.1)


def test_a_run_that_went_on_after_its_evaluation_says_so(tmp_path, fake_run):
    directory = fake_run(end="unfinished").write(tmp_path)
    assert read_runs([tmp_path])[0].state_text == "unfinished"
    append(directory, {"kind": "step", "step": 350, "rows": 179_200, "l0": 40.0, "fvu": 0.3, "dead_fraction": None, "dead_rows": 60_000})
    assert read_runs([tmp_path])[0].state_text == "unfinished, evaluated at step 298"


def test_a_run_that_has_logged_nothing_yet_is_read(tmp_path, fake_run):
    directory = fake_run(is_evaluated=False).write(tmp_path)
    (directory / "metrics.jsonl").unlink()
    (run,) = read_runs([tmp_path])
    assert (run.state, run.rows, run.dead_fraction, run.last("l0")) == ("unfinished", 0, None, None)


def test_a_stopped_run_gives_its_reason(tmp_path, fake_run):
    fake_run(end="stopped", l0=0.6).write(tmp_path)
    (run,) = read_runs([tmp_path])
    assert run.state == "stopped"
    assert run.stop_reason == "L0 0.62 over the last 50 steps is under 1"


def test_a_stopped_run_that_went_on_is_not_stopped(tmp_path, fake_run):
    directory = fake_run(end="stopped").write(tmp_path)
    append(directory, {"kind": "step", "step": 200, "rows": 102_400, "l0": 40.0, "fvu": 0.3, "dead_fraction": None, "dead_rows": 60_000})
    (run,) = read_runs([tmp_path])
    assert (run.state, run.stop_reason) == ("unfinished", None)
    append(directory, {"kind": "finished", "step": 586, "rows": 300_032, "dead_fraction": 0.5, "dead_rows": 60_000, "seconds": 3.0})
    (run,) = read_runs([tmp_path])
    assert (run.state, run.dead_fraction) == ("finished", 0.5)


def test_each_resampling_event_is_joined_with_its_outcome(tmp_path, fake_run):
    fake_run(resampling=True).write(tmp_path)
    (run,) = read_runs([tmp_path])
    refused, resampled, idle = run.events
    assert refused.refused is not None
    assert refused.refused.startswith("the firing interval holds")
    assert (resampled.dead, resampled.resampled, resampled.alive, resampled.outcome_rows) == (184, 184, 171, 512 * 205)
    assert (idle.dead, idle.resampled, idle.refused, idle.alive) == (0, 0, None, None)


def test_a_line_that_is_being_written_is_left_out(tmp_path, fake_run):
    directory = fake_run(end="unfinished").write(tmp_path)
    (before,) = read_runs([tmp_path])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "finished", "step": 586, "ro')
    (after,) = read_runs([tmp_path])
    assert (after.state, after.rows) == ("unfinished", before.rows)


def test_runs_of_two_pipelines_with_one_name_are_told_apart(tmp_path, fake_run):
    fake_run().write(tmp_path / "first")
    fake_run().write(tmp_path / "second")
    fake_run(lambda_=0.25).write(tmp_path / "second")
    labels = {run.label for run in read_runs([tmp_path / "first", tmp_path / "second"])}
    assert labels == {"first/resid.15/gated-m2304-l0.175-s0", "second/resid.15/gated-m2304-l0.175-s0", "gated-m2304-l0.25-s0"}


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory; give run directories"):
        read_runs([tmp_path / "nowhere"])


def test_a_foreign_directory_is_named(tmp_path, fake_run):
    fake_run().write(tmp_path / "runs")
    (tmp_path / "store").mkdir()
    with pytest.raises(CheckpointError, match=r"store: no run.json in it or below"):
        read_runs([tmp_path / "runs", tmp_path / "store"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "not json", r"run.json: cannot be read as JSON"),
        ("run.json", '{"format": 3}', r"run.json: format is 3, this version of gsae reads 1 and 2"),
        ("run.json", "[]", r"run.json: format is None"),
        ("run.json", '{"format": 1}', r"lacks or garbles 'name'"),
        ("results.json", '{"format": 1, "metrics": {}}', r"results.json: lacks or garbles 'intervals'; run gsae evaluate again"),
        ("metrics.jsonl", '{"kind": "step"\n', r"metrics.jsonl: a line is not JSON"),
        ("metrics.jsonl", '{"step": 3}\n', r"lacks or garbles 'kind'"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, fake_run, file, content, message):
    directory = fake_run().write(tmp_path)
    (directory / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_runs([tmp_path])
    assert "\n" not in str(caught.value)
