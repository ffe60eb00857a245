"""Stage 1: run the LLM over the training text and store its activations. In: a config, the ranks. Out: a whole activation store.

A store is claimed, the LLM loaded, the median norms taken from a fixed sample, the lanes harvested (`gsae.harvest.lanes`), and the
manifest written. What is written depends on neither the number of ranks nor on interruptions.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from gsae.config import Config
from gsae.console import Console, ProgressBar, open_console
from gsae.corpus.contexts import Context, Packer
from gsae.corpus.documents import corpus_identity, read_pieces
from gsae.corpus.size import expected_tokens, require_text_in_parts
from gsae.errors import CorpusError
from gsae.harvest.lanes import BOOKMARKS_FILE, harvest_lanes
from gsae.harvest.parts import config_of_visit, is_calibrated, next_visit, share_calibration, what_comes_next
from gsae.harvest.rows import RowHarvest, calibrate, llm_batches
from gsae.heartbeat import heartbeat
from gsae.llm.load import LLM, LLMInfo, describe, load
from gsae.llm.packing import prove_packing
from gsae.llm.site import resolve_sites
from gsae.sae.products import SLOW_BFLOAT16, is_quick_at_bfloat16
from gsae.store import finish, manifest
from gsae.store.durable import require_writable
from gsae.store.lease import clear, lease
from gsae.store.manifest import Layout
from gsae.store.parts import require_identity
from gsae.store.progress import ProgressLog
from gsae.store.statistics import no_rows
from gsae.store.stopping import CONTINUES, STOPPED_FILE, StopRequest
from gsae.world import Group, World, lanes_of


def run_harvest(config: Config, world: World) -> None:
    """Harvest what is missing of the config's store.

    Raises:
        ConfigError: a site is out of range, the ranks do not divide the lanes, or the store's directory cannot be written.
        CorpusError: the text is missing, or too short for the lanes.
        ModelError: the LLM cannot be loaded, or its attention does not keep segments apart.
        StoreError: the directory holds a store of other settings, or the disk is full.
        ConfigError: another job harvests into the store.
        GsaeError: a rank failed, or got no further for stall_timeout_seconds.
    """
    console, store = open_console(world.is_first), Path(config.store_directory)
    with world.everyone.together():
        info = describe(config.llm)
        layout = layout_of(config, info)
        identity = manifest.complete_identity(layout, _settings(config, info))
        require_identity(store, identity)
    with ExitStack() as holding, StopRequest("harvest", store).listening() as request:

        @cache
        def claim() -> LLM:
            """The LLM, and the store to itself; not before, since a setting that cannot be is not to claim the directory."""
            if config.llm.dtype == "bfloat16" and not is_quick_at_bfloat16(world.device):
                console.warn_once(SLOW_BFLOAT16)
            llm = _load_llm(config, layout, world)
            world.everyone.on_first(lambda: require_writable(store, "harvest.store"))
            holding.enter_context(lease(store, "harvest", "harvest.store", world.everyone, console.say))
            world.everyone.on_first(request.forget)
            return llm

        if config.corpus.parts == 1:
            _harvest_store(config, info, layout, claim, world, console, request)
            return
        while (visit := world.everyone.on_first(lambda: next_visit(config, info.num_layers))) is not None:
            _calibrate_parts(config, identity, layout, claim, world.everyone)
            world.everyone.on_first(partial(share_calibration, config, visit))
            if not _harvest_store(config_of_visit(config, visit), info, layout, claim, world, console, request):
                return
        console.say(world.everyone.on_first(lambda: what_comes_next(config)))


def _harvest_store(
    config: Config, info: LLMInfo, layout: Layout, claim: Callable[[], LLM], world: World, console: Console, request: StopRequest
) -> bool:
    """Harvest what is missing of one store; it is claimed, and the LLM loaded, only where something is. False when it was stopped."""
    group, store = world.everyone, Path(config.store_directory)
    with group.together():
        lanes = lanes_of(group, config.corpus.num_lanes)
        settings = _settings(config, info)
        manifest.check_identity(store, manifest.complete_identity(layout, settings))
    if group.on_first(lambda: _is_whole(store)):
        group.on_first(lambda: clear(store, "harvest"))
        console.say(f"harvest: the store {store} is whole, nothing to do")
        return True
    llm = claim()
    group.on_first(lambda: manifest.begin(store, layout, settings))
    median_norms = _median_norms(config, llm, layout, store, group)
    total = group.on_first(lambda: expected_tokens(config, lambda: llm.tokenizer))
    with group.together():
        logs = [ProgressLog.open(store, lane) for lane in lanes]
    before = _count_done(logs, config, group)
    rows = RowHarvest(config.harvest, llm, layout, median_norms)
    about_shards = total and total // shard_tokens(config)
    with (
        console.progress("harvest", total, "tokens", before.tokens) as bar,
        heartbeat(world, config.stall_timeout_seconds, _Display(bar, before, about_shards), "the harvest continues where it is") as beats,
    ):
        board = world.board("stop")
        is_whole = harvest_lanes(config, llm, rows, store, layout, logs, group, beats, lambda: request.is_left(board))
    if group.any(not is_whole):
        group.on_first(lambda: request.record(shards=before.shards + beats.totals().get("shards", 0)))
        console.say(f"harvest: {CONTINUES} ({store / STOPPED_FILE})")
        return False
    group.on_first(lambda: _finish(store, console))
    return True


def _calibrate_parts(config: Config, identity: dict[str, Any], layout: Layout, claim: Callable[[], LLM], group: Group) -> None:
    """Take what all parts share, unless that has been done: norms, means and scales of the calibration sample of the whole corpus."""
    store = Path(config.store_directory)
    if group.on_first(lambda: is_calibrated(store)):
        return
    group.on_first(lambda: require_text_in_parts(config.corpus))
    llm = claim()
    median_norms = _median_norms(config, llm, layout, store, group)
    rows = RowHarvest(config.harvest, llm, layout, median_norms)
    totals = {site.name: no_rows(layout.d_model) for site in layout.sites}
    with group.together():
        contexts = calibration_contexts(config, llm)
    with group.together():
        for batch in llm_batches(contexts, config.harvest.batch_contexts, llm):
            harvested = rows(batch)
            for name in totals:
                totals[name] += harvested.rows_of(name)[1]
    group.on_first(lambda: finish.write_manifest(store, identity, totals, median_norms, lanes=()))


def _load_llm(config: Config, layout: Layout, world: World) -> LLM:
    """The LLM up to its last site, on all ranks, with proof that it keeps segments apart."""
    last = layout.sites[-1]
    with world.everyone.together():
        llm = load(config.llm, world.device, last_layer=last.layer, group=world.everyone)
        prove_packing(llm, last, config.harvest.packed)
    return llm


@dataclass(frozen=True)
class _Done:
    """What is in a store, at all of its lanes."""

    tokens: int
    """That the LLM computed for it."""
    shards: int


def _count_done(logs: Sequence[ProgressLog], config: Config, group: Group) -> _Done:
    whole = [shard for log in logs for shard in log.shards]
    tokens = sum(shard.contexts for shard in whole) * config.harvest.context_length
    return _Done(*(sum(each) for each in zip(*group.gather_objects((tokens, len(whole))), strict=True)))


class _Display:
    """Shows the counts of all ranks as they come in."""

    def __init__(self, bar: ProgressBar, before: _Done, about_shards: int | None) -> None:
        self._bar, self._before, self._about_shards = bar, before, about_shards
        self._start = time.monotonic()

    def __call__(self, totals: Mapping[str, int]) -> None:
        seconds = max(time.monotonic() - self._start, 1e-3)
        shards = self._before.shards + totals.get("shards", 0)
        of_all = "" if self._about_shards is None else f" of about {max(shards, self._about_shards)}"
        speed = f"{totals.get('bytes', 0) / 1e6 / seconds:.3g} MB/s"
        self._bar.show(self._before.tokens + totals.get("tokens", 0), f"{speed}, {shards}{of_all} shards")


def shard_tokens(config: Config) -> int:
    """Tokens that the LLM computes for a full shard."""
    return config.harvest.contexts_per_shard * config.harvest.context_length


def layout_of(config: Config, info: LLMInfo) -> Layout:
    """The sites of the config in this LLM, and how their rows are stored."""
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
        **({} if harvest.packed else {"packed": False}),  # left out where it is as usual, so that older stores are known again
    }


def _is_whole(store: Path) -> bool:
    """Whether nothing is left to do; the directory is made where it is missing."""
    require_writable(store, "harvest.store")
    return finish.is_finished(store)


def _median_norms(config: Config, llm: LLM, layout: Layout, store: Path, group: Group) -> dict[str, float]:
    """The median norm of each site; taken once, then read from the store, so that a resumed harvest masks by the same ones."""
    known = group.on_first(lambda: finish.read_calibration(store))
    if known is not None:
        return known
    with group.together():  # reading may fail on one rank alone; forwards may be collectives
        contexts = calibration_contexts(config, llm)
    with group.together():
        median_norms = calibrate(contexts, config.harvest, llm, layout.sites)
    median_norms = group.broadcast_object(median_norms)
    group.on_first(lambda: finish.write_calibration(store, median_norms))
    return median_norms


def calibration_contexts(config: Config, llm: LLM) -> list[Context]:
    """A fixed sample: the first pieces of the first documents, packed."""
    packer = Packer(llm.tokenizer, config.harvest.context_length, packed=config.harvest.packed)
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


def _finish(store: Path, console: Console) -> None:
    whole = finish.finish(store)
    for left_over in store.glob(f"{BOOKMARKS_FILE}*"):
        left_over.unlink()  # nothing is left to resume
    for line in finish.warnings(whole):
        console.warn(line)
    rows = ", ".join(f"{site.name} {site.rows:,} rows (scale {site.scale:.4g})" for site in whole.sites.values())
    console.say(f"harvest: store {store} is whole: {rows}")
