"""How well an SAE reconstructs activations. In: an SAE and the rows of a batch. Out: x_hat, its error row by row, and the metrics.

Sums are float64; an SAE computes in its own weights' type, float32 unless it was trained otherwise.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gsae.evaluate.sums import RunSums, SiteSums, Values
from gsae.sae.gated import GatedSAE
from gsae.sae.objective import SAE

SLICE_ROWS = 2048
"""Rows encoded at once. It bounds the rows x features memory, and being fixed it does not change the numbers."""


@dataclass(frozen=True)
class Reconstruction:
    """One SAE on the rows of a batch."""

    x_hat: Float[Tensor, "rows d_model"]
    """In raw units."""
    l0: Int[Tensor, " rows"]
    """Features on."""
    firing_counts: Int[Tensor, " features"]
    """Kept rows on which each feature is on."""
    gates: Int[Tensor, "3"]
    """Of kept rows, (row, feature) pairs with the gate open, with a positive magnitude, and with both; 0 without gates."""


@dataclass(frozen=True)
class RowErrors:
    """x against x_hat, row by row, in float64."""

    squared_error: Float[Tensor, " rows"]
    """|x - x_hat|^2."""
    squared_x_hat: Float[Tensor, " rows"]
    """|x_hat|^2."""
    inner: Float[Tensor, " rows"]
    """x . x_hat."""
    cosine: Float[Tensor, " rows"]
    """x . x_hat / (|x| |x_hat|); 0 where either is zero."""


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Ratios of sums over kept rows. Fields are scalars, or have one value a bootstrap draw."""

    l0: Annotated[Values, "mean over kept rows of the number of features on (f > 0)"]
    fvu: Annotated[
        Values, "fraction of variance unexplained over kept rows: sum |x - x_hat|^2 / sum |x - mean|^2, mean being that of these same rows"
    ]
    fvu_dropped: Annotated[
        Values,
        "sum |x - x_hat|^2 / sum |x - mean|^2 over dropped rows (position 0, BOS, EOS, outliers), mean being that of the store's kept rows",
    ]
    mse: Annotated[Values, "mean over kept rows of |x - x_hat|^2, summed over d_model, in the LLM's own units"]
    mse_scaled: Annotated[Values, "mse of rows multiplied by the SAE's scale, the unit of the training loss"]
    cosine: Annotated[Values, "mean over kept rows of the cosine between x and x_hat, neither centred"]
    gamma: Annotated[Values, "relative reconstruction bias E|x_hat|^2 / E[x . x_hat] over kept rows, not centred; below 1 is shrinkage"]


@torch.no_grad()
def reconstruct(sae: SAE, x: Float[Tensor, "rows d_model"], scale: float, kept: Bool[Tensor, " rows"]) -> Reconstruction:
    """The rows through the SAE, whether kept or not: f = encode(scale x), x_hat = decode(f) / scale.

    Of a part of a dictionary a collective: x_hat and L0 are those of the whole, counts those of the part.
    """
    x_hat, l0 = [], []
    firing_counts = torch.zeros(sae.num_features, dtype=torch.int64, device=x.device)
    gates = firing_counts.new_zeros(3)
    for start in range(0, len(x), SLICE_ROWS):
        rows = slice(start, start + SLICE_ROWS)
        scaled = x[rows].to(sae.W_dec.dtype) * scale
        if isinstance(sae, GatedSAE):
            pre = sae.pre_activations(scaled)
            f = sae.features(pre)
            is_open, is_positive = pre.pi_gate[kept[rows]] > 0, pre.pi_mag[kept[rows]] > 0
            gates += torch.stack([is_open.sum(), is_positive.sum(), (is_open & is_positive).sum()])
        else:
            f = sae.encode(scaled)
        x_hat.append(sae.decode(f) / scale)
        is_on = f > 0
        own_l0 = is_on.sum(1)
        l0.append(own_l0 if sae.part is None else sae.part.reduce(own_l0))
        firing_counts += is_on[kept[rows]].sum(0)
    return Reconstruction(torch.cat(x_hat), torch.cat(l0), firing_counts, gates)


def row_errors(x: Float[Tensor, "rows d_model"], x_hat: Float[Tensor, "rows d_model"]) -> RowErrors:
    """Compare x_hat with x."""
    x, x_hat = x.double(), x_hat.double()
    inner = (x * x_hat).sum(-1)
    squared_x_hat = x_hat.square().sum(-1)
    norms = (x.square().sum(-1) * squared_x_hat).sqrt()
    return RowErrors((x - x_hat).square().sum(-1), squared_x_hat, inner, torch.where(norms > 0, inner / norms, 0.0))


def reconstruction_metrics(site: SiteSums, run: RunSums, scale: float) -> ReconstructionMetrics:
    """One division each. With m the mean of the rows at hand, sum |x - m|^2 = sum |x - c|^2 - |sum (x - c)|^2 / rows for any c."""
    variance = site.squared_distance - site.offset.square().sum(-1) / site.kept_rows
    mse = run.squared_error / site.kept_rows
    return ReconstructionMetrics(
        l0=run.l0 / site.kept_rows,
        fvu=run.squared_error / variance,
        fvu_dropped=run.squared_error_dropped / site.squared_distance_dropped,
        mse=mse,
        mse_scaled=mse * scale**2,
        cosine=run.cosine / site.kept_rows,
        gamma=run.squared_x_hat / run.inner,
    )
