"""Triton kernels of the update. In: weights, gradients, Adam's moments, one vector a feature. Out: the moved weights.

Two passes, since clipping needs the norm of the whole gradient: the first reads gradients (and the decoder rows they are projected
by), the second reads and writes all that Adam does, projects, clips and renormalises on the way. torch's own sequence reads and writes
the decoder's gradient and rows four times more. A program has one feature's vector in its registers; sums have a fixed order.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def _measure(gradient, weight, dots, squares, width, IS_UNIT: tl.constexpr, WIDTH: tl.constexpr):
    """The square of one vector's gradient, less its part along the vector where that is a unit vector, and that part."""
    row, at = tl.program_id(0), tl.arange(0, WIDTH)
    place = row.to(tl.int64) * width + at
    g = tl.load(gradient + place, mask=at < width, other=0.0)
    if IS_UNIT:
        w = tl.load(weight + place, mask=at < width, other=0.0)
        dot = tl.sum(g * w, axis=0)
        tl.store(dots + row, dot)
        g -= dot * w
    tl.store(squares + row, tl.sum(g * g, axis=0))


@triton.jit
def _move(
    gradient, weight, dots, average, average_square, scalars, width, beta1, beta2, eps, IS_UNIT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Adam's update of one vector, as torch's fused kernel makes it; nothing where the gradient is not finite."""
    row, at = tl.program_id(0), tl.arange(0, WIDTH)
    place = row.to(tl.int64) * width + at
    is_inside = at < width
    if tl.load(scalars) != 0:
        clip, step_size, root = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
        g, w = tl.load(gradient + place, mask=is_inside, other=0.0), tl.load(weight + place, mask=is_inside, other=0.0)
        if IS_UNIT:
            g -= tl.load(dots + row) * w
        g *= clip
        m = tl.load(average + place, mask=is_inside, other=0.0)
        v = tl.load(average_square + place, mask=is_inside, other=0.0)
        m += (g - m) * (1 - beta1)
        v = beta2 * v + (1 - beta2) * g * g
        w -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        if IS_UNIT:
            w = tl.div_rn(w, tl.sqrt_rn(tl.sum(tl.where(is_inside, w * w, 0.0), axis=0)))
        tl.store(weight + place, w, mask=is_inside)
        tl.store(average + place, m, mask=is_inside)
        tl.store(average_square + place, v, mask=is_inside)


def measure(
    gradient: Float[Tensor, "features d_model"], weight: Float[Tensor, "features d_model"] | None
) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]]:
    """The squares of the gradient's rows and, where `weight` has unit rows, what `move` needs to take away the parts along them.

    Args:
        gradient: float32, contiguous.
        weight: the unit rows; None where all of the gradient counts.
    """
    dots, squares = torch.empty(2, len(gradient), dtype=torch.float32, device=gradient.device)
    _measure[(len(gradient),)](
        gradient, gradient if weight is None else weight, dots, squares, gradient.shape[1],
        IS_UNIT=weight is not None, **_of_a_vector(gradient),
    )  # fmt: skip
    return squares, dots


def move(
    weight: Float[Tensor, "features d_model"],
    gradient: Float[Tensor, "features d_model"],
    moments: tuple[Float[Tensor, "features d_model"], Float[Tensor, "features d_model"]],
    dots: Float[Tensor, " features"] | None,
    scalars: Float[Tensor, "4"],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update weights and Adam's moments in place.

    Args:
        weight: float32, contiguous.
        gradient: as backward left it.
        moments: the averages of the gradient and of its square.
        dots: what `measure` gave, where the rows of `weight` are unit vectors and are to stay so.
        scalars: 1, or 0 to change nothing; what to multiply the gradient by; learning rate / (1 - beta1^t); sqrt(1 - beta2^t).
        betas: decays of the moments.
        eps: what is added to the root of the second one.
    """
    _move[(len(weight),)](
        gradient, weight, gradient if dots is None else dots, *moments, scalars, weight.shape[1], *betas, eps,
        IS_UNIT=dots is not None, **_of_a_vector(weight),
    )  # fmt: skip


def _of_a_vector(matrix: Tensor) -> dict[str, int]:
    width = triton.next_power_of_2(matrix.shape[1])
    return {"WIDTH": width, "num_warps": max(4, min(16, width // 512))}
