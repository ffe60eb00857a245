"""Sums over rows, kept a block at a time. In: float64 values a token. Out: sums a block, added in the order of the batches.

A block is up to 512 tokens of one document, so sums of documents are sums of whole blocks.

Every metric is one division of such sums at the very end. Because a batch's sums do not depend on the rank that made them and
are added in batch order, the metrics do not depend on the number of ranks. A bootstrap draw weights the same sums anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self, get_args, get_type_hints

import torch
from jaxtyping import Float, Int
from torch import Tensor

Values = Float[Tensor, "..."]
"""One value a token, block or draw; or the total."""


@dataclass(frozen=True)
class Sums:
    """Base of named float64 sums. The leading axis of every field is tokens, blocks or draws; totals have none."""

    def _map(self, work: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{field.name: work(getattr(self, field.name)) for field in fields(self)})

    def by_block(self, membership: Float[Tensor, "blocks tokens"]) -> Self:
        """Values a token, added up within each block, on the CPU."""
        return self._map(lambda value: (membership @ value).cpu())

    def total(self) -> Self:
        """The sums over all blocks."""
        return self._map(lambda value: value.sum(0))

    def drawn(self, weights: Float[Tensor, "draws blocks"]) -> Self:
        """The sums of each bootstrap draw, in which a block counts `weights` times."""
        return self._map(lambda value: weights @ value)

    def add(self, blocks: Int[Tensor, " part"], part: Self) -> None:
        """Add a batch's sums to those of its blocks, in place."""
        for field in fields(self):
            getattr(self, field.name)[blocks] += getattr(part, field.name)

    def zeros(self, num_blocks: int) -> Self:
        """Sums of the same fields and trailing shapes, all zero, one row a block."""
        return self._map(lambda value: value.new_zeros(num_blocks, *value.shape[1:]))


@dataclass(frozen=True)
class SiteSums(Sums):
    """What does not depend on an SAE. Distances are to the mean of the store's kept rows, `mean` below."""

    kept_rows: Values
    """Rows that the mask lets in."""
    dropped_rows: Values
    """Rows of text that it does not."""
    squared_distance: Values
    """|x - mean|^2 of kept rows."""
    squared_distance_dropped: Values
    """|x - mean|^2 of dropped rows."""
    offset: Float[Tensor, "... d_model"]
    """x - mean of kept rows."""
    targets: Values
    """Tokens that are predicted."""
    ce_clean: Values
    """Their cross-entropy in the untouched LLM, in nats."""
    ce_zero: Values
    """With kept rows replaced by zero."""
    ce_mean: Values
    """With kept rows replaced by the mean."""
    ce_zero_all_rows: Values
    """With all rows replaced by zero."""
    ce_mean_all_rows: Values
    """With all rows replaced by the mean."""


@dataclass(frozen=True)
class RunSums(Sums):
    """What one SAE adds, in raw units (x_hat already divided by the scale)."""

    squared_error: Values
    """|x - x_hat|^2 of kept rows."""
    squared_error_dropped: Values
    """|x - x_hat|^2 of dropped rows."""
    squared_x_hat: Values
    """|x_hat|^2 of kept rows."""
    inner: Values
    """x . x_hat of kept rows."""
    cosine: Values
    """Cosine between x and x_hat of kept rows."""
    l0: Values
    """Features on, of kept rows."""
    ce_spliced: Values
    """Cross-entropy with kept rows replaced by x_hat, in nats."""
    kl: Values
    """KL divergence of the spliced from the clean next-token distribution, in nats."""


@dataclass(frozen=True)
class Membership:
    """Which tokens of a batch belong to which block."""

    blocks: Int[Tensor, " blocks"]
    """The blocks that occur, as indices into all blocks of the evaluation."""
    matrix: Float[Tensor, "blocks tokens"]
    """1 where the token belongs to the block; padding belongs to none."""


def find_membership(blocks: Int[Tensor, "contexts length"]) -> Membership:
    """The membership of a batch's tokens; `blocks` is -1 on padding."""
    flat = blocks.flatten()
    found = torch.unique(flat[flat >= 0])
    return Membership(found.cpu(), (found[:, None] == flat[None, :]).double())


def definitions(metrics: type) -> dict[str, str]:
    """What every metric of a dataclass means: the text its field is annotated with, written into results.json beside the numbers."""
    hints = get_type_hints(metrics, include_extras=True)
    return {field.name: get_args(hints[field.name])[1] for field in fields(metrics)}
