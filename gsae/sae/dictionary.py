"""What all SAEs share: the decoder, and how a feature gets new directions. In: features. Out: reconstructions."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsae.sae.part import Part
from gsae.sae.products import affine, product


class Dictionary(nn.Module):
    """Directions with a decoder; a subclass adds the encoder.

    x_hat = f W_dec + b_dec
    """

    FEATURE_AXIS: ClassVar[Mapping[str, int]]
    """The axis along which a parameter has one slice a feature; b_dec has none."""
    part: Part | None
    """Which features of a dictionary these are; None: all of them."""

    def __init__(self, d_model: int, num_features: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.part = None
        self.W_dec = nn.Parameter(torch.zeros(num_features, d_model, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_model, dtype=dtype))

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.W_dec.shape[1]

    @property
    def num_features(self) -> int:
        """Number of features, of a part those of the part."""
        return self.W_dec.shape[0]

    @property
    def total_features(self) -> int:
        """Number of features of the whole dictionary."""
        return self.num_features if self.part is None else self.part.total

    @property
    @abstractmethod
    def encoder(self) -> Float[Tensor, "d_model features"]:
        """The encoder's directions, one a column."""

    @property
    @abstractmethod
    def gate_bias(self) -> Float[Tensor, " features"]:
        """What is added to x - b_dec along the encoder's direction; a feature is on where the sum is positive."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows features"]:
        """Features of each row."""

    def decode(self, f: Float[Tensor, "rows features"], *, frozen: bool = False) -> Float[Tensor, "rows d_model"]:
        """The reconstruction x_hat. Of a part a collective: that of the whole dictionary.

        Args:
            f: features, of a part those of the part.
            frozen: whether gradients pass to f alone.
        """
        W_dec, b_dec = (self.W_dec.detach(), self.b_dec.detach()) if frozen else (self.W_dec, self.b_dec)
        if self.part is None:
            return affine(b_dec, f, W_dec)
        return self.part.sum(affine(b_dec, f, W_dec) if self.part.is_first else product(f, W_dec))

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
        """Give `features` new encoder directions, decoder rows and gate biases."""
        self.encoder[:, features] = encoder.T
        self.W_dec[features] = directions
        self.gate_bias[features] = gate_bias


def encoder_weight(d_model: int, num_features: int, dtype: torch.dtype) -> nn.Parameter:
    """Zeros (d_model features), a feature's direction contiguous in memory as W_dec's rows are: the sparse step gathers them by feature."""
    return nn.Parameter(torch.zeros(num_features, d_model, dtype=dtype).T)
