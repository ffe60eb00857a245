"""Training objectives. In: an SAE and rows of scaled activations. Out: each loss term apart, and what the rows did to the features.

Dense reference: sums over d_model and features, means over rows. A gated step costs seven rows x d_model x features products:
one encode, two decodes, and in the backward pass two to the features, one to W_dec, one to W_gate. sparse.py computes the same
from the features that are on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.config import ObjectiveName
from gsae.sae.gated import GatedSAE
from gsae.sae.part import Part
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


DRAWN_FEATURES = 4096
"""Directions that are drawn at once; a multiple of 16."""


@dataclass(frozen=True, eq=False)
class Losses:
    """The terms of the loss, each a mean over rows. Of a part (part.py) the penalty is that of its features, the errors are of all."""

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


def build(
    name: ObjectiveName, d_model: int, num_features: int, seed: int, dtype: torch.dtype = torch.float32, part: Part | None = None
) -> SAE:
    """An SAE at its initial values: random unit decoder rows, the encoder their transpose, all biases and r_mag 0.

    The directions are drawn in float32 whatever `dtype` is. b_dec is the caller's to set.

    Args:
        name: what it is trained by.
        d_model: width of an activation.
        num_features: of the whole dictionary.
        seed: of the directions, which do not depend on how the dictionary is split.
        dtype: of the parameters.
        part: the features to make; None makes all.
    """
    features = range(num_features) if part is None else part.features
    sae = SAE_CLASS[name](d_model, len(features), dtype)
    sae.part = part
    with torch.no_grad():
        for start, drawn in _drawn(num_features, d_model, seed):
            low, high = max(start, features.start), min(start + len(drawn), features.stop)
            if low < high:
                own = drawn[low - start : high - start].to(dtype)
                directions = own / torch.linalg.vector_norm(own, dim=1, keepdim=True)
                sae.W_dec[low - features.start : high - features.start] = directions
                sae.encoder[:, low - features.start : high - features.start] = directions.T
    return sae


def _drawn(num_features: int, d_model: int, seed: int) -> Iterator[tuple[int, Float[Tensor, "some d_model"]]]:
    """What one draw of all directions gives, a slice after another, with the number of its first feature.

    torch makes normal numbers in groups of 16, and less than 16 in another way: a slice has a multiple of 16 rows, the last one more.
    """
    generator, start = torch.Generator().manual_seed(seed), 0
    while start < num_features:
        left = num_features - start
        count = left if left < 2 * DRAWN_FEATURES else DRAWN_FEATURES
        yield start, torch.randn(count, d_model, generator=generator)
        start += count


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
    auxiliary = _squared_error(sae.decode(open_gates, frozen=True), x)
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
