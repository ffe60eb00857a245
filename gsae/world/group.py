"""Ranks that work together. In: a process group. Out: collectives on tensors and plain data, and failures that all ranks share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gsae.errors import ConfigError, GsaeError

Reduction = Literal["sum", "max", "min"]
T = TypeVar("T")

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass(frozen=True)
class Group:
    """Ranks that work together. Every method that talks is a collective: all ranks of the group call it, in the same order."""

    ranks: tuple[int, ...]
    """Their ranks in the world."""
    rank: int
    """This rank's place in the group."""
    device: torch.device
    """Where this rank computes."""
    process_group: "dist.ProcessGroup"
    mesh: "Mesh | None" = None
    """How the ranks share the features of dictionaries too; None: they share only rows, and each holds all features."""

    @property
    def rows(self) -> "Group":
        """The ranks that hold the features that this one holds, and share the rows of a batch: all, where features are not split."""
        return self if self.mesh is None else self.mesh.rows

    @property
    def features(self) -> "Group | None":
        """The ranks that see the rows that this one sees, and share the features of a dictionary; None where features are not split."""
        return None if self.mesh is None else self.mesh.features

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the group's files."""
        return self.rank == 0

    def reduce(self, value: Tensor, operation: Reduction) -> Tensor:
        """The elementwise sum, maximum or minimum over ranks, as a new tensor on `value`'s device."""
        result = value.clone()
        dist.all_reduce(result, op=_OPERATIONS[operation], group=self.process_group)
        return result

    def broadcast(self, value: Tensor) -> Tensor:
        """The first rank's `value`, as a new tensor."""
        result = value.clone()
        dist.broadcast(result, src=self.ranks[0], group=self.process_group)
        return result

    def broadcast_object(self, value: T | None) -> T:
        """The first rank's `value` (plain data; pickled between ranks of one job only)."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=self.ranks[0], group=self.process_group)
        return box[0]  # type: ignore[no-any-return]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def gather(self, value: Tensor) -> Tensor:
        """The ranks' rows, one rank after another: each gives a tensor of its own first dimension and the same others."""
        lengths = self.gather_objects(value.shape[0])
        padded = value.new_zeros(max(lengths), *value.shape[1:])
        padded[: value.shape[0]] = value
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.process_group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return bool(self.reduce(torch.tensor(int(flag)), "max").item())

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks leave alike: when it raises on one, the others raise too, with that rank's message."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.gather_objects(
            None if failure is None else f"{type(failure).__name__ if not isinstance(failure, GsaeError) else ''} {failure}".strip()
        )
        for rank, message in zip(self.ranks, messages, strict=True):
            if message is not None:
                if failure is None:
                    failure = GsaeError(f"{message} (on rank {rank})")
                if isinstance(failure, GsaeError):
                    failure.spoken_by = self.ranks[0]
                raise failure

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank only and give its result (plain data) to all; its error is everybody's."""
        result: T | None = None
        with self.together():
            if self.is_first:
                result = work()
        return self.broadcast_object(result)

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` under DistributedDataParallel, averaging gradients over the group.

        DDP regroups its buckets after the first backward, which changes the order of sums and so the last bits of a resumed run;
        searching for unused parameters keeps the first layout.
        """
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            module, device_ids=devices, process_group=self.process_group, find_unused_parameters=True
        )


@dataclass(frozen=True)
class Mesh:
    """The ranks of a group as a grid, rows x features. Rank r of the group stands in row r // n and column r % n of n columns."""

    rows: Group
    """This rank's column."""
    features: Group
    """This rank's row."""
    writers: Group
    """The same ranks as `features`, for collectives of another thread."""


def without_sum(module: nn.Module) -> AbstractContextManager[None]:
    """A block in which backward passes of a wrapped module keep their gradients on this rank; the next one outside sums all of them."""
    assert isinstance(module, nn.parallel.DistributedDataParallel)
    return module.no_sync()


def on_sum(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Have `before` called when a backward pass of a wrapped module has its own gradients, and `after` when it has their sum over ranks.

    What lies between is the part of the communication that the backward pass did not hide, waiting for slower ranks included; nothing in a
    block `without_sum`. On a GPU both are called when the work before them is queued, and may come from another thread.
    """
    engine = torch.autograd.Variable._execution_engine
    is_queued = False

    def end() -> None:
        nonlocal is_queued
        is_queued = False
        after()

    def begin() -> None:
        before()
        engine.queue_callback(end)

    def queue(parameter: Tensor) -> None:
        nonlocal is_queued
        # The engine calls back in the order of the queue: this before DDP, which asks with the last gradient, and `end` after it.
        if not is_queued:
            is_queued = True
            engine.queue_callback(begin)

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(queue)  # type: ignore[no-untyped-call]


def lanes_of(group: Group, num_lanes: int) -> Sequence[int]:
    """The lanes of this rank: r, r + R, r + 2R, ..., with R the ranks that share the rows of a batch.

    Raises:
        ConfigError: their number does not divide the number of lanes.
    """
    group = group.rows
    if num_lanes % group.size:
        possible = [n for n in range(1, num_lanes + 1) if num_lanes % n == 0]
        nearest = sorted(possible, key=lambda n: abs(n - group.size))[:2]
        raise ConfigError(
            f"{group.size} ranks in a group do not divide corpus.num_lanes ({num_lanes}); "
            f"start {' or '.join(str(n) for n in sorted(nearest))} ranks a group (times train.feature_ranks), "
            "or harvest with another num_lanes"
        )
    return range(group.rank, num_lanes, group.size)
