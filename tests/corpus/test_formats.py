import bz2
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import as_lines

from gsae.config import CorpusConfig, DataSetConfig
from gsae.corpus.files import find_files
from gsae.corpus.formats import read_entries
from gsae.errors import ConfigError, CorpusError

PAGE = "<page><title>{title}</title><ns>{namespace}</ns><id>{id}</id>{redirect}<revision><id>9</id><text>{text}</text></revision></page>"


def page(id, text, namespace=0, redirect=""):
    return PAGE.format(title=f"T{id}", namespace=namespace, id=id, redirect=redirect, text=text)


def mediawiki(*pages):
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo/>{"".join(pages)}</mediawiki>'


def entries(path, format, **settings):
    return [(entry.id, entry.raw) for entry in read_entries(CorpusConfig(path=str(path), format=format, **settings))]


@pytest.fixture
def fever_rows():
    """Rows as FEVER has them: the first of a file is empty, and some pages have a name but no text."""
    blank = {"id": "", "text": "", "lines": ""}
    first = [
        blank,
        {"id": "1928_in_film", "text": "The following .", "lines": "0\tThe following ."},
        {"id": "Void", "text": "", "lines": "0\t"},
        {"id": "", "text": "Nameless ."},
    ]
    second = [blank, {"id": "Caf\u00e9_-LRB-bar-RRB-", "text": "A caf\u00e9 -LRB- bar -RRB- .", "lines": ""}]
    return {"wiki-001.jsonl": first, "wiki-002.jsonl": second}


@pytest.fixture
def fever_zip(tmp_path, fever_rows):
    path = tmp_path / "wiki-pages.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(fever_rows):
            archive.writestr(f"wiki-pages/{name}", as_lines(fever_rows[name]))
            archive.writestr(f"__MACOSX/wiki-pages/._{name}", b"\x00\x05\x16\x07 not json")
    return path


@pytest.mark.parametrize("name", ["dump.xml", "dump.xml.bz2", "dump.xml-p1p30.bz2"])
def test_a_dump_gives_its_articles_only(tmp_path, name):
    xml = mediawiki(
        page(1, "One."),
        page(2, "#REDIRECT", redirect='<redirect title="T1"/>'),
        page(3, "Talk", namespace=1),
        page(4, " \n"),
        page(5, "&lt;b&gt;"),
    )
    path = tmp_path / name
    path.write_bytes(bz2.compress(xml.encode()) if name.endswith("bz2") else xml.encode())
    assert entries(path, "mediawiki") == [("1", "One."), ("5", "<b>")]
    assert entries(tmp_path, "mediawiki") == entries(path, "mediawiki")


@pytest.mark.demo
def test_the_real_dump_has_106_articles(dump):
    found = entries(dump, "mediawiki")
    assert (len(found), len({id for id, _ in found})) == (106, 106)


def test_memory_does_not_grow_with_the_dump(tmp_path):
    path = tmp_path / "dump.xml"
    path.write_text(mediawiki(*(page(number, "word " * 50) for number in range(10_000))))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_entries(CorpusConfig(path=str(path)))) == 10_000
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 300_000 < path.stat().st_size / 10


def test_fever_reads_alike_from_the_zip_its_directory_and_its_files(tmp_path, fever_rows, fever_zip):
    pages = [("1928_in_film", "The following ."), ("Caf\u00e9_-LRB-bar-RRB-", "A caf\u00e9 -LRB- bar -RRB- .")]
    assert entries(fever_zip, "fever") == pages
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(fever_zip) as archive:
        archive.extractall(unpacked)
    assert entries(unpacked, "fever") == pages
    assert entries(unpacked / "wiki-pages" / "wiki-002.jsonl", "fever") == pages[1:]
    assert entries(unpacked / "**" / "wiki-00[1]*", "fever") == pages[:1]


def test_jsonl_lines_without_an_id_are_named_by_file_and_line(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "two"}\n\n{"id": null, "text": "three"}\n{"text": ""}\n')
    (tmp_path / "a.jsonl").write_text('{"id": 7, "text": "one", "url": "u"}\n')
    expected = [("7", "one"), ("b/x.jsonl:1", "two"), ("b/x.jsonl:3", "three")]
    assert entries(tmp_path, "jsonl") == expected
    assert entries(tmp_path / "**" / "*.jsonl", "jsonl") == expected


def test_columns_may_have_other_names(tmp_path):
    rows = [
        {"uid": "a", "id": 1, "body": "one", "text": None},
        {"uid": "b", "id": 2, "body": "", "text": None},
        {"uid": 7, "body": "three"},
    ]
    (tmp_path / "a.jsonl").write_text(as_lines(rows))
    pq.write_table(pa.Table.from_pylist([{**row, "uid": str(row["uid"])} for row in rows]), tmp_path / "a.parquet")
    for format in ("jsonl", "parquet"):
        assert entries(tmp_path, format, text_column="body", id_column="uid") == [("a", "one"), ("7", "three")]
        assert entries(tmp_path, format, text_column="body") == [("1", "one"), (f"a.{format}:3", "three")]


