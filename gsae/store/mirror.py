"""A local directory that stands for a store at a URL. In: the name of one of its files. Out: the file, open to read.

    <cache>/<hash>-<name>/remote.json    that it is a mirror, of what, and its room
    <cache>/<hash>-<name>/...            files of the store, those that were asked for

Tars, those on their way included, never take more than the room: the least recently used go. So a tar may be gone as soon as it is closed,
and what reads one takes it from `open_stored`, which brings it again; while it is open it stays readable. Processes of one host may share a
mirror: each change of what is there is made under a lock.
"""

import errno
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gsae.errors import ConfigError, StoreError
from gsae.store.durable import PARTIAL_SUFFIX, make_directory
from gsae.store.remote import DISK_FULL, Remote, name_of

REMOTE_FILE = "remote.json"
MIRROR_FORMAT = 1
LOCK_FILE = "lock"
POLL_SECONDS = 0.05
"""Between two looks at whether another process has brought a file, or made room."""
_KEY = re.compile(r"(identity|manifest|calibration)\.json|progress/\d{4,}\.jsonl|\w[\w.-]*/\d{4,}-\d{6,}\.tar", re.ASCII)
"""The names that files of a store have; no other is asked for, whatever a manifest says."""
_PARTIAL = re.compile(rf"(.+)\.[^/]+\.\d+\.\d+{re.escape(PARTIAL_SUFFIX)}")
_NUMBERS = itertools.count()
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class _Contents:
    """What a mirror holds."""

    tars: list[Path]
    """Whole ones."""
    coming: list[Path]
    """Partial files of processes that live."""


@dataclass(frozen=True)
class Mirror:
    """A mirror whose directory is there."""

    directory: Path
    url: str
    max_bytes: int
    """Its room: what its tars may take together."""

    def open(self, path: Path) -> BinaryIO:
        """A file of the store to read; it is brought first where it is not there, and counts as used.

        Raises:
            StoreError: the store has no such file, it cannot be brought, or has no room.
        """
        key = self._key(path)
        size: int | None = None
        while True:
            with suppress(FileNotFoundError):
                file = path.open("rb")
                _mark_used(file)
                return file
            if size is None:
                size = Remote(self.url).size(key)
            partial = self._reserve(path, size)
            if partial is None:
                time.sleep(POLL_SECONDS)
            elif self._bring(partial, path, size):
                return partial

    def fetch(self, path: Path) -> None:
        """Make a file of the store be there, as `open` does, and leave it; a tar may go again at any time."""
        self.open(path).close()

    def forget(self, path: Path) -> None:
        """Remove a file that is not what it should be, so that it is brought again."""
        with self.locked():
            path.unlink(missing_ok=True)

    def empty(self) -> None:
        """Remove all that is of the store, the manifest first; what is on its way is not taken either. To be called under the lock."""
        for path in sorted(_files(self.directory), key=lambda path: path.name != "manifest.json"):
            if _KEY.fullmatch(path.relative_to(self.directory).as_posix()) or _PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def trim(self) -> None:
        """Remove what is beyond the room, and what killed processes left. To be called under the lock."""
        self._make_room(0, self._look())

    @contextmanager
    def locked(self, name: str = LOCK_FILE) -> Iterator[None]:
        """No other thread or process of this host is in such a block of this mirror."""
        with (self.directory / name).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise ConfigError(
                    f"harvest.cache: the file system of {self.directory} has no file locks; give a directory on a local disk"
                ) from error
            yield

    def _key(self, path: Path) -> str:
        key = path.relative_to(self.directory).as_posix()
        if not _KEY.fullmatch(key):
            raise StoreError(f"{self.url} names a file {key}, which no store has; it is damaged, or was not written by gsae")
        return key

    def _reserve(self, path: Path, size: int) -> BinaryIO | None:
        """A partial file of that size, locked; None while there is no room, or where another process has brought or is bringing the file.

        Raises:
            StoreError: it would not fit if there were nothing else.
        """
        is_tar = path.suffix == ".tar"
        if is_tar and size > self.max_bytes:
            raise StoreError(
                f"{name_of(self._key(path))} of {self.url} has {size} bytes, and all tars may take {self.max_bytes}; "
                "raise harvest.cache_gigabytes"
            )
        make_directory(path.parent)
        with self.locked():
            contents = self._look()
            if path.exists() or path in map(_target, contents.coming):
                return None
            if is_tar and not self._make_room(size, contents):
                return None
            whose = f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
            file = path.with_name(f"{path.name}.{whose}{PARTIAL_SUFFIX}").open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(size)
            return file

    def _make_room(self, size: int, contents: _Contents) -> bool:
        """Whether there is room for a tar of so many bytes; the least recently used go for it."""
        tars = sorted(((path.stat(), path) for path in contents.tars), key=lambda tar: tar[0].st_atime_ns)
        coming = sum(path.stat().st_size for path in contents.coming if ".tar." in path.name)
        there = sum(status.st_size for status, _ in tars)
        if coming + size > self.max_bytes:
            return False
        for status, path in tars:
            if coming + there + size <= self.max_bytes:
                break
            path.unlink()
            there -= status.st_size
        return True

    def _bring(self, partial: BinaryIO, path: Path, size: int) -> bool:
        """Fill a partial file and give it its name; False where the mirror was emptied meanwhile, so that it may be of another store."""
        try:
            Remote(self.url).copy(self._key(path), size, partial)
            partial.flush()
            _mark_used(partial)
            with self.locked():
                if not Path(partial.name).exists():
                    partial.close()
                    return False
                Path(partial.name).replace(path)
                fcntl.flock(partial, fcntl.LOCK_UN)
        except BaseException as error:
            with self.locked():
                Path(partial.name).unlink(missing_ok=True)
            with suppress(OSError):  # what it has not written yet
                partial.close()
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise StoreError(
                    f"{name_of(self._key(path))} of {self.url} does not fit on the disk of {self.directory} ({error.strerror}); "
                    "lower harvest.cache_gigabytes, or put harvest.cache on a larger disk"
                ) from error
            raise
        partial.seek(0)
        return True

    def _look(self) -> _Contents:
        """What is there; what killed processes left is removed. To be called under the lock."""
        tars, coming = [], []
        for path in _files(self.directory):
            if path.suffix == ".tar":
                tars.append(path)
            elif _PARTIAL.fullmatch(path.name):
                if _is_held(path):
                    coming.append(path)
                else:
                    path.unlink(missing_ok=True)
        return _Contents(tars, coming)


