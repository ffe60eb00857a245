import json
from dataclasses import replace

import pytest
from corpora import as_lines, rows_of

from gsae.config import CorpusConfig
from gsae.corpus.bookmarks import Bookmark, Bookmarks
from gsae.corpus.documents import open_bookmarks, read_pieces
from gsae.corpus.entries import Place

NUM_ROWS = 12_000


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CorpusConfig:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text(as_lines(rows_of({f"page {number}": f"text of page {number}" for number in range(NUM_ROWS)})))
    return CorpusConfig(format="jsonl", path=str(path), held_out_fraction=0.25)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "bookmarks.json"


def opened(file, config, split="training"):
    bookmarks = open_bookmarks(file, config, split)
    bookmarks._save_every_seconds = 0.0
    return bookmarks


@pytest.mark.parametrize("max_documents", [None, 9000])
def test_a_resumed_reading_gives_the_pieces_that_follow_and_reads_little_before_them(config, file, monkeypatch, max_documents):
    config = replace(config, max_documents=max_documents)
    pieces = list(read_pieces(config, "training", bookmarks=opened(file, config)))
    lines = []
    loads = json.loads
    monkeypatch.setattr("gsae.corpus.formats.json.loads", lambda line: lines.append(line) or loads(line))
    for first in (0, 1, 999, 1000, 3456, pieces[-1].document):
        lines.clear()
        again = read_pieces(config, "training", first_document=first, bookmarks=opened(file, config))
        assert list(again) == [piece for piece in pieces if piece.document >= first]
        # Bookmarks are 1000 documents apart; 1000 training documents are 1333 of the rows, 1778 where 9000 of 12,000 are taken.
        share_before = max(0, first - 1000) / len(pieces)
        assert len(lines) < NUM_ROWS * (1 - share_before) + 200


def test_without_bookmarks_the_same_pieces_come_from_a_reading_from_the_beginning(config):
    pieces = list(read_pieces(config, "training"))
    assert list(read_pieces(config, "training", first_document=5000)) == pieces[5000:]


def test_a_reading_that_was_cut_off_leaves_bookmarks_for_the_next(config, file):
    for piece in read_pieces(config, "training", bookmarks=opened(file, config)):
        if piece.document == 4500:
            break
    assert opened(file, config).before(10**9).document == 4000
    list(read_pieces(config, "training", first_document=4500, bookmarks=opened(file, config)))
    marks = {opened(file, config).before(document).document for document in range(9000)}
    assert marks == set(range(0, 9000, 1000))


@pytest.mark.parametrize("damage", ["missing", "cut off", "not an object", "another version"])
def test_a_file_that_cannot_be_used_is_as_none(config, file, damage):
    list(read_pieces(config, "training", bookmarks=opened(file, config)))
    assert opened(file, config).before(5000) != Bookmark(0, Place())
    content = file.read_text()
    spoilt = {"cut off": content[:-9], "not an object": "[1]", "another version": content.replace('"version": 1', '"version": 9')}
    file.unlink() if damage == "missing" else file.write_text(spoilt[damage])
    assert opened(file, config).before(5000) == Bookmark(0, Place())


def test_bookmarks_of_another_corpus_or_split_are_not_used(config, file):
    list(read_pieces(config, "training", bookmarks=opened(file, config)))
    for other, split in ((config, "held_out"), (replace(config, seed=1), "training"), (replace(config, held_out_fraction=0.2), "training")):
        assert opened(file, other, split).before(5000) == Bookmark(0, Place())


def test_the_selection_is_made_once(config, file, monkeypatch):
    config = replace(config, max_documents=8000)
    pieces = list(read_pieces(config, "training", bookmarks=opened(file, config)))
    monkeypatch.setattr("gsae.corpus.documents._find_largest_selected_hash", lambda config: pytest.fail("another pass over the corpus"))
    assert list(read_pieces(config, "training", first_document=2, bookmarks=opened(file, config))) == pieces[2:]


def test_the_file_is_written_whole_and_now_and_then(tmp_path):
    bookmarks = Bookmarks(tmp_path / "b.json", {"corpus": 1}, save_every_seconds=3600)
    bookmarks.note(1000, Place(0, 5, 5))
    assert list(tmp_path.iterdir()) == []
    bookmarks.save()
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    assert Bookmarks(tmp_path / "b.json", {"corpus": 1}).before(1500) == Bookmark(1000, Place(0, 5, 5))
