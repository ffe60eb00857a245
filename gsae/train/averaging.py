"""The exponential moving average of a run's weights. In: the weights after each update. Out: the SAE that a checkpoint is of.

After update t, the first number 0,
    w_avg <- d_t w_avg + (1 - d_t) w      d_t = min(decay, t / (t + 9))
so the first update's weights are taken over whole, and until d_t reaches the decay about the last tenth of the updates counts: an
average with the full decay from the start would be of initial values. Every rank computes the same from the same weights.
"""

import copy
from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gsae.sae.formats import fold_scale
from gsae.sae.objective import SAE


class WeightAverage:
    """The average of the weights of one SAE."""

    def __init__(self, sae: SAE, decay: float, *, unit_norm: bool) -> None:
        """Start before the first update.

        Args:
            sae: the SAE in training.
            decay: the largest share of itself that the average keeps at an update.
            unit_norm: whether the decoder rows of the SAE are kept at norm 1.
        """
        self.decay = decay
        self._unit_norm = unit_norm
        self._sae = copy.deepcopy(sae).requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """d_t of an update; the first is number 0."""
        return min(self.decay, step / (step + 9))

    def update(self, sae: SAE, step: int) -> None:
        """Take in the weights after an update; the first is number 0."""
        average, weights = list(self._sae.parameters()), [parameter.detach() for parameter in sae.parameters()]
        get_ema_multi_avg_fn(self.decay_at(step))(average, weights, step)  # type: ignore[no-untyped-call]

    def take_over(self, sae: SAE, features: Int[Tensor, " features"]) -> None:
        """Start anew for `features`, which were resampled: an average of a dead direction and a new one is neither."""
        for name, axis in sae.FEATURE_AXIS.items():
            self._sae.get_parameter(name).movedim(axis, 0)[features] = sae.get_parameter(name).detach().movedim(axis, 0)[features]

    def to_sae(self) -> SAE:
        """A new SAE, the function of the averaged weights.

        The average of unit vectors is shorter than 1: what its decoder row lacks goes into the encoder, so that the row has norm 1 again
        and f times the row is what it was.
        """
        return fold_scale(self._sae, 1.0) if self._unit_norm else copy.deepcopy(self._sae)

    def state_tensors(self) -> dict[str, Tensor]:
        """The averaged parameters by name; the tensors themselves, not copies."""
        return dict(self._sae.named_parameters())

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, from any device."""
        for name, own in self.state_tensors().items():
            own.copy_(tensors[name])
