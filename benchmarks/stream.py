"""How fast a store is read, against plain sequential reads of the same files. In: a place for a made-up store. Out: one JSON line.

    .venv/bin/python benchmarks/stream.py --directory /scratch/rows
    .venv/bin/python benchmarks/stream.py --directory /scratch/rows --cold

The store is made once: random bfloat16 rows, kept in the directory for the next call. Raw is one thread with `readinto` into one block
that stays in the processor's cache, of the size that is fastest here. The stream delivers whole batches in training's order. Both take
turns; figures are medians over the rounds, `ratio` is the median of the rounds' own ratios. Cold: the files' pages are dropped first.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gsae.corpus.contexts import Cursor
from gsae.llm.site import Site
from gsae.store import manifest as manifests
from gsae.store.finish import finish, write_calibration
from gsae.store.progress import ProgressLog, ShardRecord, SiteRecord
from gsae.store.shards import ContextRows, open_tar, tar_path
from gsae.store.statistics import measure_rows, site_statistics
from gsae.store.stream import Stream

SITE = Site("resid.0", 0, "model.layers.0")
BLOCKS = [2**18, 2**20, 2**23]


def make_store(store: Path, options: argparse.Namespace) -> None:
    """Lanes of equal shards; rows are random, the same in every context, so that making them does not take long."""
    layout = manifests.Layout((SITE,), options.d_model, options.lanes, options.context_rows, "bfloat16", 3.0)
    manifests.begin(store, layout, {"corpus": "random rows"})
    write_calibration(store, {SITE.name: options.d_model**0.5})
    count = options.context_rows
    x = torch.randn(count, options.d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    order = torch.arange(count, dtype=torch.int32)
    context = ContextRows(x, token=order % 100, position=order, document=order * 0)
    kept = torch.ones(1, count, dtype=torch.bool)
    measured = [measure_rows(x[None].expand(options.shard_contexts, -1, -1), kept.expand(options.shard_contexts, -1))]
    all_kept = kept.expand(options.shard_contexts, -1)
    tokens = context.token.long()[None].expand(options.shard_contexts, -1)
    found = site_statistics(measured[0], all_kept, all_kept, {"position_0": ~all_kept}, tokens, lambda ids: map(str, ids), 1e9)
    lane_bytes = options.gigabytes * 1e9 / options.lanes
    num_shards = max(1, round(lane_bytes / (options.shard_contexts * count * options.d_model * 2)))
    for lane in range(options.lanes):
        log = ProgressLog.open(store, lane)
        for shard in range(num_shards):
            with open_tar(tar_path(store, SITE.name, lane, shard), lane, shard) as tar:
                for _ in range(options.shard_contexts):
                    tar.add(context)
            sites = {SITE.name: SiteRecord(tar.record, found)}
            ends = Cursor(shard, 0, 0), Cursor(shard + 1, 0, 0)
            log.add(ShardRecord(lane, shard, options.shard_contexts, *ends, shard == num_shards - 1, sites))
    finish(store)


def drop_pages(paths: Sequence[Path]) -> None:
    """Have the next read of these files come from the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_raw(paths: Sequence[Path], block_bytes: int) -> float:
    """Bytes a second."""
    block, total, began = memoryview(bytearray(block_bytes)), 0, time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                total += count
    return total / (time.perf_counter() - began)


def open_stream(store: Path, options: argparse.Namespace, verify: bool) -> Stream:
    """A stream of all lanes, as one process opens it."""
    return Stream(store, SITE.name, range(options.lanes), options.batch_rows, options.window_rows, 0, verify, read_threads=options.threads)


def read_stream(stream: Stream, num_rows: int, options: argparse.Namespace) -> float:
    """Bytes of rows a second, from one batch to that which comes `num_rows` later."""
    began = time.perf_counter()
    for _ in range(num_rows // options.batch_rows):
        stream.next_batch()
    return num_rows // options.batch_rows * options.batch_rows * options.d_model * 2 / (time.perf_counter() - began)


def measure_warm(store: Path, paths: Sequence[Path], num_rows: int, block: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pages in memory, the stream running: what is read ahead is the same at both ends of a measurement."""
    rounds: list[tuple[float, float]] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_stream(store, options, verify=False) as stream:
        began = time.perf_counter()
        stream.next_batch()
        first_batch_seconds = time.perf_counter() - began
        read_stream(stream, 2 * options.window_rows, options)
        rounds += [(read_raw(paths, block), read_stream(stream, num_rows, options)) for _ in range(options.rounds)]
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        seeks = []
        for position in range(options.rounds):
            stream.seek((2 * position + 1) * options.window_rows // 2 // options.batch_rows * options.batch_rows)
            began = time.perf_counter()
            stream.next_batch()
            seeks.append(time.perf_counter() - began)
    windows = 2 * options.window_rows * options.d_model * 2
    return {
        **summary(rounds),
        "first_batch_seconds": round(first_batch_seconds, 2),
        "seek_seconds": round(statistics.median(seeks), 2),
        **first_epochs(store, num_rows, options),
        "memory_bytes": memory,
        "memory_over_two_windows": round(memory / windows, 2),
    }


def first_epochs(store: Path, num_rows: int, options: argparse.Namespace) -> dict[str, int]:
    """Bytes of rows a second, pages in memory, from the first call on: memory is new, and hashes are compared, or are not."""
    rates: dict[str, list[float]] = {"first_epoch_bytes_per_second": [], "first_epoch_verified_bytes_per_second": []}
    for _ in range(options.rounds):
        for (_, found), verify in zip(rates.items(), (False, True), strict=True):
            with open_stream(store, options, verify) as stream:
                found.append(read_stream(stream, num_rows, options))
    return {name: round(statistics.median(found)) for name, found in rates.items()}


def measure_cold(store: Path, paths: Sequence[Path], num_rows: int, block: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pages on the disk; from opening the stream to the last row of an epoch."""
    rounds = []
    for _ in range(options.rounds):
        drop_pages(paths)
        raw = read_raw(paths, block)
        drop_pages(paths)
        with open_stream(store, options, verify=False) as stream:
            rounds.append((raw, read_stream(stream, num_rows, options)))
    return summary(rounds)


def summary(rounds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians."""
    raw, stream = zip(*rounds, strict=True)
    return {
        "bytes_per_second": round(statistics.median(stream)),
        "raw_bytes_per_second": round(statistics.median(raw)),
        "ratio": round(statistics.median(ours / theirs for theirs, ours in rounds), 3),
    }


def main() -> None:
    """One line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=4.3)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--context-rows", type=int, default=1024)
    parser.add_argument("--shard-contexts", type=int, default=4)
    parser.add_argument("--batch-rows", type=int, default=4096)
    parser.add_argument("--window-rows", type=int, default=2**17)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    shape = (options.d_model, options.lanes, options.context_rows, options.shard_contexts, options.gigabytes)
    store = options.directory / "-".join(map(str, shape))
    if not (store / manifests.MANIFEST_FILE).exists():
        make_store(store, options)
    paths = sorted((store / SITE.name).glob("*.tar"))
    num_rows = manifests.load(store).sites[SITE.name].rows
    read_raw(paths, BLOCKS[0])
    block = max(BLOCKS, key=lambda size: max(read_raw(paths, size) for _ in range(2)))
    found = (measure_cold if options.cold else measure_warm)(store, paths, num_rows, block, options)
    setting = {
        "cold": options.cold,
        "d_model": options.d_model,
        "rows": num_rows,
        "window_rows": options.window_rows,
        "lanes": options.lanes,
    }
    print(json.dumps({**setting, **found, "threads": options.threads, "cpus": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    main()
