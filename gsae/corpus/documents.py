"""Documents. In: the corpus's entries. Out: the documents of a split, and the pieces they are cut into.

Which documents are taken, and which of them are held out, is decided by seeded hashes of their ids alone: the same on every
rank and machine, whatever the order of the files, before a document's text is looked at.
"""

import hashlib
import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gsae.config import CorpusConfig
from gsae.corpus.bookmarks import Bookmark, Bookmarks
from gsae.corpus.entries import Entry, Place
from gsae.corpus.formats import describe, read_entries
from gsae.corpus.markup import detokenise, strip_wiki_markup
from gsae.errors import CorpusError

Split = Literal["training", "held_out"]

_TEXT_VERSION = 1
"""Raised when the same files come to give other documents, pieces or text."""

_USUAL = {"text_column": "text", "id_column": None, "parts": 1}
"""Settings that the identity leaves out where they have these values, as it did before they could have others."""


@dataclass(frozen=True)
class CorpusPart(CorpusConfig):
    """One of the corpus.parts parts of the training text, as a corpus of its own; what is held out is the same in all of them."""

    part: int = 0
    """Which one, from 0."""


@dataclass(frozen=True)
class Document:
    """One document of a split."""

    index: int
    """Ordinal among the documents of its split, or of a part of the training text, in corpus order."""
    id: str
    """Its name in the corpus: page id, FEVER's page name, or the like."""
    text: str
    """Plain text, cut to corpus.max_document_characters; empty where nothing but markup was there."""


@dataclass(frozen=True)
class Piece:
    """Part of a document, the unit dealt to lanes."""

    document: int
    """Document.index."""
    piece: int
    """Ordinal in the document."""
    text: str

    def lane(self, num_lanes: int) -> int:
        """The lane it is dealt to: (document + piece) mod num_lanes."""
        return (self.document + self.piece) % num_lanes


def seeded_hash(purpose: str, seed: int, name: str) -> int:
    """A uniform 64-bit number that depends on its arguments alone; different purposes give independent numbers."""
    # JSON can spell an id with half a surrogate pair, which strict UTF-8 refuses.
    content = f"{purpose}:{seed}:{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def part_of(config: CorpusConfig, part: int) -> CorpusPart:
    """One part of a corpus."""
    return CorpusPart(**_settings(config), part=part)


def part_of_document(config: CorpusConfig, id: str) -> int:
    """The part that a training document belongs to."""
    return seeded_hash("part", config.seed, id) % config.parts


def read_documents(config: CorpusConfig, split: Split) -> Iterator[Document]:
    """The documents of one split in corpus order, streamed; markup is stripped from these only.

    Raises:
        CorpusError: the text is missing or damaged, or the split is empty.
    """
    return (Document(index, entry.id, _plain_text(config, entry)) for index, entry in _read_split(config, split, 0, None, lambda: None))


def read_pieces(
    config: CorpusConfig,
    split: Split,
    wanted: Callable[[int, int], bool] | None = None,
    *,
    first_document: int = 0,
    bookmarks: Bookmarks | None = None,
    on_entry: Callable[[], None] = lambda: None,
) -> Iterator[Piece]:
    """The split's documents cut into pieces of at most corpus.piece_characters, in order.

    Args:
        config: the corpus.
        split: which documents.
        wanted: `wanted(document, piece)` may leave pieces out; it sees Document.index and the piece's ordinal. The text of a
            document is not looked at where none of the pieces it can have is wanted.
        first_document: Document.index of the first that is wanted; what stands before is skipped as far as the format allows.
        bookmarks: those of this corpus and split (`open_bookmarks`), to begin at and to add to; None reads from the beginning.
        on_entry: called for each entry that is read, wanted or not, as a sign of life; what it raises ends the reading.

    Raises:
        CorpusError: the text is missing or damaged, or the split is empty.
    """
    limit = config.piece_characters
    for index, entry in _read_split(config, split, first_document, bookmarks, on_entry):
        if index < first_document:
            continue
        if wanted is not None and not any(wanted(index, piece) for piece in range(_most_pieces(config, entry))):
            continue
        for piece, text in enumerate(cut_at_whitespace(_plain_text(config, entry), limit)):
            if wanted is None or wanted(index, piece):
                yield Piece(index, piece, text)


def open_bookmarks(path: Path, config: CorpusConfig, split: Split) -> Bookmarks:
    """The bookmarks of a corpus and split that a file keeps, for `read_pieces`; none yet where it is not there or of another corpus.

    Raises:
        CorpusError: as corpus_identity.
    """
    return Bookmarks(path, {"split": split, **corpus_identity(config)})


def cut_at_whitespace(text: str, max_characters: int) -> Iterator[str]:
    """Cut text into parts that are as long as the limit allows, without the whitespace between them.

    A word longer than the limit is cut within.
    """
    pattern = rf"(?=\S).{{1,{max_characters}}}(?<=\S)(?!\S)|\S{{{max_characters}}}"
    return (match.group() for match in re.finditer(pattern, text, re.DOTALL))


