"""The AuxK term (Gao et al. 2024, arXiv 2406.04093, appendix A.2). In: an SAE, rows, dead features. Out: a loss that revives them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.sae.objective import SAE


def auxk_loss(
    sae: SAE, x: Float[Tensor, "rows d_model"], x_hat: Float[Tensor, "rows d_model"], dead: Int[Tensor, " dead"], num_features: int
) -> Float[Tensor, ""]:
    """L_auxk = |e - z W_dec|^2, the mean over rows, with e = x - x_hat and z the largest pre-activations pi_gate of dead features.

    A dead feature's gate is closed on every row, so z is taken before the ReLU: its sign does not stop the gradient. The encoder, the
    gate's bias and the decoder of dead features learn to explain the error; nothing else learns (e and b_dec are constants).
    Rows x dead features are in memory.

    Args:
        sae: the SAE; for `gated-*` pi_gate is the gate's pre-activation, for `relu` the only one.
        x: rows.
        x_hat: their reconstructions.
        dead: the dead features.
        num_features: dead features a row; all of them where there are fewer.
    """
    error = (x - x_hat).detach()
    pre = (x - sae.b_dec.detach()) @ sae.encoder[:, dead] + sae.gate_bias[dead]
    top = pre.topk(min(num_features, len(dead)), dim=1)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    return (z @ sae.W_dec[dead] - error).square().sum(dim=1).mean()
