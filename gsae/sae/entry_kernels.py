"""Triton kernels of the list of entries. In: rows, directions and biases. Out: the open gates of a batch as a list, on the device.

Rules of all kernels here: every element is written by one program, which adds up its terms in the order of rows or of features: no
atomics, so the same call gives the same bits, and an entry's place in the list does not change a sum. Matrices are contiguous along
d_model and may be float32 or bfloat16; sums and what belongs to an entry are float32. Entries, rows and features are counted in int32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

WORD_BITS = 32
"""Features whose bits one int32 of a bitmap holds."""
PRODUCT_WIDTH = 256
"""Elements of vectors that a program multiplies at a time."""
ENTRIES = 16
"""Entries that a program takes together where it makes one number of each."""

_PROPOSE = {"BLOCK_ROWS": 128, "BLOCK_FEATURES": 256, "BLOCK_WIDTH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
"""Tiles of the product that proposes entries."""
_WORDS = 64
"""Words of a bitmap that a program looks at together."""


@triton.jit
def _propose(
    rows, directions, row_norm, direction_norm, bias, words, num_rows, num_features, width, num_words, error,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr, BLOCK_WIDTH: tl.constexpr, GROUP: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """One tile of the product, its epilogue, and its bits. Programs of `GROUP` tiles of rows share directions in the cache."""
    tiles_of_rows, tiles_of_features = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_features, BLOCK_FEATURES)
    first = tl.program_id(0) // (GROUP * tiles_of_features) * GROUP
    in_group = tl.minimum(tiles_of_rows - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_of_features)
    row = (first + within % in_group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_feature = (within // in_group) * BLOCK_FEATURES
    feature = first_feature + tl.arange(0, BLOCK_FEATURES)
    has_row, has_feature = row < num_rows, feature < num_features
    left = rows + row.to(tl.int64)[:, None] * width
    right = directions + feature.to(tl.int64)[None, :] * width
    products = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), tl.float32)
    for column in range(0, width, BLOCK_WIDTH):
        at = column + tl.arange(0, BLOCK_WIDTH)
        a = tl.load(left + at[None, :], mask=has_row[:, None] & (at < width)[None, :], other=0.0)
        b = tl.load(right + at[:, None], mask=has_feature[None, :] & (at < width)[:, None], other=0.0)
        if WIDENS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, products)
    norms = tl.load(row_norm + row, mask=has_row, other=0.0)[:, None] * tl.load(direction_norm + feature, mask=has_feature, other=0.0)[None]
    threshold = -tl.load(bias + feature, mask=has_feature, other=0.0)
    is_on = (~(products + error * norms <= threshold[None, :])) & has_feature[None, :]
    bits = tl.reshape(is_on.to(tl.int32), (BLOCK_ROWS, BLOCK_FEATURES // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = first_feature // 32 + tl.arange(0, BLOCK_FEATURES // 32)
    at = words + row.to(tl.int64)[:, None] * num_words + word[None, :]
    tl.store(at, tl.sum(bits, axis=2), mask=has_row[:, None] & (word < num_words)[None, :])


@triton.jit
def _pack(products, words, num_features, num_words, WORDS: tl.constexpr):
    """The bits of one row where a product is not at most 0."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, num_words, WORDS):
        word = first + tl.arange(0, WORDS)
        feature = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        is_inside = feature < num_features
        found = tl.load(products + row * num_features + feature, mask=is_inside, other=0.0).to(tl.float32)
        bits = ((~(found <= 0)) & is_inside).to(tl.int32) << tl.arange(0, 32)[None, :]
        tl.store(words + row * num_words + word, tl.sum(bits, axis=1), mask=word < num_words)


