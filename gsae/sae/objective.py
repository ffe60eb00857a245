"""Training objectives. In: an SAE and rows of scaled activations. Out: each loss term apart, and what the rows did to the features.

Dense reference: sums over d_model and features, means over rows. A gated step costs seven rows x d_model x features products:
one encode, two decodes, and in the backward pass two to the features, one to W_dec, one to W_gate. sparse.py computes the same
from the features that are on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.config import ObjectiveName
from gsae.sae.gated import GatedSAE
from gsae.sae.products import affine
from gsae.sae.relu import ReluSAE

SAE = ReluSAE | GatedSAE

SAE_CLASS: dict[ObjectiveName, type[ReluSAE] | type[GatedSAE]] = {
    "relu": ReluSAE,
    "gated": GatedSAE,
    "gated-no-aux": GatedSAE,
    "gated-norm-weighted": GatedSAE,
}
"""The model that an objective trains."""

UNIT_NORM: frozenset[ObjectiveName] = frozenset({"relu", "gated", "gated-no-aux"})
"""Objectives whose decoder rows are kept at norm 1."""


@dataclass(frozen=True, eq=False)
class Losses:
    """The terms of the loss, each a mean over rows."""

    reconstruction: Float[Tensor, ""]
    """Squared distance of x_hat from x."""
    sparsity: Float[Tensor, ""]
    """The penalty, before lambda."""
    auxiliary: Float[Tensor, ""]
    """Squared distance from x of the reconstruction by the gates alone; 0 where the objective has none."""

    def total(self, lambda_: float) -> Float[Tensor, ""]:
        """L = reconstruction + lambda * sparsity + auxiliary."""
        return self.reconstruction + lambda_ * self.sparsity + self.auxiliary


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass. Only the losses carry gradients."""

    losses: Losses
    x_hat: Float[Tensor, "rows d_model"]
    """Reconstructions."""
    fired: Int[Tensor, " features"]
    """Rows at which each feature is on, f > 0."""
    opened: Int[Tensor, " features"]
    """Rows at which each gate is open, pi_gate > 0; for `relu`, the same as `fired`."""


Objective = Callable[[Any, Tensor], Forward]
"""A function of an SAE (of the class that SAE_CLASS names) and rows (rows d_model)."""


def objective(name: ObjectiveName) -> Objective:
    """The forward pass that computes the losses of the objective `name`."""
    return _OBJECTIVES[name]


def build(name: ObjectiveName, d_model: int, num_features: int, seed: int, dtype: torch.dtype = torch.float32) -> SAE:
    """An SAE at its initial values: random unit decoder rows, the encoder their transpose, all biases and r_mag 0.

    The directions are drawn in float32 whatever `dtype` is. b_dec is the caller's to set.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_features, d_model, generator=generator).to(dtype)
    directions = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    sae = SAE_CLASS[name](d_model, num_features, dtype)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.encoder.copy_(directions.T)
    return sae


def relu(sae: ReluSAE, x: Float[Tensor, "rows d_model"]) -> Forward:
    """L = |x - x_hat|^2 + lambda |f|_1."""
    f = sae.encode(x)
    x_hat = sae.decode(f)
    losses = Losses(_squared_error(x_hat, x), _l1(f), x.new_zeros(()))
    fired = _rows_above_zero(f)
    return Forward(losses, x_hat.detach(), fired, fired)


def gated(sae: GatedSAE, x: Float[Tensor, "rows d_model"]) -> Forward:
    """L = |x - x_hat|^2 + lambda |relu(pi_gate)|_1 + |x - (relu(pi_gate) sg(W_dec) + sg(b_dec))|^2 (eq. 8), sg the stop-gradient.

    b_dec still learns from every term through the encoder.
    """
    pre = sae.pre_activations(x)
    open_gates = torch.relu(pre.pi_gate)
    auxiliary = _squared_error(affine(sae.b_dec.detach(), open_gates, sae.W_dec.detach()), x)
    return _forward(sae, x, pre.pi_gate, sae.features(pre), _l1(open_gates), auxiliary)


def gated_no_aux(sae: GatedSAE, x: Float[Tensor, "rows d_model"]) -> Forward:
    """L = |x - x_hat|^2 + lambda |relu(pi_gate)|_1: the paper's L_incorrect, in which gates learn only to close."""
    pre = sae.pre_activations(x)
    return _forward(sae, x, pre.pi_gate, sae.features(pre), _l1(torch.relu(pre.pi_gate)), x.new_zeros(()))


def gated_norm_weighted(sae: GatedSAE, x: Float[Tensor, "rows d_model"]) -> Forward:
    """L = |x - x_hat|^2 + lambda sum_i relu(pi_gate_i) |W_dec_i| + |x - (relu(pi_gate) W_dec + b_dec)|^2.

    The variant of SAELens and of the JumpReLU paper's baseline (Rajamanoharan et al. 2024, arXiv 2407.14435): free decoder norms,
    which the penalty weighs, and a decoder that learns from the auxiliary term too.
    """
    pre = sae.pre_activations(x)
    open_gates = torch.relu(pre.pi_gate)
    sparsity = (open_gates @ torch.linalg.vector_norm(sae.W_dec, dim=1)).mean()
    return _forward(sae, x, pre.pi_gate, sae.features(pre), sparsity, _squared_error(sae.decode(open_gates), x))


def _forward(sae: GatedSAE, x: Tensor, pi_gate: Tensor, f: Tensor, sparsity: Tensor, auxiliary: Tensor) -> Forward:
    x_hat = sae.decode(f)
    losses = Losses(_squared_error(x_hat, x), sparsity, auxiliary)
    return Forward(losses, x_hat.detach(), _rows_above_zero(f), _rows_above_zero(pi_gate))


def _squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean over rows of |x_hat - x|^2."""
    return (x_hat - x).square().sum(dim=1).mean()


def _l1(f: Tensor) -> Tensor:
    """Mean over rows of the sum of features, which are at least 0."""
    return f.sum(dim=1).mean()


def _rows_above_zero(values: Tensor) -> Tensor:
    """Rows at which each feature's value is positive."""
    return (values.detach() > 0).sum(dim=0)


_OBJECTIVES: dict[ObjectiveName, Objective] = {
    "relu": relu,
    "gated": gated,
    "gated-no-aux": gated_no_aux,
    "gated-norm-weighted": gated_norm_weighted,
}
