"""Files of tensors larger than memory. In: a file and some of its features, or slices of features. Out: the slice, or a whole file.

Parts of tensors are read and written by their places in the file, not through a mapping of it: of columns a mapping reads and writes the
rows around them too, a hundred times as much where the cache does not hold the file. Besides, a mapping larger than the memory is refused,
and a full disk under one ends the process.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What safetensors calls the types that weights have, in the order in which it puts them."""
NAMES = {dtype: name for name, dtype in TYPES.items()}
ARCHIVE_BYTES = 2**14
"""Of an archive of torch's beside the values, about."""


class Slice(NamedTuple):
    """Some features' part of each tensor; what has no axis of features is whole in each slice."""

    first: int
    """The number of the first feature."""
    tensors: Mapping[str, Tensor]


class Stored(NamedTuple):
    """A tensor in a file, row after row."""

    begin: int
    """Where its bytes begin."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def runs(self, axis: int | None, part: range) -> tuple[range, int]:
        """Where the runs of bytes begin that a part of it is in, and how long each is.

        Args:
            axis: the axis that the part is cut from; None takes all of the tensor.
            part: the indices along it.
        """
        if axis is None:
            return range(self.begin, self.begin + 1), prod(self.shape) * self.dtype.itemsize
        count, size, inner = prod(self.shape[:axis]), self.shape[axis], prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        first = self.begin + part.start * inner
        return range(first, first + count * size * inner, size * inner), len(part) * inner


def feature_axis(whole: Sequence[int], part: Sequence[int]) -> int | None:
    """The axis along which a tensor of some features is shorter than that of all; None where they are as large."""
    return next((axis for axis, sizes in enumerate(zip(whole, part, strict=True)) if sizes[0] != sizes[1]), None)


def outline(convert: Callable[[int], Mapping[str, Tensor]], num_features: int) -> dict[str, Tensor]:
    """Tensors like those of the whole, without storage.

    Args:
        convert: gives the tensors of so many features.
        num_features: of the whole.
    """
    found, more = {}, convert(2)
    for name, value in convert(1).items():
        axis, shape = feature_axis(more[name].shape, value.shape), list(value.shape)
        if axis is not None:
            shape[axis] = num_features
        found[name] = torch.empty(shape, dtype=value.dtype, device="meta")  # nothing is computed there: that loads much of torch
    return found


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        OSError, SafetensorError: it is missing, none of safetensors, or holds what is no weight.
    """
    with safe_open(path, "np"):  # which finds what is wrong with the header or the length
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise SafetensorError(f"tensor {name} is {entry['dtype']}, none of {', '.join(TYPES)}")
    return {name: Stored(8 + length + each["data_offsets"][0], tuple(each["shape"]), TYPES[each["dtype"]]) for name, each in header.items()}


def read_part(file: int, tensor: Stored, axis: int | None, part: range) -> Tensor:
    """A part of a tensor (see `Stored.runs`), copied.

    Args:
        file: descriptor of the open file.
        tensor: what is read.
        axis: the axis that the part is cut from; None reads all of it.
        part: the indices along it.

    Raises:
        OSError: the file cannot be read.
    """
    begins, length = tensor.runs(axis, part)
    found = np.empty((len(begins), length), np.uint8)
    for begin, run in zip(begins, found, strict=True):
        left = run.data
        while left:
            count = os.preadv(file, [left], begin + length - len(left))
            if count == 0:
                raise OSError(errno.EIO, "the file has become shorter")
            left = left[count:]
    shape = [len(part) if number == axis else size for number, size in enumerate(tensor.shape)]
    return torch.from_numpy(found.reshape(-1)).view(tensor.dtype).view(shape)


def _write_part(file: int, tensor: Stored, first: int, values: Tensor) -> None:
    axis = feature_axis(tensor.shape, values.shape)
    begins, length = tensor.runs(axis, range(0) if axis is None else range(first, first + values.shape[axis]))
    content = values.detach().contiguous().view(-1).view(torch.uint8).numpy().reshape(len(begins), length)
    for begin, run in zip(begins, content, strict=True):
        left = run.data
        while left:  # the system takes less than 2 GiB at once
            left = left[os.pwrite(file, left, begin + length - len(left)) :]


def write_safetensors(path: Path, wanted: Mapping[str, Tensor], slices: Iterable[Slice]) -> dict[str, Stored]:
    """Write what safetensors' own `save_file` would write of the whole, byte for byte.

    Format: the length of the header as 8 bytes, little-endian; the header, JSON, with spaces to a multiple of 8; the values.

    Args:
        path: the file.
        wanted: tensors like those of the whole (see `outline`).
        slices: all features, in any order.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    order = list(NAMES)
    header, end = {}, 0
    for name in sorted(wanted, key=lambda name: (order.index(wanted[name].dtype), name)):
        begin, end = end, end + wanted[name].nbytes
        header[name] = {"dtype": NAMES[wanted[name].dtype], "shape": list(wanted[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)  # a disk without the room says so now
        file.write(len(text).to_bytes(8, "little") + text)
        places = stored_tensors(path)
        for first, tensors in slices:
            for name, place in places.items():
                _write_part(file.fileno(), place, first, tensors[name])
    return places


def write_state_dict(path: Path, wanted: Mapping[str, Tensor], slices: Iterable[Slice]) -> None:
    """Write what `torch.save` would write of the whole to an open file. It takes the room on the disk twice (see `write_safetensors`).

    torch writes a tensor from end to end, and checks it on the way; so the values come together in a file aside first.
    """
    scratch = path.with_name(f"{path.name}.values.partial")
    with path.open("wb") as file:  # not by its path, which torch would put into the archive
        os.posix_fallocate(file.fileno(), 0, sum(value.nbytes for value in wanted.values()) + ARCHIVE_BYTES)
        places = write_safetensors(scratch, wanted, slices)
        torch.save({name: _mapped(scratch, places[name]) for name in wanted}, file)
        file.truncate()
    scratch.unlink()


def _mapped(path: Path, tensor: Stored) -> Tensor:
    """A tensor for torch.save, which reads it once from end to end and copies nothing."""
    values = np.memmap(path, np.uint8, "r+", tensor.begin, (prod(tensor.shape) * tensor.dtype.itemsize,))
    return torch.from_numpy(values).view(tensor.dtype).view(tensor.shape)
