import csv
import io

import pytest

from gsae.report.runs import read_runs
from gsae.report.tables import COLUMNS, MORE_COLUMNS, results_csv

HEADER = (
    "run,site,objective,resampling,pre_activation_loss,lambda,seed,rows,num_features,l0,fvu,mse,gamma,loss_recovered,ce_clean,ce_spliced,ce_zero,dead_fraction,"
    "delta_ce,not_seen_fraction,dead_rows,state"
)


@pytest.fixture
def runs(tmp_path, fake_run):
    fake_run(resampling=True).write(tmp_path)
    fake_run(objective="gated-no-aux", lambda_=0.3, end="unfinished", is_evaluated=False).write(tmp_path)
    return read_runs([tmp_path])


def cell(column, run):
    return next(c for c in COLUMNS if c.title == column).cell(run)


def test_the_csv_has_the_promised_header_and_full_numbers(runs, fake_run):
    text = results_csv(runs)
    assert text.splitlines()[0] == HEADER
    first, second = csv.DictReader(io.StringIO(text))
    expected = fake_run(resampling=True).results()["metrics"]
    assert float(first["loss_recovered"]) == expected["loss_recovered"]
    assert float(first["fvu"]) == expected["fvu"]
    assert (first["resampling"], first["lambda"], first["rows"], first["dead_rows"]) == ("true", "0.175", "300032", "60000")
    assert (second["l0"], second["loss_recovered"], second["state"]) == ("", "", "unfinished, not evaluated")


def test_the_weight_of_pre_activation_loss_is_shown(tmp_path, fake_run):
    fake_run().write(tmp_path)
    fake_run(pre_activation_loss=0.03125).write(tmp_path)
    runs = read_runs([tmp_path])
    assert [line["pre_activation_loss"] for line in csv.DictReader(io.StringIO(results_csv(runs)))] == ["0.0", "0.03125"]
    column = next(column for column in MORE_COLUMNS if column.title == "pre-activation loss")
    assert [column.cell(run).text for run in runs] == ["\u2013", "0.03125"]


def test_every_table_shows_l0(runs):
    for columns in (COLUMNS, MORE_COLUMNS):
        assert "L0" in [column.title for column in columns]


def test_a_cell_has_its_interval_or_its_rows_below(runs):
    evaluated = runs[0]
    assert cell("L0", evaluated).text == "46.4"
    assert cell("L0", evaluated).note == "45.2 \u2013 47.6"  # 46.4 x 0.975 and x 1.025
    assert cell("dead", evaluated).note == "in 60\u2009k rows"
    assert cell("not seen", evaluated).note == "in 22\u2009k rows"
    assert cell("ΔCE", evaluated).text.startswith("+")


def test_a_run_that_was_not_evaluated_shows_training_s_l0_marked_and_no_other_quality(runs):
    waiting = runs[1]
    assert cell("L0", waiting).note == "in training"
    assert cell("L0", waiting).sort == waiting.last("l0")
    assert cell("loss recovered", waiting).text == "\u2013"
    assert cell("loss recovered", waiting).sort is None
    assert cell("not seen", waiting).note == ""
