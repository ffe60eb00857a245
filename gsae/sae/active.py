"""The active set of a batch, and products over it alone. In: rows, weights and a gate's bias. Out: the entries (row, feature) that are on.

The operations here are all that the sparse step (sparse.py) asks of a device; on CPU and CUDA they are torch's own sparse
kernels: `embedding_bag` for sums of weighted rows, `sampled_addmm` for products at listed entries.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from gsae.sae.products import sums_in_float32

# Said once a process, and not to our users: the layout is stable enough for the two products that need it.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)

BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
"""Elements of rows x features that are in memory at once while the active set is looked for."""
BFLOAT16_ERROR = 2.0**-7 * 1.03
"""Bound of |bfloat16(u) . bfloat16(v) - u . v| / (|u| |v|) in exact sums: two roundings of relative error 2^-8, and room for those of
the bound itself. Sums of n terms in float32 add at most n 2^-24."""
BOUND_COLUMNS = 8
"""What is added to rows and directions for the bias and the bound: as many columns as keep 16 bytes aligned."""


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The entries (row, feature) of a batch with a + bias > 0, row by row, features rising within a row."""

    num_rows: int
    num_features: int
    row: Int[Tensor, " entries"]
    feature: Int[Tensor, " entries"]
    a: Float[Tensor, " entries"]
    """Product of the row with the feature's encoder direction."""

    @cached_property
    def row_offsets(self) -> Int[Tensor, " rows_and_1"]:
        """Where each row's entries begin, and the end."""
        return _offsets(self.row, self.num_rows)

    @cached_property
    def feature_order(self) -> Int[Tensor, " entries"]:
        """The entries sorted by feature, rows rising within a feature."""
        return self.feature.argsort(stable=True)

    @cached_property
    def feature_offsets(self) -> Int[Tensor, " features_and_1"]:
        """Where each feature's entries begin in `feature_order`, and the end."""
        return _offsets(self.feature, self.num_features)

    @cached_property
    def row_by_feature(self) -> Int[Tensor, " entries"]:
        """The rows of the entries in `feature_order`."""
        return self.row[self.feature_order]

    def sums_over_features(
        self, values: Float[Tensor, " entries"], vectors: Float[Tensor, "features width"]
    ) -> Float[Tensor, "rows width"]:
        """For each row, the sum over its entries of value times the feature's vector: a decode."""
        return _weighted_sums(self.feature, self.row_offsets, values, vectors)

    def sums_over_rows(self, values: Float[Tensor, " entries"], vectors: Float[Tensor, "rows width"]) -> Float[Tensor, "features width"]:
        """For each feature, the sum over its entries of value times the row's vector: a weight's gradient. No two write one place."""
        return _weighted_sums(self.row_by_feature, self.feature_offsets, values[self.feature_order], vectors)

    def products(self, rows: Float[Tensor, "rows width"], vectors: Float[Tensor, "features width"]) -> Float[Tensor, " entries"]:
        """At each entry, the product of the row with the feature's vector: a feature's gradient."""
        size = (self.num_rows, self.num_features)
        zeros = torch.sparse_csr_tensor(self.row_offsets, self.feature, rows.new_zeros(len(self.feature)), size, check_invariants=False)
        found: Tensor = torch.sparse.sampled_addmm(zeros, rows, vectors.T, beta=0).values()
        return found

    def feature_totals(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " features"]:
        """The sum of each feature's values, always in the same order."""
        return self.sums_over_rows(values, values.new_ones(self.num_rows, 1)).squeeze(1)

    def feature_counts(self, chosen: Tensor | None = None) -> Int[Tensor, " features"]:
        """The number of each feature's entries, or of those that the boolean `chosen` (entries) marks."""
        feature = self.feature if chosen is None else self.feature[chosen]
        return torch.bincount(feature, minlength=self.num_features)


