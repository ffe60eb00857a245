"""The sparse step on Triton's kernels. In: an SAE and rows, on a GPU. Out: the losses and gradients of sparse.py, whose formulas these are.

A bfloat16 product proposes entries as in active.py, here as a bitmap: a bit for each row and feature. Everything after it is a list
with room for `Capacity.entries` of them, and is queued before the host knows how many there are: the device never waits for the host.
The host looks when the decodes are queued, and where the list was too short makes a longer one and decodes again; no entry is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gsae.config import ObjectiveName
from gsae.sae.active import BFLOAT16_ERROR, bounded_directions, bounded_rows
from gsae.sae.objective import Objective
from gsae.sae.part import Part
from gsae.sae.products import sums_in_float32
from gsae.sae.sparse import TERMS, Terms, forward_by, sum_parts

if TYPE_CHECKING:
    from gsae.sae.kernels import Decoded

SMALLEST_CAPACITY = 1 << 14
PRODUCTS_ELEMENTS = 1 << 26
"""Elements of rows x features that are in memory at once where cuBLAS proposes entries."""


@dataclass
class Capacity:
    """Room in the list of entries: a power of two, enough for the last batch and not eight times as much."""

    entries: int = SMALLEST_CAPACITY

    def holds(self, num_proposed: int) -> bool:
        """Whether the list had room for all; sets the room for the next."""
        was_enough = num_proposed <= self.entries
        if not was_enough or 8 * num_proposed < self.entries:
            self.entries = max(SMALLEST_CAPACITY, 1 << (num_proposed + num_proposed // 4).bit_length())
        return was_enough


def sparse_kernel_objective(
    name: ObjectiveName, *, in_bfloat16: bool = False, capacity: Capacity | None = None, proposer: "Proposer | None" = None
) -> Objective:
    """The sparse step of the objective `name` on Triton's kernels, for float32 weights.

    Args:
        name: the objective.
        in_bfloat16: whether what is multiplied (rows, weights, errors) is rounded to bfloat16; sums are in float32 all the same.
            Otherwise bfloat16 only proposes entries, and values and gradients are those of `objective(name)`, to the last rounding.
        capacity: the room in the list of entries to begin with.
        proposer: who finds the entries; None takes the quicker one.
    """
    settings = _Settings(TERMS[name], in_bfloat16, capacity or Capacity(), proposer or _quicker)
    return lambda sae, x: forward_by(_KernelStep, (settings,), sae, x)


@dataclass(frozen=True)
class Factors:
    """What is multiplied to find entries."""

    x: Float[Tensor, "rows d_model"]
    """Rows less b_dec, rounded to bfloat16."""
    directions: Float[Tensor, "features d_model"]
    """Of the encoder, rounded to bfloat16."""
    bias: Float[Tensor, " features"]
    is_exact: bool
    """Whether the gates are decided by the product before rounding, rather than by that of these factors."""

    @property
    def error(self) -> float:
        """Bound of the product, summed in float32 in any order, from what decides; in units of both norms' product."""
        return (BFLOAT16_ERROR if self.is_exact else 2.0**-20) + 2 * self.x.shape[1] * 2.0**-24


Proposer = Callable[[Factors], Int[Tensor, "rows words"]]
"""Sets a bit for each entry whose gate may be open, at least: those too many are found out afterwards."""


def propose_fused(factors: Factors) -> Int[Tensor, "rows words"]:
    """In one kernel: the product never is in memory."""
    from gsae.sae import entry_kernels

    return entry_kernels.propose(factors.x, factors.directions, factors.bias, factors.error)


