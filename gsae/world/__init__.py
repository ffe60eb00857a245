"""Ranks, groups and collectives. In: what the launcher set in the environment. Out: `World` and `Group`.

The only room that imports accelerate, deepspeed and torch.distributed. One process is a world of one rank with real process
groups, so no caller has a case for it.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from gsae.errors import ConfigError, RankMismatchError
from gsae.world.board import Board
from gsae.world.group import Group, Mesh, lanes_of, on_sum, without_sum
from gsae.world.network import CHOICE, choose_interface, host_name
from gsae.world.zero3 import Zero3

__all__ = ["Board", "Group", "Mesh", "World", "Zero3", "cut_into_groups", "host_name", "lanes_of", "on_sum", "start", "without_sum"]


@dataclass(frozen=True)
class World:
    """All ranks of the job, and the groups they were cut into."""

    everyone: Group
    """All ranks."""
    group: Group
    """The group this rank belongs to."""
    num_groups: int

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the job."""
        return self.everyone.is_first

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.everyone.device

    def next_ticket(self, queue: str) -> int:
        """A number 0, 1, 2, ... that no other group gets from this queue; the same on all ranks of the group."""
        store = dist.distributed_c10d._get_default_store()
        ticket = store.add(f"gsae/{queue}", 1) - 1 if self.group.is_first else None
        return self.group.broadcast_object(ticket)

    def board(self, name: str) -> Board:
        """The board of this name, the same for all ranks, on a connection of its own: what another thread waits for does not hold it up."""
        store = dist.distributed_c10d._get_default_store()
        return Board(dist.PrefixStore(f"gsae/{name}", store.clone()))  # type: ignore[attr-defined]


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch sees no CUDA device; set device: cpu, or install a CUDA build of torch")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RankMismatchError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} on this host); start at most one process a GPU"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def start(device: str = "auto", num_groups: int = 1, timeout_seconds: float = 1800, feature_ranks: int = 1) -> Iterator[World]:
    """Join the launcher's ranks (or be a world of one), cut them into groups, and leave cleanly.

    Args:
        device: `auto`, `cpu` or `cuda`.
        num_groups: number of groups; must divide the number of ranks.
        timeout_seconds: how long a collective waits for a missing rank.
        feature_ranks: ranks of a group that share the features of a dictionary; must divide the ranks of a group.

    Raises:
        RankMismatchError: accelerate sees another number of ranks than the launcher announced, or they do not reach each other.
        ConfigError: the ranks cannot be cut into so many groups, or the device is not there.
    """
    launched_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _choose_device(device, local_rank)
    backend = "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            if "RANK" in os.environ:
                _join(backend, timeout)
            else:
                alone = f"file://{scratch}/rendezvous"
                dist.init_process_group(backend, init_method=alone, rank=0, world_size=1, timeout=timeout)
        try:
            state = PartialState(cpu=chosen.type == "cpu")
            if state.num_processes != launched_size or dist.get_world_size() != launched_size:
                raise RankMismatchError(
                    f"the launcher announced {launched_size} ranks, accelerate sees {state.num_processes}; "
                    "for CPU ranks use launch/accelerate/cpu.yaml (distributed_type MULTI_GPU with use_cpu false)"
                )
            yield cut_into_groups(chosen, num_groups, timeout, feature_ranks)
        finally:
            dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    """Meet the launcher's other ranks."""
    choose_interface()
    try:
        dist.init_process_group(backend, timeout=timeout)
        # A rank that ends at once, over a mistake in the config, would break off what others still connect to it with.
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise RankMismatchError(
            f"the ranks do not reach each other ({str(error).splitlines()[0]}); on each host set {CHOICE} to the interface of the network "
            f"between the hosts (here it is {os.environ.get(CHOICE, 'not set')}), and see that no firewall closes its ports"
        ) from error


def cut_into_groups(device: torch.device, num_groups: int, timeout: timedelta = timedelta(minutes=30), feature_ranks: int = 1) -> World:
    """Make all process groups, on all ranks in the same order (`new_group` is collective over the world)."""
    size, rank = dist.get_world_size(), dist.get_rank()
    _require_divisor("train.groups", num_groups, size, "ranks")
    size_of_group = size // num_groups
    _require_divisor("train.feature_ranks", feature_ranks, size_of_group, "ranks in a group")

    def make(ranks: Sequence[int], backend: str | None = None) -> Group | None:
        """A group of these ranks; None on others."""
        process_group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
        return Group(tuple(ranks), ranks.index(rank), device, process_group) if rank in ranks else None

    def own(cuts: Iterable[Sequence[int]], backend: str | None = None) -> Group:
        """The group, of those that these cuts make, that this rank is in."""
        (found,) = [group for group in [make(ranks, backend) for ranks in cuts] if group is not None]
        return found

    everyone = own([range(size)])
    group = own(range(first, first + size_of_group) for first in range(0, size, size_of_group))
    if feature_ranks > 1:
        rows = [range(first, first + feature_ranks) for first in range(0, size, feature_ranks)]
        columns = [
            range(first + column, first + size_of_group, feature_ranks)
            for first in range(0, size, size_of_group)
            for column in range(feature_ranks)
        ]
        group = replace(group, mesh=Mesh(rows=own(columns), features=own(rows), writers=own(rows, "gloo")))
    return World(everyone, group, num_groups)


def _require_divisor(setting: str, value: int, size: int, what: str) -> None:
    if value > size or size % value:
        possible = [n for n in range(1, size + 1) if size % n == 0]
        error = ConfigError(
            f"{setting} is {value} but there are {size} {what}; set it to one of {possible}, or start a multiple of {value} ranks"
        )
        error.spoken_by = 0
        raise error
