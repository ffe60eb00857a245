"""What files from elsewhere must hold. In: an object of a JSON file, or tensors. Out: nothing, or one line about the first misfit."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsae.errors import CheckpointError

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN_CHARACTERS = 80
"""Of a value that does not fit, in a message."""


@dataclass(frozen=True)
class Kind:
    """A kind of value in a JSON file."""

    words: str
    """What it is called in messages."""
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # Comparisons, as they hold for neither NaN nor infinity nor an integer that no float can be.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
COUNT = Kind("a whole number", _is_whole)
SIZE = Kind("a whole number above 0", lambda value: _is_whole(value) and value > 0)
PAIR = Kind("two numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def or_null(kind: Kind) -> Kind:
    """The kind, or null."""
    return Kind(kind.words, lambda value: value is None or kind.fits(value))


def each(kind: Kind) -> Kind:
    """An object whose values are all of the kind."""
    return Kind("an object", lambda value: isinstance(value, dict) and all(map(kind.fits, value.values())))


def record(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object with keys of these kinds; the optional ones may be absent, others are free."""
    words = f"an object{' with ' if needed else ''}{', '.join(needed)}"
    return Kind(words, lambda value: isinstance(value, dict) and _misfit(value, needed, optional or {}) is None)


def require_fields(found: Mapping[str, Any], needed: Mapping[str, Kind], optional: Mapping[str, Kind], where: str) -> None:
    """Refuse an object whose keys are not of these kinds.

    Args:
        found: the object.
        needed: keys that must be there.
        optional: keys that may be absent; one that is there must fit.
        where: its place, for messages.

    Raises:
        CheckpointError: naming the first key that does not fit.
    """
    key = _misfit(found, needed, optional)
    if key is None:
        return
    if key not in found:
        raise CheckpointError(f"{where}: has no {key!r}; fetch it again")
    kinds = {**needed, **optional}
    shown = f"{found[key]!r:.{SHOWN_CHARACTERS}}"
    raise CheckpointError(f"{where}: {key} is {shown}, not {kinds[key].words}; fetch it again")


def _misfit(found: Mapping[str, Any], needed: Mapping[str, Kind], optional: Mapping[str, Kind]) -> str | None:
    for key, kind in needed.items():
        if key not in found or not kind.fits(found[key]):
            return key
    return next((key for key, kind in optional.items() if key in found and not kind.fits(found[key])), None)


def require_weights(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that cannot be an SAE's weights.

    Raises:
        CheckpointError: one is of another type than WEIGHT_TYPES, sparse, without values, or holds NaN or infinite ones.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_TYPES or tensor.layout != torch.strided or tensor.is_meta:
            found = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise CheckpointError(f"{where}: tensor {name} is not plain floating point ({found}); fetch it again")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{where}: tensor {name} holds NaN or infinite values; use another SAE, or fetch it again")
