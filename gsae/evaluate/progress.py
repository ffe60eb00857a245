"""How far an evaluation is. In: the sums of batches, round after round. Out: the same in a file, from which the evaluation goes on.

The sums of the batches so far are float64 sums in the order of the batches, and integers: taken up again, on any number of ranks, they end
as if nothing had been between.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from gsae.evaluate.batch import BatchSums, SpliceChecks
from gsae.evaluate.density import FiringCounts
from gsae.evaluate.strata import StratumSums
from gsae.evaluate.sums import RunSums, SiteSums, Sums
from gsae.store.durable import write_aside
from gsae.world import Group

PROGRESS_FILE = "evaluation.safetensors"
"""In the output directory while an evaluation is under way."""
PROGRESS_FORMAT = 1

AnySums = TypeVar("AnySums", bound=Sums)
Kind = type[SiteSums] | type[RunSums] | type[StratumSums] | type[FiringCounts]


class Totals:
    """The sums of every block, whose documents are `documents`, over all batches so far. They are added in the order of the batches."""

    def __init__(self, documents: Int[Tensor, " blocks"]) -> None:
        self.sites: dict[str, SiteSums] = {}
        self.runs: dict[str, RunSums] = {}
        self.strata: dict[str, StratumSums] = {}
        self.documents = documents

    def add(self, batch: BatchSums) -> None:
        """Add one batch's sums."""
        self._add(self.sites, batch, batch.sites)
        self._add(self.runs, batch, batch.runs)
        for name, part in batch.strata.items():
            self.strata[name] = self.strata[name] + part if name in self.strata else part

    def _add(self, sums: dict[str, AnySums], batch: BatchSums, parts: Mapping[str, AnySums]) -> None:
        for name, part in parts.items():
            if name not in sums:
                sums[name] = part.zeros(len(self.documents))
            sums[name].add(batch.blocks, part)


@dataclass
class Progress:
    """The batches so far."""

    totals: Totals
    """On the first rank; empty on the others."""
    num_batches: int = 0
    """How many there were, on all ranks together."""
    firing: dict[str, FiringCounts] = field(default_factory=dict)
    """Of each run, on the device: this rank's, of the features that it holds."""
    earlier: dict[str, FiringCounts] = field(default_factory=dict)
    """Of an earlier evaluation that this one continues, over all ranks and features; on the first rank."""
    checks: Mapping[str, SpliceChecks] = field(default_factory=dict)
    """Of each site; on the first rank."""

    def reduced_firing(self, group: Group) -> dict[str, FiringCounts]:
        """Over all ranks and features, on the CPU; complete on the first rank. A collective."""
        found = {}
        for name, each in self.firing.items():
            features = group.rows.reduce(each.features, "sum")
            features = features if group.features is None else group.features.gather(features)
            of_rows, of_all = group.rows.reduce(each.l0_histogram, "sum"), group.reduce(each.gates, "sum")
            found[name] = FiringCounts(features.cpu(), of_rows.cpu(), of_all.cpu())
        return {name: counts + self.earlier[name] if name in self.earlier else counts for name, counts in found.items()}


def save_progress(path: Path, progress: Progress, identity: Mapping[str, Any], group: Group) -> None:
    """Write what has come together so far. A collective.

    Args:
        path: of the file.
        progress: this rank's.
        identity: what is evaluated, as plain JSON values: `evaluation`, and the weights of each of the `runs` by name.
        group: all ranks.
    """
    firing = progress.reduced_firing(group)

    def write() -> None:
        totals = progress.totals
        named: dict[str, dict[str, Any]] = {"site": totals.sites, "run": totals.runs, "strata": totals.strata, "firing": firing}
        tensors = {
            f"{kind} {name} {each.name}": getattr(part, each.name).contiguous()
            for kind, parts in named.items()
            for name, part in parts.items()
            for each in fields(part)
        }
        tensors["documents"] = totals.documents
        checks = {name: asdict(check) for name, check in progress.checks.items()}
        about = {"format": PROGRESS_FORMAT, "batches": progress.num_batches, "checks": checks, "identity": identity}
        with write_aside(path) as file:
            file.write(safetensors.torch.save(tensors, metadata={"progress": json.dumps(about)}))

    group.on_first(write)


def load_progress(path: Path, identity: Mapping[str, Any], documents: Int[Tensor, " blocks"]) -> Progress | None:
    """What an earlier evaluation of the same came to; None where there is none. One rank calls this.

    Args:
        path: of the file.
        identity: as for `save_progress`; the earlier evaluation may have had other runs besides.
        documents: of the blocks of this evaluation.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["progress"])
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    there, runs = about["identity"], identity["runs"]
    is_same = about["format"] == PROGRESS_FORMAT and there["evaluation"] == identity["evaluation"]
    if not is_same or any(there["runs"].get(name) != weights for name, weights in runs.items()):
        return None
    if not torch.equal(tensors["documents"], documents):
        return None
    totals = Totals(documents)
    totals.sites = _sums(SiteSums, "site", tensors)
    totals.runs = {name: sums for name, sums in _sums(RunSums, "run", tensors).items() if name in runs}
    totals.strata = {name: sums for name, sums in _sums(StratumSums, "strata", tensors).items() if name in {*totals.sites, *runs}}
    earlier = {name: counts for name, counts in _sums(FiringCounts, "firing", tensors).items() if name in runs}
    checks = {name: SpliceChecks(**check) for name, check in about["checks"].items()}
    return Progress(totals, about["batches"], earlier=earlier, checks=checks)


def _sums(kind: Kind, word: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sums of one kind, by the name of the site or run that they are of."""
    names = dict.fromkeys(key.split(" ")[1] for key in tensors if key.startswith(f"{word} "))
    return {name: kind(**{each.name: tensors[f"{word} {name} {each.name}"] for each in fields(kind)}) for name in names}
