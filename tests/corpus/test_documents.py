import json
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsae.config import CorpusConfig
from gsae.corpus import documents as documents_module
from gsae.corpus.documents import Piece, corpus_identity, cut_at_whitespace, read_documents, read_pieces, seeded_hash
from gsae.corpus.entries import Entry
from gsae.errors import CorpusError

SPLITS = ("training", "held_out")


@pytest.fixture
def write(tmp_path):
    """Writes documents {id: text} as one .jsonl file and gives the config that reads it."""

    def write_corpus(texts, **settings):
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()))
        return CorpusConfig(**{"format": "jsonl", "path": str(path), "held_out_fraction": 0.3, **settings})

    return write_corpus


def ids(config, split):
    return [document.id for document in read_documents(config, split)]


def numbered(count):
    return {f"page {number}": f"text of page {number}" for number in range(count)}


def test_the_splits_part_the_corpus_and_count_their_documents_in_its_order(write):
    texts = numbered(1000)
    config = write(texts)
    training, held_out = (list(read_documents(config, split)) for split in SPLITS)
    assert sorted(document.id for document in training + held_out) == sorted(texts)
    assert 250 < len(held_out) < 350  # 300 expected, standard deviation 14
    for found in (training, held_out):
        assert [document.index for document in found] == list(range(len(found)))
        assert [document.id for document in found] == sorted((d.id for d in found), key=list(texts).index)
        assert all(document.text == texts[document.id] for document in found)


def test_a_document_keeps_its_split_whatever_else_the_corpus_holds(write):
    held_out = set(ids(write(numbered(200)), "held_out"))
    texts = dict(reversed(numbered(400).items()))
    assert {id for id in ids(write(texts), "held_out") if id in numbered(200)} == held_out
    assert set(ids(write(texts, held_out_fraction=0.5), "held_out")) > held_out
    assert set(ids(write(texts, seed=1), "held_out")) & set(numbered(200)) != held_out


def test_the_selection_takes_exactly_the_smallest_hashes_and_leaves_the_split_alone(write):
    whole = write(numbered(1000))
    config = replace(whole, max_documents=200)
    selected = [id for split in SPLITS for id in ids(config, split)]
    assert set(selected) == set(sorted(numbered(1000), key=lambda id: seeded_hash("selection", 0, id))[:200])
    assert len(selected) == 200
    assert 35 < len(ids(config, "held_out")) < 85  # 60 expected, standard deviation 6.5: the two hashes are independent
    assert set(ids(config, "held_out")) <= set(ids(whole, "held_out"))
    assert set(ids(replace(config, seed=1), "training")) != set(ids(config, "training"))


def test_a_selection_larger_than_the_corpus_is_the_corpus(write):
    config = write(numbered(50))
    assert ids(replace(config, max_documents=51), "training") == ids(config, "training")


def test_blank_documents_are_not_selected(write):
    texts = {**numbered(20), **{f"blank {number}": " " for number in range(80)}}
    config = write(texts, max_documents=20)
    assert {id for split in SPLITS for id in ids(config, split)} == set(numbered(20))


def test_markup_is_stripped_from_the_asked_split_only(tmp_path, monkeypatch):
    pages = "".join(f"<page><ns>0</ns><id>{n}</id><revision><text>page {n}</text></revision></page>" for n in range(100))
    (tmp_path / "dump.xml").write_text(f"<mediawiki>{pages}</mediawiki>")
    stripped = []
    monkeypatch.setattr(documents_module, "strip_wiki_markup", lambda markup: stripped.append(markup) or "plain")
    config = CorpusConfig(path=str(tmp_path), held_out_fraction=0.2, max_documents=60)
    found = list(read_documents(config, "held_out"))
    assert stripped == [f"page {document.id}" for document in found]
    assert {document.text for document in found} == {"plain"}


def test_documents_are_streamed(write):
    config = write({**numbered(10), "last": "fine"})
    with Path(config.path).open("a") as file:
        file.write("not json\n")
    assert len(list(islice(read_documents(config, "training"), 3))) == 3


def test_a_document_is_cut_at_whitespace_within_its_limit(write):
    config = write({"a": "one two  three"}, held_out_fraction=1e-9)
    texts = {limit: next(read_documents(replace(config, max_document_characters=limit), "training")).text for limit in (2, 3, 8, 13, 14)}
    assert texts == {2: "on", 3: "one", 8: "one two", 13: "one two", 14: "one two  three"}


def test_half_a_surrogate_pair_reads_as_a_question_mark(write):
    config = write({"\ud800": "a \udfff b"}, held_out_fraction=1e-9)
    assert [document.text for document in read_documents(config, "training")] == ["a ? b"]


def test_fever_is_detokenised_on_request(write):
    config = write({"Ada": "Ada -LRB- a poet -RRB- ."}, format="fever", held_out_fraction=1e-9)
    assert next(read_documents(config, "training")).text == "Ada -LRB- a poet -RRB- ."
    assert next(read_documents(replace(config, detokenise=True), "training")).text == "Ada (a poet)."


