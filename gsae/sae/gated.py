"""The gated sparse autoencoder. In: rows of scaled activations. Out: features, and their reconstruction."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsae.sae.dictionary import Dictionary, encoder_weight
from gsae.sae.products import centred_affine


@dataclass(frozen=True, eq=False)
class PreActivations:
    """What stands before the step and the ReLU of the encoder."""

    pi_gate: Float[Tensor, "rows features"]
    """A feature is on where this is positive."""
    pi_mag: Float[Tensor, "rows features"]
    """How strongly, where it is on."""


class GatedSAE(Dictionary):
    """Gated sparse autoencoder with tied gate and magnitude weights (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 6 and 7).

    a       = (x - b_dec) W_gate
    pi_gate = a + b_gate
    pi_mag  = exp(r_mag) * a + b_mag
    f       = 1[pi_gate > 0] * relu(pi_mag)
    x_hat   = f W_dec + b_dec
    """

    FEATURE_AXIS: ClassVar[Mapping[str, int]] = MappingProxyType({"W_gate": 1, "r_mag": 0, "b_mag": 0, "b_gate": 0, "W_dec": 0})

    def __init__(self, d_model: int, num_features: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(d_model, num_features, dtype)
        self.W_gate = encoder_weight(d_model, num_features, dtype)
        self.r_mag = nn.Parameter(torch.zeros(num_features, dtype=dtype))
        self.b_mag = nn.Parameter(torch.zeros(num_features, dtype=dtype))
        self.b_gate = nn.Parameter(torch.zeros(num_features, dtype=dtype))

    @property
    def encoder(self) -> Float[Tensor, "d_model features"]:
        """The encoder's directions, one a column."""
        return self.W_gate

    @property
    def gate_bias(self) -> Float[Tensor, " features"]:
        """b_gate."""
        return self.b_gate

    def pre_activations(self, x: Float[Tensor, "rows d_model"]) -> PreActivations:
        """Gate and magnitude before their nonlinearities, from one product."""
        a = centred_affine(None, x, self.b_dec, self.W_gate)
        return PreActivations(a + self.b_gate, torch.exp(self.r_mag) * a + self.b_mag)

    def features(self, pre: PreActivations) -> Float[Tensor, "rows features"]:
        """The features f; no gradient passes through the step."""
        return torch.where(pre.pi_gate > 0, torch.relu(pre.pi_mag), 0.0)

    def encode(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows features"]:
        """Features of each row."""
        return self.features(self.pre_activations(x))

    @torch.no_grad()
    def replace_features(
        self,
        features: Int[Tensor, " new"],
        encoder: Float[Tensor, "new d_model"],
        directions: Float[Tensor, "new d_model"],
        gate_bias: Float[Tensor, " new"],
    ) -> None:
        """Give `features` new encoder directions, decoder rows and gate biases; their magnitudes start from exp(0) and 0."""
        super().replace_features(features, encoder, directions, gate_bias)
        self.r_mag[features] = 0
        self.b_mag[features] = 0
