"""The corpus's files. In: corpus.format and corpus.path. Out: the files in their order, and what the corpus's identity says of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsae.config import CorpusConfig
from gsae.corpus.entries import SourceFile
from gsae.errors import CorpusError

_PATTERNS = {
    "mediawiki": ("*.xml", "*.bz2"),
    "fever": ("**/*.jsonl",),
    "jsonl": ("**/*.jsonl",),
    "text": ("**/*.txt",),
    "parquet": ("**/*.parquet",),
}
"""What is read where corpus.path is a directory."""

_CURES = {
    "mediawiki": "download a pages-articles.xml.bz2 from https://dumps.wikimedia.org and name it",
    "fever": "download https://fever.ai/download/fever/wiki-pages.zip and name it, or the directory it was unpacked to",
    "jsonl": "name .jsonl files, their directory, or a glob pattern",
    "text": "name text files by a glob pattern, or a directory that holds .txt files",
    "parquet": "name .parquet files, their directory, or a glob pattern",
}


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
    named = sorted((file.relative_to(base).as_posix(), file) for file in found if file.is_file())
    files = [SourceFile(name, file, number) for number, (name, file) in enumerate(item for item in named if not is_macos_copy(item[0]))]
    if not files:
        raise CorpusError(f"corpus.path is {config.path!r}, where no file matches; {_CURES[config.format]}")
    return files


def is_macos_copy(name: str) -> bool:
    """Whether this is one of the resource forks that macOS packs beside every file."""
    return "__MACOSX" in name.split("/")


def describe_files(files: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """The files in an identity, from their names and sizes in bytes."""
    return {
        "first": files[0][0],
        "number": len(files),
        "bytes": sum(size for _, size in files),
        "names_and_sizes_sha256": hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in files).encode()).hexdigest(),
    }