@triton.jit
def _count(words, counts, num_words, WORDS: tl.constexpr):
    """The number of bits of one row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WORDS,), tl.int32)
    for first in range(0, num_words, WORDS):
        word = first + tl.arange(0, WORDS)
        bits = tl.load(words + row * num_words + word, mask=word < num_words, other=0)
        total += tl.sum((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, axis=1)
    tl.store(counts + row, tl.sum(total, axis=0))


@triton.jit
def _list(words, starts, feature, entry_row, num_words, capacity, WORDS: tl.constexpr):
    """The features of one row's bits, rising; those beyond the capacity are left out."""
    row = tl.program_id(0)
    free = tl.load(starts + row)
    for first in range(0, num_words, WORDS):
        word = first + tl.arange(0, WORDS)
        loaded = tl.load(words + row.to(tl.int64) * num_words + word, mask=word < num_words, other=0)
        bits = tl.reshape((loaded[:, None] >> tl.arange(0, 32)[None, :]) & 1, (WORDS * 32,))
        slot = free + tl.cumsum(bits, axis=0) - 1
        is_listed = (bits == 1) & (slot < capacity)
        tl.store(feature + slot, first * 32 + tl.arange(0, WORDS * 32), mask=is_listed)
        tl.store(entry_row + slot, tl.zeros((WORDS * 32,), tl.int32) + row, mask=is_listed)
        free += tl.sum(bits, axis=0)


