"""Bookmarks. In: the places that go by as a corpus is read. Out: a small file of them, so that reading resumes near a document."""

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from gsae.corpus.entries import Place

_VERSION = 1
_APART = 1000
"""Documents of the split between two bookmarks, at least."""


@dataclass(frozen=True)
class Bookmark:
    """Reading from `place` gives the split's document of number `document` first."""

    document: int
    """Document.index."""
    place: Place


_BEGINNING = Bookmark(0, Place())


class Bookmarks:
    """Bookmarks of one split of a corpus, kept in a file that may be lost or out of date: reading then begins at the beginning.

    Any number of processes may keep the same file: each writes it whole, and all find the same bookmarks.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, save_every_seconds: float = 30.0) -> None:
        """Read the file, if it is of this corpus.

        Args:
            path: the file; it is made when there is something to keep.
            identity: of the corpus and the split, as plain data.
            save_every_seconds: time between two writes of it.
        """
        self._path = path
        self._sha256 = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._save_every_seconds = save_every_seconds
        self._saved_at = time.monotonic()
        known = _read(path, self._sha256)
        self.largest_hash: int | None = known.get("largest_hash")
        """The largest hash of a selected document, where a whole pass over the corpus has found it."""
        self._bookmarks = [_BEGINNING, *(Bookmark(document, Place(*place)) for document, *place in known.get("bookmarks", []))]

    def before(self, document: int) -> Bookmark:
        """The last one that does not stand behind a document."""
        return self._bookmarks[bisect_right(self._bookmarks, document, key=lambda bookmark: bookmark.document) - 1]

    def note(self, document: int, place: Place) -> None:
        """Keep that the reading is at a place and this document comes next; the file is written now and then."""
        if document < self._bookmarks[-1].document + _APART:
            return
        self._bookmarks.append(Bookmark(document, place))
        if time.monotonic() >= self._saved_at + self._save_every_seconds:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        rows = [(mark.document, mark.place.file, mark.place.offset, mark.place.row) for mark in self._bookmarks[1:]]
        content = {"version": _VERSION, "corpus_sha256": self._sha256, "largest_hash": self.largest_hash, "bookmarks": rows}
        aside = self._path.with_name(f"{self._path.name}.{uuid4().hex}.partial")  # ranks of several hosts share it
        aside.write_text(json.dumps(content), encoding="utf-8")
        aside.replace(self._path)
        self._saved_at = time.monotonic()


def _read(path: Path, sha256: str) -> dict[str, Any]:
    """What the file holds; nothing where it is missing, damaged, or of another corpus."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(content, dict) and (content.get("version"), content.get("corpus_sha256")) == (_VERSION, sha256)
    return content if is_ours else {}
