"""Stage 1: run the LLM over the training text and store its activations. In: a config, the ranks. Out: a whole activation store.

    documents -> pieces -> lanes -> contexts -> LLM batches -> kept rows -> shards

A rank reads the corpus once and deals its lanes' pieces to a packer a lane; whenever a lane has a shard's contexts, the LLM runs
over them. What is written depends on neither the number of ranks nor on interruptions: LLM batches are cut within a shard.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae.config import Config
from gsae.console import Console, open_console
from gsae.corpus.contexts import Context, Packer
from gsae.corpus.documents import Piece, corpus_identity, open_bookmarks, read_pieces
from gsae.corpus.size import expected_tokens, shards_a_lane
from gsae.errors import CorpusError
from gsae.harvest.rows import ShardRows, calibrate
from gsae.llm.load import LLM, LLMInfo, describe, load
from gsae.llm.site import resolve_sites
from gsae.store import finish, manifest
from gsae.store.durable import require_writable
from gsae.store.manifest import Layout
from gsae.store.progress import ProgressLog, write_shard
from gsae.world import Group, World, lanes_of

BOOKMARKS_FILE = "bookmarks.json"
"""In the store while it is harvested: where in the corpus its documents are."""


def run_harvest(config: Config, world: World) -> None:
    """Harvest what is missing of the config's store.

    Raises:
        ConfigError: a site is out of range, the ranks do not divide the lanes, or the store's directory cannot be written.
        CorpusError: the text is missing, or too short for the lanes.
        ModelError: the LLM cannot be loaded.
        StoreError: the directory holds a store of other settings.
    """
    group, store = world.everyone, Path(config.store_directory)
    console = open_console(world.is_first)
    with group.together():
        info = describe(config.llm)
        layout = _layout(config, info)
        lanes = lanes_of(group, config.corpus.num_lanes)
        settings = _settings(config, info)
        manifest.check_identity(store, manifest.complete_identity(layout, settings))
    if group.on_first(lambda: _claim(store, layout, settings)):
        console.say(f"harvest: the store {store} is whole, nothing to do")
        return
    with group.together():
        llm = load(config.llm, world.device, last_layer=layout.sites[-1].layer)
    median_norms = _median_norms(config, llm, layout, store, group)
    total_tokens = group.on_first(lambda: expected_tokens(config, lambda: llm.tokenizer))
    _harvest_lanes(config, llm, ShardRows(config.harvest, llm, layout, median_norms), store, lanes, total_tokens, group, console)
    world.wait_for_all("harvested")
    group.on_first(lambda: _finish(store, console))


def _layout(config: Config, info: LLMInfo) -> Layout:
    harvest = config.harvest
    sites = tuple(resolve_sites(harvest.sites, info.num_layers))
    return Layout(sites, info.d_model, config.corpus.num_lanes, harvest.context_length, harvest.storage_dtype, harvest.outlier_multiple)


def _settings(config: Config, info: LLMInfo) -> dict[str, Any]:
    """What decides the rows, besides the layout."""
    harvest = config.harvest
    corpus = {key: value for key, value in corpus_identity(config.corpus).items() if key != "num_lanes"}
    return {
        "num_layers": info.num_layers,
        "llm": {**info.identity, "dtype": config.llm.dtype, "attention": config.llm.attention},
        "corpus": corpus,
        "split": "training",
        "contexts_per_shard": harvest.contexts_per_shard,
        "batch_contexts": harvest.batch_contexts,
        "max_tokens": harvest.max_tokens,
        "calibration_contexts": harvest.calibration_contexts,
    }


def _claim(store: Path, layout: Layout, settings: dict[str, Any]) -> bool:
    """Make the directory this store's; whether it is whole already."""
    require_writable(store, "harvest.store")
    manifest.begin(store, layout, settings)
    return finish.is_finished(store)


def _median_norms(config: Config, llm: LLM, layout: Layout, store: Path, group: Group) -> dict[str, float]:
    """The median norm of each site; taken once, then read from the store, so that a resumed harvest masks by the same ones."""
    known = group.on_first(lambda: finish.read_calibration(store))
    if known is not None:
        return known
    with group.together():
        median_norms = calibrate(_calibration_contexts(config, llm), config.harvest, llm, layout.sites)
    median_norms = group.broadcast_object(median_norms)
    group.on_first(lambda: finish.write_calibration(store, median_norms))
    return median_norms


