"""Formats. In: the format and path of the config. Out: entries, each an id and its raw text, streamed in corpus order."""

import bz2
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast
from xml.etree import ElementTree

from gsae.config import CorpusConfig
from gsae.corpus.entries import Entry, Place, SourceFile
from gsae.corpus.files import describe_files, find_files, is_macos_copy
from gsae.errors import CorpusError

_READ_BYTES = 1 << 20

_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, ElementTree.ParseError, UnicodeDecodeError)
"""What the standard library raises on a file that is cut short, damaged, or of another format."""


def read_entries(config: CorpusConfig, start: Place | None = None) -> Iterator[Entry]:
    """All entries with text, in the order of the files, or those from a place on; memory holds one entry, or one read of a table.

    Args:
        config: where the text is.
        start: the `place` of an entry of the same corpus; None is the beginning.

    Raises:
        CorpusError: a file is missing, damaged or of another format, or a column is not there or holds no strings.
    """
    read, start = _READERS[config.format], start or Place()
    for file in _sources(config)[start.file :]:
        place = None
        try:
            for entry in read(file, config, start if file.number == start.file else Place(file.number)):
                # Where an entry without text is left out, the next one begins there instead.
                place = entry.place or place
                if entry.raw and not entry.raw.isspace():
                    yield entry if place is entry.place else replace(entry, place=place)
                    place = None
        except _DAMAGE as error:
            raise CorpusError(
                f"{file.path}: not readable as {config.format} ({error}); check corpus.format and that the file is complete"
            ) from error


def describe(config: CorpusConfig) -> dict[str, Any]:
    """What the corpus's identity says of where the text comes from: files by name and size, or a data set by its revision.

    Raises:
        CorpusError: corpus.path is empty, matches no file, or names no data set.
    """
    if config.format == "datasets":
        from gsae.corpus.huggingface import describe_data_set

        return {"dataset": describe_data_set(config)}
    return {"files": describe_files([(file.name, file.path.stat().st_size) for file in find_files(config)])}


def _sources(config: CorpusConfig) -> list[SourceFile]:
    return [SourceFile(config.path, Path(config.path))] if config.format == "datasets" else find_files(config)


def _read_mediawiki(file: SourceFile, config: CorpusConfig, start: Place) -> Iterator[Entry]:
    """The articles (namespace 0, no redirects) of an XML dump; it is read from its start only."""
    place: Place | None = start
    with _open_dump(file.path) as stream:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        for event, element in events:
            if event == "end" and element.tag.rpartition("}")[2] == "page":
                if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                    yield Entry(element.findtext("{*}id", ""), element.findtext("{*}revision/{*}text", ""), place)
                    place = None
                root.clear()


def _open_dump(path: Path) -> BinaryIO:
    """The XML, decompressed where the file begins as bzip2 does: the dumps' names have their parts' numbers at the end."""
    with path.open("rb") as stream:
        is_compressed = stream.read(3) == b"BZh"
    return cast(BinaryIO, bz2.open(path)) if is_compressed else path.open("rb")


def _read_fever(file: SourceFile, config: CorpusConfig, start: Place) -> Iterator[Entry]:
    """The pages of FEVER's zip, or of one of the .jsonl files it holds; rows without an id are empty."""
    if zipfile.is_zipfile(file.path):
        yield from _read_fever_zip(file, start)
        return
    with file.path.open("rb") as stream:
        yield from (Entry(row["id"], row["text"], place) for place, row in _read_rows(file.name, stream, start, "text") if row.get("id"))


def _read_fever_zip(file: SourceFile, start: Place) -> Iterator[Entry]:
    """The members in the order of their names; a member is read from its start only."""
    with zipfile.ZipFile(file.path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jsonl") and not is_macos_copy(name))
        for number, name in enumerate(names[start.offset :], start=start.offset):
            place: Place | None = Place(file.number, number)
            # A member by itself finds its lines twice as slowly.
            with BufferedReader(cast(Any, archive.open(name)), _READ_BYTES) as member:
                for _, row in _read_rows(name, member, Place(), "text"):
                    if row.get("id"):
                        yield Entry(row["id"], row["text"], place)
                        place = None


def _read_jsonl(file: SourceFile, config: CorpusConfig, start: Place) -> Iterator[Entry]:
    """One entry a line; a line without an id is named by its file and number."""
    key = config.id_column or "id"
    with file.path.open("rb") as stream:
        for place, row in _read_rows(file.name, stream, start, config.text_column):
            id = row.get(key)
            if id is None and config.id_column is not None:
                raise CorpusError(f"{file.name}, line {place.row + 1}: nothing under {key!r}; check corpus.id_column, or leave it out")
            yield Entry(f"{file.name}:{place.row + 1}" if id is None else str(id), row[config.text_column], place)


def _read_text(file: SourceFile, config: CorpusConfig, start: Place) -> Iterator[Entry]:
    """The whole file, named by its path."""
    yield Entry(file.name, file.path.read_text(encoding="utf-8"), start)


def _read_rows(name: str, lines: BinaryIO, start: Place, text_column: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The objects of a .jsonl file from a place on, each with the place of its line and a string under `text_column`."""
    offset = start.offset
    if offset:
        lines.seek(offset)
    for number, line in enumerate(lines, start=start.row):
        place = Place(start.file, offset, number)
        offset += len(line)
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            where = f"{name}, line {number + 1}"
            raise CorpusError(f"{where}: not JSON ({error}); check corpus.format and that the file is complete") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            keys = f" but with {', '.join(row)}" if isinstance(row, dict) and text_column not in row else ""
            raise CorpusError(
                f"{name}, line {number + 1}: not an object with a string under {text_column!r}{keys}; "
                "check corpus.format and corpus.text_column"
            )
        yield place, row


def _read_parquet(file: SourceFile, config: CorpusConfig, start: Place) -> Iterator[Entry]:
    from gsae.corpus.tables import read_parquet  # pyarrow takes a while to import

    return read_parquet(file, config, start)


def _read_data_set(file: SourceFile, config: CorpusConfig, start: Place) -> Iterator[Entry]:
    from gsae.corpus.huggingface import read_data_set

    return read_data_set(config, start)


_READERS: dict[str, Callable[[SourceFile, CorpusConfig, Place], Iterator[Entry]]] = {
    "mediawiki": _read_mediawiki,
    "fever": _read_fever,
    "jsonl": _read_jsonl,
    "text": _read_text,
    "parquet": _read_parquet,
    "datasets": _read_data_set,
}
"""A reader gives the entries of one file from a place in it on; entries at which it could begin again carry their place."""
