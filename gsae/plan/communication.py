"""What the ranks of a group tell each other while they train. In: the runs of a site, the ranks of a group. Out: bytes of a step.

In each step the gradient of every run is summed over the ranks, in its own type; DDP cuts it into buckets, which adds no bytes. Chores
sum counts and measures every so many steps, and directions of resampled features at the events.
"""

import math
from dataclasses import dataclass

from gsae.config import Config
from gsae.plan.disk import NUMBER_BYTES, num_parameters
from gsae.plan.memory import COUNTER_BYTES
from gsae.train.chores import CHOOSE_EVERY_STEPS, checkpoint_interval
from gsae.train.plan import BankSpec, RunSpec
from gsae.train.schedule import event_steps

MEASURE_BYTES = 7 * 8
"""Of a run at a log line."""
TIMES_BYTES = 5 * 8
"""Of a log line: what the ranks' time went for."""
RESAMPLED_TENSORS = 3
"""Tensors of resampled features x d_model that travel at an event: drawn rows, encoders and directions."""


@dataclass(frozen=True)
class Communication:
    """Of the runs of one site, in a step, on average. All 0 where a rank is alone in its group."""

    gradient_bytes_per_step: int
    """Tensors of gradients that are summed over the ranks."""
    chore_bytes_per_step: float
    """Tensors that chores sum; at most, since all features are taken to be dead at each resampling event."""
    sent_bytes_per_step: float
    """What each rank sends for them, and receives: 2 (R - 1) / R of the tensors, as a ring of R ranks does."""
    seconds_per_step: float | None
    """At the given speed of a link, nothing of it hidden behind the computation; None where none is given."""


def communication(config: Config, bank: BankSpec, ranks: int, link_bytes_per_second: float | None) -> Communication:
    """Of the runs of a site, on a group of so many ranks."""
    if ranks == 1:
        return Communication(0, 0.0, 0.0, None if link_bytes_per_second is None else 0.0)
    gradients = NUMBER_BYTES[config.train.dtype] * sum(map(num_parameters, bank.runs))
    chores = _chore_bytes(config, bank) / bank.total_steps
    sent = sent_bytes(gradients + chores, ranks)
    return Communication(gradients, chores, sent, None if link_bytes_per_second is None else sent / link_bytes_per_second)


def sent_bytes(tensor_bytes: float, ranks: int) -> float:
    """What each of so many ranks sends when a tensor is summed over them in a ring."""
    return 2 * (ranks - 1) / ranks * tensor_bytes


def _chore_bytes(config: Config, bank: BankSpec) -> int:
    """Tensors that chores sum in the whole of a training; lines of plain data, which are hundreds of bytes, are left out."""
    steps, runs = bank.total_steps, bank.runs
    counts = COUNTER_BYTES * sum(run.num_features for run in runs)
    every, interval = config.train.log_every_steps, checkpoint_interval(steps, config.train)
    checkpoints = -(-steps // interval)
    log_lines = checkpoints + steps // every - steps // math.lcm(every, interval)  # one before each checkpoint
    asks_who_is_dead = [run for run in runs if run.pre_activation_loss]
    choices = 8 * len(runs) + COUNTER_BYTES * sum(run.num_features for run in asks_who_is_dead)
    return (
        log_lines * (TIMES_BYTES + MEASURE_BYTES * len(runs) + counts)
        + checkpoints * counts
        + steps // CHOOSE_EVERY_STEPS * choices
        + sum(_event_bytes(config, bank, run) for run in runs if run.resampling)
    )


def _event_bytes(config: Config, bank: BankSpec, run: RunSpec) -> int:
    """All events of a run; at each but the first, and once after the last, the outcome of the one before is counted."""
    events = len(event_steps(config.train.resampling.event_fractions, bank.total_steps))
    counts = COUNTER_BYTES * run.num_features
    directions = RESAMPLED_TENSORS * NUMBER_BYTES[config.train.dtype] * run.num_features * run.d_model
    return events * directions + (events + (events > 0)) * counts