def mirror_of(store: Path) -> Mirror | None:
    """The mirror that a directory is; None of a store that was harvested there, or of none.

    Raises:
        StoreError: it is the mirror of another version of gsae.
    """
    path = store / REMOTE_FILE
    try:
        content = json.loads(path.read_text())
        if content["format"] == MIRROR_FORMAT:
            return Mirror(store, content["url"], content["max_bytes"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        content = {}
    raise StoreError(f"{path} has format {content.get('format')}, this version of gsae reads {MIRROR_FORMAT}; delete {store}")


def open_stored(path: Path) -> BinaryIO:
    """A tar of a store to read, `<store>/<site>/<tar>`.

    Raises:
        FileNotFoundError: it is not there, and the store is no mirror.
        StoreError: it cannot be brought.
    """
    mirror = mirror_of(path.parent.parent)
    return path.open("rb") if mirror is None else mirror.open(path)


def provide(store: Path, path: Path) -> None:
    """Make a small file be there, where the store is a mirror.

    Raises:
        StoreError: it cannot be brought.
    """
    if not path.exists():
        mirror = mirror_of(store)
        if mirror is not None:
            mirror.fetch(path)


def forget(path: Path) -> None:
    """Remove a tar that is not what it should be from a mirror; one of another store stays."""
    mirror = mirror_of(path.parent.parent)
    if mirror is not None:
        mirror.forget(path)


def _files(directory: Path) -> Iterator[Path]:
    """The files of a directory and of those in it."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_file():
                yield Path(entry.path)
            else:
                with os.scandir(entry) as inner:
                    yield from (Path(file.path) for file in inner if file.is_file())


def _target(partial: Path) -> Path:
    """The file that a partial file will be."""
    return partial.with_name(_PARTIAL.sub(r"\1", partial.name))


def _is_held(partial: Path) -> bool:
    """Whether the process that fills a partial file lives: it holds a lock on it."""
    with partial.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _mark_used(file: BinaryIO) -> None:
    """Set the time of the last access, and of nothing else: by the others readers tell that a file is unchanged."""
    with suppress(PermissionError):  # another user's
        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
