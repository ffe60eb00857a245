"""Where rows come from. In: their lanes, and their ordinals in them. Out: the tar, context and document of each."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch import Tensor

from gsae.errors import StoreError
from gsae.store.progress import read_records
from gsae.store.shards import TarRecord, context_key, read_documents, short_name, tar_path


@dataclass(frozen=True)
class Origin:
    """Where a row comes from."""

    tar: Path
    lane: int
    shard: int
    context: int
    """Ordinal of the context in the shard."""
    row: int
    """Ordinal of the row in the context."""
    document: int
    """Index of the document among those of the training split."""

    @property
    def key(self) -> str:
        """The name of the context's members in the tar."""
        return context_key(self.lane, self.shard, self.context)

    def __str__(self) -> str:
        return f"row {self.row} of context {self.context} in {short_name(self.tar)} (lane {self.lane}, document {self.document})"


def find_origins(store: Path, site: str, lane: Int[Tensor, " rows"], row: Int[Tensor, " rows"]) -> list[Origin]:
    """Where each of some rows comes from. Of the tars only the documents are read.

    Args:
        store: directory of the store.
        site: name of the site.
        lane: the lane of each row.
        row: the ordinal of each row in its lane.

    Raises:
        StoreError: a lane has no such row, or a tar is missing or damaged.
    """
    lanes, rows = lane.numpy(), row.numpy()
    origins: dict[int, Origin] = {}
    for number in np.unique(lanes).tolist():
        tars = [record.sites[site].tar for record in read_records(store, number)]
        firsts = list(accumulate((tar.rows for tar in tars), initial=0))
        places = np.flatnonzero(lanes == number)
        if rows[places].max() >= firsts[-1]:
            raise StoreError(f"lane {number} of {site} in {store} has no row {rows[places].max()}")
        shards = np.searchsorted(firsts, rows[places], side="right") - 1  # the last that begins there or before: none without rows
        for shard in np.unique(shards).tolist():
            its = places[shards == shard]
            found = _in_tar(tar_path(store, site, number, shard), tars[shard], number, shard, rows[its] - firsts[shard])
            origins |= dict(zip(its.tolist(), found, strict=True))
    return [origins[place] for place in range(len(rows))]


def _in_tar(path: Path, tar: TarRecord, lane: int, shard: int, rows: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> list[Origin]:
    """Where rows of a shard stand, by their ordinals in it."""
    low, high = int(rows.min()), int(rows.max())
    documents = read_documents(path, tar, low, high - low + 1)[rows - low]
    firsts = np.cumsum([0, *tar.context_rows])
    contexts = np.searchsorted(firsts, rows, side="right") - 1
    places = zip(contexts.tolist(), (rows - firsts[contexts]).tolist(), documents.tolist(), strict=True)
    return [Origin(path, lane, shard, context, row, document) for context, row, document in places]
