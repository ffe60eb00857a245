"""Triton kernels of the sparse step. In: rows, weights, a list of entries. Out: errors, losses and gradients, on the device.

The rules are those of entry_kernels.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from gsae.sae.entry_kernels import ENTRIES, PRODUCT_WIDTH, Entries, part_of_vector

_FEW_ENTRIES = 4
"""Entries that a program takes together where it adds up their vectors."""
_WIDTH = 1024
"""Elements of vectors that a program adds up."""


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
    chunk = part_of_vector(centred, _WIDTH)
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
        scales, da, dg, df, dr, width, **flags, HAS_AUXILIARY=has_auxiliary, ENTRIES=ENTRIES, WIDTH=part_of_vector(centred, PRODUCT_WIDTH),
    )  # fmt: skip
    dW_dec, dW_encoder = (torch.empty(num_features, width, dtype=torch.float32, device=centred.device) for _ in range(2))
    totals = torch.zeros(4, num_features, dtype=torch.float32, device=centred.device)
    chunk = part_of_vector(centred, _WIDTH)
    _to_weights[(num_features, triton.cdiv(width, chunk))](
        entries.order, entries.offsets, entries.row, decoded.f, decoded.g, da, dg, df, dr, decoded.error, decoded.gate_error, centred,
        W_dec, of_features[1], scales, dW_dec, dW_encoder, totals, num_features, width,
        **flags, IS_FREE=is_free, ENTRIES=_FEW_ENTRIES, WIDTH=chunk,
    )  # fmt: skip
    return Gradients(dW_dec, dW_encoder, *totals)
