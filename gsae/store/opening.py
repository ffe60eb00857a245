"""From where a store is to a directory to read it in. In: a path or a URL. Out: the path, or the mirror of what is at the URL now."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from gsae.config import Config
from gsae.config.location import is_remote
from gsae.errors import StoreError
from gsae.store.durable import require_writable, write_aside, write_json_atomically
from gsae.store.manifest import IDENTITY_FILE, MANIFEST_FILE, fingerprint
from gsae.store.mirror import MIRROR_FORMAT, REMOTE_FILE, Mirror, mirror_of
from gsae.store.progress import progress_path, progress_sha256
from gsae.store.remote import COPY_AGAIN, MissingError, Remote

OPENING_FILE = "opening"
_KEPT_NAME = 40


def store_of(config: Config) -> Path:
    """The directory in which to read the config's store; of one at a URL its mirror. Any number of ranks may call this at once.

    Raises:
        StoreError: what is at the URL is no whole store, or cannot be read.
        ConfigError: the cache cannot be written.
    """
    return open_store(config.store_directory, config.harvest.cache_directory, config.harvest.cache_gigabytes)


def open_store(location: str, cache: Path, cache_gigabytes: float) -> Path:
    """The directory in which to read a store, raising what `store_of` does.

    Args:
        location: a directory, which is returned as it is, or a URL.
        cache: directory of the mirrors.
        cache_gigabytes: room for the tars of a mirror, in units of 10^9 bytes.
    """
    if not is_remote(location, "the store"):
        return Path(location)
    remote = Remote(location.rstrip("/"))
    directory = cache / _mirror_name(remote.url)
    require_writable(directory, "harvest.cache")
    mirror = Mirror(directory, remote.url, int(cache_gigabytes * 10**9))
    with mirror.locked(OPENING_FILE):
        _refresh(mirror, _fetch_description(remote))
    return directory


def _mirror_name(url: str) -> str:
    tail = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2])[-_KEPT_NAME:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}"


def _fetch_description(remote: Remote) -> dict[str, bytes]:
    """Identity and manifest, as they are there now, of one whole store."""
    try:
        manifest = remote.read(MANIFEST_FILE)
    except MissingError as error:
        raise StoreError(f"there is no whole store at {remote.url}: {MANIFEST_FILE} is missing; {COPY_AGAIN}") from error
    try:
        identity = remote.read(IDENTITY_FILE)
    except MissingError as error:
        raise StoreError(
            f"{remote.url} has a {MANIFEST_FILE} but no {IDENTITY_FILE}: it is a store in parts, which can only be read in a directory, "
            f"or not whole; {COPY_AGAIN}"
        ) from error
    content = _parse(remote, MANIFEST_FILE, manifest)
    digest = content.pop("digest", None)
    if digest != fingerprint(content) or content.get("fingerprint") != _parse(remote, IDENTITY_FILE, identity).get("fingerprint"):
        raise StoreError(f"{MANIFEST_FILE} in {remote.url} was changed, or is of another store than {IDENTITY_FILE}; {COPY_AGAIN}")
    return {MANIFEST_FILE: manifest, IDENTITY_FILE: identity}


def _parse(remote: Remote, name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise StoreError(f"{name} in {remote.url} is not one of gsae's; {COPY_AGAIN}")
    return value


def _refresh(mirror: Mirror, description: dict[str, bytes]) -> None:
    """Make the mirror one of this store; what it has of another one goes."""
    if mirror_of(mirror.directory) != mirror:
        own = {"format": MIRROR_FORMAT, "url": mirror.url, "max_bytes": mirror.max_bytes}
        write_json_atomically(mirror.directory / REMOTE_FILE, own)
    with mirror.locked():
        if any(_read(mirror.directory / name) != content for name, content in description.items()):
            mirror.empty()
            for name in (IDENTITY_FILE, MANIFEST_FILE):
                with write_aside(mirror.directory / name) as file:
                    file.write(description[name])
        mirror.trim()
    for lane, described in enumerate(json.loads(description[MANIFEST_FILE])["lanes"]):
        path = progress_path(mirror.directory, lane)
        if path.exists() and progress_sha256(mirror.directory, lane) != described["progress_sha256"]:
            mirror.forget(path)  # the remote may have been mended since


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
