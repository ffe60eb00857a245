"""How rows are stored. In: activations of any type. Out: the values that go to disk, and what a reader makes of them.

A float type stores x rounded to it. int8 stores q in -127 ... 127 and a float32 scale a row, x ~ q |q| scale, scale = max|x| / 127^2:
half the disk of bfloat16, and an error that the harvest measures. In the rows of a Llama a few dimensions are 10 to 20 times the
others' root mean square; equal steps up to them would be coarse for all, so steps grow with the value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

STORAGE_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
"""By the names that config and manifest use."""
_LARGEST = 127


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows as they are stored; on any device."""

    x: Shaped[Tensor, "*rows d_model"]
    """In the storage type."""
    row_scale: Float[Tensor, "*rows"] | None = None
    """Float32, of int8 rows only: they are x |x| row_scale."""

    @classmethod
    def empty(cls, num_rows: int, d_model: int, storage: str) -> Self:
        """Room for rows, on the CPU."""
        return cls(torch.empty(num_rows, d_model, dtype=STORAGE_TYPES[storage]), torch.empty(num_rows) if storage == "int8" else None)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Self:
        """Views of some of the rows."""
        return type(self)(self.x[rows], None if self.row_scale is None else self.row_scale[rows])

    def copy_(self, source: Self) -> None:
        """Fill these rows with others of the same number and type."""
        for own, other in self._with(source):
            own.copy_(other)

    def take_(self, source: Self, chosen: Int[Tensor, " rows"]) -> None:
        """Fill these rows with the chosen ones of `source`."""
        for own, other in self._with(source):
            torch.index_select(other, 0, chosen, out=own)

    def _with(self, source: Self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.x, source.x
        if self.row_scale is not None and source.row_scale is not None:
            yield self.row_scale, source.row_scale

    def has_same_bytes(self, other: Self) -> bool:
        """Whether these rows are stored as the others are, NaN included."""
        if self.x.dtype != other.x.dtype or (self.row_scale is None) != (other.row_scale is None):
            return False
        return all(torch.equal(own.view(torch.uint8), its.view(torch.uint8)) for own, its in self._with(other))

    def decode(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Float[Tensor, "*rows d_model"]:
        """The values that a reader gets back.

        Args:
            device: where they are wanted; rows travel as they are stored. None leaves them where they are.
            dtype: type of the result; None is the storage type, or float32 for int8.
        """
        if self.row_scale is None:
            return self.x.to(device=device, dtype=dtype)
        scale = self.row_scale.to(device=device, dtype=dtype)
        q = self.x.to(device=device).to(scale.dtype)
        return q * q.abs() * scale.unsqueeze(-1)


def encode(x: Float[Tensor, "*rows d_model"], storage: str) -> Encoded:
    """Rows as they are stored; nothing here waits for the device.

    Args:
        x: activations, on any device. A row of zeros decodes to zeros; one with a NaN or infinite value decodes to values none of which
            is finite (int8) or to that value (float types), so that a mask finds it.
        storage: name of the storage type.
    """
    if storage != "int8":
        return Encoded(x.to(STORAGE_TYPES[storage]))
    x32 = x.float()
    scale = x32.abs().amax(dim=-1) / _LARGEST**2
    # Of a row of zeros, or one that is not finite, the quotient is NaN.
    quotient = torch.nan_to_num(x32 / scale.unsqueeze(-1), nan=0.0)
    # The nearest square: halfway between k^2 and (k + 1)^2 is k^2 + k + 1/2 = (k + 1/2)^2 + 1/4.
    root = (quotient.abs() - 0.25).clamp(min=0.0).sqrt().round().clamp(max=_LARGEST)
    return Encoded((root * quotient.sign()).to(torch.int8), scale)
