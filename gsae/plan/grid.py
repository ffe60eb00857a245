"""How a group's ranks share rows and features. In: the runs of a site, ranks, their memory, a link. Out: what each grid takes; the choice.

A grid of r x n ranks has the rows of a batch of B cut r times and each dictionary's M features n times. In a step each rank sums
    over r ranks  the gradients of its features   2 d M / n values
    over n ranks  partial reconstructions         2 d B / r values, d for relu
so that n = 1 sums 2 d M of them, r = 1 sums 2 d B: features are the cheaper to split once M > B, and the only ones that save memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gsae.config import Config, TrainConfig
from gsae.plan.communication import communication
from gsae.plan.memory import part_parameters, state_bytes, step_bytes
from gsae.train.plan import BankSpec


@dataclass(frozen=True)
class Grid:
    """One way to share rows and features."""

    row_ranks: int
    feature_ranks: int
    device_bytes_per_rank: int
    """Of weights, optimizer and features, where a rank computes."""
    sent_bytes_per_step: float
    """What each rank sends, and receives."""
    seconds_per_step: float | None
    """That this takes at the given speed of a link."""
    fits: bool
    """Whether a rank has the memory."""


@dataclass(frozen=True)
class Grids:
    """All ways, and one of them."""

    possible: tuple[Grid, ...]
    """By rising feature_ranks."""
    chosen: Grid
    """Of those that fit the one that sends least; of none that fits, the one that needs least memory."""

    def of(self, feature_ranks: int) -> Grid | None:
        """The grid with so many feature ranks, if it is possible."""
        return next((grid for grid in self.possible if grid.feature_ranks == feature_ranks), None)


def find_grids(config: Config, banks: Sequence[BankSpec], ranks: int, free_bytes: int, link: float | None) -> Grids | None:
    """The grids that a group of so many ranks can be, and the best; None where there is none.

    Args:
        config: the config, whatever its feature_ranks.
        banks: the runs of each site; the largest decides.
        ranks: of a group.
        free_bytes: that a rank may take where it computes, for training alone.
        link: bytes a second that a rank sends to another.
    """
    possible = tuple(_possible(config, banks, ranks, free_bytes, link))
    if not possible:
        return None
    fitting = [grid for grid in possible if grid.fits]
    if fitting:
        return Grids(possible, min(fitting, key=lambda grid: (grid.sent_bytes_per_step, grid.feature_ranks)))
    return Grids(possible, min(possible, key=lambda grid: grid.device_bytes_per_rank))


def _possible(config: Config, banks: Sequence[BankSpec], ranks: int, free_bytes: int, link: float | None) -> Iterator[Grid]:
    largest = max(banks, key=lambda bank: sum(part_parameters(run, 1) for run in bank.runs))
    for count in range(1, ranks + 1):
        is_even = ranks % count == 0 and all(run.num_features % count == 0 for bank in banks for run in bank.runs)
        if not is_even or config.corpus.num_lanes % (ranks // count):
            continue
        split = replace(config, train=replace(config.train, feature_ranks=count))
        told = communication(split, largest, ranks, link)
        needed = train_bytes(split.train, banks, ranks)
        yield Grid(ranks // count, count, needed, told.sent_bytes_per_step, told.seconds_per_step, needed <= free_bytes)


def train_bytes(train: TrainConfig, banks: Sequence[BankSpec], ranks: int) -> int:
    """What a rank of a group holds where it computes, but for what evaluates while training goes on."""
    state = max(state_bytes(train, sum(part_parameters(run, train.feature_ranks) for run in bank.runs)) for bank in banks)
    rows = -(-train.batch_rows // max(1, ranks // train.feature_ranks))
    return state + max(step_bytes(train, run, rows) for bank in banks for run in bank.runs)
