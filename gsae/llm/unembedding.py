"""What a direction in the residual stream says to the LM head. In: directions. Out: logits, by the direct path alone."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def direct_logits(model: "PreTrainedModel", directions: Float[Tensor, "directions d_model"]) -> Float[Tensor, "directions vocab_size"]:
    """The logits that each direction adds by the direct path: times the final norm's gain, through the LM head, less their mean.

    The layers above are left out, and so is the factor 1 / |x| of the final norm, which is the same for all tokens: order and ratios
    hold, units do not. The mean over the vocabulary, which softmax does not see, is taken off.
    """
    gain, head = model.get_parameter("model.norm.weight"), model.get_submodule("lm_head").get_parameter("weight")
    logits = (directions.to(torch.float32) * gain.to(torch.float32)) @ head.to(torch.float32).T
    return logits - logits.mean(1, keepdim=True)
