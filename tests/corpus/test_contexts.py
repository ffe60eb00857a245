import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.config import CorpusConfig, EvaluateConfig
from gsae.corpus.contexts import Cursor, Packer, held_out_contexts, tokenise
from gsae.corpus.documents import Piece
from gsae.errors import CorpusError

TEXTS = st.lists(st.text(alphabet="abc </s>", max_size=30), max_size=12)


def shown(context, tokenizer):
    """One sign a token: `^` is BOS, `$` EOS, `_` padding, the rest is text of one byte a token."""
    signs = {"<s>": "^", "</s>": "$", "<pad>": "_"}
    return "".join(signs.get(token, token) for token in tokenizer.convert_ids_to_tokens(context.tokens.tolist()))


def pieces_of(texts):
    """Two pieces a document, as a lane with gaps might have them."""
    return [Piece(document=3 * (number // 2), piece=4 * (number % 2) + 1, text=text) for number, text in enumerate(texts)]


def pack(packer, pieces):
    return [context for piece in pieces for context in packer.push(piece)] + packer.finish()


def as_plain(contexts):
    return [(c.tokens.tolist(), c.positions.tolist(), c.documents.tolist(), c.start, c.end) for c in contexts]


def segments_of(context):
    """(document, token ids) of each segment, padding included as document -1."""
    starts = [*np.flatnonzero(context.positions == 0), len(context.positions)]
    return [(int(context.documents[a]), context.tokens[a:b].tolist()) for a, b in pairwise(starts)]


def test_a_piece_is_cut_where_its_context_ends_and_a_short_rest_is_padded(tokenizer):
    packer = Packer(tokenizer, context_length=8)
    first = packer.push(Piece(0, 0, "abcdefghij"))
    assert [shown(context, tokenizer) for context in first] == ["^abcdefg"]
    # 4 of 8 rows are used by BOS and hij, so BOS and 3 tokens fit; after ^kl one row is left, too short for BOS and 2 tokens.
    second = packer.push(Piece(0, 1, "kl"))
    assert [shown(context, tokenizer) for context in second] == ["^hij^kl_"]
    assert packer.push(Piece(5, 0, "mnop")) == []
    third = packer.finish()
    assert [shown(context, tokenizer) for context in third] == ["^mnop___"]
    assert packer.finish() == []
    contexts = [*first, *second, *third]
    assert [c.positions.tolist() for c in contexts] == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert [c.documents.tolist() for c in contexts] == [[0] * 8, [0] * 7 + [-1], [5] * 5 + [-1] * 3]
    assert [(c.start, c.end) for c in contexts] == [
        (Cursor(0, 0, 0), Cursor(0, 0, 7)),
        (Cursor(0, 0, 7), Cursor(0, 1, 2)),
        (Cursor(5, 0, 0), Cursor(5, 0, 4)),
    ]
    assert {array.dtype for c in contexts for array in (c.tokens, c.positions, c.documents)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("length", "expected"), [(7, ["^abcd__", "^efg___"]), (8, ["^abcd^ef", "^g______"])])
def test_a_context_is_padded_only_when_bos_and_two_tokens_do_not_fit(tokenizer, length, expected):
    contexts = pack(Packer(tokenizer, length), [Piece(0, 0, "abcd"), Piece(0, 1, "efg")])
    assert [shown(context, tokenizer) for context in contexts] == expected


def test_without_bos_segments_begin_with_text_and_eos_pads(tokenizer_without_bos):
    contexts = pack(Packer(tokenizer_without_bos, context_length=6), [Piece(0, 0, "abc"), Piece(0, 1, "de"), Piece(1, 0, "fgh")])
    # After abc de one row is left: less than 2 tokens, so it is padded.
    assert [shown(context, tokenizer_without_bos) for context in contexts] == ["abcde$", "fgh$$$"]
    assert [c.positions.tolist() for c in contexts] == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]]
    assert contexts[0].documents.tolist() == [0, 0, 0, 0, 0, -1]


def test_what_looks_like_a_special_token_is_packed_as_text(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenise(tokenizer, "<s>a</s>")) == list("<s>a</s>")
    assert tokenizer.bos_token_id not in tokenise(tokenizer, "<s>")


@given(texts=TEXTS, length=st.integers(4, 20), has_bos=st.booleans())
@settings(deadline=None)
def test_every_token_is_packed_once_in_order(tokenizer, tokenizer_without_bos, texts, length, has_bos):
    chosen = tokenizer if has_bos else tokenizer_without_bos
    pieces = pieces_of(texts)
    contexts = pack(Packer(chosen, length), pieces)
    prefix = [chosen.bos_token_id] if has_bos else []
    packed = []
    for context in contexts:
        *segments, last = segments_of(context)
        padding = last[1] if last[0] == -1 else []
        segments += [] if padding else [last]
        assert len(padding) < len(prefix) + 2 or context is contexts[-1]
        for document, ids in segments:
            assert document != -1
            assert ids[: len(prefix)] == prefix
            packed += [(document, token) for token in ids[len(prefix) :]]
        for before, after in pairwise(range(length)):
            restarts = context.positions[after] == 0
            assert restarts or context.positions[after] == context.positions[before] + 1
            assert restarts or context.documents[after] == context.documents[before]
    assert packed == [(piece.document, token) for piece in pieces for token in tokenise(chosen, piece.text)]


@given(texts=TEXTS, length=st.integers(4, 20), has_bos=st.booleans())
@settings(deadline=None)
def test_a_packer_resumed_at_any_end_gives_the_contexts_that_follow(tokenizer, tokenizer_without_bos, texts, length, has_bos):
    chosen = tokenizer if has_bos else tokenizer_without_bos
    pieces = pieces_of(texts)
    contexts = as_plain(pack(Packer(chosen, length), pieces))
    for number, (*_, end) in enumerate(contexts):
        assert as_plain(pack(Packer(chosen, length, start=end), pieces)) == contexts[number + 1 :]
        later = [piece for piece in pieces if (piece.document, piece.piece) >= (end.document, end.piece)]
        assert as_plain(pack(Packer(chosen, length, start=end), later)) == contexts[number + 1 :]
    for number, (*_, start, _) in enumerate(contexts):
        assert as_plain(pack(Packer(chosen, length, start=start), pieces)) == contexts[number:]


@given(texts=TEXTS, length=st.integers(4, 20))
@settings(deadline=None)
def test_without_packing_a_context_has_one_segment_and_no_token_is_lost(tokenizer, texts, length):
    pieces = pieces_of(texts)
    contexts = pack(Packer(tokenizer, length, packed=False), pieces)
    packed = []
    for context in contexts:
        (document, ids), *padding = segments_of(context)
        assert [number for number, _ in padding] in ([], [-1])
        packed += [(document, token) for token in ids[1:]]
    assert packed == [(piece.document, token) for piece in pieces for token in tokenise(tokenizer, piece.text)]
    for number, context in enumerate(contexts):
        resumed = pack(Packer(tokenizer, length, start=context.end, packed=False), pieces)
        assert as_plain(resumed) == as_plain(contexts[number + 1 :])


@pytest.fixture
def write(tmp_path):
    """Writes texts as one .jsonl corpus of which nearly all is held out, and gives the config that reads it."""

    def write_corpus(texts, **settings):
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return CorpusConfig(**{"format": "jsonl", "path": str(path), "held_out_fraction": 1 - 1e-9, **settings})

    return write_corpus


def text_lengths(contexts):
    """Tokens of text a document gives, BOS not counted."""
    lengths = Counter()
    for context in contexts:
        for document, ids in segments_of(context):
            if document != -1:
                lengths[document] += len(ids) - 1
    return lengths


def numbered_words(document, count):
    """Words that name their document and place, 7 letters each."""
    return " ".join(f"{document:03d}x{place:03d}" for place in range(count))


def test_held_out_segments_come_from_all_documents_in_turn(write, tokenizer):
    # 30 documents of 50 words in pieces of 15 letters (2 words); a context of 16 holds one whole piece.
    config = write([numbered_words(document, 50) for document in range(30)], piece_characters=15)
    evaluate = EvaluateConfig(max_tokens=30 * 15 * 2 + 15, max_document_tokens=10_000, min_documents=30)
    lengths = text_lengths(held_out_contexts(config, evaluate, tokenizer, 16))
    assert sorted(lengths.values()) == [30] * 29 + [45]


def test_held_out_segments_are_whole_text_of_one_place_and_never_twice(write, tokenizer):
    texts = [numbered_words(document, 2 + 7 * document) for document in range(25)]
    config = write(texts, piece_characters=40)
    contexts = held_out_contexts(config, EvaluateConfig(max_tokens=100_000, min_documents=25), tokenizer, 24)
    segments = [(document, bytes_of(ids, tokenizer)) for context in contexts for document, ids in segments_of(context) if document != -1]
    assert all(text in texts[document] for document, text in segments)
    assert len(set(segments)) == len(segments)
    # 39 letters a piece: segments of 23 and 16, of which a context of 24 holds the first alone; nothing is left out but the cuts.
    assert sum(len(text) for _, text in segments) == sum(len(text) - (len(text) - 1) // 40 for text in texts)
    assert all(context.start.document in context.documents and context.end.document in context.documents for context in contexts)


def bytes_of(ids, tokenizer):
    assert ids[0] == tokenizer.bos_token_id
    return "".join(tokenizer.convert_ids_to_tokens(ids[1:])).replace("\u0120", " ")


def test_a_document_gives_no_more_than_its_cap_from_all_over_it(write, tokenizer):
    config = write([numbered_words(0, 900), *(numbered_words(document, 10) for document in range(1, 20))], piece_characters=79)
    evaluate = EvaluateConfig(max_tokens=100_000, max_document_tokens=300, min_documents=20)
    contexts = held_out_contexts(config, evaluate, tokenizer, 80)
    lengths = text_lengths(contexts)
    assert lengths == {0: 300, **dict.fromkeys(range(1, 20), 79)}
    words = [word for c in contexts for document, ids in segments_of(c) if document == 0 for word in bytes_of(ids, tokenizer).split()]
    places = sorted(int(word[4:]) for word in words if len(word) == 7)
    assert places[0] < 450 < places[-1]
    assert places != list(range(places[0], places[0] + len(places)))


@pytest.mark.parametrize("max_tokens", [160, 161, 199, 200])
def test_held_out_text_ends_at_max_tokens(write, tokenizer, max_tokens):
    config = write([numbered_words(document, 20) for document in range(20)], piece_characters=10)
    contexts = held_out_contexts(config, EvaluateConfig(max_tokens=max_tokens), tokenizer, 16)
    # Segments of 7 tokens; a last one of a single token would have nothing to predict but its first, and is left out.
    assert sum(text_lengths(contexts).values()) == (max_tokens - 1 if max_tokens % 7 == 1 else max_tokens)


def test_held_out_segments_are_packed_tightly_and_uncut(write, tokenizer):
    # With BOS: 20 segments of 6 rows, 20 of 5, 20 of 3. Contexts of 8: 6 | 5 + 3, in 40 contexts; two of 3 in one would take more.
    config = write(["abcde", "fghi", "jk"] * 20)
    for seed in range(5):
        contexts = held_out_contexts(config, EvaluateConfig(min_documents=60, seed=seed), tokenizer, 8)
        assert Counter(shown(context, tokenizer) for context in contexts) == {"^abcde__": 20, "^fghi^jk": 20}


def test_held_out_segments_stand_alone_without_packing(write, tokenizer):
    config = write(["abcde", "fghi", "jk"] * 20)
    contexts = held_out_contexts(config, EvaluateConfig(min_documents=60), tokenizer, 8, packed=False)
    assert Counter(shown(context, tokenizer) for context in contexts) == {"^abcde__": 20, "^fghi___": 20, "^jk_____": 20}


def test_held_out_contexts_follow_from_the_settings_alone(write, tokenizer):
    config = write([numbered_words(document, 30) for document in range(40)], piece_characters=60)
    evaluate = EvaluateConfig(max_tokens=2000)
    contexts = as_plain(held_out_contexts(config, evaluate, tokenizer, 32))
    assert as_plain(held_out_contexts(config, evaluate, tokenizer, 32)) == contexts
    assert as_plain(held_out_contexts(config, replace(evaluate, seed=1), tokenizer, 32)) != contexts


@pytest.mark.parametrize(
    ("num_texts", "max_tokens", "says"),
    [
        (19, 10_000, r"comes from 19 documents \(19 are held out\), but evaluate.min_documents is 20; raise corpus.held_out_fraction"),
        (50, 70, r"comes from 10 documents \(50 are held out\), but evaluate.min_documents is 20; .* evaluate.max_tokens \(70\)"),
    ],
)
def test_too_few_documents_are_refused_in_one_line(write, tokenizer, num_texts, max_tokens, says):
    config = write([numbered_words(document, 3) for document in range(num_texts)], piece_characters=7)
    with pytest.raises(CorpusError, match=says) as raised:
        held_out_contexts(config, EvaluateConfig(max_tokens=max_tokens), tokenizer, 16)
    assert "\n" not in str(raised.value)
