"""Contexts. In: pieces and a tokenizer. Out: fixed-length contexts of segments, each token with its position and document."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from gsae.config import CorpusConfig, EvaluateConfig
from gsae.corpus.documents import Piece, read_pieces, seeded_hash
from gsae.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MIN_SEGMENT_TOKENS = 2
"""Tokens of text below which what is left of a context is padded."""


@dataclass(frozen=True)
class Cursor:
    """Where in the corpus a token stands."""

    document: int
    """Document.index."""
    piece: int
    """Ordinal of the piece in the document."""
    token: int
    """Ordinal of the token in the piece; the number of its tokens where the piece is used up."""


@dataclass(frozen=True, eq=False)
class Context:
    """One input of the LLM: segments one after another, then padding.

    A segment is BOS (where the tokenizer has one) and a run of tokens of one piece; it attends only within itself, because
    positions begin again at 0 with each segment. The padding is a segment of its own.
    """

    tokens: Int32[np.ndarray, " context_length"]
    """Token ids."""
    positions: Int32[np.ndarray, " context_length"]
    """Place of each token in its segment."""
    documents: Int32[np.ndarray, " context_length"]
    """Document.index of each token, BOS included; -1 is padding."""
    start: Cursor
    """The first token of text in it."""
    end: Cursor
    """The token of text that comes after its last one."""


@dataclass(frozen=True)
class _Segment:
    """A run of tokens of one piece, BOS not included."""

    start: Cursor
    token_ids: list[int]

    @property
    def end(self) -> Cursor:
        return replace(self.start, token=self.start.token + len(self.token_ids))


class _OpenContext:
    """A context in the making, all padding at first."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", context_length: int) -> None:
        self._prefix = _segment_prefix(tokenizer)
        padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        self._tokens = np.full(context_length, padding, dtype=np.int32)
        self._positions = np.arange(context_length, dtype=np.int32)
        self._documents = np.full(context_length, -1, dtype=np.int32)
        self._segments: list[_Segment] = []
        self._used = 0

    @property
    def is_empty(self) -> bool:
        return not self._segments

    @property
    def room(self) -> int:
        """Tokens of text that a further segment may have."""
        return len(self._tokens) - self._used - len(self._prefix)

    def add(self, segment: _Segment) -> None:
        stop = self._used + len(self._prefix) + len(segment.token_ids)
        rows = slice(self._used, stop)
        self._tokens[rows] = self._prefix + segment.token_ids
        self._documents[rows] = segment.start.document
        for rest in (rows, slice(stop, None)):
            self._positions[rest] = np.arange(len(self._positions[rest]))
        self._segments.append(segment)
        self._used = stop

    def close(self) -> Context:
        return Context(self._tokens, self._positions, self._documents, self._segments[0].start, self._segments[-1].end)


class Packer:
    """Packs one lane's pieces, in order, into contexts.

    A segment is cut where its context ends; the rest of its piece begins the next context. What is left of a context is padded
    when it has no room for BOS and 2 tokens. Nothing else is kept between contexts, so a packer that starts at a context's `end`
    gives the very contexts that follow it: what comes before `start` may be pushed and is ignored.

    Args:
        tokenizer: the LLM's.
        context_length: tokens of a context.
        start: where in the lane to begin; None begins at its start.
        packed: whether a context may hold several segments; otherwise each has a context of its own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", context_length: int, start: Cursor | None = None, packed: bool = True) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._start = start or Cursor(0, 0, 0)
        self._packed = packed
        self._open = _OpenContext(tokenizer, context_length)

    def push(self, piece: Piece) -> list[Context]:
        """Add the lane's next piece; gives the contexts that it fills."""
        place = (piece.document, piece.piece)
        first_place = (self._start.document, self._start.piece)
        if place < first_place:
            return []
        token_ids = tokenise(self._tokenizer, piece.text)
        token = self._start.token if place == first_place else 0
        filled = []
        while token < len(token_ids):
            segment = _Segment(Cursor(*place, token), token_ids[token : token + self._open.room])
            self._open.add(segment)
            token = segment.end.token
            if not self._packed or self._open.room < _MIN_SEGMENT_TOKENS:
                filled += self.finish()
        return filled

    def finish(self) -> list[Context]:
        """Pad and give the last context, if anything is in it."""
        if self._open.is_empty:
            return []
        context = self._open.close()
        self._open = _OpenContext(self._tokenizer, self._context_length)
        return [context]


