"""What ranks of a test do with a mirror."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gsae.store.mirror import Mirror
from gsae.store.opening import open_store


def read_tars(url: str, cache: str, room: int, names: dict[str, str], passes: int) -> None:
    """Read all tars so often, from two threads, each rank in another order; they must have the hashes they have at home."""
    store = open_store(url, Path(cache), room / 10**9)
    mirror = Mirror(store, url, room)
    rank = int(os.environ["RANK"])

    def read(name: str) -> None:
        with mirror.open(store / name) as file:
            assert hashlib.sha256(file.read()).hexdigest() == names[name], name

    order = sorted(names, reverse=rank % 2 == 1) * passes
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, order))


def fetch(directory: str, url: str, room: int, name: str) -> None:
    """Make one file be there."""
    Mirror(Path(directory), url, room).fetch(Path(directory) / name)
