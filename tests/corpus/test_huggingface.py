"""Data sets of the library `datasets`: from a small hub over HTTP, each client a process, and from directories."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import as_lines, rows_of
from data_set_hub import running_data_set_hub

from gsae.config import CorpusConfig, DataSetConfig
from gsae.corpus.documents import corpus_identity, read_documents
from gsae.corpus.formats import read_entries
from gsae.errors import CorpusError

NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens
ROWS = rows_of({f"page {number}": f"text {number}" for number in range(900)})
CLIENT = """
import json, sys
from gsae.config import CorpusConfig, DataSetConfig
from gsae.corpus.formats import describe, read_entries
from gsae.errors import GsaeError
for words in sys.argv[1:]:
    settings = json.loads(words)
    config = CorpusConfig(format="datasets", path=settings.pop("path"), dataset=DataSetConfig(**settings))
    try:
        print(json.dumps({"entries": [(entry.id, entry.raw) for entry in read_entries(config)], "dataset": describe(config)["dataset"]}))
    except GsaeError as error:
        print(json.dumps({"error": str(error)}))
"""


def as_parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**row, "number": number} for number, row in enumerate(rows)]), file, row_group_size=400)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub():
    with running_data_set_hub() as running:
        yield running


@pytest.fixture
def client(tmp_path):
    """A process that reads data sets, with a cache of its own; what it says of each."""

    def read(*wanted, **environment):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        kept |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-c", CLIENT, *map(json.dumps, wanted)]
        done = subprocess.run(command, capture_output=True, text=True, env=kept, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return read


def test_the_hub_gives_the_same_documents_streamed_and_downloaded_and_the_commit_is_recorded(hub, client):
    first = hub.push("alice/pages", {"train.parquet": as_parquet(ROWS[:500])})
    second = hub.push("alice/pages", {"train.parquet": as_parquet(ROWS), "test.parquet": as_parquet(ROWS[:3])})
    hub.push("alice/lines", {"train.jsonl": as_lines(ROWS).encode()})
    pages = {"path": "alice/pages"}
    wanted = [pages, {**pages, "streaming": False}, {**pages, "revision": first}, {**pages, "split": "test"}, {"path": "alice/lines"}]
    streamed, downloaded, older, test, lines = client(*wanted, HF_ENDPOINT=hub.address)
    expected = [[row["id"], row["text"]] for row in ROWS]
    assert streamed["entries"] == downloaded["entries"] == lines["entries"] == expected
    assert older["entries"] == expected[:500]
    assert test["entries"] == expected[:3]
    described = {"subset": "default", "split": "train", "name": "alice/pages"}
    assert streamed["dataset"] == downloaded["dataset"] == {**described, "revision": second}
    assert older["dataset"] == {**described, "revision": first}
    # What was downloaded is there without a network, but not another commit in its stead.
    kept, other = client({**pages, "streaming": False}, {**pages, "streaming": False, "revision": first}, HF_HUB_OFFLINE="1")
    assert kept == downloaded
    assert first in other["error"]
    assert second in other["error"]


def test_of_a_streamed_parquet_only_the_columns_that_are_needed_come_over_the_network(hub, client):
    rows = [{**row, "lines": os.urandom(4000).hex()} for row in ROWS]
    data = as_parquet(rows)
    hub.push("alice/wide", {"train.parquet": data})
    hub.sent_bytes = 0
    (answer,) = client({"path": "alice/wide"}, HF_ENDPOINT=hub.address)
    assert len(answer["entries"]) == len(rows)
    assert hub.sent_bytes < len(data)


def test_what_the_hub_refuses_is_said_in_one_line(hub, client):
    hub.push("alice/few", {"train.jsonl": as_lines(ROWS[:2]).encode()})
    hub.push("alice/gated", {"train.jsonl": as_lines(ROWS[:2]).encode(), "README.md": b"terms"})
    hub.gated.add("alice/gated")
    cases = {
        "gated": ({"path": "alice/gated"}, "data set alice/gated: .*gated.*hf auth login"),
        "unknown": ({"path": "alice/none"}, "data set alice/none: .*doesn't exist.*check corpus.path"),
        "revision": ({"path": "alice/few", "revision": "v9"}, "Revision 'v9' doesn't exist"),
        "split": ({"path": "alice/few", "split": "exam"}, "exam.*train.*check corpus.path and corpus.dataset"),
        "subset": ({"path": "alice/few", "subset": "de"}, "'de' not found.*default"),
    }
    answers = client(*(wanted for wanted, _ in cases.values()), HF_ENDPOINT=hub.address)
    for answer, (_, says) in zip(answers, cases.values(), strict=True):
        check_refusal(answer["error"], says)
    (offline,) = client({"path": "alice/few"}, HF_HUB_OFFLINE="1")
    check_refusal(offline["error"], "data set alice/few: Couldn't reach.*save_to_disk")


def check_refusal(message, says):
    with pytest.raises(CorpusError, match=says):
        raise CorpusError(message)
    assert "\n" not in message


def refusal(config):
    with pytest.raises(CorpusError) as raised:
        list(read_documents(config, "training"))
    return str(raised.value)


@pytest.mark.parametrize("path", ["", "json", "nowhere/at/all", "/nowhere"])
def test_a_path_that_can_be_no_data_set_is_refused_before_the_hub_is_asked(path):
    check_refusal(refusal(CorpusConfig(format="datasets", path=path)), f"corpus.path is '{path}', which is no directory.*OWNER/NAME")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text_column": "body"}, r"no column 'body' \(it has text, number, empty\); set corpus.text_column"),
        ({"id_column": "key"}, r"no column 'key' .*set corpus.id_column"),
        ({"text_column": "number"}, r"column 'number' holds int64, not strings; set corpus.text_column to text or empty"),
        ({"text_column": "empty"}, r"holds no datasets text; check it, corpus.format and corpus.text_column \(empty\)"),
        ({}, r"row 2: null under 'text'; leave such rows out"),
        ({"text_column": "empty", "id_column": "text"}, r"row 2: null under 'text'; set another corpus.id_column"),
        ({"dataset": DataSetConfig(split="exam")}, r"no split 'exam'; set corpus.dataset.split to train or test"),
    ],
)
def test_a_column_that_cannot_be_read_is_named_in_one_line(tmp_path, settings, says):
    rows = datasets.Dataset.from_dict({"text": ["one", None], "number": [1, 2], "empty": ["", " "]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    message = refusal(CorpusConfig(format="datasets", path=str(tmp_path / "saved"), **settings))
    check_refusal(message, says)


def test_rows_without_an_id_are_named_by_their_number(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "", "three"]}).save_to_disk(str(tmp_path / "saved"))
    config = CorpusConfig(format="datasets", path=str(tmp_path / "saved"))
    assert [(entry.id, entry.raw) for entry in read_entries(config)] == [("row:1", "one"), ("row:3", "three")]


def test_a_saved_data_set_keeps_its_identity_where_it_is_moved(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "here"))
    before = corpus_identity(CorpusConfig(format="datasets", path=str(tmp_path / "here")))
    (tmp_path / "here").rename(tmp_path / "there")
    assert corpus_identity(CorpusConfig(format="datasets", path=str(tmp_path / "there"))) == before
    assert set(before["dataset"]) == {"fingerprint", "rows"}
    assert set(asdict(CorpusConfig())) - set(before) == {"path", "text_column", "id_column", "parts"}


def test_a_damaged_directory_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    check_refusal(refusal(CorpusConfig(format="datasets", path=str(tmp_path / "data"))), "doesn't contain any data files")
    (tmp_path / "data" / "a.parquet").write_bytes(as_parquet(ROWS)[:-9])
    check_refusal(refusal(CorpusConfig(format="datasets", path=str(tmp_path / "data"))), "data: Parquet magic bytes not found.*complete")
