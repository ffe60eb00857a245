"""The matrix products of an SAE, in its own type or from bfloat16 copies. In: two matrices. Out: their product, in their own type.

Within `bfloat16_products` both factors of a product are rounded to bfloat16, in the backward pass too; the terms are summed in float32.
CUDA hands out these sums; CPU kernels round them to bfloat16 once more. With u = 2^-8, bfloat16's rounding,

    |found - A B| <= (2 u + u^2) |A| |B|, on a CPU + u |A B|, entry by entry, and what float32 sums add

Everything else stays as it is: biases, nonlinearities, norms, losses, and sums of gradients over rows, micro-batches and ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_IS_BFLOAT16 = ContextVar("_IS_BFLOAT16", default=False)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Products of matrices made in this block, and their gradients whenever those are computed, take bfloat16 factors."""
    token = _IS_BFLOAT16.set(True)
    try:
        yield
    finally:
        _IS_BFLOAT16.reset(token)


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """CUDA may sum parts of a bfloat16 product in bfloat16, which would break the bound of its error."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


def product(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """The product of two matrices."""
    if not _IS_BFLOAT16.get():
        return left @ right
    found: Tensor = _Bfloat16Product.apply(left, right)  # type: ignore[no-untyped-call]
    return found


def affine(
    bias: Float[Tensor, " columns"], left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """The product of two matrices, and a bias that is never rounded."""
    return bias + product(left, right) if _IS_BFLOAT16.get() else torch.addmm(bias, left, right)


def centred_affine(
    bias: Float[Tensor, " features"] | None,
    x: Float[Tensor, "rows d_model"],
    b_dec: Float[Tensor, " d_model"],
    encoder: Float[Tensor, "d_model features"],
) -> Float[Tensor, "rows features"]:
    """(x - b_dec) encoder + bias, where b_dec learns through a product with a vector: not through one as large as the product itself.

    In bfloat16 b_dec is subtracted before the product: what is rounded is then as small as the rows' distance from it.
    """
    rows, shift = (x - b_dec.detach(), b_dec - b_dec.detach()) if _IS_BFLOAT16.get() else (x, b_dec)
    offset = -(shift @ encoder)
    return affine(offset if bias is None else bias + offset, rows, encoder)


class _Bfloat16Product(torch.autograd.Function):
    """C = A B, dA = dC B^T, dB = A^T dC, each from bfloat16 factors, of which the backward pass keeps the copies."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.dtype = left.dtype
        left, right = left.bfloat16(), right.bfloat16()
        ctx.save_for_backward(left, right)
        return _multiply(left, right, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        needs_left, needs_right = ctx.needs_input_grad
        gradient = gradient.bfloat16()
        d_left = _multiply(gradient, right.T, ctx.dtype) if needs_left else None
        if not needs_right:
            return d_left, None
        if right.stride(0) == 1:  # in the layout of the weight, so that it need not be copied
            return d_left, _multiply(gradient.T, left, ctx.dtype).T
        return d_left, _multiply(left.T, gradient, ctx.dtype)


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two bfloat16 matrices."""
    if left.device.type != "cuda":
        return (left @ right).to(dtype)
    with sums_in_float32():
        return torch.mm(left, right, out_dtype=torch.float32).to(dtype)
