"""What this machine has. In: nothing. Out: the memory that is free on it, and on its GPUs."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gsae.config import Config


@dataclass(frozen=True)
class Machine:
    """The memory of this host."""

    host_free_bytes: int
    gpu_free_bytes: tuple[int, ...]
    """Of each GPU; empty where there is none, or `device: cpu`."""

    def ranks_here(self, ranks: int) -> int:
        """Of so many ranks, those on this host: one a GPU, or all where there is none."""
        return min(ranks, len(self.gpu_free_bytes) or ranks)

    def free_bytes_per_rank(self, ranks: int) -> int:
        """What a rank may take where it computes: the fullest GPU's free memory, or its share of the host's."""
        return min(self.gpu_free_bytes, default=self.host_free_bytes // ranks)


def this_machine(config: Config) -> Machine:
    """The memory that is free here and now."""
    gpus = range(torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0)
    return Machine(_free_host_bytes(), tuple(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus))


def _free_host_bytes() -> int:
    """What Linux says that programs can still take; elsewhere, all the memory there is."""
    path = Path("/proc/meminfo")
    if path.exists():
        found = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return int(found["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