def corpus_identity(config: CorpusConfig) -> dict[str, Any]:
    """What decides the pieces and their lanes, as plain data: the settings, and where the text comes from.

    Files are given by name and size, a data set by its revision or fingerprint.

    Raises:
        CorpusError: corpus.path is empty, matches no file, or names no data set.
    """
    settings = asdict(config)
    for name in ("path", "dataset", *(name for name, usual in _USUAL.items() if settings[name] == usual)):
        del settings[name]
    return {"text_version": _TEXT_VERSION, **settings, **describe(config)}


def _read_split(
    config: CorpusConfig, split: Split, first_document: int, bookmarks: Bookmarks | None, on_entry: Callable[[], None]
) -> Iterator[tuple[int, Entry]]:
    """The numbered entries of a split, in corpus order, from the last bookmark before `first_document` on.

    With corpus.max_documents those are the entries with the smallest hashes; entries of one id go together.
    """
    largest = _largest_selected_hash(config, bookmarks, on_entry)
    start = bookmarks.before(first_document) if bookmarks is not None else Bookmark(0, Place())
    num_entries, index = 0, start.document
    for entry in read_entries(config, start.place):
        on_entry()
        if bookmarks is not None and entry.place is not None:
            bookmarks.note(index, entry.place)
        if largest is not None and seeded_hash("selection", config.seed, entry.id) > largest:
            continue
        num_entries += 1
        if _is_held_out(config, entry) == (split == "held_out") and (split == "held_out" or _is_in_part(config, entry)):
            yield index, entry
            index += 1
    if index == 0:
        raise CorpusError(_why_empty(config, split, num_entries))


def _why_empty(config: CorpusConfig, split: Split, num_entries: int) -> str:
    """The complaint about a split without documents, of a corpus with so many."""
    if num_entries == 0:
        has_columns = config.format in ("jsonl", "parquet", "datasets")
        check = f"it, corpus.format and corpus.text_column ({config.text_column})" if has_columns else "it and corpus.format"
        return f"corpus.path is {config.path!r}, which holds no {config.format} text; check {check}"
    if split == "training" and isinstance(config, CorpusPart):
        return (
            f"part {config.part} of the {config.parts} of {config.path!r} has none of its {num_entries} documents; "
            "lower corpus.parts, or give more documents"
        )
    kind, change = ("held out", "raise") if split == "held_out" else ("training text", "lower")
    return (
        f"none of the {num_entries} documents of {config.path!r} is {kind}; "
        f"{change} corpus.held_out_fraction ({config.held_out_fraction}), or give more documents"
    )


def _largest_selected_hash(config: CorpusConfig, bookmarks: Bookmarks | None, on_entry: Callable[[], None]) -> int | None:
    """The bound of the selection; None where all documents are taken."""
    if config.max_documents is None:
        return None
    whole = CorpusConfig(**_settings(config))  # all parts share one pass
    if bookmarks is None:
        return _find_largest_selected_hash(whole, on_entry)
    if bookmarks.largest_hash is None:
        bookmarks.largest_hash = _find_largest_selected_hash(whole, on_entry)
        bookmarks.save()
    return bookmarks.largest_hash


_largest_selected_hashes: dict[CorpusConfig, int] = {}
"""Of the corpora that this process has passed over."""


def _find_largest_selected_hash(config: CorpusConfig, on_entry: Callable[[], None]) -> int:
    """One pass over the whole corpus, made once a process."""

    def hashes() -> Iterator[int]:
        for entry in read_entries(config):
            on_entry()
            yield seeded_hash("selection", config.seed, entry.id)

    if config not in _largest_selected_hashes:
        _largest_selected_hashes[config] = max(heapq.nsmallest(config.max_documents or 0, hashes()), default=0)
    return _largest_selected_hashes[config]


def _most_pieces(config: CorpusConfig, entry: Entry) -> int:
    """Pieces that a document can have: no text is longer than its markup, and two pieces together are longer than the limit."""
    characters = min(len(entry.raw), config.max_document_characters or len(entry.raw))
    return 2 * (characters // (config.piece_characters + 1)) + 1


def _is_held_out(config: CorpusConfig, entry: Entry) -> bool:
    return seeded_hash("split", config.seed, entry.id) < config.held_out_fraction * 2**64


def _is_in_part(config: CorpusConfig, entry: Entry) -> bool:
    return not isinstance(config, CorpusPart) or part_of_document(config, entry.id) == config.part


def _settings(config: CorpusConfig) -> dict[str, Any]:
    """The fields of a corpus, or of the one that a part is of."""
    return {field.name: getattr(config, field.name) for field in fields(CorpusConfig)}


def _plain_text(config: CorpusConfig, entry: Entry) -> str:
    # A tokenizer refuses the half surrogate pairs that JSON can spell.
    text = entry.raw.encode("utf-8", "replace").decode("utf-8")
    if config.format == "mediawiki":
        text = strip_wiki_markup(text)
    elif config.format == "fever" and config.detokenise:
        text = detokenise(text)
    if config.max_document_characters is not None:
        text = next(cut_at_whitespace(text, config.max_document_characters), "")
    return text
