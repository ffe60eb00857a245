"""Rows on their way from the store to the step. In: a stream. Out: scaled batches on the device; what training will see next, on request.

    stream --storage type--> device --decode, times the scale--> all runs of the bank

On a GPU the next batch travels on a stream of its own while the step computes. What the store's stream gives is good only until it is
asked for more, so a copy is waited for before that.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from gsae.store.encoding import Encoded
from gsae.store.origin import Origin
from gsae.store.stream import Batch, Stream
from gsae.train.clock import Clock


class Feed:
    """The batches of one stretch; use it in a `with` block inside the stream's.

    Args:
        stream: the stream; nothing else reads it.
        rows_taken: rows over all ranks that were taken from it before.
        batch_rows: rows of a batch over all ranks.
        scale: what rows are multiplied by.
        device: where they are wanted.
        dtype: the type of training.
        clock: told when this rank waits for rows, and when for their copy.
    """

    def __init__(
        self, stream: Stream, rows_taken: int, *, batch_rows: int, scale: float, device: torch.device, dtype: torch.dtype, clock: Clock
    ) -> None:
        self._stream = stream
        self._rows_taken = rows_taken
        self._batch_rows = batch_rows
        self._scale, self._device, self._dtype = scale, device, dtype
        self._clock = clock
        self._copies = _DeviceCopies(device) if device.type == "cuda" else None
        self._ahead: Encoded | None = None
        stream.seek(rows_taken)

    def next(self) -> Float[Tensor, "local_rows d_model"]:
        """This rank's part of the next batch, scaled, on the device, in the training type.

        Raises:
            StoreError: a tar is gone or damaged.
        """
        rows = self._fetch() if self._ahead is None else self._ahead
        self._ahead = None
        self._clock.enter("copying")
        if self._copies is not None:
            self._copies.order_after(rows)
        self._rows_taken += self._batch_rows
        return self._scaled(rows)

    def look_ahead(self) -> None:
        """On a GPU, begin to copy the next batch; for when the work on this one is queued. On a CPU nothing would be won."""
        if self._copies is not None and self._ahead is None:
            self._ahead = self._fetch()

    def upcoming(self, num_batches: int) -> Iterator[Batch]:
        """What `next` will give, scaled and on the device; `next` gives it all the same. Each batch is good until the one after it."""
        try:
            if self._ahead is not None:
                self._return()
            for _ in range(num_batches):
                yield self._scaled_batch()
        finally:
            self._return()

    def read_again(self, rows_taken: int) -> Batch:
        """The batch that came after so many rows, scaled and on the device; `next` gives what it would have given. It stays.

        Raises:
            StoreError: a tar is gone or damaged.
        """
        try:
            self._finish_copy()
            self._stream.seek(rows_taken)
            batch = self._scaled_batch()
            return replace(batch, row=batch.row.clone())
        finally:
            self._return()

    def origins(self, batch: Batch) -> list[Origin]:
        """Where each row of a batch comes from.

        Raises:
            StoreError: a tar is gone or damaged.
        """
        return self._stream.origins(batch)

    def _fetch(self) -> Encoded:
        """The stream's next rows, on a GPU as a copy that is under way."""
        self._clock.enter("waiting")
        self._finish_copy()
        batch = self._stream.next_batch()
        rows = Encoded(batch.x, batch.row_scale)
        return rows if self._copies is None else self._copies.start(rows)

    def _return(self) -> None:
        """Bring the stream to where `next` goes on."""
        self._finish_copy()
        self._ahead = None
        self._stream.seek(self._rows_taken)

    def _scaled_batch(self) -> Batch:
        batch = self._stream.next_batch()
        return replace(batch, x=self._scaled(Encoded(batch.x, batch.row_scale)), row_scale=None)

    def _finish_copy(self) -> None:
        if self._copies is not None:
            self._copies.finish()

    def _scaled(self, rows: Encoded) -> Float[Tensor, "local_rows d_model"]:
        return rows.decode(self._device, self._dtype) * self._scale

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._finish_copy()


class _DeviceCopies:
    """Copies to a GPU beside its computation, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, rows: Encoded) -> Encoded:
        """Begin to copy rows; they have to stay until `finish`."""
        with torch.cuda.stream(self._side):
            x = rows.x.to(self._device, non_blocking=True)
            row_scale = None if rows.row_scale is None else rows.row_scale.to(self._device, non_blocking=True)
            self._done.record(self._side)
        return Encoded(x, row_scale)

    def order_after(self, copy: Encoded) -> None:
        """Let the computation use a copy once it is there; the host does not wait."""
        computation = torch.cuda.current_stream(self._device)
        computation.wait_event(self._done)
        for tensor in (copy.x, copy.row_scale):
            if tensor is not None:
                tensor.record_stream(computation)

    def finish(self) -> None:
        """Wait until the last copy is made."""
        self._done.synchronize()
