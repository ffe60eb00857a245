"""Memory does not grow with the corpus: the peak of a process that reads 200 MB, beside one that reads 2 MB."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MEGABYTE = 1 << 20
WORDS = "The quick brown fox jumps over the lazy dog number {number} . " * 32  # about 2,000 characters
READ = """
import sys
from gsae.config import CorpusConfig
from gsae.corpus.documents import read_pieces
config = CorpusConfig(format=sys.argv[1], path=sys.argv[2])
characters = sum(len(piece.text) for piece in read_pieces(config, "training"))
# Not getrusage, which counts what the parent process held when it started this one.
print(characters, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write(path, megabytes, row_group_size=None):
    """Documents whose text has so many bytes; a .parquet file is one row group, as some writers leave it, unless it is said otherwise."""
    rows = ({"id": str(number), "text": WORDS.format(number=number)} for number in range(megabytes * MEGABYTE // len(WORDS)))
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        pq.write_table(
            pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size or 10**9, compression="none", use_dictionary=False
        )
    return path


def peak_bytes(format, path, least_characters):
    done = subprocess.run([sys.executable, "-c", READ, format, str(path)], capture_output=True, text=True, check=True, timeout=300)
    characters, kibibytes = map(int, done.stdout.split())
    assert characters > least_characters
    return kibibytes * 1024


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_memory_stays_flat(tmp_path, format):
    for name, megabytes in (("little", 2), ("much", 200)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"train.{format}", megabytes)
    little = peak_bytes(format, tmp_path / "little", 1.8 * MEGABYTE)
    much = peak_bytes(format, tmp_path / "much", 180 * MEGABYTE)
    assert much - little < 60 * MEGABYTE


def test_memory_of_a_streamed_data_set_is_bounded_by_its_largest_file(tmp_path):
    for name in ("one", "ten"):
        (tmp_path / name).mkdir()
    file = write(tmp_path / "one" / "train-0.parquet", 20, row_group_size=2000)
    for number in range(10):
        (tmp_path / "ten" / f"train-{number}.parquet").hardlink_to(file)
    one = peak_bytes("datasets", tmp_path / "one", 18 * MEGABYTE)
    ten = peak_bytes("datasets", tmp_path / "ten", 180 * MEGABYTE)
    assert ten - one < 90 * MEGABYTE
