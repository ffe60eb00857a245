"""One run's optimizer. In: an SAE with gradients. Out: updated weights, the gradient's norm, and tensors to resume from."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gsae.sae.objective import SAE


@dataclass(frozen=True, eq=False)
class GradientReport:
    """What a step found, left on the device."""

    norm: Float[Tensor, ""]
    """Euclidean norm of the whole gradient, after the projection and before clipping, in float64."""
    is_finite: Bool[Tensor, ""]
    """Whether the update was made."""


class SAEOptimizer:
    """Adam over the parameters of an SAE, for the unit-norm objectives on the product of unit spheres of its decoder rows.

    A step is
        G    <- G - (G . w) w     for every decoder row w, |w| = 1, and its gradient G
        G    <- G min(1, clip / |G|)
        w    <- Adam(w, G)        unless |G| is not finite: then nothing changes, not even Adam's step count
        w    <- w / |w|
    without waiting for the device. On several ranks the gradients are the same, so the updates are.
    """

    def __init__(
        self, sae: SAE, *, betas: tuple[float, float], eps: float, unit_norm: bool, clip_gradient_norm: float | None = None
    ) -> None:
        self._sae = sae
        self._unit_norm = unit_norm
        self._clip_gradient_norm = clip_gradient_norm
        self._adam = torch.optim.Adam(sae.parameters(), betas=betas, eps=eps, fused=True)
        for parameter in sae.parameters():
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, learning_rate: float) -> GradientReport:
        """Make one update from the gradients that backward left; projection and clipping change them in place."""
        if self._unit_norm:
            self._project_gradient()
        gradients = [parameter.grad for parameter in self._sae.parameters() if parameter.grad is not None]
        norm = _norm(gradients)
        is_finite = torch.isfinite(norm)
        if self._clip_gradient_norm is not None:
            factor = (self._clip_gradient_norm / norm).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        # What torch.amp.GradScaler sets: the fused kernel skips the update, and its step count, where the flag is 1.
        self._adam.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        if self._unit_norm:
            norms = torch.linalg.vector_norm(self._sae.W_dec, dim=1, keepdim=True)
            self._sae.W_dec.div_(torch.where(is_finite, norms, torch.ones_like(norms)))
        return GradientReport(norm, is_finite)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Adam's state as `<parameter>.<step|exp_avg|exp_avg_sq>`; the tensors themselves, not copies."""
        return {
            f"{name}.{key}": value for name, parameter in self._sae.named_parameters() for key, value in self._adam.state[parameter].items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, from any device; other names in `tensors` are passed over."""
        for name, own in self.state_tensors().items():
            own.copy_(tensors[name])

    @torch.no_grad()
    def reset_slices(self, features: Int[Tensor, " resampled"], alive: Bool[Tensor, " features"]) -> None:
        """Fresh state for resampled features: exp_avg 0, exp_avg_sq the mean over alive features (over all, when none is alive).

        With exp_avg_sq 0 and an old step count the first update would be up to 1 / sqrt(1 - beta2) = 31.6 times the learning rate.
        """
        source = alive if bool(alive.any()) else torch.ones_like(alive)
        for name, axis in self._sae.FEATURE_AXIS.items():
            state = self._adam.state[self._sae.get_parameter(name)]
            state["exp_avg"].movedim(axis, 0)[features] = 0
            by_feature = state["exp_avg_sq"].movedim(axis, 0)
            by_feature[features] = by_feature[source].mean(dim=0)

    def _project_gradient(self) -> None:
        """Remove from each decoder row's gradient the component along the row, which renormalising would undo."""
        directions, gradient = self._sae.W_dec, self._sae.W_dec.grad
        assert gradient is not None
        gradient.addcmul_(torch.linalg.vecdot(gradient, directions)[:, None], directions, value=-1)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm over all tensors: along the axis contiguous in memory in their own type, which is quick, then in float64."""
    norms = torch.cat([torch.linalg.vector_norm(tensor, dim=tensor.stride().index(1)).flatten().double() for tensor in tensors])
    return norms.square().sum().sqrt()
