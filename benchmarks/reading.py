"""Ways to get shuffled batches out of the tars of a store. In: a store that benchmarks/stream.py made. Out: one JSON line.

    .venv/bin/python benchmarks/reading.py --directory /scratch/rows

All give the same: windows of each lane in a random order, cut into batches. Pages are in memory, memory has been used before, two threads
read where that is possible, and the main thread takes the batches. Figures are medians of rounds in which all take turns.

scatter     gsae: one `preadv` a shard, each row straight to its place
mapped      each context copied from the mapped file to the window, rows gathered to batches
readinto    shard by shard into the window, headers included, rows gathered to batches
webdataset  its own reader, one process; contexts are unpacked with safetensors, and their rows copied to the window and gathered
"""

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
import webdataset
from torch import Tensor

from gsae.store import manifest as manifests
from gsae.store.progress import read_records
from gsae.store.shards import TarRecord, tar_path
from gsae.store.stream import Stream

Shard = tuple[Path, TarRecord]
Fill = Callable[[Shard, Tensor], None]


def mapped(shard: Shard, target: Tensor) -> None:
    """Copy one context after another out of the mapped file."""
    path, record = shard
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), record.bytes, access=mmap.ACCESS_COPY)
    done = 0
    for rows, offset in zip(record.context_rows, record.offsets, strict=True):
        x = torch.frombuffer(memory, dtype=target.dtype, count=rows * target.shape[1], offset=offset)
        target[done : done + rows].copy_(x.view(rows, -1))
        done += rows


def readinto(shard: Shard, target: Tensor) -> None:
    """Read each context's rows straight to where they stand in the window."""
    path, record = shard
    content = memoryview(target.view(torch.uint8).view(-1).numpy())
    row_bytes, done = target.shape[1] * target.itemsize, 0
    with path.open("rb", buffering=0) as file:
        for rows, offset in zip(record.context_rows, record.offsets, strict=True):
            os.preadv(file.fileno(), [content[done * row_bytes : (done + rows) * row_bytes]], offset)
            done += rows


def gathered(groups: Sequence[Sequence[Shard]], window: list[Tensor], batch: Tensor, fill: Fill, threads: int) -> Iterator[None]:
    """Batches of one window after another; the next one is filled meanwhile."""
    with ThreadPoolExecutor(threads) as pool:

        def begin(number: int) -> list[object]:
            starts, first = [], 0
            for shard in groups[number]:
                rows = shard[1].rows
                starts.append(pool.submit(fill, shard, window[number % 2][first : first + rows]))
                first += rows
            return starts

        loading = begin(0)
        for number, shards in enumerate(groups):
            for future in loading:
                future.result()  # type: ignore[attr-defined]
            loading = begin(number + 1) if number + 1 < len(groups) else []
            order = torch.randperm(sum(record.rows for _, record in shards))
            for chosen in order.split(len(batch)):
                torch.index_select(window[number % 2], 0, chosen, out=batch[: len(chosen)])
                yield


def through_webdataset(shards: Sequence[Shard], window: Tensor, batch: Tensor) -> Iterator[None]:
    """Contexts as webdataset gives them."""
    samples = webdataset.WebDataset([str(path) for path, _ in shards], shardshuffle=False)
    filled = 0
    for sample in samples:
        x = safetensors.torch.load(sample["rows.safetensors"])["x"]
        if filled + len(x) > len(window):
            for chosen in torch.randperm(filled).split(len(batch)):
                torch.index_select(window, 0, chosen, out=batch[: len(chosen)])
                yield
            filled = 0
        window[filled : filled + len(x)].copy_(x)
        filled += len(x)
    for chosen in torch.randperm(filled).split(len(batch)):
        torch.index_select(window, 0, chosen, out=batch[: len(chosen)])
        yield


def main() -> None:
    """One line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--batch-rows", type=int, default=4096)
    parser.add_argument("--window-rows", type=int, default=2**17)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = {}
    for store in sorted(path for path in options.directory.iterdir() if (path / manifests.MANIFEST_FILE).exists()):
        manifest = manifests.load(store)
        ((site, described),) = manifest.sites.items()
        records = [record for lane in range(manifest.num_lanes) for record in read_records(store, lane)]
        shards = [(tar_path(store, site, record.lane, record.shard), record.sites[site].tar) for record in records]
        a_window = max(1, options.window_rows // shards[0][1].rows)
        groups = [shards[first : first + a_window] for first in range(0, len(shards), a_window)]
        windows = [torch.ones(options.window_rows, manifest.d_model, dtype=torch.bfloat16) for _ in range(2)]
        batch = torch.ones(options.batch_rows, manifest.d_model, dtype=torch.bfloat16)
        stream = Stream(
            store, site, range(manifest.num_lanes), options.batch_rows, options.window_rows, 0, False, read_threads=options.threads
        )
        for _ in range(2 * options.window_rows // options.batch_rows):
            stream.next_batch()
        ways: dict[str, Callable[[], Iterator[object]]] = {
            "scatter": lambda: (stream.next_batch() for _ in range(described.rows // options.batch_rows)),  # noqa: B023
            "mapped": lambda: gathered(groups, windows, batch, mapped, options.threads),  # noqa: B023
            "readinto": lambda: gathered(groups, windows, batch, readinto, options.threads),  # noqa: B023
            "webdataset": lambda: through_webdataset(shards, windows[0], batch),  # noqa: B023
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                for _ in way():
                    pass
                rates[name].append(described.rows * manifest.d_model * 2 / (time.perf_counter() - began))
        stream.close()
        found[f"d_model {manifest.d_model}"] = {name: round(statistics.median(values)) for name, values in rates.items()}
    print(json.dumps({"bytes_per_second": found, "threads": options.threads, "cpus": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    main()
