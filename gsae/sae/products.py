"""The matrix products of an SAE, in its own type or of rounded factors. In: two matrices. Out: their product, in their own type.

Within `rounded_factors` both factors of a product are rounded to bfloat16 or TF32, in the backward pass too; the terms are summed in
float32. CUDA hands out these sums; CPU kernels round bfloat16's to bfloat16 once more, and have no TF32: there it is float32. With u the
rounding, bfloat16's 2^-8 or TF32's 2^-11,

    |found - A B| <= (2 u + u^2) |A| |B|, on a CPU + u |A B|, entry by entry, and what float32 sums add

Everything else stays as it is: biases, nonlinearities, norms, losses, and sums of gradients over rows, micro-batches and ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from gsae.config import ProductsName


@cache
def is_quick_at_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16 products; a CPU without them takes up to a hundred times as long as for float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


SLOW_BFLOAT16 = "this device has no instructions for bfloat16 products: --llm.dtype float32 makes the LLM many times as fast"
"""What to tell who has an LLM in bfloat16 on such a device."""
_FACTORS: ContextVar[ProductsName] = ContextVar("_FACTORS", default="float32")


@contextmanager
def rounded_factors(factors: ProductsName) -> Iterator[None]:
    """Products of matrices made in this block, and their gradients whenever those are computed, take factors of this type."""
    token = _FACTORS.set(factors)
    try:
        yield
    finally:
        _FACTORS.reset(token)


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
    if _FACTORS.get() == "float32":
        return left @ right
    found: Tensor = _RoundedProduct.apply(left, right, _FACTORS.get() == "bfloat16")  # type: ignore[no-untyped-call]
    return found


def affine(
    bias: Float[Tensor, " columns"], left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """The product of two matrices, and a bias that is never rounded."""
    return torch.addmm(bias, left, right) if _FACTORS.get() == "float32" else bias + product(left, right)


def centred_affine(
    bias: Float[Tensor, " features"] | None,
    x: Float[Tensor, "rows d_model"],
    b_dec: Float[Tensor, " d_model"],
    encoder: Float[Tensor, "d_model features"],
) -> Float[Tensor, "rows features"]:
    """(x - b_dec) encoder + bias, where b_dec learns through a product with a vector: not through one as large as the product itself.

    Where factors are rounded b_dec is subtracted before the product: what is rounded is then as small as the rows' distance from it.
    """
    rows, shift = (x, b_dec) if _FACTORS.get() == "float32" else (x - b_dec.detach(), b_dec - b_dec.detach())
    offset = -(shift @ encoder)
    return affine(offset if bias is None else bias + offset, rows, encoder)


class _RoundedProduct(torch.autograd.Function):
    """C = A B, dA = dC B^T, dB = A^T dC, each from rounded factors; in bfloat16 the backward pass keeps the copies."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, in_bfloat16: bool) -> Tensor:
        ctx.dtype, ctx.in_bfloat16 = left.dtype, in_bfloat16
        if in_bfloat16:
            left, right = left.bfloat16(), right.bfloat16()
        ctx.save_for_backward(left, right)
        return multiply_rounded(left, right, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        needs_left, needs_right, _ = ctx.needs_input_grad
        if ctx.in_bfloat16:
            gradient = gradient.bfloat16()
        d_left = multiply_rounded(gradient, right.T, ctx.dtype) if needs_left else None
        if not needs_right:
            return d_left, None, None
        if right.stride(0) == 1:  # in the layout of the weight, so that it need not be copied
            return d_left, multiply_rounded(gradient.T, left, ctx.dtype).T, None
        return d_left, multiply_rounded(left.T, gradient, ctx.dtype), None


def multiply_rounded(
    left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"], dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """The product of two bfloat16 matrices, or of others rounded to TF32 on the way, with its sums in `dtype`."""
    if left.dtype != torch.bfloat16:
        with _tf32():
            return left @ right
    if left.device.type != "cuda":
        return (left @ right).to(dtype)
    with sums_in_float32():
        return torch.mm(left, right, out_dtype=torch.float32).to(dtype)


@contextmanager
def _tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before
