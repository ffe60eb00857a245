"""Data sets of the library `datasets`. In: a name on the hub or a directory. Out: their rows as entries, and their revision."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever of its versions the hub's client uses

from gsae.config import CorpusConfig
from gsae.corpus.entries import Entry, Place
from gsae.corpus.files import describe_files
from gsae.corpus.tables import READ_ROWS, entries_of, find_columns
from gsae.errors import CorpusError

_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` leaves in the directory of one split, and of several."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_FAILURES = (datasets.exceptions.DatasetsError, httpx.HTTPError, OSError, ValueError, RuntimeError)
"""What the library raises where a name, a split, a file or the network is not as it should be."""


@dataclass(frozen=True)
class _DataSet:
    """A data set that is open."""

    rows: Any
    """A `datasets.Dataset` or `datasets.IterableDataset` of Arrow tables."""
    description: dict[str, Any]
    """Its part of the corpus's identity."""


def describe_data_set(config: CorpusConfig) -> dict[str, Any]:
    """What a corpus's identity says of a data set, and no place on this machine.

    Of one on the hub `name`, `subset`, `split` and `revision` (the commit); of a directory that `save_to_disk` wrote `fingerprint` and
    `rows`; of another directory `subset`, `split` and its files by name and size.

    Raises:
        CorpusError: there is no such data set, subset, split or revision, or it cannot be reached.
    """
    with _failures_named(config):
        return _open(config).description


def read_data_set(config: CorpusConfig, start: Place) -> Iterator[Entry]:
    """The rows from `start.row` on; a row without an id is named by its number.

    A data set on this machine begins there at once; one that is streamed is read from its beginning, what comes before is dropped.

    Raises:
        CorpusError: the data set cannot be read, or a column is not there, not of strings, or has nulls.
    """
    where, row = f"data set {config.path}", start.row
    with _failures_named(config):
        rows = _open(config).rows.skip(row) if row else _open(config).rows
        for table in rows.iter(READ_ROWS):
            columns = find_columns(where, table.schema, config)
            for number, entry in enumerate(entries_of(table, where, "row", columns, row), start=row):
                yield Entry(entry.id, entry.raw, Place(0, 0, number)) if number == row else entry
            row += table.num_rows


@cache
def _open(config: CorpusConfig) -> _DataSet:
    """The data set, opened once a process."""
    directory = Path(config.path)
    is_directory = directory.is_dir() and bool(config.path)
    if not is_directory and not _HUB_NAME.fullmatch(config.path):
        raise CorpusError(f"corpus.path is {config.path!r}, which is no directory; name one, or a data set on the hub as OWNER/NAME")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it raises too
    if any((directory / name).is_file() for name in _SAVED):
        return _open_saved(config)
    wanted = config.dataset
    builder = datasets.load_dataset_builder(config.path, wanted.subset, revision=wanted.revision)
    if wanted.revision is not None and _COMMIT.fullmatch(wanted.revision) and not is_directory and builder.hash != wanted.revision:
        # Where the hub is out of reach the library takes the newest revision in its cache.
        raise CorpusError(
            f"data set {config.path}: not to be had at {wanted.revision}, only at {builder.hash}; set corpus.dataset.revision"
        )
    described: dict[str, Any] = {"subset": builder.config.name, "split": wanted.split}
    if is_directory:
        described["files"] = describe_files(_sizes(directory, builder.config.data_files or {}, wanted.split))
    else:
        described |= {"name": config.path, "revision": builder.hash}
    if wanted.streaming:
        return _DataSet(_stream(builder, config).with_format("arrow"), described)
    builder.download_and_prepare()
    return _DataSet(builder.as_dataset(wanted.split).with_format("arrow"), described)


def _stream(builder: Any, config: CorpusConfig) -> Any:
    """The split as it comes over the network; of .parquet files only the columns that are needed, which the library reads by row group."""
    split = config.dataset.split
    rows = builder.as_streaming_dataset(split)
    if isinstance(builder.config, ParquetConfig):
        builder.config.columns = find_columns(f"data set {config.path}", rows.features.arrow_schema, config).names
        builder.config.batch_size = READ_ROWS
        rows = builder.as_streaming_dataset(split)
    return rows


def _open_saved(config: CorpusConfig) -> _DataSet:
    """A directory that `save_to_disk` wrote: one split, or several by name."""
    saved, split = datasets.load_from_disk(config.path), config.dataset.split
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise CorpusError(f"data set {config.path}: no split {split!r}; set corpus.dataset.split to {' or '.join(saved)}")
        saved = saved[split]
    return _DataSet(saved.with_format("arrow"), {"fingerprint": saved._fingerprint, "rows": len(saved)})


def _sizes(directory: Path, data_files: dict[str, list[str]], split: str) -> list[tuple[str, int]]:
    """Names below the directory, and bytes, of a split's files; of all splits' where the split is a part of one, or several."""
    chosen = data_files.get(split) or [file for files in data_files.values() for file in files]
    base = directory.resolve()
    return sorted((Path(file).relative_to(base).as_posix(), Path(file).stat().st_size) for file in chosen)


@contextmanager
def _failures_named(config: CorpusConfig) -> Iterator[None]:
    """The library's errors in one line that names the data set."""
    try:
        yield
    except _FAILURES as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        words = " ".join(str(cause or error).split())[:300]
        if Path(config.path).is_dir():
            cure = "check corpus.dataset, and that its files are complete"
        elif isinstance(error, ConnectionError | httpx.TransportError):
            cure = "where there is no network, save it elsewhere with save_to_disk and name that directory"
        else:
            cure = "check corpus.path and corpus.dataset; for a gated one accept its terms on the hub and run hf auth login"
        raise CorpusError(f"data set {config.path}: {words or type(error).__name__}; {cure}") from error
