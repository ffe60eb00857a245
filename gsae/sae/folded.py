"""SAEs as users get them. In: a trained SAE and its scale. Out: `FoldedSAE`, which reads the LLM's own activations, of any leading shape.

Every objective's SAE is a JumpReLU SAE, so one form serves them all: W_enc, b_enc, threshold, W_dec, b_dec.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gsae.sae.formats import fold_scale
from gsae.sae.objective import SAE
from gsae.sae.relu import ReluSAE

FOLDED_KEY = "folded"
"""In a description: true where the scale is in the weights already, so that they are used as they are."""


@dataclass(frozen=True, eq=False)
class JumpReluWeights:
    """The weights of f = pre * 1[pre > threshold] with pre = (x - b_dec) W_enc + b_enc."""

    W_enc: Float[Tensor, "d_model features"]
    b_enc: Float[Tensor, " features"]
    threshold: Float[Tensor, " features"]
    """At least 0, in the unit of the features."""
    W_dec: Float[Tensor, "features d_model"]
    b_dec: Float[Tensor, " d_model"]


@torch.no_grad()
def jumprelu_weights(sae: SAE) -> JumpReluWeights:
    """The same function as a JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435, section 2), exactly.

    For a gated SAE pi_gate > 0 <=> pi_mag > b_mag - exp(r_mag) b_gate, so
    W_enc = exp(r_mag) W_gate;  b_enc = b_mag;  threshold = max(0, b_mag - exp(r_mag) b_gate).
    """
    if isinstance(sae, ReluSAE):
        return JumpReluWeights(sae.W_enc.detach(), sae.b_enc.detach(), torch.zeros_like(sae.b_enc), sae.W_dec.detach(), sae.b_dec.detach())
    ratio = torch.exp(sae.r_mag)
    threshold = torch.relu(sae.b_mag - ratio * sae.b_gate)
    return JumpReluWeights(sae.W_gate * ratio, sae.b_mag.detach(), threshold, sae.W_dec.detach(), sae.b_dec.detach())


def folded(sae: SAE, description: Mapping[str, Any]) -> SAE:
    """A new SAE in float64 that reads raw activations.

    Args:
        sae: as a checkpoint or a published directory holds it.
        description: its description. With `"folded": true` the weights are used as they are; otherwise its `scale` is folded in
            (1 where there is none) and decoder rows get norm 1.
    """
    wide = copy.deepcopy(sae).to(torch.float64)
    return wide if description.get(FOLDED_KEY) else fold_scale(wide, float(description.get("scale", 1.0)))


def folded_description(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a description becomes when the scale is folded in: `scale` is 1, and what it was is `training_scale`."""
    if description.get(FOLDED_KEY):
        return dict(description)
    return {**description, "training_scale": description.get("scale", 1.0), "scale": 1.0, FOLDED_KEY: True}


class FoldedSAE(nn.Module):
    """A trained SAE for use on the LLM's own activations; the training scale is in the weights, decoder rows of trained SAEs have norm 1.

    pre   = (x - b_dec) W_enc + b_enc
    f     = pre * 1[pre > threshold]
    x_hat = f W_dec + b_dec

    x may have any leading shape and any float type. It computes in its own type: `encode` and `decode` give that type,
    `forward` gives the type of x, so that x_hat can stand in for x. The weights take no gradient until `requires_grad_(True)`;
    gradients to x pass in any case.

    Attributes:
        W_enc: (d_model, features), the encoder's directions, one a column.
        b_enc: (features).
        threshold: (features), at least 0: a feature is on where pre exceeds it.
        W_dec: (features, d_model), the features' directions, one a row.
        b_dec: (d_model).
        description: what is known of it: objective, site, layer, module, LLM, lambda, which rows were masked, results.
    """

    def __init__(self, weights: JumpReluWeights, description: dict[str, Any]) -> None:
        super().__init__()
        # A trained SAE's encoder is stored by feature; safetensors saves contiguous tensors only.
        self.W_enc = nn.Parameter(weights.W_enc.contiguous())
        self.b_enc = nn.Parameter(weights.b_enc)
        self.threshold = nn.Parameter(weights.threshold)
        self.W_dec = nn.Parameter(weights.W_dec.contiguous())
        self.b_dec = nn.Parameter(weights.b_dec)
        self.description = description
        self.requires_grad_(False)

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.W_dec.shape[1]

    @property
    def num_features(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def encode(self, x: Float[Tensor, "... d_model"], *, sparse: bool = False) -> Float[Tensor, "... features"]:
        """Features of each activation.

        Args:
            x: activations as the LLM has them.
            sparse: give a coalesced sparse COO tensor of the same shape that holds the active features only: `indices()` has a row
                for each leading axis and one for the feature, `values()` the features, sorted by position.

        Raises:
            ValueError: the last axis of x is not d_model.
        """
        if x.shape[-1:] != (self.d_model,):
            raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be d_model, {self.d_model}")
        pre = F.linear(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc.T, self.b_enc)
        is_on = pre > self.threshold
        if not sparse:
            return torch.where(is_on, pre, 0.0)
        places = is_on.nonzero(as_tuple=True)
        return torch.sparse_coo_tensor(torch.stack(places), pre[places], pre.shape, is_coalesced=True, check_invariants=False)

    def decode(self, f: Float[Tensor, "... features"]) -> Float[Tensor, "... d_model"]:
        """The reconstruction x_hat of dense or sparse features (COO with any leading shape, or CSR of rows).

        Raises:
            ValueError: the last axis of f is not the number of features.
        """
        if f.shape[-1:] != (self.num_features,):
            raise ValueError(f"f has shape {tuple(f.shape)}; its last axis must be the number of features, {self.num_features}")
        if f.layout == torch.strided:
            return f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec
        return self._decode_sparse(f.to_sparse().coalesce())

    def _decode_sparse(self, f: Tensor) -> Tensor:
        """Sums, for each row, the directions of its active features; costs (active features) x d_model."""
        *leading, features = f.indices()
        num_rows = f.shape[:-1].numel()
        rows = torch.zeros_like(features)
        for size, index in zip(f.shape, leading, strict=False):
            rows = rows * size + index
        starts = torch.bincount(rows, minlength=num_rows).cumsum(0).roll(1)
        starts[:1] = 0
        summed = F.embedding_bag(features, self.W_dec, starts, mode="sum", per_sample_weights=f.values().to(self.W_dec.dtype))
        return summed.view(*f.shape[:-1], self.d_model) + self.b_dec

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The reconstruction x_hat of each activation, in x's own type."""
        return self.decode(self.encode(x)).to(x.dtype)

    def extra_repr(self) -> str:
        """What the repr shows between the brackets."""
        llm = (self.description.get("llm") or {}).get("name")
        place = [text for text in (self.description.get("site"), llm) if text]
        kind = self.description.get("objective")
        words = [" of ".join(place)] if place else []
        words += [str(kind)] if kind else []
        return ", ".join([*words, f"d_model={self.d_model}", f"num_features={self.num_features}", f"dtype={self.W_dec.dtype}"])
