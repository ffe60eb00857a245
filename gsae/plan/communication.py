"""What the ranks of a group tell each other while they train. In: the runs of a site, the ranks of a group. Out: bytes of a step.

In each step the gradient of every run is summed over the ranks, in its own type; DDP cuts it into buckets, which adds no bytes. Chores
sum counts and measures every so many steps, and directions of resampled features at the events. On a grid of ranks (train.feature_ranks)
gradients are summed over its rows and reconstructions over its columns.
"""

import math
from dataclasses import dataclass

from gsae.config import Config, ObjectiveName, TrainConfig
from gsae.plan.disk import NUMBER_BYTES, row_bytes
from gsae.plan.memory import COUNTER_BYTES, part_parameters
from gsae.train.chores import CHOOSE_EVERY_STEPS, checkpoint_interval
from gsae.train.plan import BankSpec, RunSpec
from gsae.train.schedule import event_steps

MEASURE_BYTES = 7 * 8
"""Of a run at a log line."""
TIMES_BYTES = 5 * 8
"""Of a log line: what the ranks' time went for."""
RESAMPLED_TENSORS = 3
"""Tensors of resampled features x d_model that travel at an event: drawn rows, encoders and directions."""


DECODES: dict[ObjectiveName, int] = {"relu": 1, "gated-no-aux": 1, "gated": 2, "gated-norm-weighted": 2}
"""Reconstructions of a step, each of which is a sum over the parts of a split dictionary."""
NORM_BYTES = 8
"""Of the gradient's norm, summed over the parts."""
ROW_NAME_BYTES = 8
"""Of a row's number, which travels with it."""


@dataclass(frozen=True)
class Communication:
    """Of the runs of one site, in a step, on average. All 0 where a rank is alone in its group."""

    gradient_bytes_per_step: int
    """Tensors of gradients that are summed over the ranks that hold the same features."""
    feature_bytes_per_step: int
    """Tensors that are summed over the ranks that see the same rows: reconstructions, and b_dec's gradient."""
    row_bytes_per_step: int
    """Rows that one of these reads and sends to the others."""
    chore_bytes_per_step: float
    """Tensors that chores sum; at most, since all features are taken to be dead at each resampling event."""
    sent_bytes_per_step: float
    """What each rank sends for them, and receives: 2 (R - 1) / R of tensors that are summed, as a ring of R ranks does; rows once."""
    seconds_per_step: float | None
    """At the given speed of a link, nothing of it hidden behind the computation; None where none is given."""


def communication(config: Config, bank: BankSpec, ranks: int, link_bytes_per_second: float | None) -> Communication:
    """Of the runs of a site, on a group of so many ranks."""
    if ranks == 1:
        return Communication(0, 0, 0, 0.0, 0.0, None if link_bytes_per_second is None else 0.0)
    train = config.train
    columns = min(train.feature_ranks, ranks)
    rows = max(1, ranks // columns)
    gradients = 0 if rows == 1 else NUMBER_BYTES[train.dtype] * sum(part_parameters(run, columns) for run in bank.runs)
    local_rows = -(-bank.batch_rows // rows)
    features = 0 if columns == 1 else sum(feature_bytes(train, run, local_rows) for run in bank.runs)
    own_rows = row_bytes_per_step(config, bank, local_rows) if columns > 1 and train.shared_reads else 0
    chores = _chore_bytes(config, bank, rows, columns) / bank.total_steps
    sent = sent_bytes(gradients, rows) + sent_bytes(features, columns) + own_rows + sent_bytes(chores, ranks)
    return Communication(
        gradients, features, own_rows, chores, sent, None if link_bytes_per_second is None else sent / link_bytes_per_second
    )


def row_bytes_per_step(config: Config, bank: BankSpec, local_rows: int) -> int:
    """What a rank that reads sends to those that see the same rows."""
    return local_rows * (row_bytes(bank.runs[0].d_model, config.harvest.storage_dtype) + ROW_NAME_BYTES)


def feature_bytes(train: TrainConfig, run: RunSpec, local_rows: int) -> int:
    """What a step of a run sums over the parts of its dictionary, however many: partial reconstructions, b_dec's gradient, a norm."""
    number = NUMBER_BYTES[train.dtype]
    return number * run.d_model * (DECODES[run.objective] * local_rows + 1) + NORM_BYTES


def sent_bytes(tensor_bytes: float, ranks: int) -> float:
    """What each of so many ranks sends when a tensor is summed over them in a ring."""
    return 2 * (ranks - 1) / ranks * tensor_bytes


def _chore_bytes(config: Config, bank: BankSpec, rows: int, columns: int) -> int:
    """Tensors that chores sum in the whole of a training; lines of plain data, which are hundreds of bytes, are left out.

    On a grid of rows x columns counts are summed over the rows, which may be one.
    """
    steps, runs = bank.total_steps, bank.runs
    of_part = COUNTER_BYTES * (rows > 1) / columns
    counts = of_part * sum(run.num_features for run in runs)
    every, interval = config.train.log_every_steps, checkpoint_interval(steps, config.train)
    checkpoints = -(-steps // interval)
    log_lines = checkpoints + steps // every - steps // math.lcm(every, interval)  # one before each checkpoint
    asks_who_is_dead = [run for run in runs if run.pre_activation_loss]
    choices = 8 * len(runs) + of_part * sum(run.num_features for run in asks_who_is_dead)
    return round(
        log_lines * (TIMES_BYTES + MEASURE_BYTES * len(runs) + counts)
        + checkpoints * counts
        + steps // CHOOSE_EVERY_STEPS * choices
        + sum(_event_bytes(config, bank, run, rows, columns) for run in runs if run.resampling)
    )


def _event_bytes(config: Config, bank: BankSpec, run: RunSpec, rows: int, columns: int) -> float:
    """All events of a run; at each but the first, and once after the last, the outcome of the one before is counted."""
    events = len(event_steps(config.train.resampling.event_fractions, bank.total_steps))
    counts = COUNTER_BYTES * (rows > 1) / columns * run.num_features
    # All drawn rows reach all ranks, encoders and directions those that hold them.
    tensors = 1 + (RESAMPLED_TENSORS - 1) * (rows > 1) / columns
    directions = tensors * NUMBER_BYTES[config.train.dtype] * run.num_features * run.d_model
    return events * directions + (events + (events > 0)) * counts
