"""What ranks leave for each other. In: the launcher's store. Out: small values that any rank can read at any time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist


class Board:
    """Small values that ranks leave for each other, outside of collectives. For one thread; another one takes a board of its own.

    Any call raises ConnectionError when what holds the values has ended, and blocks while that is stopped or out of reach.
    """

    def __init__(self, store: "dist.distributed_c10d.Store") -> None:
        self._store = store
        self._written: set[str] = set()

    def write(self, key: str, value: str) -> None:
        """Leave `value` in place of what was there."""
        with _lost_connections():
            self._store.set(key, value)

    def read(self, keys: Sequence[str]) -> list[str | None]:
        """What was last left at each key; None where nothing was yet. Nothing is waited for."""
        with _lost_connections():
            # Asking for a value that is not there would wait for it. Those that are there stay, and come all at once.
            self._written.update(key for key in keys if key not in self._written and self._store.check([key]))
            written = [key for key in keys if key in self._written]
            values = self._store.multi_get(written) if written else []
        found = {key: value.decode() for key, value in zip(written, values, strict=True)}
        return [found.get(key) for key in keys]


@contextmanager
def _lost_connections() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError((str(error).splitlines() or [type(error).__name__])[0]) from error
