"""The stream of a harvested store on real ranks: 1, 2, 4, 8 and 16 processes that cut the lanes as training does."""

import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch.distributed as dist
import webdataset
from conftest import small_settings, write_config, write_text
from ranks import run, run_gsae

from gsae.store.manifest import load
from gsae.store.stream import Stream
from gsae.world import lanes_of, start

SITE, NUM_LANES, SEEDS = "resid.1", 16, (0, 1, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sixteen")
    write_text(folder / "text", num_documents=60)
    settings = small_settings(folder)
    settings["corpus"]["num_lanes"] = NUM_LANES
    settings["harvest"] |= {"sites": [1], "contexts_per_shard": 4}
    run_gsae(1, ["harvest", write_config(folder / "config.yaml", settings)])
    return folder / "runs/store"


def read_epochs(store: str, output: str, num_batches: int) -> None:
    """A rank: every row it is given until the longest lane has been read twice, as [lane, row, x], for each seed."""
    with start("cpu") as world:
        lanes = lanes_of(world.group, NUM_LANES)
        for seed in SEEDS:
            with Stream(Path(store), SITE, lanes, 4 * NUM_LANES, 640, seed, verify_shards=True) as stream:
                taken = [
                    [[lane, row, x] for lane, row, x in zip(batch.lane.tolist(), batch.row.tolist(), batch.x.tolist(), strict=True)]
                    for batch in (stream.next_batch() for _ in range(num_batches))
                ]
            Path(f"{output}-{seed}-{dist.get_rank()}.json").write_text(json.dumps(taken))


@cache
def rows_of(store: Path) -> dict[int, list[tuple[tuple, list[float]]]]:
    """Of each lane the rows in their own order, as webdataset reads them: (document, position, token, context), x."""
    rows = defaultdict(list)
    for lane in range(NUM_LANES):
        for path in sorted((store / SITE).glob(f"{lane:04d}-*.tar")):
            for member in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
                found = safetensors.torch.load(member["rows.safetensors"])
                names = zip(*(found[name].tolist() for name in ("document", "position", "token")), strict=True)
                rows[lane] += [((*name, member["__key__"]), x) for name, x in zip(names, found["x"].tolist(), strict=True)]
    return rows


def test_an_epoch_has_every_row_once_and_batches_are_the_same_on_1_to_16_ranks(store, tmp_path):
    wanted = rows_of(store)
    assert sum(map(len, wanted.values())) == load(store).sites[SITE].rows
    assert len({name for rows in wanted.values() for name, _ in rows}) > 0.9 * load(store).sites[SITE].rows, "names say little"
    num_batches = 2 * max(map(len, wanted.values())) // 4 + 1  # of 4 rows of each lane
    alone = {}
    for size in (1, 2, 4, 8, 16):
        run(size, read_epochs, str(store), str(tmp_path / str(size)), num_batches, timeout_seconds=300)
        for seed in SEEDS:
            ranks = [json.loads((tmp_path / f"{size}-{seed}-{rank}.json").read_text()) for rank in range(size)]
            batches = [sorted((row for part in parts for row in part), key=lambda row: row[0]) for parts in zip(*ranks, strict=True)]
            assert alone.setdefault(seed, batches) == batches, "row for row, lane by lane"
    assert alone[0] != alone[1] != alone[2]
    for batches in alone.values():
        handed_out = defaultdict(list)
        for lane, row, x in (row for batch in batches for row in batch):
            name, there = wanted[lane][row]
            assert x == there
            handed_out[lane].append((name, row))
        for lane, rows in wanted.items():
            assert len(handed_out[lane]) >= 2 * len(rows)
            for epoch in (0, 1):
                its = handed_out[lane][epoch * len(rows) : (epoch + 1) * len(rows)]
                assert Counter(name for name, _ in its) == Counter(name for name, _ in rows)
                assert len({row for _, row in its}) == len(rows)
