"""Ranks, groups and collectives. In: what the launcher set in the environment. Out: `World` and `Group`.

The only module that imports accelerate, deepspeed and torch.distributed. One process is a world of one rank with real process
groups, so no caller has a case for it.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from gsae.errors import ConfigError, GsaeError, ModelError, RankMismatchError

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


class Board:
    """Small values that ranks leave for each other, outside of collectives. For one thread; another one takes a board of its own.

    Any call raises ConnectionError when what holds the values has ended, and blocks while that is stopped or out of reach.
    """

    def __init__(self, store: "dist.distributed_c10d.Store") -> None:
        self._store = store
        self._written: set[str] = set()

    def write(self, key: str, value: str) -> None:
        """Leave `value` in place of what was there."""
        with _lost_connections():
            self._store.set(key, value)

    def read(self, keys: Sequence[str]) -> list[str | None]:
        """What was last left at each key; None where nothing was yet. Nothing is waited for."""
        with _lost_connections():
            # Asking for a value that is not there would wait for it. Those that are there stay, and come all at once.
            self._written.update(key for key in keys if key not in self._written and self._store.check([key]))
            written = [key for key in keys if key in self._written]
            values = self._store.multi_get(written) if written else []
        found = {key: value.decode() for key, value in zip(written, values, strict=True)}
        return [found.get(key) for key in keys]


@contextmanager
def _lost_connections() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError((str(error).splitlines() or [type(error).__name__])[0]) from error


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

    def wait_for_all(self, name: str) -> None:
        """Wait until all ranks have called this, however long the slowest takes: unlike a collective it knows no time-out."""
        store = dist.distributed_c10d._get_default_store()
        store.add(f"gsae/{name}", 1)
        while store.add(f"gsae/{name}", 0) < self.everyone.size:
            time.sleep(0.2)

    def board(self, name: str) -> Board:
        """The board of this name, the same for all ranks, on a connection of its own: what another thread waits for does not hold it up."""
        store = dist.distributed_c10d._get_default_store()
        return Board(dist.PrefixStore(f"gsae/{name}", store.clone()))  # type: ignore[attr-defined]


class Zero3:
    """Parameters of frozen modules split over all ranks: DeepSpeed's ZeRO-3, through accelerate.

    Each rank keeps a share of every parameter. A parameter is whole only while the module that owns it runs, so that a forward is a
    collective of all ranks. Must live as long as the modules are used.

    Args:
        group: all ranks of the world.
        offload: whether a share stays in the host's memory.
        whole_at_once: elements of parameters that a rank may gather ahead of their use.
        kept_whole_below: parameters of at most so many elements stay on every rank once they have been used.

    Raises:
        ModelError: DeepSpeed is missing or does not work here.
    """

    def __init__(self, group: Group, offload: bool, whole_at_once: int, kept_whole_below: int) -> None:
        zero: dict[str, Any] = {
            "stage": 3,
            "stage3_prefetch_bucket_size": whole_at_once,
            "stage3_max_live_parameters": 2 * whole_at_once,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": kept_whole_below,
            "memory_efficient_linear": False,  # it puts a function of its own in the place of torch's, for the whole process
        }
        if offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        self._settings = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": group.size, "zero_optimization": zero}
        self._deepspeed = _import_deepspeed(group.device)
        self._accelerator: Accelerator | None = None

    def split(self, module: nn.Module) -> None:
        """Take each parameter's values from the first rank; leave every rank its share. All ranks call this, in the same order."""
        self._deepspeed.zero.Init(module=module, config_dict_or_path=self._settings)

    def gather_when_run(self, module: nn.Module) -> None:
        """Have the split parameters of `module` gathered around each of its forwards. All ranks call this, once."""
        AcceleratorState._reset_state()  # what an earlier model left: accelerate takes DeepSpeed's settings once a process
        plugin = DeepSpeedPlugin(hf_ds_config=self._settings, zero3_init_flag=False)
        self._accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no")
        self._accelerator.prepare(module)
        plugin.dschf = None  # as long as this lives, transformers makes every further model a split one


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this kind of device, without its words, and without the kernels that it would compile for collectives on CPUs."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    try:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(verbose=False)
    except Exception as error:  # a compiler, a driver or a package that it misses, each with an error of its own
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"llm.sharding 'zero3' needs DeepSpeed, which cannot be used here ({type(error).__name__}: {reason}): "
            "pip install 'deepspeed>=0.18' for this torch, or set llm.sharding: replicate"
        ) from None
    return deepspeed


def without_sum(module: nn.Module) -> AbstractContextManager[None]:
    """A block in which backward passes of a wrapped module keep their gradients on this rank; the next one outside sums all of them."""
    assert isinstance(module, nn.parallel.DistributedDataParallel)
    return module.no_sync()


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
def start(device: str = "auto", num_groups: int = 1, timeout_seconds: float = 1800) -> Iterator[World]:
    """Join the launcher's ranks (or be a world of one), cut them into groups, and leave cleanly.

    Args:
        device: `auto`, `cpu` or `cuda`.
        num_groups: number of groups; must divide the number of ranks.
        timeout_seconds: how long a collective waits for a missing rank.

    Raises:
        RankMismatchError: accelerate sees another number of ranks than the launcher announced.
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
                dist.init_process_group(backend, timeout=timeout)
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
            yield cut_into_groups(chosen, num_groups, timeout)
        finally:
            dist.destroy_process_group()


def cut_into_groups(device: torch.device, num_groups: int, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Make all process groups, on all ranks in the same order (`new_group` is collective over the world)."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if num_groups > size or size % num_groups:
        possible = [n for n in range(1, size + 1) if size % n == 0]
        error = ConfigError(
            f"train.groups is {num_groups} but there are {size} ranks; set it to one of {possible}, "
            f"or start a multiple of {num_groups} ranks"
        )
        error.spoken_by = 0
        raise error
    everyone = Group(tuple(range(size)), rank, device, dist.new_group(list(range(size)), timeout=timeout))
    size_of_group = size // num_groups
    mine: Group | None = None
    for first in range(0, size, size_of_group):
        ranks = tuple(range(first, first + size_of_group))
        process_group = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            mine = Group(ranks, rank - first, device, process_group)
    assert mine is not None
    return World(everyone, mine, num_groups)


def lanes_of(group: Group, num_lanes: int) -> Sequence[int]:
    """The lanes of this rank: r, r + R, r + 2R, ...

    Raises:
        ConfigError: the number of ranks does not divide the number of lanes.
    """
    if num_lanes % group.size:
        possible = [n for n in range(1, num_lanes + 1) if num_lanes % n == 0]
        nearest = sorted(possible, key=lambda n: abs(n - group.size))[:2]
        raise ConfigError(
            f"{group.size} ranks in a group do not divide corpus.num_lanes ({num_lanes}); "
            f"start {' or '.join(str(n) for n in sorted(nearest))} ranks a group, or harvest with another num_lanes"
        )
    return range(group.rank, num_lanes, group.size)
