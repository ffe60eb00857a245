"""The ranks' values under TCP: held by a process of its own, as launchers do, which can be stopped and killed, or by the first rank."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_HOLDER = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(1000)
"""


@contextmanager
def held() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port."""
    with subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        try:
            yield holder, int(holder.stdout.readline())
        finally:
            holder.kill()


def join(port: int, rank: int, size: int) -> None:
    """Take part as a rank."""
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def hold_and_join(folder: Path, rank: int, size: int) -> None:
    """Take part as a rank where the first one holds the values; `folder` is the same for all."""
    written, port = folder / "port.partial", folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        written.write_text(str(store.port))
        written.rename(port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        return
    while not port.exists():
        time.sleep(0.01)
    join(int(port.read_text()), rank, size)
