"""Corpus files. In: the format and path of the config. Out: entries, each an id and its raw text, streamed in corpus order."""

import bz2
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast
from xml.etree import ElementTree

from gsae.config import CorpusConfig
from gsae.errors import CorpusError

_READ_BYTES = 1 << 20

_PATTERNS = {"mediawiki": ("*.xml", "*.bz2"), "fever": ("**/*.jsonl",), "jsonl": ("**/*.jsonl",), "text": ("**/*.txt",)}
"""What is read where corpus.path is a directory."""

_CURES = {
    "mediawiki": "download a pages-articles.xml.bz2 from https://dumps.wikimedia.org and name it",
    "fever": "download https://fever.ai/download/fever/wiki-pages.zip and name it, or the directory it was unpacked to",
    "jsonl": "name .jsonl files, their directory, or a glob pattern",
    "text": "name text files by a glob pattern, or a directory that holds .txt files",
}

_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, ElementTree.ParseError, UnicodeDecodeError)
"""What the standard library raises on a file that is cut short, damaged, or of another format."""


@dataclass(frozen=True)
class Entry:
    """One document as its file has it."""

    id: str
    """Its name in the corpus; the selection and the split are made by it."""
    raw: str
    """Its text, markup included; never blank."""


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus."""

    name: str
    """Path below the fixed part of corpus.path (what stands before the first wildcard), so that a corpus may move."""
    path: Path
    """Where it is on this machine."""


def find_files(config: CorpusConfig) -> list[SourceFile]:
    """The corpus's files, in the order of their names.

    Raises:
        CorpusError: corpus.path is empty or matches no file.
    """
    path = Path(config.path)
    wildcards = [place for place, part in enumerate(path.parts) if any(sign in part for sign in "*?[")]
    if path.is_file():
        base, found = path.parent, [path]
    elif path.is_dir() and config.path:
        base, found = path, [file for pattern in _PATTERNS[config.format] for file in path.glob(pattern)]
    elif wildcards:
        base = Path(*path.parts[: wildcards[0]])
        found = list(base.glob("/".join(path.parts[wildcards[0] :])))
    else:
        raise CorpusError(f"corpus.path is {config.path!r}, which is not there; {_CURES[config.format]}")
    files = [SourceFile(file.relative_to(base).as_posix(), file) for file in found if file.is_file()]
    files = sorted((file for file in files if not _is_macos_copy(file.name)), key=lambda file: file.name)
    if not files:
        raise CorpusError(f"corpus.path is {config.path!r}, where no file matches; {_CURES[config.format]}")
    return files


def read_entries(config: CorpusConfig) -> Iterator[Entry]:
    """All entries with text, in the order of the files; memory holds one entry at a time.

    Raises:
        CorpusError: a file is missing, damaged or of another format.
    """
    read = _READERS[config.format]
    for file in find_files(config):
        try:
            yield from (entry for entry in read(file) if entry.raw and not entry.raw.isspace())
        except _DAMAGE as error:
            raise CorpusError(
                f"{file.path}: not readable as {config.format} ({error}); check corpus.format and that the file is complete"
            ) from error


def _is_macos_copy(name: str) -> bool:
    """Whether this is one of the resource forks that macOS packs beside every file."""
    return "__MACOSX" in name.split("/")


def _read_mediawiki(file: SourceFile) -> Iterator[Entry]:
    """The articles (namespace 0, no redirects) of an XML dump."""
    with _open_dump(file.path) as stream:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        for event, element in events:
            if event == "end" and element.tag.rpartition("}")[2] == "page":
                if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                    yield Entry(element.findtext("{*}id", ""), element.findtext("{*}revision/{*}text", ""))
                root.clear()


def _open_dump(path: Path) -> BinaryIO:
    """The XML, decompressed where the file begins as bzip2 does: the dumps' names have their parts' numbers at the end."""
    with path.open("rb") as stream:
        is_compressed = stream.read(3) == b"BZh"
    return cast(BinaryIO, bz2.open(path)) if is_compressed else path.open("rb")


def _read_fever(file: SourceFile) -> Iterator[Entry]:
    """The pages of FEVER's zip, or of one of the .jsonl files it holds; rows without an id are empty."""
    for name, lines in _open_fever(file):
        yield from (Entry(row["id"], row["text"]) for _, row in _read_rows(name, lines) if row.get("id"))


def _open_fever(file: SourceFile) -> Iterator[tuple[str, BinaryIO]]:
    """Names and contents of the .jsonl files in a zip, or of the one that this file is."""
    if not zipfile.is_zipfile(file.path):
        with file.path.open("rb") as stream:
            yield file.name, stream
        return
    with zipfile.ZipFile(file.path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jsonl") and not _is_macos_copy(name):
                # A member by itself finds its lines twice as slowly.
                with BufferedReader(cast(Any, archive.open(name)), _READ_BYTES) as member:
                    yield name, member


def _read_jsonl(file: SourceFile) -> Iterator[Entry]:
    """One entry a line; a line without an id is named by its file and number."""
    with file.path.open("rb") as stream:
        for number, row in _read_rows(file.name, stream):
            yield Entry(f"{file.name}:{number}" if row.get("id") is None else str(row["id"]), row["text"])


def _read_text(file: SourceFile) -> Iterator[Entry]:
    """The whole file, named by its path."""
    yield Entry(file.name, file.path.read_text(encoding="utf-8"))


def _read_rows(name: str, lines: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered objects of a .jsonl file, each with a string under `text`."""
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{name}, line {number}: not JSON ({error}); check corpus.format and that the file is complete") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CorpusError(f"{name}, line {number}: not an object with a string under 'text'; check corpus.format")
        yield number, row


_READERS: dict[str, Callable[[SourceFile], Iterator[Entry]]] = {
    "mediawiki": _read_mediawiki,
    "fever": _read_fever,
    "jsonl": _read_jsonl,
    "text": _read_text,
}
