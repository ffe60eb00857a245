"""The evaluate stage. In: the config, its store's manifest and its runs. Out: `results.json` in the directory of each run.

Contexts are cut into fixed batches, and a round of R batches has one for each rank. After every round the ranks' sums are added in
batch order, so the numbers do not depend on R, nor on a stop between two rounds (progress.py).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gsae.config import Config, EvaluateConfig
from gsae.console import Console, open_console
from gsae.corpus.contexts import Context, held_out_contexts
from gsae.corpus.documents import corpus_identity
from gsae.errors import CheckpointError, ConfigError
from gsae.evaluate.batch import BatchSums, SplicedRun, SplicedSite, cut_batches, documents_of_blocks, evaluate_batch
from gsae.evaluate.bootstrap import draw_documents
from gsae.evaluate.density import FiringCounts
from gsae.evaluate.progress import PROGRESS_FILE, Progress, Totals, load_progress, save_progress
from gsae.evaluate.results import (
    Evidence,
    FeatureMetrics,
    Measured,
    TrainedRun,
    describe_features,
    evaluation_identity,
    find_trained_runs,
    is_evaluated,
    write_results,
)
from gsae.evaluate.splice import EvaluationBatch
from gsae.heartbeat import Heartbeat, heartbeat
from gsae.llm.load import LLM, LLMInfo, describe, load
from gsae.llm.site import Site, Tail
from gsae.sae.formats import read_sae
from gsae.sae.objective import SAE
from gsae.sae.part import part_of
from gsae.sae.products import SLOW_BFLOAT16, is_quick_at_bfloat16
from gsae.store.lease import lease
from gsae.store.manifest import Manifest
from gsae.store.manifest import load as load_manifest
from gsae.store.opening import store_of
from gsae.store.parts import WAITING_FILE
from gsae.store.stopping import CONTINUES, STOPPED_FILE, StopRequest, read_stop
from gsae.world import Group, World

SHOWN = {
    "L0": "l0",
    "FVU": "fvu",
    "gamma": "gamma",
    "delta CE": "delta_ce",
    "loss recovered": "loss_recovered",
    "not seen": "not_seen_fraction",
}
"""Metrics shown on the console, by the words they are shown with."""

SAVE_EVERY_SECONDS = 300.0
"""How long an evaluation goes on before it saves how far it is; what is killed loses no more."""


@dataclass(frozen=True)
class Plan:
    """What there is to evaluate."""

    manifest: Manifest
    identity: dict[str, Any]
    """What the numbers depend on beside a run's weights."""
    pending: list[TrainedRun]
    """Runs without results of their newest checkpoint."""
    num_done: int
    """Runs that have them."""


def run_evaluate(config: Config, world: World) -> None:
    """Evaluate the newest checkpoint of every run below `config.output` that has no results of it yet. All ranks call this.

    Raises:
        CheckpointError: there is no run, or one has no whole checkpoint, or belongs to another store.
        StoreError: the store that gives the masks is not whole.
        CorpusError: the held-out text holds too few documents.
        ConfigError: another job evaluates the same runs.
        GsaeError: a rank failed, or got no further for stall_timeout_seconds.
    """
    console, output = open_console(world.is_first), Path(config.output)
    with (
        ExitStack() as holding,
        StopRequest("evaluate", output).listening() as request,
        heartbeat(world, config.stall_timeout_seconds, continues="the evaluation continues where it was") as beats,
    ):
        with beats.busy():
            plan = world.everyone.on_first(lambda: _plan(config))
            if not plan.pending:
                console.say(f"evaluate: all {plan.num_done} runs below {output} have the results of their newest checkpoint")
                return
            holding.enter_context(lease(output, "evaluate", "output", world.everyone, console.say))
            work = _load(config, plan, world, console)
            world.everyone.on_first(request.forget)
        _evaluate(config, plan, work, world, console, request, beats)


@dataclass(frozen=True)
class _Work:
    """What an evaluation has in memory."""

    llm: LLM
    sites: Sequence[SplicedSite]
    batches: Sequence[EvaluationBatch]


def _load(config: Config, plan: Plan, world: World, console: Console) -> _Work:
    if config.llm.sharding != "replicate":
        console.warn("evaluation runs parts of the LLM by themselves, so each rank holds it whole, whatever llm.sharding says")
    if config.llm.dtype == "bfloat16" and not is_quick_at_bfloat16(world.device):
        console.warn_once(SLOW_BFLOAT16)
    with world.everyone.together():
        llm = load(replace(config.llm, sharding="replicate", offload=False), world.device)
        sites = load_sites(plan.manifest, plan.pending, llm, world.group)
    contexts = share_contexts(config, config.evaluate, plan.manifest, llm, world.everyone)
    console.say(
        f"evaluate: {len(plan.pending)} runs at {len(sites)} sites on {len(contexts)} contexts; {plan.num_done} runs have results already"
    )
    return _Work(llm, sites, cut_batches(contexts, config.evaluate.batch_contexts))


