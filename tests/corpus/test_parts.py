"""A corpus in parts: what each of them holds."""

from dataclasses import replace

import pytest
from corpora import as_lines, rows_of

from gsae.config import Config, CorpusConfig, HarvestConfig
from gsae.corpus import documents
from gsae.corpus.documents import Piece, corpus_identity, open_bookmarks, part_of, read_documents, read_pieces
from gsae.corpus.size import expected_tokens, most_bytes_at_once, shards_a_lane
from gsae.errors import CorpusError

NUM_PARTS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CorpusConfig:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text(as_lines(rows_of({f"page {number}": f"text of page {number}" for number in range(8000)})))
    return CorpusConfig(format="jsonl", path=str(path), held_out_fraction=0.25, parts=NUM_PARTS)


def ids(config: CorpusConfig, split="training") -> list[str]:
    return [document.id for document in read_documents(config, split)]


@pytest.mark.parametrize("max_documents", [None, 2000])
def test_the_parts_are_disjoint_and_together_the_training_split(config, max_documents):
    config = replace(config, max_documents=max_documents)
    parts = [ids(part_of(config, part)) for part in range(NUM_PARTS)]
    together = [id for part in parts for id in part]
    assert len(together) == len(set(together))
    assert set(together) == set(ids(config)) == set(ids(replace(config, parts=1)))
    share = len(together) / NUM_PARTS
    assert all(0.85 * share < len(part) < 1.15 * share for part in parts)  # 4 standard deviations of 360 documents are 16 %


def test_documents_of_a_part_are_numbered_in_it_and_in_corpus_order(config):
    part = list(read_documents(part_of(config, 2), "training"))
    assert [document.index for document in part] == list(range(len(part)))
    order = {id: place for place, id in enumerate(ids(config))}
    assert sorted(part, key=lambda document: order[document.id]) == part


def test_what_is_held_out_is_the_same_in_all_parts(config):
    held_out = ids(replace(config, parts=1), "held_out")
    assert [ids(part_of(config, part), "held_out") for part in range(NUM_PARTS)] == [held_out] * NUM_PARTS


def test_another_seed_gives_other_parts(config):
    one, other = (set(ids(part_of(replace(config, seed=seed, held_out_fraction=1e-9), 0))) for seed in (0, 1))
    assert 0.15 < len(one & other) / len(one) < 0.35  # a quarter, by chance


def test_the_identity_says_part_and_number_of_parts_and_neither_of_a_corpus_in_one(config):
    whole = corpus_identity(replace(config, parts=1))
    assert "parts" not in whole
    assert corpus_identity(config) == {**whole, "parts": NUM_PARTS}
    assert corpus_identity(part_of(config, 3)) == {**whole, "parts": NUM_PARTS, "part": 3}


def test_bookmarks_of_a_part_resume_that_part_only(config, tmp_path):
    part, other = part_of(config, 1), part_of(config, 0)
    first = 1100  # bookmarks are 1000 documents apart

    def read(part: CorpusConfig, first_document: int) -> list[Piece]:
        bookmarks = open_bookmarks(tmp_path / "bookmarks.json", part, "training")
        found = list(read_pieces(part, "training", first_document=first_document, bookmarks=bookmarks))
        bookmarks.save()
        return found

    pieces = read(part, 0)
    assert len(open_bookmarks(tmp_path / "bookmarks.json", part, "training")._bookmarks) == 2
    assert read(part, first) == pieces[first:]
    assert read(other, first) == list(read_pieces(other, "training"))[first:]


def test_all_parts_share_one_pass_for_the_selection(config, monkeypatch):
    config = replace(config, max_documents=500)
    documents._largest_selected_hashes.clear()
    for part in range(NUM_PARTS):
        ids(part_of(config, part))
    ids(config)
    assert len(documents._largest_selected_hashes) == 1


def test_a_part_without_documents_is_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(as_lines(rows_of({"one": "a b"})))
    config = CorpusConfig(format="jsonl", path=str(path), held_out_fraction=1e-9, parts=50)
    empty = next(part for part in range(50) if documents.seeded_hash("part", 0, "one") % 50 != part)
    with pytest.raises(CorpusError, match=rf"part {empty} of the 50 of .* lower corpus.parts"):
        list(read_documents(part_of(config, empty), "training"))


def test_max_tokens_is_shared_out_to_the_parts_in_whole_shards():
    # A round of shards is 4 lanes x 8 contexts x 32 tokens = 1024; 10,000 tokens in 3 parts are 3,334 each: 4 rounds.
    corpus = CorpusConfig(num_lanes=4, parts=3)
    config = Config(corpus=corpus, harvest=HarvestConfig(max_tokens=10_000, context_length=32, contexts_per_shard=8, batch_contexts=4))
    assert shards_a_lane(config) == shards_a_lane(replace(config, corpus=part_of(corpus, 1))) == 4
    assert expected_tokens(config, pytest.fail) == 3 * 4096
    assert expected_tokens(replace(config, corpus=part_of(corpus, 1)), pytest.fail) == 4096


@pytest.mark.parametrize(("parts", "expected"), [(1, 100), (2, 100), (3, 67), (8, 25)])
def test_two_parts_are_on_the_disk_at_once(parts, expected):
    assert most_bytes_at_once(100, parts) == expected