@pytest.mark.parametrize(
    ("texts", "settings", "split", "says"),
    [
        ({"a": "", "b": " "}, {}, "training", r"which holds no jsonl text; check it, corpus.format and corpus.text_column \(text\)"),
        (
            {"a": "one"},
            {"held_out_fraction": 1e-9},
            "held_out",
            "none of the 1 documents of .* is held out; raise corpus.held_out",
        ),
        (
            {"a": "one"},
            {"held_out_fraction": 1 - 1e-9},
            "training",
            "none of the 1 documents of .* is training text; lower corpus.",
        ),
    ],
)
def test_an_empty_split_is_refused_in_one_line(write, texts, settings, split, says):
    with pytest.raises(CorpusError, match=says) as raised:
        list(read_documents(write(texts, **settings), split))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        ("one two three", 7, ["one two", "three"]),
        ("one two three", 6, ["one", "two", "three"]),
        ("one two three", 13, ["one two three"]),
        ("  one \n\n two  ", 5, ["one", "two"]),
        ("one \n\n two", 10, ["one \n\n two"]),
        ("a bbbbbbb c", 3, ["a", "bbb", "bbb", "b c"]),
        ("ab c", 1, ["a", "b", "c"]),
        ("a\u2003b", 1, ["a", "b"]),
        (" \n", 5, []),
        ("", 5, []),
    ],
)
def test_text_is_cut_at_the_last_whitespace_within_the_limit(text, limit, pieces):
    assert list(cut_at_whitespace(text, limit)) == pieces


@given(st.text(alphabet=st.sampled_from("ab \n\u00a0\u2003\U0001f600"), max_size=200), st.integers(1, 30))
def test_pieces_rejoin_to_the_document_up_to_whitespace(text, limit):
    pieces = list(cut_at_whitespace(text, limit))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= limit and piece == piece.strip() for piece in pieces)
    words = text.split()
    if all(len(word) <= limit for word in words):
        assert [word for piece in pieces for word in piece.split()] == words
        for piece, following in pairwise(pieces):
            text = text[text.index(piece) :]
            gap = text[len(piece) : text.index(following, len(piece))]
            assert len(piece + gap + following.split()[0]) > limit  # the next word would not have fitted
            text = text[len(piece) :]


def test_pieces_are_numbered_in_their_document_and_filtered_on_request(write):
    config = write({"a": "one two three", "b": "four"}, piece_characters=4, held_out_fraction=1e-9)
    expected = [Piece(0, 0, "one"), Piece(0, 1, "two"), Piece(0, 2, "thre"), Piece(0, 3, "e"), Piece(1, 0, "four")]
    assert list(read_pieces(config, "training")) == expected
    wanted = [piece for piece in expected if piece.lane(3) == 1]
    assert wanted == [expected[1], expected[4]]
    assert list(read_pieces(config, "training", lambda document, piece: (document + piece) % 3 == 1)) == wanted


@given(st.text(alphabet=st.sampled_from("ab "), min_size=1, max_size=60), st.integers(1, 12))
def test_a_piece_is_given_however_many_there_are_before_it(text, limit):
    # Words of 6 letters in pieces of 10: one word each, nearly twice as many pieces as the text has tens of letters.
    for document in (text, "abcdef " * 20):
        pieces = list(cut_at_whitespace(document, limit))
        assert len(pieces) <= documents_module._most_pieces(CorpusConfig(piece_characters=limit), Entry("", document))
    assert len(list(cut_at_whitespace("abcdef " * 20, 10))) == 20 > len("abcdef " * 20) // 11 + 1


@pytest.mark.demo
def test_lanes_of_real_text_are_even(real_documents):
    num_lanes = 32
    characters = Counter()
    for document in real_documents:
        for number, text in enumerate(cut_at_whitespace(document.text, 1000)):
            characters[Piece(document.index, number, text).lane(num_lanes)] += len(text)
    mean = characters.total() / num_lanes
    assert set(characters) == set(range(num_lanes))
    assert all(0.9 < count / mean < 1.1 for count in characters.values())


def test_the_identity_names_what_decides_the_pieces_and_no_place(write, tmp_path):
    config = write(numbered(3))
    identity = corpus_identity(config)
    assert (identity["files"]["number"], identity["files"]["bytes"]) == (1, (tmp_path / "corpus.jsonl").stat().st_size)
    assert str(tmp_path) not in json.dumps(identity)
    changes = {"max_documents": 2, "max_document_characters": 9, "held_out_fraction": 0.4, "piece_characters": 9, "num_lanes": 4}
    for name, value in {**changes, "seed": 5}.items():
        assert corpus_identity(replace(config, **{name: value})) == {**identity, name: value}
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "corpus.jsonl").rename(tmp_path / "moved" / "corpus.jsonl")
    assert corpus_identity(replace(config, path=str(moved))) == identity
    assert corpus_identity(replace(config, path=str(tmp_path / "moved"))) == identity


def test_hashes_are_the_same_everywhere():
    # Computed once with another tool: printf 'split:0:page 1' | b2sum -l 64
    assert f"{seeded_hash('split', 0, 'page 1'):016x}" == "26c62b8cce1a1d77"
