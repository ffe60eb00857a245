"""Files of tensors larger than memory. In: slices of features, one after another. Out: a safetensors file, or a state dict of torch.

A slice goes to its place in a file that is mapped into memory; what is dirty there the system writes when it likes, so that the process
holds a slice and no more.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls types, in the order in which it puts them."""
WORDS = {8: (np.int64, torch.int64), 4: (np.int32, torch.int32), 2: (np.int16, torch.int16)}
"""Integers of as many bytes, as which values are moved: numpy has no bfloat16."""


@dataclass(frozen=True)
class Layout:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    """That of features; None where there is none, and each slice has all of it."""

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Slice(NamedTuple):
    """Some features' part of each tensor."""

    first: int
    """The number of the first feature."""
    tensors: Mapping[str, Tensor]


def layouts(tensors: Mapping[str, Tensor], axes: Mapping[str, int | None], num_features: int) -> dict[str, Layout]:
    """The layouts of a whole, from any slice of it.

    Args:
        tensors: of the slice.
        axes: the axis of features, by name; 0 where none is named.
        num_features: of the whole.
    """
    found = {}
    for name, value in tensors.items():
        axis, shape = axes.get(name, 0), list(value.shape)
        if axis is not None:
            shape[axis] = num_features
        found[name] = Layout(tuple(shape), value.dtype, axis)
    return found


def write_safetensors(path: Path, wanted: Mapping[str, Layout], slices: Iterable[Slice]) -> None:
    """Write what safetensors' own `save_file` would write of the whole, byte for byte.

    Format: the length of the header as 8 bytes, little-endian; the header, JSON, with spaces to a multiple of 8; the values.
    """
    order = list(NAMES)
    names = sorted(wanted, key=lambda name: (order.index(wanted[name].dtype), name))
    header, begins, end = {}, {}, 0
    for name in names:
        layout = wanted[name]
        begins[name], end = end, end + layout.num_bytes
        header[name] = {"dtype": NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    _fill({name: _mapped(path, 8 + len(text) + begins[name], wanted[name]) for name in names}, wanted, slices)


def write_state_dict(path: Path, wanted: Mapping[str, Layout], slices: Iterable[Slice]) -> None:
    """Write what `torch.save` would write of the whole."""
    with TemporaryDirectory(dir=path.parent, prefix="values.", suffix=".partial") as scratch:
        maps = {}
        for number, (name, layout) in enumerate(wanted.items()):
            values = Path(scratch) / str(number)
            with values.open("wb") as file:
                file.truncate(layout.num_bytes)
            maps[name] = _mapped(values, 0, layout)
        _fill(maps, wanted, slices)
        state = {name: torch.from_numpy(maps[name]).view(layout.dtype) for name, layout in wanted.items()}
        with path.open("wb") as file:  # not by its path, which torch would put into the archive
            torch.save(state, file)


def _mapped(path: Path, begin: int, layout: Layout) -> "np.memmap[tuple[int, ...], np.dtype[np.signedinteger]]":
    word, _ = WORDS[layout.dtype.itemsize]
    return np.memmap(path, dtype=word, mode="r+", offset=begin, shape=layout.shape)


def _fill(maps: Mapping[str, "np.memmap"], wanted: Mapping[str, Layout], slices: Iterable[Slice]) -> None:
    for first, tensors in slices:
        for name, layout in wanted.items():
            _, word = WORDS[layout.dtype.itemsize]
            values = tensors[name].detach().contiguous().view(word).numpy()
            if layout.axis is None:
                maps[name][...] = values
            else:
                place = slice(first, first + values.shape[layout.axis])
                maps[name][(slice(None),) * layout.axis + (place,)] = values
    for each in maps.values():
        each.flush()
