"""A budget as people and machines read it. In: a budget and its warnings. Out: aligned lines, or one JSON object."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from gsae.plan.budget import Budget
from gsae.plan.readers import Readers
from gsae.plan.training import TrainingNeeds
from gsae.plan.units import counted, gib, hours

SHOWN_GROUPS = 8
"""Groups that have a line each."""
SHOWN_TURNS = 6
"""Sites that a line names."""
Line = tuple[str, str]
"""What a line is about, and what it says."""


def lines(found: Budget, warnings: list[str], submission: Iterable[Line] = ()) -> list[str]:
    """The lines, in groups; the first line of each names it. `submission` is one more."""
    groups = {"harvest": _harvest(found), "store": _store(found), "LLM": _llm(found), "train": _train(found), "slurm": submission}
    shown = []
    for name, group in groups.items():
        for number, (label, text) in enumerate(group):
            shown.append(f"{name if number == 0 else '':<9}{label:<12}{text}")
    return shown + [f"warning: {warning}" for warning in warnings]


def as_json(found: Budget, warnings: list[str], jobs: list[dict[str, Any]]) -> str:
    """All figures; bytes, tokens, rows and hours as their names say."""
    figures: dict[str, Any] = {name: asdict(getattr(found, name)) for name in ("harvest", "store", "disk", "llm", "train", "machine")}
    figures["store"]["bytes_missing"] = found.store.bytes_missing
    figures["llm"]["harvest_bytes_per_rank"] = found.llm.harvest_bytes_per_rank
    figures["train"]["hours"] = found.train.hours
    return json.dumps({**figures, **({"slurm": jobs} if jobs else {}), "warnings": warnings}, indent=1)


def _harvest(found: Budget) -> Iterator[Line]:
    harvest = found.harvest
    sample = "all" if harvest.sampled_pieces == harvest.pieces else f"{harvest.sampled_pieces:,}"
    yield "text", f"{harvest.documents:,} documents in {harvest.pieces:,} pieces, {harvest.characters:,} characters read"
    yield "tokens", f"about {harvest.text_tokens:,} of text, at {harvest.characters_per_token:.2f} characters each in {sample} pieces"
    parts = f"text, {harvest.bos_tokens:,} BOS and {harvest.padding_tokens:,} of padding"
    yield "computed", f"about {harvest.computed_tokens:,} tokens in {harvest.contexts:,} contexts of {harvest.context_length}: {parts}"
    if harvest.hours is None:
        yield "time", "give --tokens-per-second, or --measure to take it on this machine"
    else:
        assert harvest.tokens_per_second is not None
        source = f", measured on one rank and taken for each of {found.llm.ranks}" if harvest.is_measured else ""
        passes = f" for {found.train.visits:,} parts" if found.store.parts > 1 else ""
        yield "time", f"{hours(harvest.hours)}{passes} at {harvest.tokens_per_second:,.0f} tokens/s{source}; writing runs beside it"


def _store(found: Budget) -> Iterator[Line]:
    store, disk = found.store, found.disk
    yield "rows", f"about {store.rows_per_site:,} a site: all text but first rows and special tokens; outliers are not taken off"
    row = f"{store.bytes_per_row:,} bytes a row, as {store.storage_dtype}"
    yield "bytes", f"about {gib(store.bytes_per_site)} a site, {gib(store.bytes)} at {', '.join(store.sites)}; {row}"
    yield "shards", f"about {store.shards_per_site:,} a site, {store.shards:,} in all, of {gib(store.bytes_per_shard)}"
    if store.parts > 1:
        once = f"{gib(store.bytes_at_once)} at most at once"
        yield "parts", f"{store.parts} of {gib(store.bytes_per_part)}, {once}; a run reads {found.train.visits:,} one after another"
    present = f", {gib(store.bytes_present)} of it there already" if store.bytes_present else ""
    yield "disk", f"{gib(store.bytes_at_once)} at {store.directory}{present}; {gib(disk.store_free_bytes)} free"
    shared = "the same disk" if disk.is_shared else "another disk"
    yield "checkpoints", f"{gib(disk.checkpoint_bytes)} on {shared}; {gib(disk.output_free_bytes)} free"


def _llm(found: Budget) -> Iterator[Line]:
    llm, machine = found.llm, found.machine
    loaded = f"{llm.harvest_parameters:,} in {llm.loaded_layers} of {llm.num_layers} layers for the harvest"
    yield "parameters", f"{loaded}, {llm.parameters:,} in all, {llm.dtype}"
    replicate, zero3, gathered = map(gib, (llm.bytes_per_rank_replicate, llm.bytes_per_rank_zero3, llm.gathered_bytes_zero3))
    yield (
        "memory",
        f"{replicate} a rank with replicate; {zero3} with zero3 on {counted(llm.ranks, 'rank')}, {gathered} of it gathered",
    )
    yield "batch", f"about {gib(llm.activation_bytes)} for one LLM batch; {gib(llm.harvest_bytes_per_rank)} a rank with {llm.sharding}"
    if llm.sharding == "zero3":
        yield "network", f"{gib(llm.bytes_received_per_forward_zero3)} to each rank for each LLM batch"
    yield "evaluation", f"about {gib(llm.evaluation_bytes_per_rank)} a rank: the whole LLM, logits, the SAEs of all runs"
    gpus = ", ".join(gib(free) for free in machine.gpu_free_bytes)
    yield "free here", f"{gib(machine.host_free_bytes)} on this host" + (f"; on its GPUs {gpus}" if gpus else "")


def _train(found: Budget) -> Iterator[Line]:
    train = found.train
    rows = f"{counted(train.runs, 'run')} of {train.steps_per_run:,} steps of {train.batch_rows} rows = {train.rows_per_run:,} rows"
    yield "runs", f"{rows}, {train.passes:.2f} passes over the store"
    if train.warm_runs:
        yield "warm start", f"{train.warm_runs:,} of them begin from the weights of another and take {train.steps_per_warm_run:,} steps"
    if train.pilots:
        share = train.pilot_rows / train.rows_per_run
        yield (
            "pilots",
            f"at least {counted(train.pilots, 'short run')} for train.target_l0: {share:.0%} of a site's time for its runs",
        )
    parts = f"{gib(train.state_bytes_per_rank)} of weights and optimizer, {gib(train.features_bytes_per_rank)} of features"
    if train.probe_bytes_per_rank:
        parts += f", {gib(train.probe_bytes_per_rank)} of the LLM for train.evaluate_every_fraction"
    group = f"the largest site on {counted(train.ranks_per_group, 'rank')}"
    yield "memory", f"about {gib(train.device_bytes_per_rank)} a rank where it computes, for {group}: {parts}"
    writers = "a group's first rank" if train.feature_ranks == 1 else f"{train.feature_ranks} ranks of a group"
    snapshot = f"{gib(train.snapshot_bytes_per_group)} on {writers} for the checkpoint that is being written"
    yield "host memory", f"about {gib(train.window_bytes_per_rank)} a rank for windows, and {snapshot}"
    yield "network", _network(found)
    yield from _grids(found)
    yield from _groups(found)
    if train.hours is None:
        yield "time", "give --rows-per-second, as gsae train shows it for the runs of a site"
    else:
        yield "time", f"{hours(train.hours)} for {counted(train.sites, 'site')} on {counted(train.groups, 'group')}"


def _network(found: Budget) -> str:
    told, ranks = found.train.communication, found.train.ranks_per_group
    if ranks == 1:
        return "nothing: a rank alone in its group has nobody to talk to"
    parts = {"gradients": told.gradient_bytes_per_step, "reconstructions": told.feature_bytes_per_step, "rows": told.row_bytes_per_step}
    summed = ", ".join(f"{gib(size)} of {name}" for name, size in parts.items() if size) or "nothing of gradients"
    tensors = f"{summed} and {gib(round(told.chore_bytes_per_step))} of chores a step"
    sent, seconds = told.sent_bytes_per_step, told.seconds_per_step
    time = "" if seconds is None else f", in {1000 * seconds:,.1f} ms at {sent / seconds / 1e9:g} GB/s"
    return f"{tensors} over {ranks} ranks: each sends {gib(round(sent))}{time}"


def _grids(found: Budget) -> Iterator[Line]:
    """What each way to share rows and features takes, and which is best; nothing where there is only one."""
    train = found.train
    if train.grids is None or len(train.grids.possible) == 1:
        return
    chosen = train.grids.chosen
    for grid in train.grids.possible:
        marks = ["as configured" if grid.feature_ranks == train.feature_ranks else "", "" if grid.fits else "does not fit"]
        seconds = "" if grid.seconds_per_step is None else f", in {1000 * grid.seconds_per_step:,.1f} ms"
        needs = f"{gib(grid.device_bytes_per_rank)} a rank, each sends {gib(round(grid.sent_bytes_per_step))} a step{seconds}"
        said = ", ".join(mark for mark in marks if mark)
        yield f"grid {grid.row_ranks}x{grid.feature_ranks}", needs + (f" ({said})" if said else "")
    if chosen.feature_ranks != train.feature_ranks:
        room = gib(found.free_bytes_per_rank)
        why = f"sends least of those that fit {room}" if chosen.fits else f"needs least memory; none fits {room}"
        yield "advice", f"train.feature_ranks {chosen.feature_ranks} {why} a rank"
    if train.feature_ranks > 1:
        yield from _readers(train)


def _readers(train: TrainingNeeds) -> Iterator[Line]:
    """What train.shared_reads costs, what the other choice would, and the better one."""
    told = train.readers
    set_to, other = (str(way.shared_reads).lower() for way in (told.configured, told.other))
    yield "readers", f"{_way(train, told.configured)}; with train.shared_reads {other}: {_way(train, told.other)}"
    if told.chosen == told.configured:
        return
    if told.chosen.shared_reads:
        known = told.given_disk_bytes_per_second is not None and told.configured.disk_bytes_per_second is not None
        why = "the disk gives less than all of them take" if known else "nothing says that the disk gives so much"
    else:
        why = "the disk gives enough for all of them, and nothing need be sent"
    yield "advice", f"train.shared_reads {other} instead of {set_to}: {why}"


def _way(train: TrainingNeeds, way: Readers) -> str:
    """What is read, sent and kept in windows."""
    windows = f"windows of {gib(way.ranks_per_group * train.window_bytes_per_rank)} in all"
    rate = "" if way.disk_bytes_per_second is None else f", {way.disk_bytes_per_second / 1e9:,.3g} GB/s of the store"
    if way.shared_reads:
        sent = f"sends {gib(way.sent_bytes_per_step)} a step to the others"
        return f"one rank of {train.feature_ranks} reads, with {windows}{rate}, and {sent}"
    return f"each reads, {train.feature_ranks} times the bytes, with {windows}{rate}"


def _groups(found: Budget) -> Iterator[Line]:
    """Who trains what, in a line each for the first groups, and what would end sooner."""
    train, queue = found.train, found.train.queue
    for group in range(min(train.groups, SHOWN_GROUPS, train.sites)):
        turns = [turn for turn in queue.turns if turn.group == group]
        sites = [turn.site if turn.end_hours is None else f"{turn.site} until {hours(turn.end_hours)}" for turn in turns]
        if len(sites) > SHOWN_TURNS:
            sites[SHOWN_TURNS // 2 : -SHOWN_TURNS // 2] = [f"{len(sites) - SHOWN_TURNS} others"]
        yield f"group {group}", ", then ".join(sites)
    left = [turn.site for turn in queue.turns if turn.group >= SHOWN_GROUPS]
    if left:
        yield "", f"{counted(len(left), 'site')} on groups {SHOWN_GROUPS} to {max(turn.group for turn in queue.turns)}"
    if queue.sooner is not None and not queue.idle_groups:
        share = f"{queue.sooner.time_fraction:.0%} of the time"
        assumed = "a group's speed goes with its ranks" + (
            "" if train.communication.seconds_per_step is not None else ", the network is free"
        )
        yield "advice", f"train.groups {queue.sooner.groups} would take {share}, if {assumed}"
