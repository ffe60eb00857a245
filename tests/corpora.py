"""The same documents in every format with ids, for tests that compare them."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from gsae.config import CorpusConfig, DataSetConfig

BLANK = {"id": "", "text": "", "lines": ""}
"""The first row of each of FEVER's files."""


def rows_of(texts: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"id": id, "text": text, "lines": f"0\t{text}"} for id, text in texts.items()]


def as_lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_fever(folder: Path, files: Mapping[str, Sequence[Mapping[str, str]]]) -> tuple[CorpusConfig, CorpusConfig]:
    """FEVER's zip as it comes, resource forks and empty rows among it, and the directory it unpacks to."""
    archive = folder / "wiki-pages.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in sorted(files, reverse=True):
            zipped.writestr(f"wiki-pages/{name}", as_lines([BLANK, *files[name]]))
            zipped.writestr(f"__MACOSX/wiki-pages/._{name}", b"\x00\x05\x16\x07 not json")
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(folder / "unpacked")
    return CorpusConfig(format="fever", path=str(archive)), CorpusConfig(format="fever", path=str(folder / "unpacked"))


def write_all(folder: Path, texts: Mapping[str, str], *, row_group_size: int = 50) -> dict[str, CorpusConfig]:
    """One corpus in all formats, in two files where a format has files; their names give the order."""
    rows = rows_of(texts)
    halves = {"a": rows[: len(rows) // 3], "b": rows[len(rows) // 3 :]}
    for format in ("jsonl", "parquet"):
        (folder / format).mkdir(parents=True)
    for name, half in halves.items():
        (folder / "jsonl" / f"{name}.jsonl").write_text(as_lines(half))
        pq.write_table(pa.Table.from_pylist(half), folder / "parquet" / f"{name}.parquet", row_group_size=row_group_size)
    zipped, unpacked = write_fever(folder, {f"wiki-{name}.jsonl": half for name, half in halves.items()})
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict(train=saved, test=saved.select(range(1))).save_to_disk(str(folder / "splits"))
    return {
        "fever zip": zipped,
        "fever directory": unpacked,
        "jsonl": CorpusConfig(format="jsonl", path=f"{folder}/jsonl/*.jsonl"),
        "parquet": CorpusConfig(format="parquet", path=f"{folder}/parquet/*.parquet"),
        "saved": CorpusConfig(format="datasets", path=str(folder / "saved")),
        "splits": CorpusConfig(format="datasets", path=str(folder / "splits")),
        "streamed jsonl": CorpusConfig(format="datasets", path=str(folder / "jsonl")),
        "local jsonl": CorpusConfig(format="datasets", path=str(folder / "jsonl"), dataset=DataSetConfig(streaming=False)),
        "streamed parquet": CorpusConfig(format="datasets", path=str(folder / "parquet")),
        "local parquet": CorpusConfig(format="datasets", path=str(folder / "parquet"), dataset=DataSetConfig(streaming=False)),
    }
