"""The lanes of a rank. In: the LLM, the store, the lanes. Out: their missing shards, written.

    documents -> pieces -> lanes -> contexts -> LLM batches -> kept rows -> shards
    '---- one shard read ahead, a thread ---'   main thread    '-- a thread a site --'

A rank reads the corpus once and deals its lanes' pieces to a packer a lane; whenever a lane has a shard's contexts, the LLM runs
over them. LLM batches are cut within a shard, so that its rows depend on nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch

from gsae.config import Config
from gsae.corpus.documents import Piece, open_bookmarks, read_pieces
from gsae.corpus.size import shards_a_lane
from gsae.harvest.pending import LaneShards, pending_shards, read_ahead
from gsae.harvest.rows import HarvestedBatch, LLMBatch, llm_batches
from gsae.harvest.writing import ShardWriter
from gsae.heartbeat import Heartbeat
from gsae.llm.load import LLM
from gsae.llm.lockstep import Lockstep
from gsae.llm.site import capture
from gsae.store.manifest import Layout
from gsae.store.progress import ProgressLog
from gsae.world import Group

BOOKMARKS_FILE = "bookmarks.json"
"""In the store while it is harvested: where in the corpus its documents are."""


def harvest_lanes(
    config: Config,
    llm: LLM,
    rows: Callable[[LLMBatch], HarvestedBatch],
    store: Path,
    layout: Layout,
    logs: Sequence[ProgressLog],
    group: Group,
    beats: Heartbeat,
    is_to_stop: Callable[[], bool],
) -> bool:
    """Harvest what the lanes of this rank lack: the next shard's text is read, and the last rows are written, while the LLM computes.

    All ranks call this. Counted are `tokens` computed, and `shards` and `bytes` on the disk.

    Args:
        config: the text, and the sizes of batches and shards.
        llm: truncated above the last site.
        rows: harvests a batch.
        store: its directory.
        layout: its sites.
        logs: of this rank's lanes.
        group: all ranks.
        beats: this rank's sign of life.
        is_to_stop: asked before each shard.

    Returns:
        Whether all that was missing is there: False when it was stopped before.
    """
    limit = shards_a_lane(config)
    missing = [LaneShards(log, llm.tokenizer, config, limit) for log in logs]
    lockstep = Lockstep(group, llm.zero3 is not None, lambda: _dummy_forward(llm, layout), lambda: beats.beat(turns=1))
    abandoned = Event()

    def on_entry() -> None:
        if abandoned.is_set():
            raise _AbandonedError
        beats.beat()

    pieces = _read_pieces(config, store, missing, on_entry)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="text") as reader,
        _set_at_end(abandoned),  # the reader is waited for, and a failure here is not to wait until it has found the next shard
        ShardWriter(store, [site.name for site in layout.sites], layout.d_model, beats) as writer,
    ):
        is_whole = True
        for shard in read_ahead(pending_shards(missing, pieces), reader):
            if is_to_stop():
                abandoned.set()  # the reader is at the next one
                is_whole = False
                break
            writer.begin(shard)
            for batch in llm_batches(shard.contexts, config.harvest.batch_contexts, llm):
                lockstep.before_forward()
                writer.add(rows(batch))
                beats.beat(tokens=batch.tokens.numel())
            writer.end()
        lockstep.finish()
    return is_whole


class _AbandonedError(Exception):
    """What ends the reading of text that nobody wants any more."""


@contextmanager
def _set_at_end(event: Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


def _read_pieces(config: Config, store: Path, missing: Sequence[LaneShards], on_entry: Callable[[], None]) -> Iterator[tuple[int, Piece]]:
    """The pieces of the lanes from the first that is needed on, each with the place of its lane among `missing`."""
    places = {lane.number: place for place, lane in enumerate(missing)}
    incomplete = [lane.first_document for lane in missing if not lane.is_complete]
    if not incomplete:
        return
    num_lanes = config.corpus.num_lanes
    pieces = read_pieces(
        config.corpus,
        "training",
        lambda document, piece: (document + piece) % num_lanes in places,
        first_document=min(incomplete),
        bookmarks=open_bookmarks(store / BOOKMARKS_FILE, config.corpus, "training"),
        on_entry=on_entry,
    )
    for piece in pieces:
        yield places[piece.lane(num_lanes)], piece


def _dummy_forward(llm: LLM, layout: Layout) -> None:
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=llm.model.device)
    capture(llm.model, layout.sites[-1:], tokens, torch.arange(2, device=tokens.device)[None])
