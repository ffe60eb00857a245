"""One run's optimizer. In: an SAE with gradients. Out: updated weights, the gradient's norm, and tensors to resume from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gsae.sae.objective import SAE, build
from gsae.sae.on_kernels import shortened


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
    without waiting for the device. On several ranks the gradients are the same, so the updates are. With `on_kernels` the two large
    weights are updated by Triton's kernels (kernels.py), to the last rounding alike. Of an SAE that is a part of a dictionary a step is
    a collective: b_dec's gradient is summed over the parts, and |G| is that of the whole.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        betas: tuple[float, float],
        eps: float,
        unit_norm: bool,
        clip_gradient_norm: float | None = None,
        on_kernels: bool = False,
    ) -> None:
        self._sae = sae
        self._unit_norm = unit_norm
        self._clip_gradient_norm = clip_gradient_norm
        self._on_kernels = [sae.encoder, sae.W_dec] if on_kernels else []
        rest = [parameter for parameter in sae.parameters() if all(parameter is not large for large in self._on_kernels)]
        self._adam = torch.optim.Adam(rest, betas=betas, eps=eps, fused=True)
        for parameter in sae.parameters():
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, learning_rate: float) -> GradientReport:
        """Make one update from the gradients that backward left; projection and clipping may change them in place."""
        self._sum_bias_gradient()
        large = [_Large(weight, is_unit=self._unit_norm and weight is self._sae.W_dec) for weight in self._on_kernels]
        if self._unit_norm and not large:
            self._project_gradient()
        gradients = [parameter.grad for parameter in self._adam.param_groups[0]["params"] if parameter.grad is not None]
        norm = self._norm(gradients, [weight.squares for weight in large])
        is_finite = torch.isfinite(norm)
        factor = torch.ones_like(norm) if self._clip_gradient_norm is None else (self._clip_gradient_norm / norm).clamp(max=1.0)
        if self._clip_gradient_norm is not None:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        # What torch.amp.GradScaler sets: the fused kernel skips the update, and its step count, where the flag is 1.
        self._adam.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        for weight in large:
            settings = self._adam.param_groups[0]
            weight.move(self._adam.state[weight.parameter], is_finite, factor, learning_rate, settings["betas"], settings["eps"])
        if self._unit_norm and not large:
            norms = torch.linalg.vector_norm(self._sae.W_dec, dim=1, keepdim=True)
            self._sae.W_dec.div_(torch.where(is_finite, norms, torch.ones_like(norms)))
        return GradientReport(norm, is_finite)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._sae.zero_grad(set_to_none=True)

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

        Of a part of a dictionary a collective; the mean is over the whole.

        With exp_avg_sq 0 and an old step count the first update would be up to 1 / sqrt(1 - beta2) = 31.6 times the learning rate.
        """
        num_alive = self._over_parts(alive.sum())
        source, count = (alive, num_alive) if bool(num_alive) else (torch.ones_like(alive), self._sae.total_features)
        for name, axis in self._sae.FEATURE_AXIS.items():
            state = self._adam.state[self._sae.get_parameter(name)]
            state["exp_avg"].movedim(axis, 0)[features] = 0
            by_feature = state["exp_avg_sq"].movedim(axis, 0)
            by_feature[features] = self._over_parts(by_feature[source].sum(dim=0)) / count

    def _sum_bias_gradient(self) -> None:
        """b_dec's gradient, of which each part has a summand."""
        bias = self._sae.b_dec
        if self._sae.part is not None and bias.grad is not None:
            bias.grad = self._over_parts(bias.grad)

    def _norm(self, gradients: list[Tensor], squares: list[Tensor]) -> Tensor:
        """The norm over the gradients of the whole dictionary, some of which gave squares of parts already. b_dec counts once."""
        bias = self._sae.b_dec.grad
        if self._sae.part is None or bias is None:
            return _squares(gradients, squares).sqrt()
        of_features = _squares([gradient for gradient in gradients if gradient is not bias], squares)
        return (self._over_parts(of_features) + _squares([bias], [])).sqrt()

    def _over_parts(self, value: Tensor) -> Tensor:
        """The sum over the parts of the dictionary."""
        part = self._sae.part
        return value if part is None else part.reduce(value)

    def _project_gradient(self) -> None:
        """Remove from each decoder row's gradient the component along the row, which renormalising would undo."""
        directions, gradient = self._sae.W_dec, self._sae.W_dec.grad
        assert gradient is not None
        gradient.addcmul_(torch.linalg.vecdot(gradient, directions)[:, None], directions, value=-1)


@cache
def why_not_on_kernels(device: torch.device, d_model: int) -> str | None:
    """What kernels get wrong in an update of a small SAE on a device, if anything, or how they fail; the first call compiles them."""
    saes, norms = [], []
    for on_kernels in (False, True):
        sae = build("gated", d_model, 8, seed=0).to(device)
        optimizer = SAEOptimizer(sae, betas=(0.9, 0.999), eps=1e-8, unit_norm=True, clip_gradient_norm=1.0, on_kernels=on_kernels)
        for parameter in sae.parameters():
            parameter.grad = parameter.detach().cos()
        try:
            norms.append(float(optimizer.step(1e-2).norm))
        except Exception as error:  # whatever a compiler or a driver raises
            return f"those of the update fail on this device ({shortened(error)})"
        saes.append(sae)
    pairs = zip(*(sae.parameters() for sae in saes), strict=True)
    is_near = all(torch.allclose(plain, found, rtol=1e-4, atol=1e-5) for plain, found in pairs) and abs(norms[1] / norms[0] - 1) < 1e-4
    return None if is_near else "their update is wrong on this device"


class _Large:
    """The update of a weight with one vector a feature, on kernels."""

    def __init__(self, parameter: Tensor, *, is_unit: bool) -> None:
        assert parameter.grad is not None
        self.parameter = parameter
        self._weight, self._gradient = (_by_feature(tensor) for tensor in (parameter.detach(), parameter.grad))
        self.squares, dots = kernels().measure(self._gradient, self._weight if is_unit else None)
        """Of each feature's gradient."""
        self._dots = dots if is_unit else None

    def move(
        self, state: dict[str, Tensor], is_finite: Tensor, factor: Tensor, learning_rate: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Make the update, unless the gradient is not finite."""
        state["step"] += is_finite
        corrections = [1 - torch.pow(beta, state["step"].double()) for beta in betas]
        scalars = torch.stack([is_finite.double(), factor, learning_rate / corrections[0], corrections[1].sqrt()]).float()
        moments = (_by_feature(state["exp_avg"]), _by_feature(state["exp_avg_sq"]))
        kernels().move(self._weight, self._gradient, moments, self._dots, scalars, betas, eps)


def kernels() -> ModuleType:
    """Triton's kernels of the update, which only a GPU needs."""
    return import_module("gsae.train.kernels")


def _by_feature(matrix: Tensor) -> Tensor:
    """A weight, or what is laid out like one, with one contiguous vector a feature."""
    found = matrix if matrix.stride(1) == 1 else matrix.T
    assert found.is_contiguous()
    return found


def _squares(tensors: list[Tensor], squares: list[Tensor]) -> Tensor:
    """The sum of the squares of all tensors, some of which gave those of their rows already.

    It is taken along the axis contiguous in memory in their own type, which is quick, then in float64.
    """
    norms = [torch.linalg.vector_norm(tensor, dim=tensor.stride().index(1)).flatten().double().square() for tensor in tensors]
    return torch.cat([*norms, *(part.double() for part in squares)]).sum()
