"""One update of one run. In: rows, an SAE, its optimizer. Out: changed weights, and what the step measured.

A run takes the dense step while many gates are open and the sparse one afterwards; both give the same losses and gradients.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsae.config import ObjectiveName, ProductsName
from gsae.sae.dense_on_kernels import dense_kernel_objective
from gsae.sae.objective import SAE, Losses, objective
from gsae.sae.on_kernels import why_not
from gsae.sae.pre_activation import pre_activation_loss
from gsae.sae.products import rounded_factors
from gsae.sae.sparse import sparse_objective
from gsae.sae.sparse_on_kernels import sparse_kernel_objective
from gsae.train.optim import GradientReport, SAEOptimizer, why_not_on_kernels
from gsae.world import without_sum

HYSTERESIS = 1.25
"""A run returns to the dense step at so many times the density at which it left it."""
DENSITY_ON_KERNELS: dict[ProductsName, float] = {"float32": 0.04, "tf32": 0.006, "bfloat16": 0.006}
"""The density above which the dense step has the advantage on a GPU, where matrices multiply so much faster than memory is read: six
products of 2 rows d_model features operations, against five vectors of d_model to read an entry. Of an H200's 67 TFLOP/s in float32,
about 400 in TF32, 790 in bfloat16, and 4.3 TB/s; not measured on a GPU yet."""


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a forward pass gives; only `total` carries a gradient."""

    total: Float[Tensor, ""]
    losses: Losses
    """Means over the rows."""
    pre_activation: Float[Tensor, ""]
    """The pre-activation loss of dead features, before its weight."""
    fired: Int[Tensor, " features"]
    """Rows at which each feature was on."""
    opened: Int[Tensor, " features"]
    """Rows at which each gate was open."""


@dataclass(frozen=True, eq=False)
class StepReport:
    """What an update of the local batch did and measured, left on the device."""

    num_rows: int
    """Rows of this rank."""
    measures: Float[Tensor, "4"]
    """Reconstruction, sparsity, auxiliary and pre-activation loss, means over this rank's rows, in float64."""
    fired: Int[Tensor, " features"]
    opened: Int[Tensor, " features"]
    gradient: GradientReport


class TrainingModule(nn.Module):
    """An SAE with its loss inside `forward`, so that DDP sees the whole step."""

    def __init__(
        self,
        sae: SAE,
        objective_name: ObjectiveName,
        pre_activation_weight: float = 0.0,
        products: ProductsName = "float32",
        *,
        kernels: bool = True,
    ) -> None:
        """Make the module.

        Args:
            sae: the SAE, on its device.
            objective_name: what it is trained by.
            pre_activation_weight: weight of the pre-activation loss of dead features, in multiples of lambda.
            products: the factors of the dense step's products; `bfloat16` has the sparse step propose entries by such, and on kernels
                rounds its factors too.
            kernels: whether kernels make the steps, where they can.
        """
        super().__init__()
        self.sae = sae
        self.is_sparse = False
        """Whether `forward` takes the sparse step."""
        self.dead = torch.zeros(0, dtype=torch.int64, device=sae.b_dec.device)
        """The features that the pre-activation loss counts as dead."""
        self._products, weight = products, sae.W_dec
        self.why_no_kernels: str | None = "train.kernels is false"
        """Why kernels do not make the steps; None where they do."""
        if kernels:
            self.why_no_kernels = why_not(objective_name, weight.device, weight.dtype, weight.shape[1], products) or why_not_on_kernels(
                weight.device, weight.shape[1]
            )
        in_bfloat16 = products == "bfloat16"
        if self.why_no_kernels is None:
            self._dense = dense_kernel_objective(objective_name, products)
            self._sparse = sparse_kernel_objective(objective_name, in_bfloat16=in_bfloat16)
        else:
            self._dense, self._sparse = objective(objective_name), sparse_objective(objective_name, in_bfloat16=in_bfloat16 or None)
        self._pre_activation_weight = pre_activation_weight

    def forward(self, x: Float[Tensor, "rows d_model"], lambda_: float) -> StepOutput:
        """The loss on scaled rows: L + weight lambda L_pre_activation."""
        with rounded_factors(self._products):
            result = (self._sparse if self.is_sparse else self._dense)(self.sae, x)
            total, pre_activation = result.losses.total(lambda_), x.new_zeros(())
            if self._pre_activation_weight and len(self.dead):
                pre_activation = pre_activation_loss(self.sae, x, self.dead)
                total = total + self._pre_activation_weight * lambda_ * pre_activation
        return StepOutput(total, result.losses, pre_activation, result.fired, result.opened)

    def choose(self, density: float, sparse_below_density: float) -> None:
        """Take the sparse step from now on where the density, the share of gates that are open, is low, the dense one where it is high."""
        if self.why_no_kernels is None:
            sparse_below_density = min(sparse_below_density, DENSITY_ON_KERNELS[self._products])
        self.is_sparse = density < sparse_below_density * (HYSTERESIS if self.is_sparse else 1)


def update(
    module: nn.Module,
    optimizer: SAEOptimizer,
    x: Float[Tensor, "rows d_model"],
    *,
    lambda_: float,
    learning_rate: float,
    micro_batch_rows: int | None,
) -> StepReport:
    """Forward, backward, clip, update.

    Only the sparse step waits for the device, for the number of active entries; on kernels the device has work meanwhile.

    Args:
        module: a TrainingModule under DDP.
        optimizer: the optimizer of its SAE.
        x: this rank's rows, scaled.
        lambda_: the sparsity coefficient.
        learning_rate: the step size.
        micro_batch_rows: rows to have in memory as rows x features at once; their gradients add up to the batch's. None takes all.
    """
    optimizer.zero_grad()
    micro_batches = torch.split(x, micro_batch_rows or len(x))
    measures = torch.zeros(4, dtype=torch.float64, device=x.device)
    fired = opened = None
    for number, rows in enumerate(micro_batches, start=1):
        share = len(rows) / len(x)
        with nullcontext() if number == len(micro_batches) else without_sum(module):
            output: StepOutput = module(rows, lambda_)
            torch.autograd.backward(output.total * share)
        losses = (output.losses.reconstruction, output.losses.sparsity, output.losses.auxiliary, output.pre_activation)
        measures += share * torch.stack([loss.detach().double() for loss in losses])
        fired = output.fired if fired is None else fired + output.fired
        opened = output.opened if opened is None else opened + output.opened
    assert fired is not None
    assert opened is not None
    return StepReport(len(x), measures, fired, opened, optimizer.step(learning_rate))
