"""Files of a store that is somewhere else. In: its URL, the name of a file in it. Out: the file's size and bytes, or one clear line.

fsspec knows the protocols. What fails for a moment is tried again; a file that comes short is not taken.
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec

from gsae.config.location import is_remote
from gsae.errors import StoreError

RETRY_WAITS_SECONDS = (1.0, 4.0, 16.0)
"""Between two tries."""
CHUNK_BYTES = 2**25
"""What is asked for at once, and held in memory."""
SILENCE_SECONDS = 60
"""A server that says nothing for so long has failed."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
"""What fsspec needs for each scheme."""
COPY_AGAIN = "copy the whole store there again, or correct its URL"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")


class MissingError(StoreError):
    """The remote store has no such file."""


class _ShortError(Exception):
    """Other bytes came than the remote had said."""


@dataclass(frozen=True)
class Remote:
    """A store at a URL."""

    url: str
    """Without a slash at its end."""

    def __post_init__(self) -> None:
        if not is_remote(self.url, "the store"):
            raise ValueError(f"{self.url} is no URL")

    def size(self, key: str) -> int:
        """Bytes of a file.

        Raises:
            StoreError: as for `copy`, or the remote does not say.
        """
        return self._try(key, lambda: self._size(key))

    def copy(self, key: str, size: int, file: BinaryIO) -> None:
        """Write a file of so many bytes into another one, from its start.

        Raises:
            MissingError: the remote has no such file.
            StoreError: it may not be read, has another size, or the remote cannot be reached.
            OSError: the other file cannot be written.
        """
        self._try(key, lambda: self._copy(key, size, file))

    def read(self, key: str) -> bytes:
        """The content of a small file; raises what `copy` raises."""
        content = BytesIO()
        self.copy(key, self.size(key), content)
        return content.getvalue()

    def _size(self, key: str) -> int:
        found = self._file_system().info(f"{self.url}/{key}")
        if found["type"] != "file":
            raise FileNotFoundError(key)
        if found["size"] is None:
            raise _ShortError("the server does not say how large it is")
        return int(found["size"])

    def _copy(self, key: str, size: int, file: BinaryIO) -> None:
        file.seek(0)
        come = 0
        for chunk in self._chunks(key, size):
            come += len(chunk)
            if come > size:
                break
            file.write(chunk)
        if come != size:
            raise _ShortError(f"{'more' if come > size else come} of its {size} bytes came")

    def _chunks(self, key: str, size: int) -> Iterator[bytes]:
        files, url = self._file_system(), f"{self.url}/{key}"
        if not self._is_web:
            for start in range(0, size, CHUNK_BYTES):
                yield files.cat_file(url, start=start, end=min(start + CHUNK_BYTES, size))
            return
        with files.open(url, block_size=0) as stream:  # one request: not every server can send a part
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    @property
    def _is_web(self) -> bool:
        return urlsplit(self.url).scheme in ("https", "http")

    def _file_system(self) -> Any:
        """Of fsspec, which keeps one a thread and process; nothing of what a remote said is remembered there."""
        scheme = urlsplit(self.url).scheme
        try:
            return fsspec.filesystem(scheme, use_listings_cache=False, **_options(scheme))
        except ImportError as error:
            package = PACKAGES[scheme]
            raise StoreError(f"{self.url} needs the package {package}, which is not installed; pip install {package}") from error

    def _try(self, key: str, work: Callable[[], T]) -> T:
        for wait in (*RETRY_WAITS_SECONDS, None):
            try:
                return work()
            except StoreError:
                raise
            except Exception as error:  # each library has its own
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                self._require_hope(key, error)
                if wait is None:
                    raise StoreError(
                        f"{name_of(key)} in {self.url} could not be read in {len(RETRY_WAITS_SECONDS) + 1} tries ({_in_words(error)}); "
                        "see that the URL is right and can be reached from here, then run the same again"
                    ) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _require_hope(self, key: str, error: Exception) -> None:
        """Raise what cannot get better."""
        status = _status(error)
        is_hidden = self._is_web and error.__cause__ is not None  # there, fsspec says of whatever goes wrong that there is no file
        if status == 404 or (isinstance(error, FileNotFoundError) and not is_hidden):
            raise MissingError(f"{name_of(key)} is missing in {self.url}; {COPY_AGAIN}") from error
        words = _in_words(error)
        if status in (401, 403) or isinstance(error, PermissionError) or "credentials" in words or words.startswith("Forbidden"):
            raise StoreError(
                f"{name_of(key)} in {self.url} may not be read ({words}); "
                "give the credentials that docs/remote.md names, or correct the URL"
            ) from error


def name_of(key: str) -> str:
    """A file of a store, as messages name it."""
    return f"shard {key}" if key.endswith(".tar") else key


def _options(scheme: str) -> dict[str, Any]:
    if scheme == "gs":
        # Otherwise gcsfs asks of which kind a bucket is, with each request; and it shows tracebacks of what it raises.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    if scheme not in ("https", "http"):
        return {}
    try:
        import aiohttp
    except ImportError:
        return {}  # fsspec will say so
    # Without these aiohttp gives up on a large file after five minutes, unpacks what is packed, and knows no proxy and no ~/.netrc.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": {"Accept-Encoding": "identity"}}


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error."""
    while error is not None:
        for name in ("status", "code"):
            if isinstance(getattr(error, name, None), int):
                return int(getattr(error, name))
        error = error.__cause__
    return None


def _in_words(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
