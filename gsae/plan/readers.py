"""Who reads rows that several ranks see. In: the runs of a site, a group's ranks, rates. Out: what each way takes; the choice.

On a grid of r x n ranks either r of them read, and each sends its rows to n - 1 others, or all r x n read, and the disk gives each row n
times.
"""

from dataclasses import dataclass

from gsae.config import Config
from gsae.plan.communication import row_bytes_per_step
from gsae.plan.disk import row_bytes
from gsae.train.plan import BankSpec


@dataclass(frozen=True)
class Readers:
    """One way."""

    shared_reads: bool
    """The setting of `train` that asks for it."""
    ranks_per_group: int
    """That read; each has windows of rows in its host's memory."""
    sent_bytes_per_step: int
    """That such a rank sends to each of those that do not read."""
    disk_bytes_per_second: float | None
    """That the store gives to all groups at the given rate of rows; None without one."""


@dataclass(frozen=True)
class ReaderChoice:
    """Both ways, and one of them."""

    configured: Readers
    other: Readers
    chosen: Readers
    """Each rank reads if the disk is known to give what that takes: nothing is sent then. Else one of those that see the same rows."""
    given_disk_bytes_per_second: float | None


def choose_readers(
    config: Config, bank: BankSpec, ranks: int, rows_per_second: float | None, disk_bytes_per_second: float | None
) -> ReaderChoice:
    """Who reads, and who should.

    Args:
        config: the config, with its grid.
        bank: the runs of a site.
        ranks: of a group.
        rows_per_second: that a group trains on.
        disk_bytes_per_second: that the store's disk gives to all ranks together.
    """
    columns = min(config.train.feature_ranks, ranks)
    rows = max(1, ranks // columns)
    size = row_bytes(bank.runs[0].d_model, config.harvest.storage_dtype)
    once = None if rows_per_second is None else config.train.groups * rows_per_second * size
    own_rows = -(-bank.batch_rows // rows)
    one = Readers(True, rows, row_bytes_per_step(config, bank, own_rows) if columns > 1 else 0, once)
    each = Readers(False, rows * columns, 0, None if once is None else columns * once)
    configured, other = (one, each) if config.train.shared_reads else (each, one)
    is_enough = once is not None and disk_bytes_per_second is not None and columns * once <= disk_bytes_per_second
    return ReaderChoice(configured, other, each if is_enough else one, disk_bytes_per_second)
