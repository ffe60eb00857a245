"""Triton kernels of the dense step. In: products of rows x features. Out: what stands between them and the next product, on the device.

The rules are those of entry_kernels.py.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_TILE = {"ROWS": 16, "FEATURES": 64}


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
