"""Memory for the rows that come next. In: rows, as they are read, to places of their own. Out: whole batches, without a copy.

The slots are batches. Row t of a lane, counted from where the stream began, belongs to batch t // lane_rows; so every row is read to
where it is handed out, and a slot is free again when its batch has been used.
"""

import mmap

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor

from gsae.store.encoding import STORAGE_TYPES


class Ring:
    """Slots of one local batch each.

    Args:
        num_slots: batches to hold.
        num_lanes: lanes of a local batch.
        lane_rows: rows of each lane in a batch.
        d_model: width of a row.
        storage: name of the storage type.
        pinned: whether a GPU can copy from here while it computes.
    """

    def __init__(self, num_slots: int, num_lanes: int, lane_rows: int, d_model: int, storage: str, pinned: bool) -> None:
        self._num_slots, self._num_lanes, self._lane_rows = num_slots, num_lanes, lane_rows
        num_rows = num_slots * num_lanes * lane_rows
        dtype = STORAGE_TYPES[storage]
        self.row_bytes = d_model * dtype.itemsize
        self.scratch_bytes = max(self.row_bytes, 2**16)
        """Most that a piece may have that is not wanted."""
        self._scratch = _allocate(self.scratch_bytes, pinned=False)
        self._x = _allocate(num_rows * self.row_bytes, pinned).view(dtype).view(num_slots, num_lanes * lane_rows, d_model)
        self._row = torch.empty(num_slots, num_lanes * lane_rows, dtype=torch.int64)
        self._row_scale = _allocate(num_rows * 4, pinned).view(torch.float32).view(self._row.shape) if storage == "int8" else None

    @property
    def lane_capacity(self) -> int:
        """Rows of each lane that it holds."""
        return self._num_slots * self._lane_rows

    def places(self, lane: int, taken: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Places of the rows of a lane (its ordinal among those of a batch) that come after `taken` others."""
        batch, row = np.divmod(taken, self._lane_rows)
        place: Int64[np.ndarray, " rows"] = (batch % self._num_slots * self._num_lanes + lane) * self._lane_rows + row
        return place

    @property
    def nowhere(self) -> int:
        """The address of what is not wanted."""
        return self._scratch.data_ptr()

    def addresses(self, places: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Where the x of these places are in memory."""
        addresses: Int64[np.ndarray, " rows"] = self._x.data_ptr() + places * self.row_bytes
        return addresses

    def note(
        self, places: Int64[np.ndarray, " rows"], row: Int64[np.ndarray, " rows"], row_scale: Shaped[np.ndarray, " rows"] | None
    ) -> None:
        """What belongs to the x of some places: the ordinals of the rows in their lane, and their scales."""
        self._row.view(-1).numpy()[places] = row
        if self._row_scale is not None and row_scale is not None:
            self._row_scale.view(-1).numpy()[places] = row_scale

    def slot(
        self, batch: int
    ) -> tuple[Shaped[Tensor, "local_rows d_model"], Int[Tensor, " local_rows"], Float[Tensor, " local_rows"] | None]:
        """x, row and row_scale of a batch, as views."""
        index = batch % self._num_slots
        return self._x[index], self._row[index], None if self._row_scale is None else self._row_scale[index]


def _allocate(num_bytes: int, pinned: bool) -> Shaped[Tensor, " bytes"]:
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, max(num_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # rows go to random places: with large pages the processor finds them faster
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]
