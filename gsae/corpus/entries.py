"""Entries. In: what a format's reader finds. Out: the types it gives it as, an entry with its place in the corpus."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus, or its data set."""

    name: str
    """Path below the fixed part of corpus.path (what stands before the first wildcard), so that a corpus may move."""
    path: Path
    """Where it is on this machine."""
    number: int = 0
    """Ordinal among the corpus's files."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading can begin without what stands before it."""

    file: int = 0
    """SourceFile.number."""
    offset: int = 0
    """Within the file, in the format's own unit: bytes of a .jsonl file, row groups of a .parquet file, members of FEVER's zip."""
    row: int = 0
    """Lines or rows of the file that stand before it; in a zip, of the member."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One document as its file has it."""

    id: str
    """Its name in the corpus; the selection and the split are made by it."""
    raw: str
    """Its text, markup included; never blank."""
    place: Place | None = None
    """Reading from here gives this entry first; None where reading cannot begin with it."""