@triton.jit
def _products_at(rows, directions, feature, starts, found, width, capacity, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """The products of one row with the directions of its entries."""
    row = tl.program_id(0)
    end = tl.minimum(tl.load(starts + row + 1), capacity)
    for first in range(tl.load(starts + row), end, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        is_entry = slot < end
        vector = tl.load(feature + slot, mask=is_entry, other=0).to(tl.int64) * width
        total = tl.zeros((ENTRIES, WIDTH), tl.float32)
        for column in range(0, width, WIDTH):
            at = column + tl.arange(0, WIDTH)
            x = tl.load(rows + row.to(tl.int64) * width + at, mask=at < width, other=0.0).to(tl.float32)
            w = tl.load(directions + vector[:, None] + at[None, :], mask=is_entry[:, None] & (at < width)[None, :], other=0.0)
            total += x[None, :] * w.to(tl.float32)
        tl.store(found + slot, tl.sum(total, axis=1), mask=is_entry)


@triton.jit
def _keep_open(proposed, product, bias, starts, feature, a, ends, capacity, ENTRIES: tl.constexpr):
    """The proposed entries of one row whose gate is open, one after another from where the row's begin."""
    row = tl.program_id(0)
    begin = tl.load(starts + row)
    end = tl.minimum(tl.load(starts + row + 1), capacity)
    free = tl.minimum(begin, capacity)
    for first in range(begin, end, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        is_entry = slot < end
        own = tl.load(proposed + slot, mask=is_entry, other=0)
        value = tl.load(product + slot, mask=is_entry, other=0.0)
        is_on = (is_entry & ~(value <= -tl.load(bias + own, mask=is_entry, other=0.0))).to(tl.int32)
        target = free + tl.cumsum(is_on, axis=0) - 1
        tl.store(feature + target, own, mask=is_on == 1)
        tl.store(a + target, value, mask=is_on == 1)
        free += tl.sum(is_on, axis=0)
    tl.store(ends + row, free)


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries (row, feature) of a batch with a + bias > 0: in each row's segment of the list, features rising."""

    num_proposed: Int[Tensor, ""]
    """Entries that the segments had to hold before it was known which gates are open; if more than the capacity, some are missing."""
    starts: Int[Tensor, " rows_and_1"]
    """Where each row's segment begins."""
    ends: Int[Tensor, " rows"]
    """Where its entries end."""
    row: Int[Tensor, " capacity"]
    feature: Int[Tensor, " capacity"]
    """Features of the entries; the number of features in the slots between segments."""
    a: Float[Tensor, " capacity"]
    """Product of the row with the feature's encoder direction."""
    order: Int[Tensor, " capacity"]
    """Slots sorted by feature, rows rising within a feature."""
    offsets: Int[Tensor, " features_and_1"]
    """Where each feature's slots begin in `order`, and the end."""

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return len(self.ends)

    @property
    def num_features(self) -> int:
        """Features of the SAE."""
        return len(self.offsets) - 1

    @property
    def capacity(self) -> int:
        """Slots of the list."""
        return len(self.feature)

    def count(self, is_chosen: Tensor | None = None) -> Int[Tensor, " features"]:
        """The number of each feature's entries, or of those that the boolean `is_chosen` (capacity) marks."""
        if is_chosen is None:
            return self.offsets.diff().long()
        before = torch.zeros(self.capacity + 1, dtype=torch.int64, device=self.order.device)
        torch.cumsum(is_chosen[self.order], dim=0, out=before[1:])
        return before[self.offsets].diff()


def propose(
    rows: Float[Tensor, "rows d_model"], directions: Float[Tensor, "features d_model"], bias: Float[Tensor, " features"], error: float
) -> Int[Tensor, "rows words"]:
    """A bit for each entry, set where the product of a row and a direction, both bfloat16, plus bias may be positive.

    Args:
        rows: bfloat16, less b_dec.
        directions: bfloat16.
        bias: what is added to the product, float32.
        error: bound of the product's error, in units of the product of both norms.

    Returns:
        Bit i of word w is feature 32 w + i. A product that is NaN sets its bit.
    """
    (num_rows, width), num_features = rows.shape, len(directions)
    words = rows.new_empty(num_rows, triton.cdiv(num_features, WORD_BITS), dtype=torch.int32)
    tiles = triton.cdiv(num_rows, _PROPOSE["BLOCK_ROWS"]) * triton.cdiv(num_features, _PROPOSE["BLOCK_FEATURES"])
    norms = (torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32) for matrix in (rows, directions))
    # Triton's interpreter takes the bits of a bfloat16 for an integer when it multiplies matrices.
    _propose[(tiles,)](
        rows, directions, *norms, bias, words, num_rows, num_features, width, words.shape[1], error,
        WIDENS=not rows.is_cuda, **_PROPOSE,
    )  # fmt: skip
    return words


def pack(products: Float[Tensor, "rows features"], words: Int[Tensor, "rows words"]) -> None:
    """Set the bits of `words` where a product is positive, or NaN, and clear the others."""
    _pack[(len(products),)](products, words, products.shape[1], words.shape[1], WORDS=_WORDS)


def list_entries(
    words: Int[Tensor, "rows words"],
    x: Float[Tensor, "rows d_model"],
    directions: Float[Tensor, "features d_model"],
    bias: Float[Tensor, " features"],
    capacity: int,
) -> Entries:
    """The proposed entries whose gate is open by the product of `x` with `directions` in their own type, summed in float32.

    Nothing here waits for the device: where `capacity` is too small for what was proposed, `num_proposed` says so.
    """
    num_rows, num_features = len(x), len(directions)
    counts, ends = x.new_empty(2, num_rows, dtype=torch.int32)
    _count[(num_rows,)](words, counts, words.shape[1], WORDS=_WORDS)
    starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=x.device)
    torch.cumsum(counts, dim=0, dtype=torch.int32, out=starts[1:])
    row, proposed = torch.zeros(2, capacity, dtype=torch.int32, device=x.device)
    feature = torch.full_like(proposed, num_features)
    product, a = torch.zeros(2, capacity, dtype=torch.float32, device=x.device)
    _list[(num_rows,)](words, starts, proposed, row, words.shape[1], capacity, WORDS=_WORDS)
    width = part_of_vector(x, PRODUCT_WIDTH)
    _products_at[(num_rows,)](x, directions, proposed, starts, product, x.shape[1], capacity, ENTRIES=ENTRIES, WIDTH=width)
    _keep_open[(num_rows,)](proposed, product, bias, starts, feature, a, ends, capacity, ENTRIES=128)
    sorted_features, order = torch.sort(feature, stable=True)
    features = torch.arange(num_features + 1, dtype=torch.int32, device=x.device)
    return Entries(starts[-1], starts, ends, row, feature, a, order, torch.searchsorted(sorted_features, features))


def part_of_vector(rows: Tensor, largest: int) -> int:
    """A power of two that covers a vector, or a part of it."""
    return min(largest, int(triton.next_power_of_2(rows.shape[1])))
