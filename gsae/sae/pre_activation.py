"""The pre-activation loss, which revives dead features. In: an SAE, rows, dead features. Out: a loss that pulls at their closed gates."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.sae.objective import SAE
from gsae.sae.products import product


def pre_activation_loss(sae: SAE, x: Float[Tensor, "rows d_model"], dead: Int[Tensor, " dead"]) -> Float[Tensor, ""]:
    """L = |relu(-pi_gate)|_1 over dead features, the mean over rows: the sparsity penalty's mirror image.

    From Anthropic's update of January 2025 (there for JumpReLU), here for dead features alone. Its gradient at a closed gate is as large
    however far the gate is from opening. The encoder and the gate's bias of dead features learn; nothing else does (b_dec is a
    constant). Rows x dead features are in memory.

    Args:
        sae: the SAE; for `gated-*` pi_gate is the gate's pre-activation, for `relu` the only one.
        x: rows.
        dead: the dead features.
    """
    pi_gate = product(x - sae.b_dec.detach(), sae.encoder[:, dead]) + sae.gate_bias[dead]
    return torch.relu(-pi_gate).sum(dim=1).mean()
