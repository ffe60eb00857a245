"""All formats against one another: the same text gives the same documents, from the beginning and from any place in it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from corpora import write_all, write_fever

from gsae.corpus.documents import corpus_identity, read_documents, read_pieces, seeded_hash
from gsae.corpus.formats import read_entries

KINDS = ("fever zip", "fever directory", "jsonl", "parquet", "saved", "splits")
KINDS += tuple(f"{how} {what}" for what in ("jsonl", "parquet") for how in ("streamed", "local"))
TEXTS = {f"page {number}": "" if number % 7 == 3 else f"-LRB- {number} -RRB- " + "word " * (number % 40) for number in range(1300)}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """One corpus in every format; the library's cache is in the test's folder."""
    folder = tmp_path_factory.mktemp("corpora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield write_all(folder, TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_entries(corpora, kind):
    found = [(entry.id, entry.raw) for entry in read_entries(corpora[kind])]
    assert found == [(id, text) for id, text in TEXTS.items() if text]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_begins_at_any_place_that_an_entry_carries(corpora, kind):
    entries = list(read_entries(corpora[kind]))
    places = [(number, entry.place) for number, entry in enumerate(entries) if entry.place is not None]
    assert places[0][0] == 0
    assert len(places) >= 2
    for number, place in [*places[1 :: max(1, len(places) // 5)], places[-1]]:
        again = list(read_entries(corpora[kind], place))
        assert [(entry.id, entry.raw) for entry in again] == [(entry.id, entry.raw) for entry in entries[number:]]
        assert again[0].place == place


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_documents_are_selected_held_out_and_numbered(corpora, kind):
    for split in ("training", "held_out"):
        found, expected = (
            [
                (document.index, document.id, document.text)
                for document in read_documents(replace(config, max_documents=200, held_out_fraction=0.3), split)
            ]
            for config in (corpora[kind], corpora["jsonl"])
        )
        assert len(found) > 40
        assert found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_tells_a_corpus_by_its_content_and_names_no_place(corpora, kind, tmp_path):
    identity = corpus_identity(corpora[kind])
    assert str(Path(corpora[kind].path).parent) not in json.dumps(identity)
    other = write_all(tmp_path, {**TEXTS, "one more": "page"})[kind]
    assert corpus_identity(other) != identity


def test_a_row_group_that_begins_with_a_blank_text_is_still_a_place_to_begin_at(corpora):
    # Of 433 and 867 rows in groups of 50; page 633, the first of a group, is blank.
    assert sum(entry.place is not None for entry in read_entries(corpora["parquet"])) == 9 + 18


def test_streaming_does_not_change_the_identity(corpora):
    assert corpus_identity(corpora["streamed parquet"]) == corpus_identity(corpora["local parquet"])


def test_the_selection_is_uniform_over_fevers_files_and_the_same_for_zip_and_directory(tmp_path):
    # Files of 600, 300 and 100 pages, of which 200 are taken: 120, 60 and 20 expected; standard deviations 6.2, 5.8, 3.8.
    sizes = {"wiki-001.jsonl": 600, "wiki-002.jsonl": 300, "wiki-003.jsonl": 100}
    files = {name: [{"id": f"{name} {page}", "text": f"Page {page} ."} for page in range(size)] for name, size in sizes.items()}
    configs = [replace(config, max_documents=200, held_out_fraction=0.01) for config in write_fever(tmp_path, files)]
    zipped, unpacked = ([document.id for document in read_documents(config, "training")] for config in configs)
    assert zipped == unpacked
    taken = [document.id for split in ("training", "held_out") for document in read_documents(configs[0], split)]
    counts = Counter(id.split()[0] for id in taken)
    assert len(taken) == 200
    assert [abs(counts[name] - share) < 4 * deviation for name, share, deviation in zip(sizes, (120, 60, 20), (6.2, 5.8, 3.8), strict=True)]
    everyone = [row["id"] for rows in files.values() for row in rows]
    assert set(taken) == set(sorted(everyone, key=lambda id: seeded_hash("selection", 0, id))[:200])


def test_a_rank_looks_only_at_the_text_of_documents_of_its_lanes(corpora, monkeypatch):
    config = replace(corpora["fever zip"], detokenise=True, piece_characters=100)
    looked_at = []
    monkeypatch.setattr("gsae.corpus.documents.detokenise", lambda text: looked_at.append(text) or text)
    everything = list(read_pieces(config, "training"))
    whole = len(looked_at)
    for rank in range(4):
        looked_at.clear()
        found = list(read_pieces(config, "training", lambda document, piece, rank=rank: (document + piece) % 4 == rank))
        assert found == [piece for piece in everything if piece.lane(4) == rank]
        # Half of the texts are below 100 characters and have one piece; the others have up to 5, and so a piece of every rank.
        assert len(looked_at) < 0.75 * whole
