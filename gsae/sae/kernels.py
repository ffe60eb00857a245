"""Triton kernels of both steps. In: rows, weights, entries or products. Out: errors, losses and gradients, on the device.

Every element is written by one program, which adds up its terms in the order of rows or of features: no atomics, so the same call
gives the same bits, and an entry's place in the list does not change a sum. Matrices are contiguous along d_model and may be float32 or
bfloat16; sums and what belongs to an entry are float32. Entries, rows and features are counted in int32.

The kernels are plain functions of tensors; sparse_on_kernels.py and dense_on_kernels.py call them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

WORD_BITS = 32
"""Features whose bits one int32 of a bitmap holds."""

_PROPOSE = {"BLOCK_ROWS": 128, "BLOCK_FEATURES": 256, "BLOCK_WIDTH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
"""Tiles of the product that proposes entries."""
_WORDS = 64
"""Words of a bitmap that a program looks at together."""
_TILE = {"ROWS": 16, "FEATURES": 64}
"""Tiles of the dense step's epilogues."""
_ENTRIES = 16
"""Entries that a program takes together where it makes one number of each."""
_FEW_ENTRIES = 4
"""The same where it adds up their vectors."""
_WIDTH = 1024
"""Elements of vectors that a program adds up."""
_PRODUCT_WIDTH = 256
"""Elements of vectors that a program multiplies at a time."""


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


