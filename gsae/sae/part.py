"""A dictionary whose features are split over ranks. In: what each rank has of a sum over features. Out: the sum, on all of them.

    rank k holds the features k m, ..., (k + 1) m - 1 of M = n m, their encoders and decoder rows, and all of b_dec
    x_hat = b_dec + sum over ranks of (f W_dec) of its features

All of them see the same rows. A decode is a sum over the ranks; the gradient of what a rank adds to it is that of the sum, so nothing
travels on the way back. b_dec's gradient is the one other sum over features (train/optim.py): each rank has its encoders' part of it,
and the first alone the decoder's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gsae.world import Group


@dataclass(eq=False)
class Part:
    """The features that this rank holds of a dictionary."""

    first: int
    """The number of the first of them in the dictionary."""
    total: int
    """Features of the dictionary."""
    holders: Group
    """The ranks that hold all of it, in the order of their parts."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes a block around each wait for the others, for whoever measures them."""

    @property
    def is_first(self) -> bool:
        """Whether it begins the dictionary."""
        return self.holders.rank == 0

    @property
    def features(self) -> range:
        """The numbers of its features in the dictionary."""
        return range(self.first, self.first + self.total // self.holders.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the parts, on each of them. A collective; all of them must go on with it alike, for the gradient's sake."""
        found: Tensor = _Sum.apply(value, self)  # type: ignore[no-untyped-call]
        return found

    def reduce(self, value: Tensor) -> Tensor:
        """The same where no gradient passes."""
        with self.waiting():
            return self.holders.reduce(value, "sum")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def part_of(num_features: int, holders: Group | None) -> Part | None:
    """The part that this rank holds of a dictionary; None where one rank holds all of it. The ranks' number divides the features'."""
    if holders is None:
        return None
    return Part(holders.rank * (num_features // holders.size), num_features, holders)


class _Sum(torch.autograd.Function):
    """y = sum over ranks of x; dx = dy, which is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, part: Part) -> Tensor:
        return part.reduce(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