def _calibration_contexts(config: Config, llm: LLM) -> list[Context]:
    """A fixed sample: the first pieces of the first documents, packed."""
    packer = Packer(llm.tokenizer, config.harvest.context_length)
    contexts: list[Context] = []
    for piece in read_pieces(config.corpus, "training", lambda document, piece: piece == 0):
        contexts += packer.push(piece)
        if len(contexts) >= config.harvest.calibration_contexts:
            break
    else:
        contexts += packer.finish()
    if not contexts:
        raise CorpusError(f"the training text of {config.corpus.path!r} is empty; check corpus.path and corpus.format")
    return contexts[: config.harvest.calibration_contexts]


def _harvest_lanes(
    config: Config, llm: LLM, rows: ShardRows, store: Path, lanes: Sequence[int], total_tokens: int, group: Group, console: Console
) -> None:
    """Harvest the lanes of this rank; the bar counts all ranks, taking the others to be as far as this one."""
    logs = [ProgressLog.open(store, lane) for lane in lanes]
    tokens_a_context = config.harvest.context_length * group.size
    done = sum(record.contexts for log in logs for record in log.records()) * tokens_a_context
    with console.progress("harvest", max(total_tokens, done), "tokens", done) as bar:
        for shard in _pending_shards(config, llm, [log for log in logs if not log.is_finished]):
            start, end = shard.contexts[0].start, shard.contexts[-1].end
            write_shard(shard.log, rows(shard.contexts), start, end, shard.last)
            bar.advance(len(shard.contexts) * tokens_a_context)


@dataclass(frozen=True)
class _PendingShard:
    """Contexts of the next shard of a lane, before the LLM has seen them."""

    log: ProgressLog
    contexts: list[Context]
    last: bool
    """Whether the lane ends with it."""


@dataclass
class _Lane:
    """A lane that is being packed."""

    log: ProgressLog
    packer: Packer
    waiting: list[Context]
    """Contexts of the next shard, and of the one after it once that has begun."""


def _pending_shards(config: Config, llm: LLM, logs: Sequence[ProgressLog]) -> Iterator[_PendingShard]:
    """The shards that are missing, as the corpus is read; a shard is given only once it is known whether it is its lane's last."""
    harvest, num_lanes = config.harvest, config.corpus.num_lanes
    size, limit = harvest.contexts_per_shard, shards_a_lane(config)
    lanes = {log.lane: _Lane(log, Packer(llm.tokenizer, harvest.context_length, log.cursor), []) for log in logs}
    pieces: Iterable[Piece] = ()
    if lanes:
        pieces = read_pieces(
            config.corpus,
            "training",
            lambda document, piece: (document + piece) % num_lanes in lanes,
            first_document=min(log.cursor.document if log.cursor else 0 for log in logs),
            bookmarks=open_bookmarks(logs[0].store / BOOKMARKS_FILE, config.corpus, "training"),
        )
    for piece in pieces:
        lane = lanes[piece.lane(num_lanes)]
        lane.waiting += lane.packer.push(piece)
        while len(lane.waiting) > size or (lane.log.next_index + 1 == limit and len(lane.waiting) == size):
            last = lane.log.next_index + 1 == limit
            shard, lane.waiting = lane.waiting[:size], lane.waiting[size:]
            yield _PendingShard(lane.log, shard, last)
            if last:
                del lanes[lane.log.lane]
                break
        if not lanes:
            return
    for number, lane in lanes.items():
        remaining = lane.waiting + lane.packer.finish()
        if not remaining:
            raise CorpusError(
                f"lane {number} has no text; lower corpus.num_lanes ({num_lanes}) or corpus.piece_characters, or give more text"
            )
        for start in range(0, len(remaining), size):
            yield _PendingShard(lane.log, remaining[start : start + size], start + size >= len(remaining))


def _finish(store: Path, console: Console) -> None:
    whole = finish.finish(store)
    for left_over in store.glob(f"{BOOKMARKS_FILE}*"):
        left_over.unlink()  # nothing is left to resume
    for line in finish.warnings(whole):
        console.warn(line)
    rows = ", ".join(f"{site.name} {site.rows:,} rows (scale {site.scale:.4g})" for site in whole.sites.values())
    console.say(f"harvest: store {store} is whole: {rows}")
