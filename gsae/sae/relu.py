"""The plain sparse autoencoder, the baseline. In: rows of scaled activations. Out: features, and their reconstruction."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsae.sae.dictionary import Dictionary, encoder_weight
from gsae.sae.products import centred_affine


class ReluSAE(Dictionary):
    """Sparse autoencoder with a ReLU encoder (Bricken et al. 2023).

    f     = relu((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec
    """

    FEATURE_AXIS: ClassVar[Mapping[str, int]] = MappingProxyType({"W_enc": 1, "b_enc": 0, "W_dec": 0})

    def __init__(self, d_model: int, num_features: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(d_model, num_features, dtype)
        self.W_enc = encoder_weight(d_model, num_features, dtype)
        self.b_enc = nn.Parameter(torch.zeros(num_features, dtype=dtype))

    @property
    def encoder(self) -> Float[Tensor, "d_model features"]:
        """The encoder's directions, one a column."""
        return self.W_enc

    @property
    def gate_bias(self) -> Float[Tensor, " features"]:
        """b_enc."""
        return self.b_enc

    def encode(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows features"]:
        """Features of each row."""
        return torch.relu(centred_affine(self.b_enc, x, self.b_dec, self.W_enc))
