"""The plain sparse autoencoder, the baseline. In: rows of scaled activations. Out: features, and their reconstruction."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ReluSAE(nn.Module):
    """Sparse autoencoder with a ReLU encoder (Bricken et al. 2023).

    f     = relu((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec
    """

    FEATURE_AXIS: ClassVar[Mapping[str, int]] = MappingProxyType({"W_enc": 1, "b_enc": 0, "W_dec": 0})
    """The axis along which a parameter has one slice a feature; b_dec has none."""

    def __init__(self, d_model: int, num_features: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_model, num_features, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(num_features, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(num_features, d_model, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_model, dtype=dtype))

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.W_dec.shape[1]

    @property
    def num_features(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def encoder(self) -> Float[Tensor, "d_model features"]:
        """The encoder's directions, one a column."""
        return self.W_enc

    def encode(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows features"]:
        """Features of each row.

        b_dec is subtracted after the product, as a vector: autograd then needs no rows x d_model x features product for it.
        """
        return torch.relu(torch.addmm(self.b_enc - self.b_dec @ self.W_enc, x, self.W_enc))

    def decode(self, f: Float[Tensor, "rows features"]) -> Float[Tensor, "rows d_model"]:
        """The reconstruction x_hat."""
        return torch.addmm(self.b_dec, f, self.W_dec)

    def forward(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """The reconstruction x_hat of each row."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def replace_features(
        self,
        features: Int[Tensor, " new"],
        encoder: Float[Tensor, "new d_model"],
        directions: Float[Tensor, "new d_model"],
        gate_bias: Float[Tensor, " new"],
    ) -> None:
        """Give `features` new encoder directions, decoder rows and thresholds."""
        self.W_enc[:, features] = encoder.T
        self.W_dec[features] = directions
        self.b_enc[features] = gate_bias
