"""One reader for the ranks that see the same rows. In: a stream that the first of them opens. Out: its batches, on each of them.

    stream on the first rank --storage type--> all ranks of its row of the grid

What travels in a batch is what the store has of its rows, and their names.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gsae.store.origin import Origin, find_origins
from gsae.store.stream import Batch, Stream
from gsae.world import Group


class SharedStream(Stream):
    """The stream of the first of some ranks, on all of them: `next_batch` is a collective. Batches are on the ranks' device.

    Args:
        open_stream: opens the stream; called on the first rank alone.
        store: directory of the store that it reads.
        site: name of the site.
        holders: the ranks.
    """

    def __init__(self, open_stream: Callable[[], Stream], store: Path, site: str, holders: Group) -> None:
        self._holders = holders
        self._store, self._site = store, site
        self._stream = open_stream() if holders.is_first else None
        self._rows_taken = 0
        self._like: Batch | None = None

    @property
    def rows_taken(self) -> int:
        """Of the first rank's stream; on the others, where it was sent to last."""
        return self._rows_taken if self._stream is None else self._stream.rows_taken

    def seek(self, rows_taken: int) -> None:
        """Continue as if so many rows had been taken; all ranks do so together."""
        self._rows_taken = rows_taken
        if self._stream is not None:
            self._stream.seek(rows_taken)

    def next_batch(self) -> Batch:
        """The next batch of the first rank's stream.

        Raises:
            StoreError: on the first rank, a tar is gone or damaged.
        """
        batch = None if self._stream is None else self._stream.next_batch()
        if self._like is None:
            self._like = self._agree(batch)
        batch = batch or self._like
        device = self._holders.device
        x, row = self._send(batch.x.to(device)), self._holders.broadcast(batch.row)
        row_scale = None if batch.row_scale is None else self._send(batch.row_scale.to(device))
        return Batch(x, self._like.lane, row, row_scale)

    def origins(self, batch: Batch) -> list[Origin]:
        """Where each row of a batch comes from."""
        return find_origins(self._store, self._site, batch.lane, batch.row)

    def close(self) -> None:
        """Stop reading."""
        if self._stream is not None:
            self._stream.close()

    def _agree(self, batch: Batch | None) -> Batch:
        """Tensors like those of all batches, and their lanes, on each rank."""
        found = None
        if batch is not None:
            scale_type = None if batch.row_scale is None else batch.row_scale.dtype
            found = (tuple(batch.x.shape), batch.x.dtype, batch.lane.tolist(), batch.row.dtype, scale_type)
        shape, dtype, lane, row_type, scale_type = self._holders.broadcast_object(found)
        empty = Batch(torch.empty(shape, dtype=dtype), torch.tensor(lane), torch.empty(len(lane), dtype=row_type))
        if scale_type is None:
            return empty
        return Batch(empty.x, empty.lane, empty.row, torch.empty(len(lane), dtype=scale_type))

    def _send(self, value: Tensor) -> Tensor:
        """The first rank's values, as bytes: not every backend knows every type."""
        return self._holders.broadcast(value.contiguous().view(torch.uint8)).view(value.dtype)
