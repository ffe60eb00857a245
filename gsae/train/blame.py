"""What a gradient that is not finite is due to. In: a bank and the step. Out: the batch's rows, listed on disk, and which are broken.

Rows that are finite leave the run itself: it diverged, and it alone stops. Broken rows meet every run of the bank, and no run is to
learn without them what it would have learnt from them: the training ends, to continue from its checkpoints once the store is mended.

The list is `non-finite-<step>.jsonl` in the run directory: a line a row, in the order of lanes.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gsae.errors import GsaeError, NonFiniteError
from gsae.store.durable import write_aside
from gsae.store.mirror import mirror_of
from gsae.store.origin import Origin
from gsae.store.shards import short_name
from gsae.train.bank import Bank, Run


@dataclass(frozen=True)
class BatchRow:
    """A row of the batch, as training saw it."""

    origin: Origin
    is_finite: bool
    norm: float
    """Of the scaled row."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        origin = self.origin
        where = {
            "lane": origin.lane,
            "shard": short_name(origin.tar),
            "context": origin.key,
            "row": origin.row,
            "document": origin.document,
        }
        return {**where, "is_finite": self.is_finite, "norm": self.norm if math.isfinite(self.norm) else None}


def list_name(step: int) -> str:
    """The file in the run directory that lists the rows of a step."""
    return f"non-finite-{step:08d}.jsonl"


def divergence(step: int) -> str:
    """Why a run is stopped that had a gradient that is not finite from rows that are."""
    return (
        f"the gradient of step {step} was not finite, so the weights did not move by it, but all rows of its batch ({list_name(step)}) "
        "are: the run diverged; lower its learning rate or its lambda"
    )


def examine(bank: Bank, non_finite: Iterable[tuple[Run, int]]) -> None:
    """Read the batches of steps again and list their rows in the directories of the runs they were not finite for. A collective.

    Args:
        bank: the bank, in a stretch that the steps are of.
        non_finite: runs, each with such a step.

    Raises:
        NonFiniteError: a row is broken, or a batch cannot be read again.
    """
    runs: defaultdict[int, list[Run]] = defaultdict(list)
    for run, step in non_finite:
        runs[step].append(run)
    for step in sorted(runs):
        rows = _read_again(bank, step)
        paths = [run.directory / list_name(step) for run in runs[step]]
        bank.group.on_first(partial(_write, paths, rows))
        broken = [row.origin for row in rows if not row.is_finite]
        if broken:
            others = f" and {len(broken) - 1} others of its batch are" if len(broken) > 1 else " is"
            what = f"{broken[0]}{others} NaN or infinite"
            error = NonFiniteError(f"{_where(bank, step)}: {what}; {_cure(broken[0])} (all its rows: {paths[0]})")
            error.spoken_by = bank.group.ranks[0]
            raise error


def _where(bank: Bank, step: int) -> str:
    return f"{bank.spec.site}, step {step}"


def _read_again(bank: Bank, step: int) -> list[BatchRow]:
    """The rows of a batch, of all ranks, in the order of lanes; training goes on as if nothing had been."""
    assert bank.feed is not None
    with bank.group.together():
        try:
            batch = bank.feed.read_again((step - bank.stretch.first_step) * bank.spec.batch_rows)
            origins = bank.feed.origins(batch)
        except GsaeError as error:
            what = "the gradient was not finite, and its rows cannot be read again"
            raise NonFiniteError(f"{_where(bank, step)}: {what}: {error}") from error
    is_finite = torch.isfinite(batch.x).all(dim=1).tolist()
    norms = torch.linalg.vector_norm(batch.x.double(), dim=1).tolist()
    own = [BatchRow(*row) for row in zip(origins, is_finite, norms, strict=True)]
    return sorted((row for rows in bank.group.rows.gather_objects(own) for row in rows), key=lambda row: row.origin.lane)


def _write(paths: Iterable[Path], rows: Iterable[BatchRow]) -> None:
    content = "".join(json.dumps(row.to_json(), allow_nan=False) + "\n" for row in rows)
    for path in paths:
        with write_aside(path) as file:
            file.write(content.encode())


def _cure(origin: Origin) -> str:
    store = origin.tar.parent.parent
    mirror = mirror_of(store)
    if mirror is not None:
        return f"repair the store that {mirror.url} is a copy of, copy it again, then run gsae train again"
    return f"run gsae verify {store} --repair, gsae harvest and gsae train again, which goes on from its last checkpoint"
