"""What training needs. In: the banks that a config asks for. Out: runs, passes over the store, bytes a rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from gsae.config import Config
from gsae.plan.disk import NUMBER_BYTES, StoreSize, num_parameters, row_bytes
from gsae.plan.pilots import pilot_needs
from gsae.train.plan import BankSpec

FEATURE_TENSORS = 7
"""Tensors of rows x features that a dense gated step holds at once."""
STATE_COPIES = 5
"""Weights, gradient, the buffer in which DDP sums it, and Adam's two moments."""
WINDOWS = 2
"""Of a stream: the one that is handed out, and the one that loads meanwhile."""


@dataclass(frozen=True)
class TrainingNeeds:
    """What training takes."""

    banks: int
    """One a site."""
    runs: int
    steps_per_run: int
    batch_rows: int
    rows_per_run: int
    pilots: int
    """Short runs that look for the lambdas of target L0s, over all sites; more where a target lies beyond the first lambdas."""
    pilot_rows: float
    """Rows of a site's runs that would take as long as its pilots; of the site where that is most."""
    passes: float
    """How often a run reads all the rows that it uses."""
    visits: int
    """Parts that a run reads one after another; 1 where the corpus is not cut into parts."""
    groups: int
    ranks_per_group: int
    bytes_per_rank: int
    """For the largest bank: its state, features and windows."""
    state_bytes_per_rank: int
    """Weights, gradients, DDP's buffers and optimizer state of a bank's runs."""
    features_bytes_per_rank: int
    """One run's rows x features, in the dense step that training begins with."""
    window_bytes_per_rank: int
    """Rows that are shuffled, in the host's memory."""


def training_needs(config: Config, banks: Sequence[BankSpec], store: StoreSize, ranks: int) -> TrainingNeeds:
    """What training needs, on so many ranks."""
    train, number = config.train, NUMBER_BYTES[config.train.dtype]
    ranks_a_group = max(1, ranks // train.groups)
    pilots = [pilot_needs(config, bank) for bank in banks]
    largest = max(max(sum(map(num_parameters, bank.runs)), before.parameters) for bank, before in zip(banks, pilots, strict=True))
    state = STATE_COPIES * number * largest
    rows = -(-train.batch_rows // ranks_a_group)
    widest = max(run.num_features for bank in banks for run in bank.runs)
    features = FEATURE_TENSORS * number * min(rows, train.micro_batch_rows or rows) * widest
    used_rows = min(store.rows_per_site, train.max_rows or store.rows_per_site)
    rows_a_part = used_rows // store.parts
    d_model = banks[0].runs[0].d_model
    window = min(train.window_rows, rows_a_part) * row_bytes(d_model, store.storage_dtype) // ranks_a_group
    total_rows = banks[0].total_rows
    rows_a_visit = max(train.batch_rows, rows_a_part - rows_a_part % train.batch_rows)
    return TrainingNeeds(
        banks=len(banks),
        runs=sum(len(bank.runs) for bank in banks),
        steps_per_run=banks[0].total_steps,
        batch_rows=train.batch_rows,
        rows_per_run=total_rows,
        pilots=sum(before.runs for before in pilots),
        pilot_rows=max(before.rows for before in pilots),
        passes=total_rows / max(1, used_rows),
        visits=1 if store.parts == 1 else -(-total_rows // rows_a_visit),
        groups=train.groups,
        ranks_per_group=ranks_a_group,
        bytes_per_rank=state + features + WINDOWS * window,
        state_bytes_per_rank=state,
        features_bytes_per_rank=features,
        window_bytes_per_rank=WINDOWS * window,
    )
