from dataclasses import replace

import pytest

from gsae.report.runs import read_runs
from gsae.report.summary import definitions, evaluations, site_facts, states, title


@pytest.fixture
def runs(tmp_path, fake_run):
    fake_run().write(tmp_path)
    fake_run(lambda_=0.25, end="stopped").write(tmp_path)
    fake_run("resid.2", end="unfinished", is_evaluated=False).write(tmp_path)
    return read_runs([tmp_path])


def test_states_are_counted(runs):
    assert states(runs) == "3 runs at 2 sites: 1 finished, 1 stopped, 1 unfinished, 1 not evaluated"


def test_the_evaluation_names_model_text_and_amount(runs):
    (evaluation,) = evaluations(runs)
    assert {fact.term: fact.text for fact in evaluation.facts} == {
        "Model": "smollm2",
        "Text": "mediawiki: enwiki-pages-articles1.xml.bz2",
        "Evaluated on": "23,808 tokens, 186 contexts, 97 documents",
    }
    assert {fact.term: fact.text for fact in evaluation.settings}["text.held_out_fraction"] == "0.2"
    assert title(runs) == "Sparse autoencoders on smollm2"


@pytest.mark.parametrize(("documents", "is_within"), [(29, True), (30, False)])
def test_under_thirty_documents_speak_for_themselves_only(tmp_path, fake_run, documents, is_within):
    fake_run(documents=documents).write(tmp_path)
    (evaluation,) = evaluations(read_runs([tmp_path]))
    assert evaluation.is_within_documents == is_within


def test_runs_evaluated_on_other_text_are_a_setting_of_their_own(tmp_path, fake_run):
    fake_run(documents=97).write(tmp_path)
    fake_run(lambda_=0.25, documents=40).write(tmp_path)
    assert len(evaluations(read_runs([tmp_path]))) == 2


def test_of_many_files_the_first_is_named_and_the_rest_counted(runs):
    identity = {"llm": {"name": "random"}, "text": {"format": "text", "files": {"first": "0.txt", "number": 12, "bytes": 36}}}
    (evaluation,) = evaluations([replace(runs[1], results=replace(runs[1].results, identity=identity))])
    assert [fact.text for fact in evaluation.facts[:2]] == ["a random Llama", "text: 0.txt and 11 more files"]
    settings = {fact.term: fact.text for fact in evaluation.settings}
    assert settings["text.files.number"] == "12"


def test_a_site_s_cross_entropies_stand_once_unless_they_differ(runs):
    facts = {fact.term: fact.text for fact in site_facts(runs[1:])}
    assert facts["CE clean"] == "3.312"
    assert facts["CE zero"] == "22.600"
    assert facts["kept rows"] == "21,960"
    assert facts["identity recovers"] == "1.000"
    results = runs[1].results
    other = replace(runs[1], results=replace(results, metrics={**results.metrics, "ce_clean": 3.5}))
    assert {fact.term: fact.text for fact in site_facts([*runs[1:], other])}["CE clean"] == "3.312 / 3.500"


def test_the_evaluation_defines_its_metrics_and_the_report_its_own(runs):
    found = {fact.term: fact.text for fact in definitions(runs)}
    assert found["L0"] == "mean number of features on (f > 0) over kept rows"
    assert found["novel_metric"] == "a metric that the report has no word for"
    assert "the stated number of rows" in found["dead"]
    assert "dead_fraction" not in found
    assert "L0" not in {fact.term for fact in definitions(runs[:1])}


def test_without_an_evaluation_there_is_no_setting_and_no_model(runs):
    assert evaluations(runs[:1]) == []
    assert site_facts(runs[:1]) == []
    assert title(runs[:1]) == "Sparse autoencoders"
