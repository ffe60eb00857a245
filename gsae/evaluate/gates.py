"""What gates and magnitudes of a gated SAE say of each other. In: counts over kept rows, weights. Out: the metrics."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from gsae.evaluate.density import FiringCounts
from gsae.sae.gated import GatedSAE
from gsae.sae.objective import SAE


@dataclass(frozen=True)
class GateMetrics:
    """None where the SAE has no gates."""

    gate_open_magnitude_zero_fraction: Annotated[
        float | None, "of the open gates of kept rows (pi_gate > 0), the share whose magnitude is zero (pi_mag <= 0): open, and yet not on"
    ]
    gate_magnitude_agreement: Annotated[
        float | None, "of the (row, feature) pairs where the gate is open or the magnitude positive, the share where both are; kept rows"
    ]
    encoder_decoder_cosine_mean: Annotated[
        float, "mean over features of the cosine between its encoder direction (W_gate; W_enc of a plain SAE) and its decoder row"
    ]
    encoder_decoder_cosine_p10: Annotated[float, "the cosine that a tenth of the features do not exceed, likewise"]


@torch.no_grad()
def gate_metrics(counts: FiringCounts, sae: SAE) -> GateMetrics:
    """From the counts over all ranks and features. Of a part of a dictionary a collective of its holders."""
    opened, positive, on = counts.gates.tolist()
    is_gated = isinstance(sae, GatedSAE)
    either = opened + positive - on
    cosines = encoder_decoder_cosines(sae)
    cosines = cosines if sae.part is None else sae.part.holders.gather(cosines)
    return GateMetrics(
        gate_open_magnitude_zero_fraction=(opened - on) / opened if is_gated and opened else None,
        gate_magnitude_agreement=on / either if is_gated and either else None,
        encoder_decoder_cosine_mean=cosines.mean().item(),
        encoder_decoder_cosine_p10=cosines.quantile(0.1).item(),
    )


def encoder_decoder_cosines(sae: SAE) -> Float[Tensor, " features"]:
    """Between each feature's encoder direction and its decoder row."""
    return torch.cosine_similarity(sae.encoder.T, sae.W_dec, dim=1).double()
