"""Documents. In: the corpus's entries. Out: the documents of a split, and the pieces they are cut into.

Which documents are taken, and which of them are held out, is decided by seeded hashes of their ids alone: the same on every
rank and machine, whatever the order of the files, before a document's text is looked at.
"""

import hashlib
import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from gsae.config import CorpusConfig
from gsae.corpus.formats import Entry, find_files, read_entries
from gsae.corpus.markup import detokenise, strip_wiki_markup
from gsae.errors import CorpusError

Split = Literal["training", "held_out"]

_TEXT_VERSION = 1
"""Raised when the same files come to give other documents, pieces or text."""


@dataclass(frozen=True)
class Document:
    """One document of a split."""

    index: int
    """Ordinal among the documents of its split, in corpus order."""
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


def read_documents(config: CorpusConfig, split: Split) -> Iterator[Document]:
    """The documents of one split in corpus order, streamed; markup is stripped from these only.

    Raises:
        CorpusError: the text is missing or damaged, or the split is empty.
    """
    num_entries = index = 0
    for entry in _read_selected(config):
        num_entries += 1
        if _is_held_out(config, entry) == (split == "held_out"):
            yield Document(index, entry.id, _plain_text(config, entry))
            index += 1
    if num_entries == 0:
        raise CorpusError(f"corpus.path is {config.path!r}, which holds no {config.format} text; check it and corpus.format")
    if index == 0:
        kind, change = ("held out", "raise") if split == "held_out" else ("training text", "lower")
        raise CorpusError(
            f"none of the {num_entries} documents of {config.path!r} is {kind}; "
            f"{change} corpus.held_out_fraction ({config.held_out_fraction}), or give more documents"
        )


def read_pieces(config: CorpusConfig, split: Split, wanted: Callable[[int, int], bool] | None = None) -> Iterator[Piece]:
    """The split's documents cut into pieces of at most corpus.piece_characters, in order.

    `wanted(document, piece)` may leave pieces out; it sees Document.index and the piece's ordinal.
    """
    for document in read_documents(config, split):
        for piece, text in enumerate(cut_at_whitespace(document.text, config.piece_characters)):
            if wanted is None or wanted(document.index, piece):
                yield Piece(document.index, piece, text)


def cut_at_whitespace(text: str, max_characters: int) -> Iterator[str]:
    """Cut text into parts that are as long as the limit allows, without the whitespace between them.

    A word longer than the limit is cut within.
    """
    pattern = rf"(?=\S).{{1,{max_characters}}}(?<=\S)(?!\S)|\S{{{max_characters}}}"
    return (match.group() for match in re.finditer(pattern, text, re.DOTALL))


def corpus_identity(config: CorpusConfig) -> dict[str, Any]:
    """What decides the pieces and their lanes, as plain data: the settings, and the files by name and size.

    Raises:
        CorpusError: corpus.path is empty or matches no file.
    """
    settings = {name: value for name, value in asdict(config).items() if name != "path"}
    files = [(file.name, file.path.stat().st_size) for file in find_files(config)]
    names_and_sizes = hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in files).encode()).hexdigest()
    described = {
        "first": files[0][0],
        "number": len(files),
        "bytes": sum(size for _, size in files),
        "names_and_sizes_sha256": names_and_sizes,
    }
    return {"text_version": _TEXT_VERSION, **settings, "files": described}


def _read_selected(config: CorpusConfig) -> Iterator[Entry]:
    """The corpus.max_documents entries with the smallest hashes, in corpus order; entries of one id go together."""
    if config.max_documents is None:
        yield from read_entries(config)
        return
    largest = _largest_selected_hash(config)
    yield from (entry for entry in read_entries(config) if seeded_hash("selection", config.seed, entry.id) <= largest)


@cache
def _largest_selected_hash(config: CorpusConfig) -> int:
    """One pass over the whole corpus, made once a process."""
    hashes = (seeded_hash("selection", config.seed, entry.id) for entry in read_entries(config))
    return max(heapq.nsmallest(config.max_documents or 0, hashes), default=0)


def _is_held_out(config: CorpusConfig, entry: Entry) -> bool:
    return seeded_hash("split", config.seed, entry.id) < config.held_out_fraction * 2**64


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
