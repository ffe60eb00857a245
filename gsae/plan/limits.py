"""What will not fit, and which setting mends it. In: a config, its budget. Out: one line for each."""

from collections.abc import Iterator
from dataclasses import replace

from gsae.config import Config
from gsae.plan.budget import Budget
from gsae.plan.disk import smallest_parts, store_size
from gsae.plan.units import gib


def warnings(config: Config, found: Budget) -> list[str]:
    """The lines, without a full stop."""
    parts = (_text, _ranks, _disk, _harvest, _train, _evaluation)
    return [line for part in parts for line in part(config, found)]


def _text(config: Config, found: Budget) -> Iterator[str]:
    lanes, empty = config.corpus.num_lanes, found.harvest.empty_lanes
    if empty:
        yield f"{empty} of {lanes} lanes get no text; lower corpus.num_lanes or corpus.piece_characters, or give more text"
    elif found.store.parts > min(lane.contexts for lane in found.text.lanes):
        yield f"corpus.parts ({found.store.parts}) leaves a lane under a context a part; lower it, or corpus.num_lanes ({lanes})"


def _ranks(config: Config, found: Budget) -> Iterator[str]:
    ranks, lanes, groups = found.llm.ranks, config.corpus.num_lanes, config.train.groups
    if lanes % ranks:
        yield f"{ranks} ranks do not divide corpus.num_lanes ({lanes}), so the harvest is refused; give --ranks that do, or set num_lanes"
    if ranks % groups:
        yield f"train.groups ({groups}) does not divide {ranks} ranks, so training is refused; set it to a divisor"
    elif (ranks // groups) % config.train.feature_ranks:
        of_group = f"{ranks // groups} ranks of a group"
        yield f"train.feature_ranks ({config.train.feature_ranks}) does not divide the {of_group}, so training is refused; set a divisor"
    queue = found.train.queue
    if queue.idle_groups:
        first, last = queue.idle_groups[0], queue.idle_groups[-1]
        idle = f"group {first} gets" if first == last else f"groups {first} to {last} get"
        cure = f"set train.groups {queue.sooner.groups}" if queue.sooner else "start fewer ranks, or train more sites"
        yield f"train.groups ({groups}) is more than the sites ({found.train.sites}), so {idle} none; {cure}"


def _disk(config: Config, found: Budget) -> Iterator[str]:
    store, disk = found.store, found.disk
    for_store = disk.store_free_bytes - (disk.checkpoint_bytes if disk.is_shared else 0)
    if store.bytes_missing > max(0, for_store):
        beside = f", {gib(disk.checkpoint_bytes)} of that for checkpoints" if disk.is_shared else ""
        cures = _store_cures(config, found, for_store)
        yield (
            f"the store will not fit: {gib(store.bytes_missing)} are to be written and {gib(disk.store_free_bytes)} are free at "
            f"{store.directory}{beside}; {', '.join(cures)}, or put harvest.store on a larger disk"
        )
    if disk.checkpoint_bytes > disk.output_free_bytes:
        yield (
            f"the checkpoints will not fit: {gib(disk.checkpoint_bytes)} for {found.train.runs} runs, {gib(disk.output_free_bytes)} are "
            f"free at {config.output}; lower train.keep_checkpoints ({config.train.keep_checkpoints}), ask for fewer runs or smaller "
            "expansions in train.sweeps, or put output on a larger disk"
        )


def _store_cures(config: Config, found: Budget, for_store: int) -> Iterator[str]:
    store, length = found.store, found.harvest.context_length
    share = max(0, for_store) / store.bytes_missing
    tokens_a_round = config.corpus.num_lanes * config.harvest.contexts_per_shard * length
    rounds = int(found.harvest.computed_tokens * share) // tokens_a_round
    if rounds:
        yield f"set harvest.max_tokens {rounds * tokens_a_round}"
    if len(store.sites) > 1:
        yield f"name fewer harvest.sites ({gib(store.bytes_per_site)} each)"
    if config.harvest.storage_dtype != "int8":
        smaller = replace(config, harvest=replace(config.harvest, storage_dtype="int8"))
        size = store_size(smaller, store.sites, found.shape.d_model, found.text)
        yield f"set harvest.storage_dtype int8 ({gib(size.bytes_at_once)})"
    parts = smallest_parts(config, len(store.sites), found.shape.d_model, found.text, for_store + store.bytes_present)
    if parts is not None:
        yield f"set corpus.parts {parts}"


def _harvest(config: Config, found: Budget) -> Iterator[str]:
    llm, machine = found.llm, found.machine
    free = found.free_bytes_per_rank
    if llm.harvest_bytes_per_rank > free:
        cures = ", ".join([*_llm_cures(config, found, free), f"or take {'GPUs' if found.computes_on_gpus else 'a host'} with more memory"])
        yield f"the LLM will not fit for the harvest: {gib(llm.harvest_bytes_per_rank)} a rank, {_free(found)}; {cures}"
    in_host = llm.share_bytes_zero3 * machine.ranks_here(llm.ranks)
    if config.llm.offload and machine.gpu_free_bytes and in_host > machine.host_free_bytes:
        free_there = gib(machine.host_free_bytes)
        yield f"llm.offload puts {gib(in_host)} into this host's memory, {free_there} are free; spread the ranks over more hosts"


def _llm_cures(config: Config, found: Budget, free: int) -> Iterator[str]:
    llm, batch = found.llm, config.harvest.batch_contexts
    per_context = llm.activation_bytes // batch
    held = llm.harvest_bytes_per_rank - llm.activation_bytes
    if held + per_context <= free:
        yield f"set harvest.batch_contexts {(free - held) // per_context} or less"
    if llm.sharding == "replicate" and llm.bytes_per_rank_zero3 + llm.activation_bytes <= free:
        yield "set --llm.sharding zero3"
    elif found.computes_on_gpus:
        yield from _sharding_cures(config, found, free)
    elif llm.sharding == "replicate" and llm.harvest_bytes_per_rank <= found.machine.host_free_bytes:
        yield f"start {found.machine.host_free_bytes // llm.harvest_bytes_per_rank} ranks or fewer"
    if config.llm.dtype in ("float32", "float64"):
        yield "set llm.dtype bfloat16"


def _sharding_cures(config: Config, found: Budget, free: int) -> Iterator[str]:
    """How more GPUs, or the host, may hold an LLM that is too large for so many."""
    llm = found.llm
    room = free - llm.gathered_bytes_zero3 - llm.activation_bytes
    if room <= 0:
        return
    also = "" if llm.sharding == "zero3" else " with --llm.sharding zero3"
    yield f"start {-(-llm.share_bytes_zero3 * llm.ranks // room)} ranks or more{also}"
    if not config.llm.offload:
        yield f"set --llm.offload true{also}"


def _train(config: Config, found: Budget) -> Iterator[str]:
    train, machine = found.train, found.machine
    free = found.free_bytes_per_rank
    fewer = "ask for fewer runs a site, or smaller expansions, in train.sweeps"
    windows, snapshot = f"lower train.window_rows ({config.train.window_rows})", train.snapshot_bytes_per_rank
    on_device = {"lower train.micro_batch_rows": train.features_bytes_per_rank, fewer: train.state_bytes_per_rank}
    on_device["leave out train.evaluate_every_fraction"] = train.probe_bytes_per_rank
    if found.computes_on_gpus and not found.is_assumed:
        here = machine.ranks_here(found.llm.ranks)
        first_ranks = -(-here // train.ranks_per_group)
        readers = -(-here * train.readers.configured.ranks_per_group // train.ranks_per_group)
        if train.readers.other.ranks_per_group < train.readers.configured.ranks_per_group:
            windows = f"set train.shared_reads true, or {windows}"
        in_host = {windows: readers * train.window_bytes_per_rank, fewer: first_ranks * train.snapshot_bytes_per_group}
        needed = sum(in_host.values())
        if needed > machine.host_free_bytes:
            yield (
                f"the windows and checkpoints of training will not fit: {gib(needed)} on this host, {gib(machine.host_free_bytes)} are "
                f"free; {_largest_first(in_host)}"
            )
    elif not found.computes_on_gpus:
        on_device[fewer] += snapshot
        on_device[windows] = train.window_bytes_per_rank
    needed = sum(on_device.values())
    if needed > free:
        grid = None if train.grids is None else train.grids.chosen
        is_cure = grid is not None and grid.fits and grid.feature_ranks != train.feature_ranks
        split = f"set train.feature_ranks {grid.feature_ranks}, or " if grid is not None and is_cure else ""
        yield f"training will not fit: {gib(needed)} a rank, {_free(found)}; {split}{_largest_first(on_device)}"


def _largest_first(cures: dict[str, int]) -> str:
    """The cures for what takes a tenth of all or more, by the bytes that each is for."""
    large = [cure for cure in cures if cures[cure] > sum(cures.values()) // 10]
    return ", or ".join(sorted(large, key=lambda cure: -cures[cure]))


def _evaluation(config: Config, found: Budget) -> Iterator[str]:
    needed, free = found.llm.evaluation_bytes_per_rank, found.free_bytes_per_rank
    if needed > free:
        cures = [f"lower evaluate.batch_contexts ({config.evaluate.batch_contexts})"]
        if found.evaluation_feature_ranks is not None:
            cures.insert(0, f"evaluate with --train.feature_ranks {found.evaluation_feature_ranks}")
        if not found.computes_on_gpus:
            cures.append("start fewer ranks a host")
        yield (
            f"the evaluation will not fit: it holds the LLM whole on each rank, {gib(needed)}, {_free(found)}; "
            f"{', '.join(cures)}, or evaluate where there is more memory"
        )
    elif found.llm.sharding == "zero3":
        yield "the evaluation holds the LLM whole on each rank; run it with --llm.sharding replicate"


def _free(found: Budget) -> str:
    """What a rank has where it computes."""
    free = gib(found.free_bytes_per_rank)
    if found.is_assumed:
        return f"--memory-gibibytes gives {free}"
    if found.computes_on_gpus:
        return f"{free} are free on a GPU of this host"
    return f"{free} are free " + ("on this host" if found.llm.ranks == 1 else f"here for each of {found.llm.ranks} ranks")
