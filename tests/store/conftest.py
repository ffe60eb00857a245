"""Small stores whose rows say which they are: x = (lane, row, site, context), exact in every storage type up to 256."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from gsae.corpus.contexts import Cursor
from gsae.llm.site import Site
from gsae.store.finish import finish, write_calibration
from gsae.store.manifest import Layout, Manifest, begin
from gsae.store.progress import ProgressLog, SiteRows, write_shard
from gsae.store.shards import DTYPES, ContextRows
from gsae.store.statistics import site_statistics

LaneRows = Sequence[Sequence[int]]
"""Rows of each context of each shard of a lane."""


class Stores:
    """Makes them, as a harvest does."""

    sites = (Site(name="resid.0", layer=0, module="model.layers.0"), Site(name="resid.2", layer=2, module="model.layers.2"))

    def layout(self, num_lanes: int, dtype: str = "float32") -> Layout:
        return Layout(self.sites, d_model=4, num_lanes=num_lanes, context_length=16, dtype=dtype, outlier_multiple=3.0)

    def begin(self, store: Path, num_lanes: int, dtype: str = "float32") -> None:
        begin(store, self.layout(num_lanes, dtype), {"corpus": {"seed": 0, "format": "text"}})
        write_calibration(store, {site.name: 100.0 for site in self.sites})

    def context(self, lane: int, first_row: int, num_rows: int, site: int = 0, context: int = 0, dtype: str = "float32") -> ContextRows:
        row = torch.arange(first_row, first_row + num_rows, dtype=torch.int32)
        x = torch.stack((torch.full_like(row, lane), row, torch.full_like(row, site), torch.full_like(row, context)), dim=1)
        return ContextRows(x.to(DTYPES[dtype]), token=row % 7, position=row + 1, document=row // 3)

    def shard(self, lane: int, first_row: int, context_rows: Sequence[int], dtype: str = "float32") -> dict[str, SiteRows]:
        """A shard at both sites; the second one keeps a row more of each context that has any."""
        sites = {}
        for site, described in enumerate(self.sites):
            row, contexts = first_row, []
            for context, num_rows in enumerate(context_rows):
                contexts.append(self.context(lane, row, num_rows + site if num_rows else 0, site, context, dtype))
                row += num_rows
            x = torch.cat([torch.empty(0, 4, dtype=DTYPES[dtype]), *(context.x for context in contexts)])
            statistics = site_statistics(x, torch.ones(len(x), dtype=torch.bool), 100.0, {"position_0": len(contexts)})
            sites[described.name] = SiteRows(contexts, statistics)
        return sites

    def write_lane(self, store: Path, lane: int, rows: LaneRows, dtype: str = "float32", stop_after: int | None = None) -> None:
        """Write, or go on writing, a lane."""
        log = ProgressLog.open(store, lane)
        for index in range(log.next_index, len(rows) if stop_after is None else stop_after):
            shard = self.shard(lane, sum(map(sum, rows[:index])), rows[index], dtype)
            write_shard(log, shard, Cursor(index, 0, 0), Cursor(index + 1, 0, 0), last=index == len(rows) - 1)

    def build(self, store: Path, lanes: Sequence[LaneRows], dtype: str = "float32") -> Manifest:
        """A whole store."""
        self.begin(store, len(lanes), dtype)
        for lane, rows in enumerate(lanes):
            self.write_lane(store, lane, rows, dtype)
        return finish(store)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Hundreds of small files; test_durable.py holds that they are fsynced, and when."""
    with patch("os.fsync"):
        yield


@pytest.fixture(scope="session")
def stores() -> Stores:
    return Stores()