@triton.jit
def _decode(
    feature, a, starts, ends, gate_bias, r_mag, b_mag, norms, W_dec, centred,
    f_of, g_of, error, gate_error, squares, gate_squares, penalties, width, num_chunks,
    HAS_MAGNITUDE: tl.constexpr, HAS_AUXILIARY: tl.constexpr, WEIGHS_NORMS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Both decodes of one row, in one chunk of d_model; the first chunk's program stores what belongs to entries."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * WIDTH + tl.arange(0, WIDTH)
    decoded, gates_decoded = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    penalty = tl.zeros((ENTRIES,), tl.float32)
    end = tl.load(ends + row)
    for first in range(tl.load(starts + row), end, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        is_entry = slot < end
        own = tl.load(feature + slot, mask=is_entry, other=0)
        product = tl.load(a + slot, mask=is_entry, other=0.0)
        g = tl.where(is_entry, product + tl.load(gate_bias + own, mask=is_entry, other=0.0), 0.0)
        f = g
        if HAS_MAGNITUDE:
            magnitude = tl.exp(tl.load(r_mag + own, mask=is_entry, other=0.0)) * product + tl.load(b_mag + own, mask=is_entry, other=0.0)
            f = tl.where(is_entry & ~(magnitude <= 0), magnitude, 0.0)
        if WEIGHS_NORMS:
            penalty += g * tl.load(norms + own, mask=is_entry, other=0.0)
        else:
            penalty += g
        if chunk == 0:
            tl.store(f_of + slot, f, mask=is_entry)
            tl.store(g_of + slot, g, mask=is_entry)
        w = tl.load(W_dec + own.to(tl.int64)[:, None] * width + at[None, :], mask=is_entry[:, None] & (at < width)[None, :], other=0.0)
        decoded += tl.sum(f[:, None] * w.to(tl.float32), axis=0)
        if HAS_AUXILIARY:
            gates_decoded += tl.sum(g[:, None] * w.to(tl.float32), axis=0)
    place = row.to(tl.int64) * width + at
    x = tl.load(centred + place, mask=at < width, other=0.0)
    tl.store(error + place, decoded - x, mask=at < width)
    tl.store(squares + row * num_chunks + chunk, tl.sum((decoded - x) * (decoded - x), axis=0))
    if HAS_AUXILIARY:
        tl.store(gate_error + place, gates_decoded - x, mask=at < width)
        tl.store(gate_squares + row * num_chunks + chunk, tl.sum((gates_decoded - x) * (gates_decoded - x), axis=0))
    if chunk == 0:
        tl.store(penalties + row, tl.sum(penalty, axis=0))


@triton.jit
def _to_entries(
    feature, a, f_of, starts, ends, r_mag, norms, W_dec, error, gate_error, scales, da_of, dg_of, df_of, dr_of, width,
    HAS_MAGNITUDE: tl.constexpr, HAS_AUXILIARY: tl.constexpr, WEIGHS_NORMS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of one row's entries: both products with each decoder row, which is read once."""
    row = tl.program_id(0)
    of_reconstruction, of_penalty, of_auxiliary = tl.load(scales), tl.load(scales + 1), tl.load(scales + 2)
    end = tl.load(ends + row)
    for first in range(tl.load(starts + row), end, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        is_entry = slot < end
        own = tl.load(feature + slot, mask=is_entry, other=0)
        total, gate_total = tl.zeros((ENTRIES, WIDTH), tl.float32), tl.zeros((ENTRIES, WIDTH), tl.float32)
        for column in range(0, width, WIDTH):
            at = column + tl.arange(0, WIDTH)
            place = row.to(tl.int64) * width + at
            mask = is_entry[:, None] & (at < width)[None, :]
            w = tl.load(W_dec + own.to(tl.int64)[:, None] * width + at[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.load(error + place, mask=at < width, other=0.0).to(tl.float32)[None, :] * w
            if HAS_AUXILIARY:
                gate_total += tl.load(gate_error + place, mask=at < width, other=0.0).to(tl.float32)[None, :] * w
        f = tl.load(f_of + slot, mask=is_entry, other=0.0)
        df = tl.where(f <= 0, 0.0, of_reconstruction * tl.sum(total, axis=1))
        dg = tl.zeros((ENTRIES,), tl.float32) + of_penalty
        if WEIGHS_NORMS:
            dg = of_penalty * tl.load(norms + own, mask=is_entry, other=0.0)
        if HAS_AUXILIARY:
            dg += of_auxiliary * tl.sum(gate_total, axis=1)
        if HAS_MAGNITUDE:
            scaled = df * tl.exp(tl.load(r_mag + own, mask=is_entry, other=0.0))
            tl.store(df_of + slot, df, mask=is_entry)
            tl.store(dr_of + slot, scaled * tl.load(a + slot, mask=is_entry, other=0.0), mask=is_entry)
            tl.store(da_of + slot, scaled + dg, mask=is_entry)
        else:
            dg += df
            tl.store(da_of + slot, dg, mask=is_entry)
        tl.store(dg_of + slot, dg, mask=is_entry)


@triton.jit
def _to_weights(
    order, offsets, entry_row, f_of, g_of, da_of, dg_of, df_of, dr_of, error, gate_error, centred, W_dec, norms, scales,
    dW_dec, dW_encoder, totals, num_features, width,
    HAS_MAGNITUDE: tl.constexpr, IS_FREE: tl.constexpr, WEIGHS_NORMS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Both weights' gradients of one feature, in one chunk of d_model, from its entries in the order of rows."""
    own, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * WIDTH + tl.arange(0, WIDTH)
    decoder, of_gates, encoder = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    da_total, dg_total = tl.zeros((ENTRIES,), tl.float32), tl.zeros((ENTRIES,), tl.float32)
    df_total, dr_total = tl.zeros((ENTRIES,), tl.float32), tl.zeros((ENTRIES,), tl.float32)
    g_total = tl.zeros((ENTRIES,), tl.float32)
    end = tl.load(offsets + own + 1)
    for first in range(tl.load(offsets + own), end, ENTRIES):
        position = first + tl.arange(0, ENTRIES)
        is_entry = position < end
        slot = tl.load(order + position, mask=is_entry, other=0)
        mask = is_entry[:, None] & (at < width)[None, :]
        place = tl.load(entry_row + slot, mask=is_entry, other=0).to(tl.int64)[:, None] * width + at[None, :]
        f = tl.load(f_of + slot, mask=is_entry, other=0.0)
        da = tl.load(da_of + slot, mask=is_entry, other=0.0)
        decoder += tl.sum(f[:, None] * tl.load(error + place, mask=mask, other=0.0).to(tl.float32), axis=0)
        encoder += tl.sum(da[:, None] * tl.load(centred + place, mask=mask, other=0.0).to(tl.float32), axis=0)
        if IS_FREE or WEIGHS_NORMS:
            g = tl.load(g_of + slot, mask=is_entry, other=0.0)
            g_total += g
            if IS_FREE:
                of_gates += tl.sum(g[:, None] * tl.load(gate_error + place, mask=mask, other=0.0).to(tl.float32), axis=0)
        da_total += da
        dg_total += tl.load(dg_of + slot, mask=is_entry, other=0.0)
        if HAS_MAGNITUDE:
            df_total += tl.load(df_of + slot, mask=is_entry, other=0.0)
            dr_total += tl.load(dr_of + slot, mask=is_entry, other=0.0)
    decoder *= tl.load(scales)
    if IS_FREE:
        decoder += tl.load(scales + 2) * of_gates
    weight = own.to(tl.int64) * width + at
    if WEIGHS_NORMS:
        norm = tl.load(norms + own)
        share = tl.where(norm > 0, tl.load(scales + 1) * tl.sum(g_total, axis=0) / tl.where(norm > 0, norm, 1.0), 0.0)
        decoder += share * tl.load(W_dec + weight, mask=at < width, other=0.0).to(tl.float32)
    tl.store(dW_dec + weight, decoder, mask=at < width)
    tl.store(dW_encoder + weight, encoder, mask=at < width)
    if chunk == 0:
        tl.store(totals + own, tl.sum(da_total, axis=0))
        tl.store(totals + num_features + own, tl.sum(dg_total, axis=0))
        if HAS_MAGNITUDE:
            tl.store(totals + 2 * num_features + own, tl.sum(df_total, axis=0))
            tl.store(totals + 3 * num_features + own, tl.sum(dr_total, axis=0))


@triton.jit
def _open_gates(
    products, gate_bias, r_mag, b_mag, norms, f_of, g_of, counts, penalties, num_rows, num_features,
    HAS_MAGNITUDE: tl.constexpr, WEIGHS_NORMS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The dense encode's epilogue for some features: f, relu(pi_gate), and how often each is positive."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    has_feature = feature < num_features
    gate = tl.load(gate_bias + feature, mask=has_feature, other=0.0)[None, :]
    num_fired, num_opened = tl.zeros((FEATURES,), tl.int32), tl.zeros((FEATURES,), tl.int32)
    penalty = tl.zeros((FEATURES,), tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & has_feature[None, :]
        place = row.to(tl.int64)[:, None] * num_features + feature[None, :]
        a = tl.load(products + place, mask=mask, other=0.0)
        g = tl.where(mask & ~(a + gate <= 0), a + gate, 0.0)
        f = g
        if HAS_MAGNITUDE:
            ratio = tl.exp(tl.load(r_mag + feature, mask=has_feature, other=0.0))[None, :]
            magnitude = ratio * a + tl.load(b_mag + feature, mask=has_feature, other=0.0)[None, :]
            f = tl.where((g > 0) & ~(magnitude <= 0), magnitude, 0.0)
        tl.store(f_of + place, f, mask=mask)
        tl.store(g_of + place, g, mask=mask)
        num_fired += tl.sum((f > 0).to(tl.int32), axis=0)
        num_opened += tl.sum((g > 0).to(tl.int32), axis=0)
        penalty += tl.sum(g, axis=0)
    if WEIGHS_NORMS:
        penalty *= tl.load(norms + feature, mask=has_feature, other=0.0)
    tl.store(counts + feature, num_fired, mask=has_feature)
    tl.store(counts + num_features + feature, num_opened, mask=has_feature)
    tl.store(penalties + feature, penalty, mask=has_feature)


@triton.jit
def _to_products(
    products, gate_products, f_of, g_of, r_mag, b_mag, norms, scales, da_of, totals, num_rows, num_features,
    HAS_MAGNITUDE: tl.constexpr, HAS_AUXILIARY: tl.constexpr, WEIGHS_NORMS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The epilogue of both dense products with the decoder, for some features: the gradient of a, and sums over rows."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    has_feature = feature < num_features
    of_reconstruction, of_penalty, of_auxiliary = tl.load(scales), tl.load(scales + 1), tl.load(scales + 2)
    penalty = tl.zeros((FEATURES,), tl.float32) + of_penalty
    if WEIGHS_NORMS:
        penalty *= tl.load(norms + feature, mask=has_feature, other=0.0)
    da_total, dg_total = tl.zeros((FEATURES,), tl.float32), tl.zeros((FEATURES,), tl.float32)
    df_total, dr_total = tl.zeros((FEATURES,), tl.float32), tl.zeros((FEATURES,), tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & has_feature[None, :]
        place = row.to(tl.int64)[:, None] * num_features + feature[None, :]
        f = tl.load(f_of + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_of + place, mask=mask, other=0.0).to(tl.float32)
        df = tl.where(f <= 0, 0.0, of_reconstruction * tl.load(products + place, mask=mask, other=0.0))
        dg = tl.zeros((ROWS, FEATURES), tl.float32) + penalty[None, :]
        if HAS_AUXILIARY:
            dg += of_auxiliary * tl.load(gate_products + place, mask=mask, other=0.0)
        dg = tl.where(g <= 0, 0.0, dg)
        if HAS_MAGNITUDE:
            scaled = df * tl.exp(tl.load(r_mag + feature, mask=has_feature, other=0.0))[None, :]
            df_total += tl.sum(df, axis=0)
            dr_total += tl.sum(df * (f - tl.load(b_mag + feature, mask=has_feature, other=0.0)[None, :]), axis=0)
            da = scaled + dg
        else:
            dg += df
            da = dg
        tl.store(da_of + place, da, mask=mask)
        da_total += tl.sum(da, axis=0)
        dg_total += tl.sum(dg, axis=0)
    tl.store(totals + feature, da_total, mask=has_feature)
    tl.store(totals + num_features + feature, dg_total, mask=has_feature)
    tl.store(totals + 2 * num_features + feature, df_total, mask=has_feature)
    tl.store(totals + 3 * num_features + feature, dr_total, mask=has_feature)


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
    width = _width(x, _PRODUCT_WIDTH)
    _products_at[(num_rows,)](x, directions, proposed, starts, product, x.shape[1], capacity, ENTRIES=_ENTRIES, WIDTH=width)
    _keep_open[(num_rows,)](proposed, product, bias, starts, feature, a, ends, capacity, ENTRIES=128)
    sorted_features, order = torch.sort(feature, stable=True)
    features = torch.arange(num_features + 1, dtype=torch.int32, device=x.device)
    return Entries(starts[-1], starts, ends, row, feature, a, order, torch.searchsorted(sorted_features, features))


@dataclass(frozen=True, eq=False)
class Decoded:
    """Both decodes."""

    f: Float[Tensor, " capacity"]
    """Features of the entries."""
    g: Float[Tensor, " capacity"]
    """relu(pi_gate) of the entries."""
    error: Float[Tensor, "rows d_model"]
    """x_hat - x."""
    gate_error: Float[Tensor, "rows d_model"]
    """The same for the reconstruction by the gates alone; `error` where there is none."""
    squares: Float[Tensor, ""]
    """Sum of the squares of `error`."""
    gate_squares: Float[Tensor, ""]
    """Sum of those of `gate_error`; 0 where there is none."""
    penalty: Float[Tensor, ""]
    """Sum of g, weighed by `norms` where they are given."""


def decode(
    entries: Entries,
    gate_bias: Float[Tensor, " features"],
    magnitude: tuple[Float[Tensor, " features"], Float[Tensor, " features"]] | None,
    norms: Float[Tensor, " features"] | None,
    W_dec: Float[Tensor, "features d_model"],
    centred: Float[Tensor, "rows d_model"],
    *,
    has_auxiliary: bool,
) -> Decoded:
    """Features and both reconstructions' errors, reading each entry's decoder row once.

    Args:
        entries: where gates are open.
        gate_bias: float32.
        magnitude: r_mag and b_mag; None where f = relu(pi_gate).
        norms: norms of the decoder rows where the penalty weighs them.
        W_dec: decoder rows, float32 or bfloat16.
        centred: rows less b_dec, float32.
        has_auxiliary: whether the reconstruction by the gates alone is wanted.
    """
    num_rows, width = centred.shape
    chunk = _width(centred, _WIDTH)
    num_chunks = triton.cdiv(width, chunk)
    f, g = torch.zeros(2, entries.capacity, dtype=torch.float32, device=centred.device)
    error = torch.empty_like(centred)
    gate_error = torch.empty_like(centred) if has_auxiliary else error
    squares, gate_squares = centred.new_zeros(2, num_rows, num_chunks)
    penalties = centred.new_empty(num_rows)
    r_mag, b_mag = (gate_bias, gate_bias) if magnitude is None else magnitude
    _decode[(num_rows, num_chunks)](
        entries.feature, entries.a, entries.starts, entries.ends, gate_bias, r_mag, b_mag, gate_bias if norms is None else norms,
        W_dec, centred, f, g, error, gate_error, squares, gate_squares, penalties, width, num_chunks,
        HAS_MAGNITUDE=magnitude is not None, HAS_AUXILIARY=has_auxiliary, WEIGHS_NORMS=norms is not None,
        ENTRIES=_FEW_ENTRIES, WIDTH=chunk,
    )  # fmt: skip
    return Decoded(f, g, error, gate_error, squares.sum(), gate_squares.sum(), penalties.sum())


@dataclass(frozen=True, eq=False)
class Gradients:
    """What backward gives, but for b_dec."""

    W_dec: Float[Tensor, "features d_model"]
    encoder: Float[Tensor, "features d_model"]
    """In the layout of the weight: one direction a row."""
    a: Float[Tensor, " features"]
    """Sum over rows of the gradient of each a, what b_dec gets through the encoder."""
    gate_bias: Float[Tensor, " features"]
    b_mag: Float[Tensor, " features"]
    """0 where features have no magnitude of their own, as r_mag's."""
    r_mag: Float[Tensor, " features"]


def gradients(
    entries: Entries,
    decoded: Decoded,
    r_mag: Float[Tensor, " features"] | None,
    norms: Float[Tensor, " features"] | None,
    W_dec: Float[Tensor, "features d_model"],
    centred: Float[Tensor, "rows d_model"],
    scales: Float[Tensor, "3"],
    *,
    has_auxiliary: bool,
    is_free: bool,
) -> Gradients:
    """The gradients of the weights, reading each entry's decoder row once, and each error's row once an entry.

    Args:
        entries: where gates are open.
        decoded: what `decode` gave, with errors in the type in which they are to be read.
        r_mag: None where f = relu(pi_gate).
        norms: norms of the decoder rows where the penalty weighs them.
        W_dec: decoder rows, float32 or bfloat16.
        centred: rows less b_dec, float32 or bfloat16.
        scales: what the gradient of the squared error, of a gate's penalty and of the gates' squared error are multiplied by.
        has_auxiliary: whether there is an error by the gates alone.
        is_free: whether the decoder learns from it.
    """
    (num_rows, width), num_features = centred.shape, entries.num_features
    da, dg, df, dr = torch.zeros(4, entries.capacity, dtype=torch.float32, device=centred.device)
    flags = {"HAS_MAGNITUDE": r_mag is not None, "WEIGHS_NORMS": norms is not None}
    unread = entries.a  # what a kernel does not read has to point somewhere
    of_features = (unread if r_mag is None else r_mag, unread if norms is None else norms)
    _to_entries[(num_rows,)](
        entries.feature, entries.a, decoded.f, entries.starts, entries.ends, *of_features, W_dec, decoded.error, decoded.gate_error,
        scales, da, dg, df, dr, width, **flags, HAS_AUXILIARY=has_auxiliary, ENTRIES=_ENTRIES, WIDTH=_width(centred, _PRODUCT_WIDTH),
    )  # fmt: skip
    dW_dec, dW_encoder = (torch.empty(num_features, width, dtype=torch.float32, device=centred.device) for _ in range(2))
    totals = torch.zeros(4, num_features, dtype=torch.float32, device=centred.device)
    chunk = _width(centred, _WIDTH)
    _to_weights[(num_features, triton.cdiv(width, chunk))](
        entries.order, entries.offsets, entries.row, decoded.f, decoded.g, da, dg, df, dr, decoded.error, decoded.gate_error, centred,
        W_dec, of_features[1], scales, dW_dec, dW_encoder, totals, num_features, width,
        **flags, IS_FREE=is_free, ENTRIES=_FEW_ENTRIES, WIDTH=chunk,
    )  # fmt: skip
    return Gradients(dW_dec, dW_encoder, *totals)


def open_gates(
    products: Float[Tensor, "rows features"],
    gate_bias: Float[Tensor, " features"],
    magnitude: tuple[Float[Tensor, " features"], Float[Tensor, " features"]] | None,
    norms: Float[Tensor, " features"] | None,
    f: Float[Tensor, "rows features"],
    g: Float[Tensor, "rows features"],
) -> tuple[Int[Tensor, "2 features"], Float[Tensor, ""]]:
    """Fill `f` and `g`, relu(pi_gate), from the products of rows with encoder directions.

    Args:
        products: float32.
        gate_bias: float32.
        magnitude: r_mag and b_mag; None where f = relu(pi_gate).
        norms: what each feature's g counts in the penalty; None counts all 1.
        f: float32 or bfloat16.
        g: of the same type.

    Returns:
        Rows at which f and g are positive, and the sum of g, weighed.
    """
    num_rows, num_features = products.shape
    counts = torch.empty(2, num_features, dtype=torch.int32, device=products.device)
    penalties = torch.empty(num_features, dtype=torch.float32, device=products.device)
    r_mag, b_mag = (gate_bias, gate_bias) if magnitude is None else magnitude
    _open_gates[(triton.cdiv(num_features, _TILE["FEATURES"]),)](
        products, gate_bias, r_mag, b_mag, gate_bias if norms is None else norms, f, g, counts, penalties, num_rows, num_features,
        HAS_MAGNITUDE=magnitude is not None, WEIGHS_NORMS=norms is not None, **_TILE,
    )  # fmt: skip
    return counts, penalties.sum()


def to_products(
    products: Float[Tensor, "rows features"],
    gate_products: Float[Tensor, "rows features"] | None,
    f: Float[Tensor, "rows features"],
    g: Float[Tensor, "rows features"],
    magnitude: tuple[Float[Tensor, " features"], Float[Tensor, " features"]] | None,
    norms: Float[Tensor, " features"] | None,
    scales: Float[Tensor, "3"],
    da: Float[Tensor, "rows features"],
) -> Float[Tensor, "4 features"]:
    """Fill `da`, the gradient of the products of rows with encoder directions.

    Args:
        products: of errors with decoder rows, float32.
        gate_products: the same of the gates' errors, if there are any.
        f: as `open_gates` left them.
        g: the same.
        magnitude: r_mag and b_mag; None where f = relu(pi_gate).
        norms: what each feature's g counts in the penalty; None counts all 1.
        scales: what the gradient of the squared error, of a gate's penalty and of the gates' squared error are multiplied by.
        da: of the type of f; may be `g` itself.

    Returns:
        Sums over rows of da and of the gradients of pi_gate, of pi_mag, and of r_mag.
    """
    num_rows, num_features = products.shape
    totals = torch.empty(4, num_features, dtype=torch.float32, device=products.device)
    r_mag, b_mag = (totals, totals) if magnitude is None else magnitude
    _to_products[(triton.cdiv(num_features, _TILE["FEATURES"]),)](
        products, products if gate_products is None else gate_products, f, g, r_mag, b_mag, totals if norms is None else norms,
        scales, da, totals, num_rows, num_features,
        HAS_MAGNITUDE=magnitude is not None, HAS_AUXILIARY=gate_products is not None, WEIGHS_NORMS=norms is not None, **_TILE,
    )  # fmt: skip
    return totals


def _width(rows: Tensor, largest: int) -> int:
    """A power of two that covers a vector, or a part of it."""
    return min(largest, int(triton.next_power_of_2(rows.shape[1])))