def find_active(
    x: Float[Tensor, "rows d_model"],
    encoder: Float[Tensor, "d_model features"],
    bias: Float[Tensor, " features"],
    *,
    in_bfloat16: bool = False,
) -> ActiveSet:
    """The entries where x . encoder + bias > 0, from one dense product.

    In bfloat16 the product only proposes entries: the bound of its error is added to it, so that none is missed (among normal numbers:
    bfloat16 kernels take subnormal ones for 0), and the values of the proposed ones are computed anew in the type of `x`, which
    decides. The result is that of the exact product, at the speed of the inexact one. A NaN is never less than 0: it is an entry.

    Args:
        x: rows, less b_dec.
        encoder: directions, each contiguous in memory.
        bias: what is added to the product.
        in_bfloat16: whether the dense product is in bfloat16.
    """
    if not in_bfloat16:
        return _at_positions(len(x), len(bias), *_scan(x, encoder, lambda products: ~(products <= -bias)))
    with sums_in_float32():
        directions = bounded_directions(encoder.T, bias, BFLOAT16_ERROR + (len(encoder) + BOUND_COLUMNS) * 2.0**-24)
        positions, _ = _scan(bounded_rows(x), directions.T, torch.relu_)
    proposed = _at_positions(len(x), len(bias), positions, x.new_empty(0))
    a = proposed.products(x, encoder.T)
    is_on = ~(a <= -bias[proposed.feature])
    return ActiveSet(len(x), len(bias), proposed.row[is_on], proposed.feature[is_on], a[is_on])


def _scan(rows: Tensor, directions: Tensor, keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Flat positions in rows x features where `keep` of the products is not 0, and the products there, one block of rows at a time."""
    num_features = directions.shape[1]
    block_rows = max(1, BLOCK_ELEMENTS[rows.device.type] // num_features)
    positions, values = [], []
    for start in range(0, len(rows), block_rows):
        products = rows[start : start + block_rows] @ directions
        found = _nonzero(keep(products))
        positions.append(found + start * num_features)
        values.append(products.flatten()[found])
    return torch.cat(positions), torch.cat(values)


def _nonzero(values: Tensor) -> Tensor:
    """Flat positions of what is not 0; on the CPU eight bytes are looked at together, since few of them are."""
    flat = values.flatten()
    a_word = 8 // flat.element_size()
    if flat.device.type != "cpu" or len(flat) % a_word:
        return flat.nonzero().flatten()
    words = flat.view(torch.int64).nonzero().flatten()
    word, place = flat.view(-1, a_word)[words].nonzero().unbind(dim=1)
    return words[word] * a_word + place


def _at_positions(num_rows: int, num_features: int, positions: Tensor, values: Tensor) -> ActiveSet:
    row = positions.div(num_features, rounding_mode="floor")
    return ActiveSet(num_rows, num_features, row, positions - row * num_features, values)


def bounded_rows(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows wider"]:
    """(x, 1, 1, 1, |x|, 0, 0, 0, 0) in bfloat16, whose product with `bounded_directions` is at least x . direction + bias."""
    rows = x.new_zeros(len(x), x.shape[1] + BOUND_COLUMNS, dtype=torch.bfloat16)
    own, bias, norm, _ = torch.split(rows, [x.shape[1], 3, 1, BOUND_COLUMNS - 4], dim=1)
    own.copy_(x)
    bias.fill_(1)
    norm.copy_(torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return rows


def bounded_directions(
    directions: Float[Tensor, "features d_model"], bias: Float[Tensor, " features"], error: float
) -> Float[Tensor, "features wider"]:
    """(direction, the bias in three parts of 8 bits each, error x |direction|, 0, 0, 0, 0) in bfloat16."""
    found = directions.new_zeros(len(directions), directions.shape[1] + BOUND_COLUMNS, dtype=torch.bfloat16)
    own, *parts, bound, _ = torch.split(found, [directions.shape[1], 1, 1, 1, 1, BOUND_COLUMNS - 4], dim=1)
    own.copy_(directions)
    rest = bias[:, None]
    for part in parts:
        part.copy_(rest)
        rest = rest - part.to(rest.dtype)
    bound.copy_(error * torch.linalg.vector_norm(directions, dim=1, keepdim=True))
    return found


def _offsets(index: Tensor, count: int) -> Tensor:
    """Where each of `count` sorted groups begins, and the end."""
    offsets = index.new_zeros(count + 1)
    torch.cumsum(torch.bincount(index, minlength=count), dim=0, out=offsets[1:])
    return offsets


def _weighted_sums(index: Tensor, offsets: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    return embedding_bag(index, vectors.detach(), offsets, mode="sum", per_sample_weights=values, include_last_offset=True)
