"""The sparse step: an objective's losses and gradients from the active set alone. In: an SAE and rows. Out: what the dense reference gives.

One dense product finds the entries with pi_gate > 0; everything else costs as many multiplications as entries times d_model. It is
the faster step once few gates are open (docs/performance.md), and holds no rows x features tensor longer than to look at it.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from gsae.config import ObjectiveName
from gsae.sae.active import find_active
from gsae.sae.gated import GatedSAE
from gsae.sae.objective import SAE, Forward, Losses, Objective
from gsae.sae.part import Part
from gsae.sae.products import is_quick_at_bfloat16


@dataclass(frozen=True)
class Terms:
    """What sets an objective apart (objective.py has the formulas)."""

    has_magnitude: bool
    """Whether f has its own pre-activation; otherwise f = relu(pi_gate)."""
    auxiliary: Literal["none", "frozen", "free"]
    """The auxiliary term, and whether the decoder learns from it."""
    weighs_norms: bool
    """Whether the penalty is weighed by the norms of the decoder rows."""


TERMS: dict[ObjectiveName, Terms] = {
    "relu": Terms(has_magnitude=False, auxiliary="none", weighs_norms=False),
    "gated": Terms(has_magnitude=True, auxiliary="frozen", weighs_norms=False),
    "gated-no-aux": Terms(has_magnitude=True, auxiliary="none", weighs_norms=False),
    "gated-norm-weighted": Terms(has_magnitude=True, auxiliary="free", weighs_norms=True),
}


def sparse_objective(name: ObjectiveName, *, in_bfloat16: bool | None = None) -> Objective:
    """The sparse step of the objective `name`; same values and gradients as `objective(name)`, to the last rounding.

    Args:
        name: the objective.
        in_bfloat16: whether the dense product that proposes active entries is in bfloat16 (`find_active`); None: where the device
            is quick at it and the rows are float32.
    """

    def step(sae: SAE, x: Float[Tensor, "rows d_model"]) -> Forward:
        is_proposed = in_bfloat16 if in_bfloat16 is not None else x.dtype == torch.float32 and is_quick_at_bfloat16(x.device)
        return forward_by(_SparseStep, (TERMS[name], is_proposed), sae, x)

    return step


def forward_by(function: type[torch.autograd.Function], settings: tuple[Any, ...], sae: SAE, x: Float[Tensor, "rows d_model"]) -> Forward:
    """The forward pass that a function makes of its settings, the SAE's part, x, encoder, gate bias, r_mag, b_mag, W_dec and b_dec."""
    magnitude_parameters = (sae.r_mag, sae.b_mag) if isinstance(sae, GatedSAE) else (None, None)
    reconstruction, sparsity, auxiliary, x_hat, fired, opened = function.apply(  # type: ignore[no-untyped-call]
        *settings, sae.part, x, sae.encoder, sae.gate_bias, *magnitude_parameters, sae.W_dec, sae.b_dec
    )
    return Forward(Losses(reconstruction, sparsity, auxiliary), x_hat, fired, opened)


def sum_parts(part: Part | None, *decoded: Tensor | None) -> tuple[Tensor | None, ...]:
    """The sums over features of decodes that each rank has of its own part: all together, in one collective."""
    if part is None:
        return decoded
    given = [values for values in decoded if values is not None]
    summed = iter(part.reduce(torch.stack(given)))
    return tuple(None if values is None else next(summed) for values in decoded)


