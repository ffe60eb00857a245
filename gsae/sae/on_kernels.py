"""Whether Triton's kernels make the steps on a device. In: a device and what is to be trained on it. Out: why not, if not."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from gsae.config import ObjectiveName, ProductsName
from gsae.sae.dense_on_kernels import dense_kernel_objective
from gsae.sae.objective import SAE, Objective, build
from gsae.sae.sparse import sparse_objective
from gsae.sae.sparse_on_kernels import sparse_kernel_objective

TOLERANCE: dict[ProductsName, float] = {"float32": 1e-4, "tf32": 0.01, "bfloat16": 0.02}
"""By how much a gradient may differ from the reference's, of its norm."""
_ROWS, _FEATURES = 16, 40


@cache
def why_not(name: ObjectiveName, device: torch.device, dtype: torch.dtype, d_model: int, products: ProductsName) -> str | None:
    """Why the kernels do not make an objective's steps on a device, if they do not.

    On a GPU the first call compiles them for these arguments and tries them on a small batch.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "they are for NVIDIA's GPUs"
    if dtype != torch.float32:
        return "they are for float32 weights"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 matrix products (compute capability 8.0 and newer have)"
    return why_wrong(name, device, d_model, products)


def why_wrong(name: ObjectiveName, device: torch.device, d_model: int, products: ProductsName) -> str | None:
    """What the kernels get wrong in a small batch, if anything: a gradient that differs from the reference's, or a failure to compile.

    The batch and the weights are numbers of bfloat16, so that rounding opens or closes no gate.
    """
    sae = build(name, d_model, _FEATURES, seed=0).bfloat16().float().to(device)
    with torch.no_grad():
        for own in sae.parameters():
            if own.shape == (_FEATURES,):  # biases and r_mag begin at 0
                own.copy_(torch.linspace(-0.25, 0.25, _FEATURES).bfloat16())
    x = torch.randn(_ROWS, d_model, generator=torch.Generator().manual_seed(1)).bfloat16().float().to(device)
    try:
        wanted = _gradients(sae, sparse_objective(name, in_bfloat16=False), x)
        for step in (sparse_kernel_objective(name, in_bfloat16=products == "bfloat16"), dense_kernel_objective(name, products)):
            found = _gradients(sae, step, x)
            for parameter, gradient in wanted.items():
                if not float((found[parameter] - gradient).norm()) <= TOLERANCE[products] * float(gradient.norm()):
                    return f"their gradient of {parameter} is wrong on this device"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"they fail on this device ({shortened(error)})"
    return None


def shortened(error: Exception) -> str:
    """The last line of what a compiler or a driver says, and what kind of error it is."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:200]}"


def _gradients(sae: SAE, step: Objective, x: Tensor) -> dict[str, Tensor]:
    parameters = dict(sae.named_parameters())
    found = torch.autograd.grad(step(sae, x).losses.total(0.3), list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
