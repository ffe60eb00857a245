"""`gsae features`. In: the config, trained runs, which features. Out: `features.json` in each run's directory, and a table.

Where a feature is strongest on held-out text, with the tokens around it, and which tokens its direction promotes and suppresses.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor

from gsae.config import Config
from gsae.console import open_console
from gsae.corpus.contexts import Context
from gsae.errors import CheckpointError, ConfigError
from gsae.evaluate.batch import SplicedRun, SplicedSite, cut_batches
from gsae.evaluate.results import DENSITY_FILE, TrainedRun, find_trained_runs
from gsae.evaluate.run import load_sites, require_same_source, share_contexts
from gsae.evaluate.splice import EvaluationBatch
from gsae.evaluate.strongest import Peak, Strongest, merge
from gsae.llm.load import LLM, describe, load
from gsae.llm.rows import candidates, special_tokens, within_norm
from gsae.llm.site import capture
from gsae.llm.unembedding import direct_logits
from gsae.sae.objective import SAE
from gsae.store.durable import write_json_atomically
from gsae.store.encoding import encode
from gsae.store.manifest import load as load_manifest
from gsae.store.opening import store_of
from gsae.store.runs import RESULTS_FILE
from gsae.world import Group, World

FEATURES_FILE = "features.json"
FEATURES_FORMAT = 1
DEFINITIONS = {
    "density": "share of the kept rows of gsae evaluate at which the feature is on; null before it ran",
    "contexts": "held-out contexts by the feature's largest activation in them, on rows times the SAE's scale; null: not a kept row",
    "promoted": "tokens by the logit that the direction adds by the direct path: decoder row times the final norm's gain, through the LM "
    "head, less the mean over the vocabulary; layers above and the norm's own scale are left out",
}
SHOWN_CONTEXTS = 3
SHOWN_TOKENS = 5
SLICE_ROWS = 2048


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    features: tuple[int, ...] = ()
    """Of every run; none: random ones."""
    random: int = 10
    """How many random ones, of those that were on in the evaluation where there was one."""
    top: int = 10
    """Contexts of each, and tokens that its direction promotes and suppresses."""
    window: int = 12
    """Tokens shown on either side of a peak."""
    runs: tuple[str, ...] = ()
    """Names, `site/name`, or directories of runs; none: all of the output."""


def run_features(config: Config, world: World, wanted: Wanted) -> None:
    """Find and show where features are strongest. All ranks call this.

    Raises:
        CheckpointError: there is no such run.
        ConfigError: a feature is not in a run, or the config's LLM or text is not the store's.
        CorpusError: there is not enough held-out text.
    """
    console, everyone = open_console(world.is_first), world.everyone

    def find() -> tuple[list[TrainedRun], dict[str, list[int]]]:
        manifest = load_manifest(store_of(config))
        require_same_source(config, manifest, describe(config.llm))
        runs = choose_runs(find_trained_runs(Path(config.output), manifest), wanted)
        return runs, {run.name: choose_features(run, wanted, config.evaluate.seed) for run in runs}

    runs, features = everyone.on_first(find)
    with everyone.together():
        manifest = load_manifest(store_of(config))
        llm = load(replace(config.llm, sharding="replicate", offload=False), world.device)
        sites = load_sites(manifest, runs, llm, world.group)
    contexts = share_contexts(config, config.evaluate, manifest, llm, everyone)
    batches = cut_batches(contexts, config.evaluate.batch_contexts)
    with console.progress("features", sum(batch.num_tokens for batch in batches), "tokens") as bar:
        peaks = find_peaks(llm, sites, batches, features, wanted, world.group, bar.advance)
    directions = {run.name: _directions(run.sae, features[run.name]) for site in sites for run in site.runs}

    def write() -> None:
        for run in runs:
            described = _describe(run, features[run.name], peaks[run.name], directions[run.name], contexts, llm, wanted)
            write_json_atomically(run.directory / FEATURES_FILE, described)
            _show(run, described, RichConsole(highlight=False))
            console.say(f"{run.name}: {len(described['features'])} features in {run.directory / FEATURES_FILE}")

    everyone.on_first(write)


def choose_runs(runs: list[TrainedRun], wanted: Wanted) -> list[TrainedRun]:
    """The runs asked for, or all.

    Raises:
        CheckpointError: there is no run of a name.
    """
    chosen: dict[str, TrainedRun] = {}
    for name in wanted.runs:
        found = [run for run in runs if name in (run.name, run.description["name"]) or Path(name).resolve() == run.directory.resolve()]
        if not found:
            known = ", ".join(run.name for run in runs)
            raise CheckpointError(f"there is no run {name}, only {known}; give one of them")
        chosen.update((run.name, run) for run in found)
    return list(chosen.values()) or runs


def choose_features(run: TrainedRun, wanted: Wanted, seed: int) -> list[int]:
    """The features asked for, or random ones of those that were on in the evaluation.

    Raises:
        ConfigError: the run has no such feature.
    """
    num_features = run.description["num_features"]
    beyond = [feature for feature in wanted.features if not 0 <= feature < num_features]
    if beyond:
        raise ConfigError(f"{run.name} has no feature {beyond[0]}; give numbers from 0 to {num_features - 1}")
    if wanted.features:
        return list(dict.fromkeys(wanted.features))
    counts = _firing_counts(run)
    seen = np.arange(num_features) if counts is None else np.flatnonzero(counts.numpy())
    digest = hashlib.sha256(f"features/{run.name}/{seed}".encode()).digest()[:8]
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return sorted(generator.permutation(seen)[: wanted.random].tolist())


def _firing_counts(run: TrainedRun) -> Tensor | None:
    """Rows at which each feature was on in the evaluation of these weights, if there was one."""
    try:
        identity = json.loads((run.directory / RESULTS_FILE).read_text())["identity"]
        if identity["checkpoint"]["sae_sha256"] != run.sae_sha256:
            return None
        return safetensors.torch.load_file(run.directory / DENSITY_FILE)["firing_counts"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def find_peaks(
    llm: LLM,
    sites: Sequence[SplicedSite],
    batches: Sequence[EvaluationBatch],
    features: dict[str, list[int]],
    wanted: Wanted,
    everyone: Group,
    advance: Any = lambda tokens: None,
) -> dict[str, list[list[Peak]]]:
    """The strongest contexts of each chosen feature of each run, over all ranks; on every rank.

    Batch i is rank i mod R's; on a grid of R rows, it is that of all ranks in a row.
    """
    found = {run.name: Strongest(len(features[run.name]), wanted.top, wanted.window) for site in sites for run in site.runs}
    first_context = 0
    with everyone.together():
        for number, batch in enumerate(batches):
            if number % everyone.rows.size == everyone.rows.rank:
                _look(llm, sites, batch.to(everyone.device), features, found, first_context)
            first_context += len(batch.tokens)
            advance(batch.num_tokens)
    parts = everyone.rows.gather_objects({name: strongest.peaks for name, strongest in found.items()})
    return {name: merge([part[name] for part in parts], wanted.top) for name in found}


@torch.no_grad()
def _look(
    llm: LLM,
    sites: Sequence[SplicedSite],
    batch: EvaluationBatch,
    features: dict[str, list[int]],
    found: dict[str, Strongest],
    first_context: int,
) -> None:
    x = capture(llm.model, [each.site for each in sites], batch.tokens, batch.positions)
    may_be_kept = candidates(batch.tokens, batch.positions, batch.documents, special_tokens(llm.tokenizer)).rows
    for each in sites:
        rows = x.pop(each.site.name)
        kept = may_be_kept & within_norm(encode(rows, each.storage).decode(), each.max_norm)
        for run in each.runs:
            f = _activations(run, rows.flatten(0, 1), features[run.name])
            found[run.name].add(f.view(*rows.shape[:2], -1), kept, batch.positions, first_context)


def _activations(run: SplicedRun, x: Float[Tensor, "rows d_model"], features: Sequence[int]) -> Float[Tensor, "rows chosen"]:
    """Of the whole dictionary: each rank that holds a part of it adds its own."""
    parts = (part.to(run.sae.W_dec.dtype) * run.scale for part in torch.split(x, SLICE_ROWS))
    return torch.cat([_chosen(run.sae, run.sae.encode(part).T, features).T for part in parts])


@torch.no_grad()
def _directions(sae: SAE, features: Sequence[int]) -> Float[Tensor, "chosen d_model"]:
    """Decoder rows. Of a part of a dictionary a collective, as `_chosen` is."""
    return _chosen(sae, sae.W_dec, features)


def _chosen(sae: SAE, by_feature: Float[Tensor, "features width"], features: Sequence[int]) -> Float[Tensor, "chosen width"]:
    """Rows of what there is of each feature, by their numbers in the whole dictionary."""
    index = torch.tensor(list(features), device=by_feature.device)
    if sae.part is None:
        return by_feature[index]
    index = index - sae.part.first
    is_own = (index >= 0) & (index < sae.num_features)
    return sae.part.reduce(torch.where(is_own[:, None], by_feature[index.clamp(0, sae.num_features - 1)], 0.0))


def _describe(
    run: TrainedRun,
    features: Sequence[int],
    peaks: Sequence[Sequence[Peak]],
    directions: Float[Tensor, "chosen d_model"],
    contexts: Sequence[Context],
    llm: LLM,
    wanted: Wanted,
) -> dict[str, Any]:
    """What features.json holds."""
    logits = direct_logits(llm.model, directions)
    counts = _firing_counts(run)
    kept_rows = json.loads((run.directory / RESULTS_FILE).read_text())["counts"]["kept_rows"] if counts is not None else None
    described = []
    for number, feature in enumerate(features):
        described.append(
            {
                "feature": feature,
                "density": None if counts is None or not kept_rows else counts[feature].item() / kept_rows,
                "promoted": _tokens_of(logits[number], wanted.top, llm, largest=True),
                "suppressed": _tokens_of(logits[number], wanted.top, llm, largest=False),
                "contexts": [_context_of(peak, contexts[peak.context], llm, wanted.window) for peak in peaks[number]],
            }
        )
    return {
        "format": FEATURES_FORMAT,
        "run": run.name,
        "checkpoint": {"step": run.step, "sae_sha256": run.sae_sha256},
        "definitions": DEFINITIONS,
        "features": described,
    }


def _tokens_of(logits: Float[Tensor, " vocab_size"], count: int, llm: LLM, *, largest: bool) -> list[dict[str, Any]]:
    values, tokens = logits.topk(min(count, len(logits)), largest=largest)
    return [{"token": llm.tokenizer.decode([token]), "logit": value} for token, value in zip(tokens.tolist(), values.tolist(), strict=True)]


def _context_of(peak: Peak, context: Context, llm: LLM, window: int) -> dict[str, Any]:
    """The tokens around a peak, those of its own segment."""
    low = peak.column - min(window, int(context.positions[peak.column]))
    starts = np.arange(len(context.positions)) - context.positions
    high = peak.column + 1
    while high < len(starts) and high <= peak.column + window and starts[high] == starts[peak.column] and context.documents[high] >= 0:
        high += 1
    shown = peak.around[window - (peak.column - low) : window + (high - peak.column)]
    ids = context.tokens[low:high].tolist()
    tokens = [{"token": llm.tokenizer.decode([token]), "activation": each} for token, each in zip(ids, shown, strict=True)]
    return {"document": int(context.documents[peak.column]), "activation": peak.activation, "peak": peak.column - low, "tokens": tokens}


def _show(run: TrainedRun, described: dict[str, Any], console: RichConsole) -> None:
    table = Table("feature", "density", "strongest on held-out text", "promotes", title=run.name, title_justify="left", show_lines=True)
    for feature in described["features"]:
        density = "not evaluated" if feature["density"] is None else f"{feature['density']:.3%}"
        texts = [_text(context) for context in feature["contexts"][:SHOWN_CONTEXTS]]
        promoted = ", ".join(repr(each["token"])[1:-1] for each in feature["promoted"][:SHOWN_TOKENS])
        table.add_row(str(feature["feature"]), density, Text("\n").join(texts) if texts else Text("never on"), promoted)
    console.print(table)


def _text(context: dict[str, Any]) -> Text:
    """A context in a line, its peak in reverse, other rows where the feature is on in bold."""
    text = Text(f"{context['activation']:.2f}  ")
    for number, each in enumerate(context["tokens"]):
        style = "reverse" if number == context["peak"] else "bold" if each["activation"] else ""
        text.append(" ".join(each["token"].splitlines()) if each["token"].strip() else " ", style=style)
    return text