def test_parquet_rows_without_an_id_are_named_by_file_and_row_whatever_the_row_groups(tmp_path):
    texts = [f"text {number}" for number in range(20)]
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / "b.parquet")
    assert entries(tmp_path, "parquet") == [(f"{name}.parquet:{row}", text) for name in "ab" for row, text in enumerate(texts, start=1)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text_column": "body"}, "no column 'body' .it has text, number, blank.; set corpus.text_column to one of them"),
        ({"text_column": "number"}, "a.parquet: column 'number' holds int64, not strings; set corpus.text_column to text or blank"),
        ({}, "a.parquet, row 1300: null under 'text'; leave such rows out, or set another corpus.text_column"),
        ({"id_column": "key"}, "a.parquet: no column 'key' .*; set corpus.id_column to one of them"),
        ({"text_column": "blank", "id_column": "text"}, "row 1300: null under 'text'; set another corpus.id_column, or leave it out"),
    ],
)
def test_a_column_of_a_parquet_that_cannot_be_read_is_named_in_one_line(tmp_path, settings, says):
    texts = [*(f"text {number}" for number in range(1299)), None]
    pq.write_table(pa.table({"text": texts, "number": range(1300), "blank": [" "] * 1300}), tmp_path / "a.parquet", row_group_size=1000)
    with pytest.raises(CorpusError, match=says) as raised:
        entries(tmp_path, "parquet", **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text_column": ""}, "corpus.text_column is empty"),
        ({"id_column": ""}, "corpus.id_column is empty"),
        ({"format": "fever", "text_column": "lines"}, "do not go with corpus.format 'fever'"),
        ({"format": "text", "id_column": "name"}, "do not go with corpus.format 'text'"),
        ({"format": "jsonl", "dataset": DataSetConfig(subset="de")}, "corpus.dataset does not go with corpus.format 'jsonl'"),
    ],
)
def test_settings_of_another_format_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        CorpusConfig(**{"format": "jsonl", **settings})


def test_text_files_are_named_by_their_path_below_the_fixed_part_of_the_pattern(tmp_path):
    for name in ("books/one.txt", "books/old/two.txt", "books/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"This is {name}.")
    (tmp_path / "books/blank.txt").write_text(" \n")
    assert [id for id, _ in entries(tmp_path / "books", "text")] == ["old/two.txt", "one.txt"]
    assert entries(tmp_path / "*" / "*.md", "text") == [("books/notes.md", "This is books/notes.md.")]
    assert entries(tmp_path / "books/one.txt", "text") == [("one.txt", "This is books/one.txt.")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert [file.name for file in find_files(CorpusConfig(path=str(tmp_path / "a[1].txt"), format="text"))] == ["a[1].txt"]


@pytest.mark.parametrize(
    ("format", "name", "content", "says"),
    [
        ("mediawiki", "missing.xml.bz2", None, "missing.xml.bz2.*is not there.*dumps.wikimedia.org"),
        ("fever", "missing.zip", None, "missing.zip.*is not there.*https://fever.ai/download/fever/wiki-pages.zip"),
        ("jsonl", "*.jsonl", None, "no file matches.*name .jsonl files"),
        ("text", "*", None, "no file matches.*glob pattern"),
        ("mediawiki", "cut.xml", mediawiki(page(1, "One."))[:-30].encode(), "cut.xml: not readable as mediawiki.*complete"),
        ("mediawiki", "cut.bz2", bz2.compress(mediawiki(page(1, "One.")).encode())[:-9], "cut.bz2: not readable as mediawiki.*complete"),
        ("mediawiki", "page.xml", b"", "page.xml: not readable as mediawiki"),
        ("jsonl", "a.jsonl", b'{"text": "one"}\n{"text": "tw', "a.jsonl, line 2: not JSON.*complete"),
        ("jsonl", "a.jsonl", b'{"text": "\xff"}', "a.jsonl, line 1: not JSON"),
        ("jsonl", "a.jsonl", b'["one"]', "a.jsonl, line 1: not an object with a string under 'text'"),
        ("fever", "a.jsonl", b'{"id": "A", "text": null}', "a.jsonl, line 1: not an object with a string under 'text'"),
        ("jsonl", "a.jsonl", b'{"body": "one", "title": "t"}', "line 1: .*under 'text' but with body, title; .* corpus.text_column"),
        ("jsonl", "a.jsonl", b'{"text": 7}', "a.jsonl, line 1: not an object with a string under 'text'"),
        ("text", "a.txt", b"\xff\xfe", "a.txt: not readable as text"),
        ("parquet", "missing", None, "missing.*is not there; name .parquet files"),
        ("parquet", "a.parquet", b"PAR1 and no more", "a.parquet: not readable as parquet .*; check corpus.format"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, format, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=says) as raised:
        entries(tmp_path / name, format)
    assert "\n" not in str(raised.value)


def test_a_line_without_the_id_that_is_asked_for_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(as_lines([{"text": "one", "key": 1}, {"text": "two"}]))
    with pytest.raises(CorpusError, match=r"a.jsonl, line 2: nothing under 'key'; check corpus.id_column"):
        entries(tmp_path, "jsonl", id_column="key")


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(CorpusError, match=r"corpus.path is ''"):
        find_files(CorpusConfig(path="", format="text"))


def test_a_damaged_zip_is_named(fever_zip):
    content = bytearray(fever_zip.read_bytes())
    content[80] ^= 0xFF
    fever_zip.write_bytes(content)
    with pytest.raises(CorpusError, match=r"wiki-pages.zip: not readable as fever|not JSON"):
        entries(fever_zip, "fever")
