"""The dense step on a GPU. In: an SAE and rows. Out: the losses and gradients of the dense reference, from its seven products and no more.

The library multiplies; kernels do everything between the products in one pass each. Products of rows x features are in memory for
a block of rows at a time; what is kept of all rows is f and relu(pi_gate), which becomes the gradient of a in the backward pass, in the
type of the factors: with bfloat16 factors nothing of rows x features is in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gsae.config import ObjectiveName, ProductsName
from gsae.sae.objective import Objective
from gsae.sae.part import Part
from gsae.sae.products import multiply_rounded
from gsae.sae.sparse import TERMS, Terms, forward_by, sum_parts

BLOCK_ELEMENTS = 1 << 25
"""Elements of rows x features whose products are in memory at once."""


def dense_kernel_objective(name: ObjectiveName, factors: ProductsName = "float32") -> Objective:
    """The dense step of the objective `name` on kernels, for float32 weights.

    Args:
        name: the objective.
        factors: what the products' factors are rounded to; everything else, and every sum, is in float32.
    """
    return lambda sae, x: forward_by(_DenseStep, (TERMS[name], factors), sae, x)


class _DenseStep(torch.autograd.Function):
    """`_SparseStep` of sparse.py, whose formulas these are, on all entries."""

    @staticmethod
    def forward(
        ctx: Any,
        terms: Terms,
        factors: ProductsName,
        part: Part | None,
        x: Tensor,
        encoder: Tensor,
        gate_bias: Tensor,
        r_mag: Tensor | None,
        b_mag: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor,
    ) -> tuple[Tensor, ...]:
        """The three losses, which alone are differentiable; x_hat; rows at which features fired; rows at which gates were open."""
        from gsae.sae import dense_kernels

        num_rows, num_features = len(x), len(W_dec)
        centred = x - b_dec
        rows, directions, decoder = (_factor(matrix, factors) for matrix in (centred, encoder.T, W_dec))
        f, g = (rows.new_empty(num_rows, num_features) for _ in range(2))
        norms = torch.linalg.vector_norm(W_dec, dim=1) if terms.weighs_norms else None
        magnitude = None if r_mag is None or b_mag is None else (r_mag, b_mag)
        counts = torch.zeros(2, num_features, dtype=torch.int64, device=x.device)
        penalty = x.new_zeros(())
        for block in _blocks(num_rows, num_features):
            products = _multiply(rows[block], directions.T, factors)
            found, added = dense_kernels.open_gates(products, gate_bias, magnitude, norms, f[block], g[block])
            counts += found
            penalty += added
        own_gates = None if terms.auxiliary == "none" else _multiply(g, decoder, factors)
        decoded, gates_decoded = sum_parts(part, _multiply(f, decoder, factors), own_gates)
        assert decoded is not None
        error = decoded - centred
        gate_error = None if gates_decoded is None else gates_decoded - centred
        ctx.terms, ctx.factors, ctx.part, ctx.norms = terms, factors, part, norms
        ctx.save_for_backward(rows, encoder, decoder, W_dec, r_mag, b_mag, f, g, error, gate_error)
        losses = (error.square().sum(), penalty, x.new_zeros(()) if gate_error is None else gate_error.square().sum())
        x_hat, (fired, opened) = x + error, counts
        ctx.mark_non_differentiable(x_hat, fired, opened)
        return *(loss / num_rows for loss in losses), x_hat, fired, opened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reconstruction: Tensor, sparsity: Tensor, auxiliary: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters, given those of the three losses; only once, since relu(pi_gate) makes room for that of a."""
        from gsae.sae import dense_kernels

        rows, encoder, decoder, W_dec, r_mag, b_mag, f, g, error, gate_error = ctx.saved_tensors
        magnitude = None if r_mag is None or b_mag is None else (r_mag, b_mag)
        factors, num_rows, is_free = ctx.factors, len(rows), ctx.terms.auxiliary == "free"
        scales = torch.stack([2 * reconstruction, sparsity, 2 * auxiliary]) / num_rows
        rounded = _factor(error, factors)
        gate_rounded = None if gate_error is None else _factor(gate_error, factors)
        dW_dec = scales[0] * _multiply(f.T, rounded, factors)
        learns_b_dec = ctx.part is None or ctx.part.is_first
        db_dec = scales[0] * error.sum(dim=0) * learns_b_dec
        if is_free and gate_rounded is not None:
            dW_dec += scales[2] * _multiply(g.T, gate_rounded, factors)
            db_dec += scales[2] * gate_error.sum(dim=0) * learns_b_dec
        if ctx.norms is not None:
            totals = torch.where(ctx.norms > 0, scales[1] * g.sum(dim=0, dtype=torch.float32) / ctx.norms, 0.0)
            dW_dec.addcmul_(totals[:, None], W_dec)
        totals = torch.zeros(4, len(W_dec), dtype=torch.float32, device=rows.device)
        for block in _blocks(*f.shape):
            products = _multiply(rounded[block], decoder.T, factors)
            gate_products = None if gate_rounded is None else _multiply(gate_rounded[block], decoder.T, factors)
            totals += dense_kernels.to_products(products, gate_products, f[block], g[block], magnitude, ctx.norms, scales, da=g[block])
        da_total, dg_total, df_total, dr_total = totals
        db_dec -= encoder @ da_total
        of_magnitude = (None, None) if r_mag is None else (dr_total, df_total)
        return None, None, None, None, _multiply(g.T, rows, factors).T, dg_total, *of_magnitude, dW_dec, db_dec


def _blocks(num_rows: int, num_features: int) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // num_features)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _factor(matrix: Tensor, factors: ProductsName) -> Tensor:
    return matrix.bfloat16() if factors == "bfloat16" else matrix


def _multiply(left: Tensor, right: Tensor, factors: ProductsName) -> Tensor:
    return left @ right if factors == "float32" else multiply_rounded(left, right, torch.float32)
