"""The evaluate stage. In: the config, its store's manifest and its runs. Out: `results.json` in the directory of each run.

Contexts are cut into fixed batches and batch i goes to rank i mod R. After every round of R batches the ranks' sums are added in
batch order, so the numbers do not depend on R.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from gsae.config import Config, EvaluateConfig
from gsae.console import Console, open_console
from gsae.corpus.contexts import Context, held_out_contexts
from gsae.corpus.documents import corpus_identity
from gsae.errors import CheckpointError, ConfigError
from gsae.evaluate.batch import BatchSums, SpliceChecks, SplicedRun, SplicedSite, cut_batches, documents_of_blocks, evaluate_batch
from gsae.evaluate.bootstrap import draw_documents
from gsae.evaluate.density import FiringCounts
from gsae.evaluate.results import Evidence, Measured, TrainedRun, evaluation_identity, find_trained_runs, is_evaluated, write_results
from gsae.evaluate.splice import EvaluationBatch
from gsae.evaluate.strata import StratumSums
from gsae.evaluate.sums import RunSums, SiteSums, Sums
from gsae.llm.load import LLM, LLMInfo, describe, load
from gsae.llm.site import Site, Tail
from gsae.sae.formats import read_sae
from gsae.store.manifest import Manifest
from gsae.store.manifest import load as load_manifest
from gsae.store.opening import store_of
from gsae.store.parts import WAITING_FILE
from gsae.store.runs import STOPPED_FILE
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

AnySums = TypeVar("AnySums", bound=Sums)


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


class Totals:
    """The sums of every block, whose documents are `documents`, over all batches so far. They are added in the order of the batches."""

    def __init__(self, documents: Int[Tensor, " blocks"]) -> None:
        self.sites: dict[str, SiteSums] = {}
        self.runs: dict[str, RunSums] = {}
        self.strata: dict[str, StratumSums] = {}
        self.documents = documents

    def add(self, batch: BatchSums) -> None:
        """Add one batch's sums."""
        self._add(self.sites, batch, batch.sites)
        self._add(self.runs, batch, batch.runs)
        for name, part in batch.strata.items():
            self.strata[name] = self.strata[name] + part if name in self.strata else part

    def _add(self, sums: dict[str, AnySums], batch: BatchSums, parts: Mapping[str, AnySums]) -> None:
        for name, part in parts.items():
            if name not in sums:
                sums[name] = part.zeros(len(self.documents))
            sums[name].add(batch.blocks, part)


@dataclass(frozen=True)
class Outcome:
    """All batches together."""

    totals: Totals
    """On the first rank; empty on the others."""
    firing: dict[str, FiringCounts]
    """Of each run, over all ranks; on the CPU."""
    checks: Mapping[str, SpliceChecks]
    """Of each site; on the first rank."""


def run_evaluate(config: Config, world: World) -> None:
    """Evaluate the newest checkpoint of every run below `config.output` that has no results of it yet. All ranks call this.

    Raises:
        CheckpointError: there is no run, or one has no whole checkpoint, or belongs to another store.
        StoreError: the store that gives the masks is not whole.
        CorpusError: the held-out text holds too few documents.
        ConfigError: `llm.sharding` splits the LLM over ranks.
    """
    console, everyone = open_console(world.is_first), world.everyone
    plan = everyone.on_first(lambda: _plan(config))
    if not plan.pending:
        console.say(f"evaluate: all {plan.num_done} runs below {config.output} have the results of their newest checkpoint")
        return
    if config.llm.sharding != "replicate":
        console.warn("evaluation runs parts of the LLM by themselves, so each rank holds it whole, whatever llm.sharding says")
    with everyone.together():
        llm = load(replace(config.llm, sharding="replicate", offload=False), world.device)
        sites = load_sites(plan.manifest, plan.pending, llm, world.device)
    contexts = share_contexts(config, config.evaluate, plan.manifest, llm, everyone)
    batches = cut_batches(contexts, config.evaluate.batch_contexts)
    console.say(
        f"evaluate: {len(plan.pending)} runs at {len(sites)} sites on {len(contexts)} contexts; {plan.num_done} runs have results already"
    )
    with console.progress("evaluate", sum(batch.num_tokens for batch in batches), "tokens") as bar:
        outcome = evaluate_batches(llm, sites, batches, everyone, check=True, advance=bar.advance)
    everyone.on_first(lambda: _write(config, plan, sites, batches, outcome, console))