def _evaluate(config: Config, plan: Plan, work: _Work, world: World, console: Console, request: StopRequest, beats: Heartbeat) -> None:
    """Evaluate from the first batch, or where an earlier evaluation of the same ended, to the last, or to a stop."""
    everyone, path = world.group, Path(config.output) / PROGRESS_FILE  # all ranks, as a grid
    weights = {run.name: {"step": run.step, "sae_sha256": run.sae_sha256} for run in plan.pending}
    identity = {"evaluation": plan.identity, "runs": weights}
    documents = documents_of_blocks(work.batches)
    progress = load_progress(path, identity, documents) if everyone.is_first else None
    progress = progress or Progress(Totals(documents))
    progress.num_batches = everyone.broadcast_object(progress.num_batches)
    tokens = [batch.num_tokens for batch in work.batches]
    done = sum(tokens[: progress.num_batches])
    if done:
        console.say(f"evaluate: continues at batch {progress.num_batches} of {len(tokens)}")
    saved_at = time.monotonic()
    is_to_stop = False
    with console.progress("evaluate", sum(tokens), "tokens", done) as bar:
        for num_tokens in evaluate_rounds(work.llm, work.sites, work.batches, everyone, progress, check=True):
            beats.beat(turns=1, batches=everyone.rows.size)
            bar.advance(num_tokens)
            is_to_stop, is_due = request.is_made(everyone, int(time.monotonic() - saved_at > SAVE_EVERY_SECONDS))
            if progress.num_batches < len(tokens) and (is_to_stop or is_due):
                with beats.busy():
                    save_progress(path, progress, identity, everyone)
                saved_at = time.monotonic()
            if is_to_stop:
                break
    if progress.num_batches < len(tokens):
        everyone.on_first(lambda: request.record(batches=progress.num_batches))
        console.say(f"evaluate: {CONTINUES} ({Path(config.output) / STOPPED_FILE})")
        return
    with beats.busy():
        firing = progress.reduced_firing(everyone)
        with everyone.together():
            # One rank alone has all features of an SAE, or those that hold a part each are asked together.
            is_asked = everyone.rows.is_first
            of_features = {run.name: describe_features(run.sae, firing[run.name]) for each in work.sites for run in each.runs if is_asked}
        everyone.on_first(lambda: _write(config, plan, work, progress, firing, of_features, console))
        everyone.on_first(lambda: path.unlink(missing_ok=True))


def _plan(config: Config) -> Plan:
    manifest, info = load_manifest(store_of(config)), describe(config.llm)
    require_same_source(config, manifest, info)
    if (stop := read_stop(Path(config.output))) is not None and stop.stage == "train":
        raise CheckpointError(
            f"the training below {config.output} was stopped before its end; run gsae train again, or delete its {STOPPED_FILE}"
        )
    if (Path(config.output) / WAITING_FILE).exists():
        raise CheckpointError(
            f"the training below {config.output} waits for a part of its store; run gsae harvest and gsae train in turn until it ends, "
            f"or delete its {WAITING_FILE}"
        )
    runs = find_trained_runs(Path(config.output), manifest)
    identity = evaluation_identity(config, manifest, info)
    pending = [run for run in runs if not is_evaluated(run, identity)]
    return Plan(manifest, identity, pending, len(runs) - len(pending))


