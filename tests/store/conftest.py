"""Small stores whose rows say which they are: x = (lane, row, site, context), exact in every storage type up to 256."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from made_up_shards import SiteRows, write_shard

from gsae.corpus.contexts import Cursor
from gsae.llm.site import Site
from gsae.store.encoding import encode
from gsae.store.finish import finish, write_calibration
from gsae.store.manifest import Layout, Manifest, begin
from gsae.store.progress import ProgressLog
from gsae.store.shards import ContextRows
from gsae.store.statistics import measure_rows, site_statistics

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
        stored = encode(x.float(), dtype)
        return ContextRows(stored.x, token=row % 7, position=row + 1, document=row // 3, row_scale=stored.row_scale)

    def shard(self, lane: int, first_row: int, context_rows: Sequence[int], dtype: str = "float32") -> dict[str, SiteRows]:
        """A shard at both sites; the second one keeps a row more of each context that has any."""
        sites = {}
        for site, described in enumerate(self.sites):
            row, contexts = first_row, []
            for context, num_rows in enumerate(context_rows):
                contexts.append(self.context(lane, row, num_rows + site if num_rows else 0, site, context, dtype))
                row += num_rows
            x = torch.cat([torch.ones(len(contexts), 4), *(context.encoded.decode() for context in contexts)])[None]
            kept = torch.arange(x.shape[1])[None] >= len(contexts)
            tokens = torch.zeros_like(kept, dtype=torch.int64)
            statistics = site_statistics(measure_rows(x, kept), kept, kept, {"position_0": ~kept}, tokens, lambda ids: map(str, ids), 100.0)
            sites[described.name] = SiteRows(contexts, statistics)
        return sites

    def write_lane(self, store: Path, lane: int, rows: LaneRows, dtype: str = "float32", stop_after: int | None = None) -> None:
        """Write, or go on writing, a lane."""
        log = ProgressLog.open(store, lane)
        missing = [gap.shard for gap in log.gaps] + list(range(log.next_index, len(rows) if stop_after is None else stop_after))
        for index in missing:
            shard = self.shard(lane, sum(map(sum, rows[:index])), rows[index], dtype)
            write_shard(log, shard, Cursor(index, 0, 0), Cursor(index + 1, 0, 0), last=index == len(rows) - 1, index=index)

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
