"""Files that survive a crash whole or not at all. In: a path and what to write. Out: the finished file, or the old one untouched."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gsae.errors import ConfigError
from gsae.store.lease import require as require_lease

PARTIAL_SUFFIX = ".partial"


def fsync_file(path: Path) -> None:
    """Wait until a file's (or directory's) content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk: a rename or a new file is not durable before."""
    fsync_file(directory)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents where they are missing, durably."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    fsync_directory(directory.parent)


def require_writable(directory: Path, setting: str) -> None:
    """Make a directory where it is missing and try to write in it.

    Raises:
        ConfigError: naming the setting it came from.
    """
    try:
        make_directory(directory)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"{setting} is {directory}, which cannot be written ({error.strerror}); give a directory that can") from error


@contextmanager
def write_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write, called `<path>.partial` until the block ends well; then it is fsynced and takes its name.

    When the block raises, the partial file is removed and `path` is as it was; a killed process leaves the partial file behind.
    """
    make_directory(path.parent)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        require_lease(path)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON does not have; give None instead.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with write_aside(path) as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Append one line to a file and wait until it is on the disk."""
    require_lease(path)
    content = (line + "\n").encode()
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        while content:  # a disk that fills up takes a part first, and complains of the rest
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        fsync_directory(path.parent)
