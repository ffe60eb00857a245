"""Tables. In: a .parquet file, or Arrow tables of a data set. Out: their rows as entries; only the columns that are needed are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gsae.config import CorpusConfig
from gsae.corpus.entries import Entry, Place, SourceFile
from gsae.errors import CorpusError

READ_ROWS = 512
"""Rows read at once: few, so that memory stays flat where documents are long."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are needed."""

    text: str
    id: str | None
    """None where rows are named by their number."""
    every_row_has_id: bool
    """Whether a row without is an error: corpus.id_column names the column."""

    @property
    def names(self) -> list[str]:
        """Both, once."""
        return list(dict.fromkeys(name for name in (self.text, self.id) if name is not None))


def find_columns(where: str, schema: pa.Schema, config: CorpusConfig) -> Columns:
    """The columns of the text and the ids.

    Args:
        where: the file or data set, for messages.
        schema: its columns.
        config: which of them are wanted.

    Raises:
        CorpusError: one is not there, or the text is not of strings.
    """
    for setting, name in (("text_column", config.text_column), ("id_column", config.id_column)):
        if name is not None and name not in schema.names:
            raise CorpusError(f"{where}: no column {name!r} (it has {', '.join(schema.names)}); set corpus.{setting} to one of them")
    kind = schema.field(config.text_column).type
    if not _is_text(kind):
        strings = [field.name for field in schema if _is_text(field.type)]
        cure = f"set corpus.text_column to {' or '.join(strings)}" if strings else "it has no column of strings"
        raise CorpusError(f"{where}: column {config.text_column!r} holds {kind}, not strings; {cure}")
    return Columns(config.text_column, config.id_column or ("id" if "id" in schema.names else None), config.id_column is not None)


def read_parquet(file: SourceFile, config: CorpusConfig, start: Place) -> Iterator[Entry]:
    """The rows of a .parquet file from one of its row groups on.

    Raises:
        CorpusError: the file is no parquet, or a column is not there, not of strings, or has nulls.
    """
    try:
        # Without pre_buffer and with a bounded buffer a row group is read page by page, not whole.
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=_READ_BYTES) as parquet:
            columns = find_columns(file.name, parquet.schema_arrow, config)
            row = start.row
            for group in range(start.offset, parquet.num_row_groups):
                place: Place | None = Place(file.number, group, row)
                for batch in parquet.iter_batches(READ_ROWS, row_groups=[group], columns=columns.names, use_threads=False):
                    for entry in entries_of(batch, file.name, file.name, columns, row):
                        yield entry if place is None else Entry(entry.id, entry.raw, place)
                        place = None
                    row += batch.num_rows
    except pa.ArrowException as error:
        words = " ".join(str(error).split())
        raise CorpusError(f"{file.path}: not readable as parquet ({words}); check corpus.format and that the file is complete") from error


def entries_of(table: pa.Table | pa.RecordBatch, where: str, name: str, columns: Columns, first_row: int) -> Iterator[Entry]:
    """The rows of a table as entries, without a place.

    Args:
        table: some rows of a file or data set.
        where: the file or data set, for messages.
        name: a row without an id is named by this and its number.
        columns: where text and ids are.
        first_row: rows of the file or data set before these.

    Raises:
        CorpusError: a text is null, or an id is and corpus.id_column names them.
    """
    texts = table.column(columns.text).to_pylist()
    ids: list[Any] = [None] * len(texts) if columns.id is None else table.column(columns.id).to_pylist()
    for number, (id, text) in enumerate(zip(ids, texts, strict=True), start=first_row + 1):
        if text is None:
            raise CorpusError(f"{where}, row {number}: null under {columns.text!r}; leave such rows out, or set another corpus.text_column")
        if id is None and columns.every_row_has_id:
            raise CorpusError(f"{where}, row {number}: null under {columns.id!r}; set another corpus.id_column, or leave it out")
        yield Entry(f"{name}:{number}" if id is None else str(id), text)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
