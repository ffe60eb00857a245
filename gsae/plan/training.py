"""What training needs. In: the banks that a config asks for. Out: runs, passes over the store, bytes a rank, communication, turns."""

from collections.abc import Sequence
from dataclasses import dataclass

from gsae.config import Config
from gsae.plan.communication import Communication, communication
from gsae.plan.disk import StoreSize, num_parameters, row_bytes
from gsae.plan.grid import Grids, find_grids
from gsae.plan.memory import part_parameters, snapshot_bytes, state_bytes, step_bytes
from gsae.plan.pilots import PilotNeeds, pilot_needs
from gsae.plan.queue import Queue, plan_queue
from gsae.plan.readers import ReaderChoice, choose_readers
from gsae.train.plan import BankSpec, by_site

WINDOWS = 2
"""Of a stream: the one that is handed out, and the one that loads meanwhile."""


@dataclass(frozen=True)
class TrainingRates:
    """What is assumed of the machines."""

    ranks: int
    rows_per_second: float | None
    """Of the stream that a group trains all runs of the largest site from; smaller sites are taken to be faster by their parameters."""
    free_bytes_per_rank: int
    """Memory where a rank computes."""
    link_bytes_per_second: float | None
    """That a rank sends to another while it receives as much. With it, communication is added to the time."""
    disk_bytes_per_second: float | None
    """That the store's disk gives to all ranks together."""


@dataclass(frozen=True)
class TrainingNeeds:
    """What training takes."""

    sites: int
    runs: int
    steps_per_run: int
    """Of those that start from random weights."""
    warm_runs: int
    """Runs that start from the weights of another."""
    steps_per_warm_run: int
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
    device_bytes_per_rank: int
    """For the largest bank, the runs that train together: its state and features, where it computes, and the LLM that evaluates them."""
    state_bytes_per_rank: int
    """Weights, gradients, DDP's buffers, optimizer state and average of a bank's runs."""
    features_bytes_per_rank: int
    """One run's rows x features, in the dense step that training begins with."""
    probe_bytes_per_rank: int
    """The whole LLM and a batch of it, for evaluations while training goes on; 0 without them."""
    window_bytes_per_rank: int
    """Rows that are shuffled, in the host's memory of a rank that reads."""
    readers: ReaderChoice
    """Ranks that read: all, or one of those that see the same rows."""
    snapshot_bytes_per_group: int
    """A checkpoint of a bank's runs on its way to the disk, in the host's memory of the group's first rank, or of its first
    feature_ranks."""
    feature_ranks: int
    """Ranks of a group that share the features of a dictionary."""
    grids: Grids | None
    """The ways in which a group's ranks can share rows and features."""
    communication: Communication
    """Of the largest bank."""
    queue: Queue

    @property
    def hours(self) -> float | None:
        """Until the last group is through; None without a rate."""
        return self.queue.hours

    @property
    def snapshot_bytes_per_rank(self) -> int:
        """On average."""
        return self.snapshot_bytes_per_group // self.ranks_per_group


def training_needs(
    config: Config, banks: Sequence[BankSpec], store: StoreSize, rates: TrainingRates, evaluation_bytes: int
) -> TrainingNeeds:
    """What training needs; `evaluation_bytes` are those of the LLM and its batch where it evaluates."""
    train = config.train
    ranks_a_group = max(1, rates.ranks // train.groups)
    pilots = [pilot_needs(config, bank) for bank in banks]
    parameters = [max(_num_parameters(bank), before.parameters) for bank, before in zip(banks, pilots, strict=True)]
    largest = max(banks, key=_num_parameters)
    columns = min(train.feature_ranks, ranks_a_group)
    row_ranks = max(1, ranks_a_group // columns)
    part = sum(part_parameters(run, columns) for run in largest.runs)
    state = state_bytes(train, max(parameters) * part // _num_parameters(largest))
    rows = -(-train.batch_rows // row_ranks)
    probe = 0 if train.evaluate_every_fraction is None else evaluation_bytes
    features = max(step_bytes(train, run, rows) for bank in banks for run in bank.runs)
    used_rows = min(store.rows_per_site, train.max_rows or store.rows_per_site)
    rows_a_part = used_rows // store.parts
    window = min(train.window_rows, rows_a_part) * row_bytes(largest.runs[0].d_model, store.storage_dtype) // row_ranks
    total_rows, warm = banks[0].total_rows, [bank for bank in banks if bank.is_warm]
    rows_a_visit = max(train.batch_rows, rows_a_part - rows_a_part % train.batch_rows)
    return TrainingNeeds(
        sites=len(by_site(banks)),
        runs=sum(len(bank.runs) for bank in banks),
        steps_per_run=banks[0].total_steps,
        warm_runs=sum(len(bank.runs) for bank in warm),
        steps_per_warm_run=warm[0].total_steps if warm else 0,
        batch_rows=train.batch_rows,
        rows_per_run=total_rows,
        pilots=sum(before.runs for before in pilots),
        pilot_rows=max(before.rows for before in pilots),
        passes=total_rows / max(1, used_rows),
        visits=1 if store.parts == 1 else -(-total_rows // rows_a_visit),
        groups=train.groups,
        ranks_per_group=ranks_a_group,
        device_bytes_per_rank=state + features + probe,
        state_bytes_per_rank=state,
        features_bytes_per_rank=features,
        probe_bytes_per_rank=probe,
        window_bytes_per_rank=WINDOWS * window,
        snapshot_bytes_per_group=max(snapshot_bytes(train, bank.runs, size) for bank, size in zip(banks, parameters, strict=True)),
        feature_ranks=columns,
        readers=choose_readers(config, largest, ranks_a_group, rates.rows_per_second, rates.disk_bytes_per_second),
        grids=find_grids(config, banks, ranks_a_group, rates.free_bytes_per_rank - probe, rates.link_bytes_per_second),
        communication=communication(config, largest, ranks_a_group, rates.link_bytes_per_second),
        queue=_queue(config, banks, pilots, rates),
    )


def _queue(config: Config, banks: Sequence[BankSpec], pilots: Sequence[PilotNeeds], rates: TrainingRates) -> Queue:
    """A group of another size is taken to compute at a rate that goes with its ranks, and to communicate as its size asks."""
    ranks_given = max(1, rates.ranks // config.train.groups)
    largest = max(map(_num_parameters, banks))
    rate, sites = rates.rows_per_second, by_site(banks)
    pilot_rows = {bank: before.rows for bank, before in zip(banks, pilots, strict=True)}

    def hours_of(bank: BankSpec, ranks: int) -> float:
        row_seconds = _num_parameters(bank) / largest * ranks_given / ranks / (rate or 1.0)
        told = communication(config, bank, ranks, rates.link_bytes_per_second).seconds_per_step
        row_seconds += 0.0 if told is None or rate is None else told / bank.batch_rows
        return (bank.total_rows + pilot_rows[bank]) * row_seconds / 3600

    return plan_queue(
        [of_site[0].site for of_site in sites],
        lambda place, ranks: sum(hours_of(bank, ranks) for bank in sites[place]),
        ranks=rates.ranks,
        groups=config.train.groups,
        num_lanes=config.corpus.num_lanes,
        in_hours=rate is not None,
    )


def _num_parameters(bank: BankSpec) -> int:
    return sum(map(num_parameters, bank.runs))