def tokenise(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text by itself: none added, and what looks like a special token (`</s>`) spelled out as text."""
    token_ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return token_ids


def held_out_contexts(
    config: CorpusConfig, evaluate: EvaluateConfig, tokenizer: "PreTrainedTokenizerBase", context_length: int, packed: bool = True
) -> list[Context]:
    """Contexts of held-out text, spread over the documents; the same on every rank.

    All held-out documents take turns, in a seeded order, and give one segment each turn, in a seeded order within the document:
    at most evaluate.max_document_tokens of text a document, until there are evaluate.max_tokens. Segments are packed whole, or each has
    a context of its own where `packed` is off.

    Raises:
        CorpusError: the segments come from fewer than evaluate.min_documents documents.
    """
    pieces: dict[int, list[Piece]] = {}
    for piece in read_pieces(config, "held_out"):
        pieces.setdefault(piece.document, []).append(piece)
    order = sorted(pieces, key=lambda document: seeded_hash("evaluation order", evaluate.seed, str(document)))
    turns = [_draw_segments(pieces[document], evaluate, tokenizer, context_length) for document in order]
    segments = list(_first_tokens(_take_turns(turns), evaluate.max_tokens))
    num_documents = len({segment.start.document for segment in segments})
    if num_documents < evaluate.min_documents:
        raise CorpusError(
            f"evaluation text comes from {num_documents} documents ({len(pieces)} are held out), but evaluate.min_documents is "
            f"{evaluate.min_documents}; raise corpus.held_out_fraction ({config.held_out_fraction}), corpus.max_documents or "
            f"evaluate.max_tokens ({evaluate.max_tokens}), or lower evaluate.min_documents"
        )
    return _pack_whole(segments, tokenizer, context_length, packed)


def _draw_segments(
    pieces: Sequence[Piece], evaluate: EvaluateConfig, tokenizer: "PreTrainedTokenizerBase", context_length: int
) -> Iterator[_Segment]:
    """One document's segments, as long as a context allows, in a seeded order, up to evaluate.max_document_tokens."""
    longest = context_length - len(_segment_prefix(tokenizer))
    segments = []
    for piece in pieces:
        token_ids = tokenise(tokenizer, piece.text)
        starts = range(0, len(token_ids), longest)
        segments += [_Segment(Cursor(piece.document, piece.piece, start), token_ids[start : start + longest]) for start in starts]
    generator = np.random.default_rng(seeded_hash("evaluation segments", evaluate.seed, str(pieces[0].document)))
    shuffled = (segments[place] for place in generator.permutation(len(segments)))
    yield from _first_tokens(shuffled, evaluate.max_document_tokens)


def _take_turns(turns: Sequence[Iterator[_Segment]]) -> Iterator[_Segment]:
    """One segment of each, then the next of each, until all are used up."""
    while turns:
        unfinished = []
        for turn in turns:
            if (segment := next(turn, None)) is not None:
                unfinished.append(turn)
                yield segment
        turns = unfinished


def _first_tokens(segments: Iterable[_Segment], max_tokens: int) -> Iterator[_Segment]:
    """The first segments of at least 2 tokens, up to `max_tokens` of text in all; the last one is cut to fit."""
    remaining = max_tokens
    for segment in segments:
        if len(segment.token_ids) >= _MIN_SEGMENT_TOKENS:
            yield replace(segment, token_ids=segment.token_ids[:remaining])
            remaining -= len(segment.token_ids)
        if remaining < _MIN_SEGMENT_TOKENS:
            return


def _pack_whole(segments: Iterable[_Segment], tokenizer: "PreTrainedTokenizerBase", context_length: int, packed: bool) -> list[Context]:
    """Contexts of uncut segments: the longest first, each where it leaves the least room (best fit decreasing)."""
    contexts: list[_OpenContext] = []
    rooms: list[tuple[int, int]] = []  # (room, place in contexts), ascending
    for segment in sorted(segments, key=lambda segment: -len(segment.token_ids)):
        fit = bisect_left(rooms, (len(segment.token_ids), 0))
        if packed and fit < len(rooms):
            _, place = rooms.pop(fit)
        else:
            place = len(contexts)
            contexts.append(_OpenContext(tokenizer, context_length))
        contexts[place].add(segment)
        insort(rooms, (contexts[place].room, place))
    return [context.close() for context in contexts]


def _segment_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What every segment begins with: BOS, where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