def require_same_source(config: Config, manifest: Manifest, info: LLMInfo) -> None:
    """Held-out documents are held out of the store only if its text and split are the config's, and so must be its LLM.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for section, here in (("llm", info.identity), ("corpus", corpus_identity(config.corpus))):
        there = manifest.identity[section]
        differing = [name for name in here if name in there and there[name] != here[name]]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{section}: the store {config.store_directory} was harvested with {name} {there[name]!r}, this config has {here[name]!r}; "
                "evaluate with the config of the harvest"
            )


def share_contexts(config: Config, settings: EvaluateConfig, manifest: Manifest, llm: LLM, everyone: Group) -> list[Context]:
    """The contexts of held-out text, found by the first rank, on all ranks."""
    length, packed = manifest.context_length, manifest.identity.get("packed", True)
    return everyone.on_first(lambda: held_out_contexts(config.corpus, settings, llm.tokenizer, length, packed))


def load_sites(manifest: Manifest, trained: Sequence[TrainedRun], llm: LLM, group: Group) -> list[SplicedSite]:
    """The sites of some runs in layer order, each with its SAEs on the device: on a grid of ranks, with this rank's parts of them.

    Raises:
        ConfigError: train.feature_ranks does not divide the features of one.
    """
    sites = []
    for name in manifest.sites:
        of_site = [run for run in trained if run.description["site"] == name]
        runs = tuple(SplicedRun(run.name, _load_sae(run, group), run.description["scale"]) for run in of_site)
        if runs:
            sites.append(spliced_site(manifest, name, llm, runs, group.device))
    return sites


def _load_sae(run: TrainedRun, group: Group) -> SAE:
    num_features = int(run.description["num_features"])
    if group.features is not None and num_features % group.features.size:
        raise ConfigError(
            f"train.feature_ranks ({group.features.size}) does not divide the {num_features} features of {run.name}; set a divisor, or 1"
        )
    part = part_of(num_features, group.features)
    sae = read_sae(run.checkpoint, None if part is None else part.features).sae
    sae.part = part
    return sae.to(group.device).requires_grad_(False)


def spliced_site(manifest: Manifest, name: str, llm: LLM, runs: tuple[SplicedRun, ...], device: torch.device) -> SplicedSite:
    """A site of the store with its SAEs, which are on the device."""
    described = manifest.sites[name]
    site = Site(name, described.layer, described.module)
    return SplicedSite(site, Tail(llm.model, site), described.mean.to(device), described.max_norm, manifest.dtype, runs)


def evaluate_rounds(
    llm: LLM,
    sites: Sequence[SplicedSite],
    batches: Sequence[EvaluationBatch],
    everyone: Group,
    progress: Progress,
    *,
    check: bool,
) -> Iterator[int]:
    """The batches that are not in `progress` yet, one a rank at a time; a round ends when every rank's sums are added to it.

    Args:
        llm: the whole LLM, on each rank.
        sites: in layer order.
        batches: all of them, on each rank.
        everyone: the ranks that share them; of a grid those of a row take the same ones.
        progress: where it begins; it holds all of each round when that ends.
        check: whether splicing is checked on the first batch.

    Yields:
        The tokens of each round.
    """
    device = everyone.device
    saes = {run.name: run.sae for site in sites for run in site.runs}
    progress.firing = {name: FiringCounts.none(sae.num_features, device, sae.total_features) for name, sae in saes.items()}
    rows = everyone.rows
    while progress.num_batches < len(batches):
        start = progress.num_batches
        round_of_batches = batches[start : start + rows.size]
        sums: BatchSums | None = None
        with everyone.together():
            if rows.rank < len(round_of_batches):
                batch = round_of_batches[rows.rank].to(device)
                result = evaluate_batch(llm, sites, batch, check=check and start + rows.rank == 0)
                sums, progress.checks = result.sums, progress.checks or result.checks
                progress.firing = {name: counts + result.firing[name] for name, counts in progress.firing.items()}
        for part in rows.gather_objects(sums):
            if part is not None and everyone.is_first:
                progress.totals.add(part)
        progress.num_batches += len(round_of_batches)
        yield sum(batch.num_tokens for batch in round_of_batches)


def _write(
    config: Config,
    plan: Plan,
    work: _Work,
    progress: Progress,
    firing: Mapping[str, FiringCounts],
    of_features: Mapping[str, FeatureMetrics],
    console: Console,
) -> None:
    totals, settings = progress.totals, config.evaluate
    draws = draw_documents(int(totals.documents.max()) + 1, settings.bootstrap_draws, settings.seed)
    num_contexts, num_tokens = sum(len(batch.tokens) for batch in work.batches), sum(batch.num_tokens for batch in work.batches)
    evidence = Evidence(plan.identity, num_contexts, num_tokens, totals.documents, draws, progress.checks)
    for site in work.sites:
        for spliced in site.runs:
            run = next(run for run in plan.pending if run.name == spliced.name)
            name = site.site.name
            sums = totals.sites[name], totals.runs[run.name]
            strata = totals.strata[name], totals.strata[run.name]
            metrics = write_results(run, Measured(sums, strata, firing[run.name], of_features[run.name], site.max_norm), evidence)
            shown = ", ".join(f"{word} {metrics[key]:.4g}" for word, key in SHOWN.items() if metrics[key] is not None)
            console.say(f"{run.name}: {shown}")