class _SparseStep(torch.autograd.Function):
    """Losses and gradients on the active set E of n rows.

    With the errors e = x_hat - x and e_g = relu(pi_gate) W_dec + b_dec - x

    df      = 2/n (e W_dec^T) on E, where f > 0          dg      = 1/n (lambda |W_dec row| or lambda) + 2/n (e_g W_dec^T) on E
    db_mag  = sum over rows of df                        db_gate = sum over rows of dg
    dr_mag  = sum over rows of df exp(r_mag) a           da      = df exp(r_mag) + dg
    dW_gate = (x - b_dec)^T da                           dW_dec  = 2/n f^T e
    db_dec  = 2/n (sum over rows of e) - W_gate (sum over rows of da)

    each term times its own upstream gradient. A free decoder also gets 2/n relu(pi_gate)^T e_g, 2/n (sum over rows of e_g) and, through
    the penalty, 1/n lambda (sum over rows of relu(pi_gate)) W_dec / |W_dec|. x gets no gradient.
    Where the features are split (part.py) a decode is the sum over the parts, and db_dec a summand of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        terms: Terms,
        in_bfloat16: bool,
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
        centred = x - b_dec
        active = find_active(centred, encoder, gate_bias, in_bfloat16=in_bfloat16)
        g = active.a + gate_bias[active.feature]
        f, ratio = g, None
        if r_mag is not None and b_mag is not None:
            ratio = torch.exp(r_mag)[active.feature]
            f = torch.relu(ratio * active.a + b_mag[active.feature])
        own_gates = None if terms.auxiliary == "none" else active.sums_over_features(g, W_dec)
        decoded, gates_decoded = sum_parts(part, active.sums_over_features(f, W_dec), own_gates)
        assert decoded is not None
        error = decoded - centred
        gate_error = None if gates_decoded is None else gates_decoded - centred
        norms = torch.linalg.vector_norm(W_dec, dim=1) if terms.weighs_norms else None
        opened = active.feature_counts()
        fired = opened if ratio is None else active.feature_counts(f > 0)
        ctx.terms, ctx.part, ctx.active, ctx.norms = terms, part, active, norms
        ctx.save_for_backward(centred, encoder, W_dec, f, g, ratio, error, gate_error)
        losses = (
            error.square().sum(dim=1).mean(),
            (g if norms is None else g * norms[active.feature]).sum() / len(x),
            x.new_zeros(()) if gate_error is None else gate_error.square().sum(dim=1).mean(),
        )
        x_hat = x + error
        ctx.mark_non_differentiable(x_hat, fired, opened)
        return *losses, x_hat, fired, opened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reconstruction: Tensor, sparsity: Tensor, auxiliary: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters, given those of the three losses."""
        centred, encoder, W_dec, f, g, ratio, error, gate_error = ctx.saved_tensors
        active, norms, num_rows = ctx.active, ctx.norms, len(centred)
        error = error * (2 / num_rows * reconstruction)
        penalty = sparsity / num_rows
        df = active.products(error, W_dec)
        dg = penalty.expand_as(g) if norms is None else penalty * norms[active.feature]
        learns_b_dec = ctx.part is None or ctx.part.is_first  # from the decode, whose b_dec counts once
        dW_dec, db_dec = active.sums_over_rows(f, error), error.sum(dim=0) * learns_b_dec
        if gate_error is not None:
            gate_error = gate_error * (2 / num_rows * auxiliary)
            dg = dg + active.products(gate_error, W_dec)
        if ctx.terms.auxiliary == "free":
            dW_dec += active.sums_over_rows(g, gate_error)
            db_dec += gate_error.sum(dim=0) * learns_b_dec
        if norms is not None:
            totals = torch.where(norms > 0, penalty * active.feature_totals(g) / norms, 0.0)
            dW_dec.addcmul_(totals[:, None], W_dec)
        dr_mag = db_mag = None
        if ratio is None:
            da = dg = dg + df
        else:
            df = torch.where(f > 0, df, 0.0)
            scaled = df * ratio
            da = scaled + dg
            dr_mag, db_mag = active.feature_totals(scaled * active.a), active.feature_totals(df)
        db_dec -= encoder @ active.feature_totals(da)
        return None, None, None, None, active.sums_over_rows(da, centred).T, active.feature_totals(dg), dr_mag, db_mag, dW_dec, db_dec
