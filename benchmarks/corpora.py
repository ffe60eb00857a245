"""What reading costs, format by format: the figures of docs/corpora.md.

python benchmarks/corpora.py [MEGABYTES]

Pages of 569 characters, as FEVER's are on average, in six formats, and MediaWiki articles of 30,000. Seconds of one process for all
pieces, for those of every 8th lane, and for what comes after 90 % of the documents: read from the beginning, and from a bookmark.
"""

import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from json import dumps
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from gsae.config import CorpusConfig
from gsae.corpus.documents import open_bookmarks, read_pieces

WORDS = "Ada -LRB- born 1900 -RRB- was a poet , and `` a critic '' of the river Danube in the old town of number {number} . "
PAGE_CHARACTERS, ARTICLE_CHARACTERS = 569, 30_000
FILES = 10


def write_corpora(folder: Path, megabytes: int) -> Iterator[tuple[str, CorpusConfig, int]]:
    """Name, config and characters of text of each corpus."""
    characters = megabytes * 10**6
    rows = [
        {"id": f"page {number}", "text": (WORDS.format(number=number) * 6)[:PAGE_CHARACTERS], "lines": WORDS * 6}
        for number in range(characters // PAGE_CHARACTERS)
    ]
    parts = [rows[part::FILES] for part in range(FILES)]
    for name in ("jsonl", "parquet", "text"):
        (folder / name).mkdir()
    with zipfile.ZipFile(folder / "wiki-pages.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, part in enumerate(parts):
            lines = "".join(dumps(row) + "\n" for row in part)
            archive.writestr(f"wiki-pages/wiki-{number:03d}.jsonl", lines)
            (folder / "jsonl" / f"{number:03d}.jsonl").write_text(lines)
            pq.write_table(pa.Table.from_pylist(part), folder / "parquet" / f"{number:03d}.parquet", row_group_size=5000)
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    yield "fever, zip", CorpusConfig(format="fever", path=str(folder / "wiki-pages.zip"), detokenise=True), characters
    yield "fever, jsonl", CorpusConfig(format="fever", path=str(folder / "jsonl"), detokenise=True), characters
    yield "jsonl", CorpusConfig(format="jsonl", path=str(folder / "jsonl")), characters
    yield "parquet", CorpusConfig(format="parquet", path=str(folder / "parquet")), characters
    yield "datasets, saved", CorpusConfig(format="datasets", path=str(folder / "saved")), characters
    yield "datasets, streamed parquet", CorpusConfig(format="datasets", path=str(folder / "parquet")), characters
    for number, row in enumerate(rows[: len(rows) // 20]):
        (folder / "text" / f"{number:06d}.txt").write_text(row["text"])
    yield "text, one file a page", CorpusConfig(format="text", path=str(folder / "text")), characters // 20
    yield "mediawiki", CorpusConfig(path=str(write_dump(folder / "dump.xml", characters // 20))), characters // 20


def write_dump(path: Path, characters: int) -> Path:
    """A dump of articles with links and templates."""
    markup = "'''Ada''' (born [[1900]]) was a [[poet]]{{citation needed}} of the [[Danube|river]] in the old town of number {number}. "
    text = (markup.replace("{number}", "7") * (ARTICLE_CHARACTERS // len(markup) + 1))[:ARTICLE_CHARACTERS]
    with path.open("w") as file:
        file.write("<mediawiki>")
        for number in range(characters // ARTICLE_CHARACTERS):
            file.write(f"<page><ns>0</ns><id>{number}</id><revision><text>{text}</text></revision></page>")
        file.write("</mediawiki>")
    return path


def seconds(config: CorpusConfig, lanes: int, **settings: object) -> float:
    """Time to read the pieces of every `lanes`-th lane."""
    begun = time.perf_counter()
    for _ in read_pieces(config, "training", lambda document, piece: (document + piece) % lanes == 0, **settings):
        pass
    return time.perf_counter() - begun


def main() -> None:
    """Print a table."""
    datasets.disable_progress_bars()
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| format | MB | all, s | MB/s | every 8th lane, s | its last 10 %, no bookmark, s | its last 10 %, bookmark, s |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        for kind, corpus, characters in write_corpora(folder, megabytes):
            config = replace(corpus, held_out_fraction=0.01)
            list(islice(read_pieces(config, "training"), 1))  # imports
            bookmarks = open_bookmarks(folder / f"{kind}.json", config, "training")
            last = max(piece.document for piece in read_pieces(config, "training", bookmarks=bookmarks))
            whole, share = seconds(config, 1), seconds(config, 8)
            late = [seconds(config, 8, first_document=last * 9 // 10, bookmarks=marks) for marks in (None, bookmarks)]
            figures = " | ".join(f"{value:.2f}" for value in (share, *late))
            print(f"| {kind} | {characters / 1e6:.0f} | {whole:.2f} | {characters / 1e6 / whole:.0f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