def _plan(config: Config) -> Plan:
    manifest, info = load_manifest(store_of(config)), describe(config.llm)
    require_same_source(config, manifest, info)
    if (Path(config.output) / STOPPED_FILE).exists():
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


def load_sites(manifest: Manifest, trained: Sequence[TrainedRun], llm: LLM, device: torch.device) -> list[SplicedSite]:
    """The sites of some runs in layer order, each with its SAEs on the device."""
    sites = []
    for name in manifest.sites:
        runs = tuple(
            SplicedRun(run.name, read_sae(run.checkpoint).sae.to(device).requires_grad_(False), run.description["scale"])
            for run in trained
            if run.description["site"] == name
        )
        if runs:
            sites.append(spliced_site(manifest, name, llm, runs, device))
    return sites


def spliced_site(manifest: Manifest, name: str, llm: LLM, runs: tuple[SplicedRun, ...], device: torch.device) -> SplicedSite:
    """A site of the store with its SAEs, which are on the device."""
    described = manifest.sites[name]
    site = Site(name, described.layer, described.module)
    return SplicedSite(site, Tail(llm.model, site), described.mean.to(device), described.max_norm, manifest.dtype, runs)


def evaluate_batches(
    llm: LLM,
    sites: Sequence[SplicedSite],
    batches: Sequence[EvaluationBatch],
    everyone: Group,
    *,
    check: bool,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Outcome:
    """All batches, one a rank at a time; a round ends when every rank's sums are added.

    Args:
        llm: the whole LLM, on each rank.
        sites: in layer order.
        batches: all of them, on each rank.
        everyone: the ranks that share them.
        check: whether splicing is checked on the first batch.
        advance: told of the tokens of each round.
    """
    device = everyone.device
    totals = Totals(documents_of_blocks(batches))
    firing = {run.name: FiringCounts.none(run.sae.num_features, device) for site in sites for run in site.runs}
    checks: Mapping[str, SpliceChecks] = {}
    for start in range(0, len(batches), everyone.size):
        round_of_batches = batches[start : start + everyone.size]
        sums: BatchSums | None = None
        with everyone.together():
            if everyone.rank < len(round_of_batches):
                batch = round_of_batches[everyone.rank].to(device)
                result = evaluate_batch(llm, sites, batch, check=check and start + everyone.rank == 0)
                sums, checks = result.sums, checks or result.checks
                firing = {name: counts + result.firing[name] for name, counts in firing.items()}
        for part in everyone.gather_objects(sums):
            if part is not None and everyone.is_first:
                totals.add(part)
        advance(sum(batch.num_tokens for batch in round_of_batches))
    reduced = {
        name: FiringCounts(*(everyone.reduce(part, "sum").cpu() for part in (each.features, each.l0_histogram, each.gates)))
        for name, each in firing.items()
    }
    return Outcome(totals, reduced, checks)


def _write(
    config: Config, plan: Plan, sites: Sequence[SplicedSite], batches: Sequence[EvaluationBatch], outcome: Outcome, console: Console
) -> None:
    totals, settings = outcome.totals, config.evaluate
    draws = draw_documents(int(totals.documents.max()) + 1, settings.bootstrap_draws, settings.seed)
    num_contexts, num_tokens = sum(len(batch.tokens) for batch in batches), sum(batch.num_tokens for batch in batches)
    evidence = Evidence(plan.identity, num_contexts, num_tokens, totals.documents, draws, outcome.checks)
    for site in sites:
        for spliced in site.runs:
            run = next(run for run in plan.pending if run.name == spliced.name)
            name = site.site.name
            sums = totals.sites[name], totals.runs[run.name]
            strata = totals.strata[name], totals.strata[run.name]
            metrics = write_results(run, Measured(sums, strata, outcome.firing[run.name], spliced.sae, site.max_norm), evidence)
            shown = ", ".join(f"{word} {metrics[key]:.4g}" for word, key in SHOWN.items() if metrics[key] is not None)
            console.say(f"{run.name}: {shown}")
