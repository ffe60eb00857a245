"""What training holds in memory. In: the runs of a site, the rows that a rank computes at once. Out: bytes, by what they are for."""

from collections.abc import Iterable

from gsae.config import TrainConfig
from gsae.plan.disk import NUMBER_BYTES, num_parameters
from gsae.train.plan import RunSpec

STATE_COPIES = 5
"""Weights, gradient, the buffer in which DDP sums it, and Adam's two moments."""
SNAPSHOT_COPIES = 3
"""Weights and Adam's two moments."""
FEATURE_TENSORS = {"relu": (3.75, 2.25), "gated": (9.0, 7.0)}
"""Tensors of rows x features that a dense step holds: at its peak, while it has no gradients yet, and beside them at its end."""
FEATURE_TENSORS_BFLOAT16 = {"relu": (4.0, 4.0), "gated": (10.0, 10.0)}
"""The same where products have bfloat16 factors, which are copies."""
ROW_VECTORS = 6
"""Vectors of d_model a row that a step on a part of the features holds: reconstructions on their way, and errors."""
COUNTER_BYTES = 3 * 8
"""Of a feature's firing counts."""


def state_bytes(train: TrainConfig, parameters: int) -> int:
    """Of runs that train together: what stays from step to step."""
    copies = STATE_COPIES + (train.ema_decay is not None)
    return copies * NUMBER_BYTES[train.dtype] * parameters


def step_bytes(train: TrainConfig, run: RunSpec, local_rows: int) -> int:
    """Of one run's dense step, beside what stays; runs step one after another.

    A run's old gradients are forgotten before its step, so their room is there until the backward pass has new ones.
    """
    tensors = FEATURE_TENSORS_BFLOAT16 if train.products == "bfloat16" else FEATURE_TENSORS
    before, beside = tensors["relu" if run.objective == "relu" else "gated"]
    rows, number = min(local_rows, train.micro_batch_rows or local_rows), NUMBER_BYTES[train.dtype]
    matrix = rows * run.num_features // train.feature_ranks
    # Of a dictionary that one rank holds these are nothing beside rows x features.
    vectors = 0 if train.feature_ranks == 1 else ROW_VECTORS * rows * run.d_model
    return round(number * (vectors + max(before * matrix - part_parameters(run, train.feature_ranks), beside * matrix)))


def part_parameters(run: RunSpec, feature_ranks: int) -> int:
    """Parameters of a run's SAE that each of the ranks holds that share its features; b_dec is on all of them."""
    return (num_parameters(run) - run.d_model) // feature_ranks + run.d_model


def snapshot_bytes(train: TrainConfig, runs: Iterable[RunSpec], parameters: int) -> int:
    """Of a checkpoint of runs on its way to the disk: the copy of all, and of one of them what is laid out anew for its files.

    Where features are split, each rank that writes a part has its share of this.

    Args:
        train: the settings.
        runs: those of the largest checkpoint, or one as large as any.
        parameters: of all runs together.
    """
    # Encoders stand in memory the other way round than in a file, in each copy; an average is made an SAE of unit directions.
    copies, laid_out = (SNAPSHOT_COPIES, 1) if train.ema_decay is None else (SNAPSHOT_COPIES + 1, 3)
    widest = max(runs, key=num_parameters)
    number = NUMBER_BYTES[train.dtype]
    counters = COUNTER_BYTES * round(parameters / num_parameters(widest) * widest.num_features)
    return number * (copies * parameters + laid_out * num_parameters(widest)) + counters