def propose_from_products(factors: Factors) -> Int[Tensor, "rows words"]:
    """With the library's own product, a block of rows at a time, and a kernel that looks at it."""
    from gsae.sae import entry_kernels

    num_features = len(factors.directions)
    words = factors.x.new_empty(len(factors.x), -(-num_features // entry_kernels.WORD_BITS), dtype=torch.int32)
    rows, directions = bounded_rows(factors.x), bounded_directions(factors.directions, factors.bias, factors.error)
    block_rows = max(1, PRODUCTS_ELEMENTS // num_features)
    with sums_in_float32():
        for start in range(0, len(rows), block_rows):
            entry_kernels.pack(rows[start : start + block_rows] @ directions.T, words[start : start + block_rows])
    return words


def _quicker(factors: Factors) -> Int[Tensor, "rows words"]:
    """What the quicker proposer gives: which one is, does not change what the entries are."""
    if factors.x.device.type != "cuda":
        return propose_fused(factors)
    key = (factors.x.device, *factors.x.shape, len(factors.directions))
    if key not in _QUICKER:
        _QUICKER[key] = min((propose_fused, propose_from_products), key=lambda proposer: _milliseconds(proposer, factors))
    return _QUICKER[key](factors)


_QUICKER: dict[tuple[Any, ...], Proposer] = {}
"""The proposer that was quicker, by device and shape."""


def _milliseconds(proposer: Proposer, factors: Factors) -> float:
    """The least of three calls' times on the device, after one that compiles."""
    proposer(factors)
    times: list[float] = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        proposer(factors)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)


@dataclass(frozen=True)
class _Settings:
    terms: Terms
    in_bfloat16: bool
    capacity: Capacity
    proposer: Proposer


class _KernelStep(torch.autograd.Function):
    """`_SparseStep` of sparse.py on kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
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
        from gsae.sae import entry_kernels, kernels

        terms, capacity = settings.terms, settings.capacity
        centred, directions = x - b_dec, encoder.T
        rounded_x, rounded_directions = centred.bfloat16(), directions.bfloat16()
        words = settings.proposer(Factors(rounded_x, rounded_directions, gate_bias, is_exact=not settings.in_bfloat16))
        deciding = (rounded_x, rounded_directions) if settings.in_bfloat16 else (centred, directions)
        factor = W_dec.bfloat16() if settings.in_bfloat16 else W_dec
        norms = torch.linalg.vector_norm(W_dec, dim=1) if terms.weighs_norms else None
        has_auxiliary = terms.auxiliary != "none"
        while True:
            entries = entry_kernels.list_entries(words, *deciding, gate_bias, capacity.entries)
            num_proposed = _Number(entries.num_proposed)
            magnitude = None if r_mag is None or b_mag is None else (r_mag, b_mag)
            rows = centred if part is None else torch.zeros_like(centred)  # so that errors are the part's own decodes
            decoded = kernels.decode(entries, gate_bias, magnitude, norms, factor, rows, has_auxiliary=has_auxiliary)
            if capacity.holds(num_proposed.wait()):
                break
        if part is not None:
            decoded = _whole(part, decoded, centred, has_auxiliary=has_auxiliary)
        opened = entries.count()
        fired = opened if r_mag is None else entries.count(decoded.f > 0)
        ctx.settings, ctx.part, ctx.entries, ctx.norms, ctx.factor, ctx.decoded = settings, part, entries, norms, factor, decoded
        ctx.save_for_backward(rounded_x if settings.in_bfloat16 else centred, encoder, r_mag)
        num_rows, x_hat = len(x), x + decoded.error
        ctx.mark_non_differentiable(x_hat, fired, opened)
        losses = (decoded.squares / num_rows, decoded.penalty / num_rows, decoded.gate_squares / num_rows)
        return *losses, x_hat, fired, opened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reconstruction: Tensor, sparsity: Tensor, auxiliary: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters, given those of the three losses."""
        from gsae.sae import kernels

        centred, encoder, r_mag = ctx.saved_tensors
        terms, decoded, num_rows = ctx.settings.terms, ctx.decoded, len(centred)
        scales = torch.stack([2 * reconstruction, sparsity, 2 * auxiliary]) / num_rows
        is_free, has_auxiliary = terms.auxiliary == "free", terms.auxiliary != "none"
        learns_b_dec = ctx.part is None or ctx.part.is_first
        db_dec = scales[0] * decoded.error.sum(dim=0) * learns_b_dec
        if is_free:
            db_dec += scales[2] * decoded.gate_error.sum(dim=0) * learns_b_dec
        if ctx.settings.in_bfloat16:
            error, gate_error = decoded.error.bfloat16(), decoded.gate_error.bfloat16() if has_auxiliary else None
            decoded = replace(decoded, error=error, gate_error=error if gate_error is None else gate_error)
        found = kernels.gradients(
            ctx.entries, decoded, r_mag, ctx.norms, ctx.factor, centred, scales, has_auxiliary=has_auxiliary, is_free=is_free
        )
        db_dec -= encoder @ found.a
        of_magnitude = (None, None) if r_mag is None else (found.r_mag, found.b_mag)
        return None, None, None, found.encoder.T, found.gate_bias, *of_magnitude, found.W_dec, db_dec


def _whole(part: Part, own: "Decoded", centred: Tensor, *, has_auxiliary: bool) -> "Decoded":
    """What a part decoded of rows that were 0, with the errors of the whole dictionary."""
    decoded, gates_decoded = sum_parts(part, own.error, own.gate_error if has_auxiliary else None)
    assert decoded is not None
    error = decoded - centred
    gate_error = error if gates_decoded is None else gates_decoded - centred
    gate_squares = gate_error.square().sum() if has_auxiliary else torch.zeros_like(own.gate_squares)
    return replace(own, error=error, gate_error=gate_error, squares=error.square().sum(), gate_squares=gate_squares)


class _Number:
    """A number on its way to the host, behind what was queued before it and beside what is queued after."""

    def __init__(self, number: Int[Tensor, ""]) -> None:
        self._copied = None
        self._value = number
        if number.is_cuda:
            self._value = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._value.copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> int:
        """The number, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._value)
