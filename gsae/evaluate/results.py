"""A run's results. In: the sums of its blocks, its firing counts. Out: three files in its directory.

`density.safetensors` has how often each feature was on, `blocks.safetensors` the sums with which two runs are compared.

`results.json` is written last and whole; its identity says which weights were evaluated, on what, and how, so that an
evaluation that has been done is not done again.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.config import Config
from gsae.corpus.documents import corpus_identity
from gsae.errors import CheckpointError
from gsae.evaluate import strata
from gsae.evaluate.batch import SpliceChecks
from gsae.evaluate.bootstrap import interval
from gsae.evaluate.density import DensityMetrics, FiringCounts, density_histogram, density_metrics
from gsae.evaluate.gates import GateMetrics, gate_metrics
from gsae.evaluate.pairs import BLOCKS_FILE, write_blocks
from gsae.evaluate.reconstruction import reconstruction_metrics
from gsae.evaluate.splice import splice_metrics
from gsae.evaluate.strata import StratumSums, by_norm_decile, by_position
from gsae.evaluate.sums import RunSums, SiteSums, definitions
from gsae.llm.load import LLMInfo
from gsae.sae.formats import DESCRIPTION_FILE
from gsae.sae.objective import SAE
from gsae.store.durable import write_aside, write_json_atomically
from gsae.store.manifest import Manifest
from gsae.store.runs import RESULTS_FILE, find_runs, newest_checkpoint, read_metrics, read_run

RESULTS_FORMAT = 2
DENSITY_FILE = "density.safetensors"
INTERVALS = ("loss_recovered", "delta_ce", "fvu", "l0")
"""Metrics that get a 95 % interval."""
COMPARABILITY = {
    "SAEBench 0.6.0": "divides MSE by the number of tokens twice and does not centre explained variance: neither compares with mse and fvu",
    "sae_lens before July 2026": "the same two; and it may leave BOS rows in L0 and MSE, which are not kept rows here",
    "dictionary_learning": "averages ratios of batches and splices x_hat in at BOS too: fvu and loss_recovered are others",
    "llamascopium": "its loss ratio is inverted: 1 is the ablation",
    "clamped recipes": "loss recovered cut to [0, 1] hides SAEs that are worse than the ablation; loss_recovered is not cut",
}
"""Where figures under the same names mean something else."""
FEW_DOCUMENTS = 30
"""Below so many documents, results speak of these documents only."""


@dataclass(frozen=True)
class TrainedRun:
    """A run with its newest checkpoint."""

    directory: Path
    description: dict[str, Any]
    """The object in run.json."""
    checkpoint: Path
    step: int
    sae_sha256: str

    @property
    def name(self) -> str:
        """Site and name of the run, which no two runs share."""
        return f"{self.description['site']}/{self.description['name']}"


@dataclass(frozen=True)
class TrainingMetrics:
    """What training said of dead features at its end."""

    dead_fraction: Annotated[float | None, "share of features not on for dead_rows rows over all ranks, at the end of training"]
    dead_rows: Annotated[int | None, "rows of training without being on after which dead_fraction counts a feature as dead"]


@dataclass(frozen=True)
class Evidence:
    """What the numbers of all runs of an evaluation rest on."""

    identity: dict[str, Any]
    """LLM, text and settings."""
    contexts: int
    tokens: int
    """Tokens of text, BOS included."""
    documents: Int[Tensor, " blocks"]
    """The document of each block."""
    draws: Float[Tensor, "draws documents"]
    """The bootstrap's."""
    checks: Mapping[str, SpliceChecks]
    """By name of the site."""


class FeatureMetrics(NamedTuple):
    """What the features of an SAE say, over all of them."""

    density: DensityMetrics
    gates: GateMetrics


def describe_features(sae: SAE, firing: FiringCounts) -> FeatureMetrics:
    """From the counts over all ranks and features. Of a part of a dictionary a collective of its holders."""
    return FeatureMetrics(density_metrics(firing, sae.W_dec, sae.part), gate_metrics(firing, sae))


@dataclass(frozen=True)
class Measured:
    """What an evaluation found of one run."""

    sums: tuple[SiteSums, RunSums]
    """Its site's and its own, a row a block."""
    strata: tuple[StratumSums, StratumSums]
    """Its site's and its own."""
    firing: FiringCounts
    """Over all ranks."""
    of_features: FeatureMetrics
    max_norm: float
    """The site's bound of kept rows."""


def evaluation_identity(config: Config, manifest: Manifest, info: LLMInfo) -> dict[str, Any]:
    """What the numbers depend on beside a run's weights: plain JSON values without absolute paths."""
    identity = {
        "llm": info.identity,
        "dtype": config.llm.dtype,
        "attention": config.llm.attention,
        "text": corpus_identity(config.corpus),
        "context_length": manifest.context_length,
        "evaluate": asdict(config.evaluate),
        "store_fingerprint": manifest.fingerprint,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def find_trained_runs(output: Path, manifest: Manifest) -> list[TrainedRun]:
    """Every run at or below `output` with its newest checkpoint.

    Raises:
        CheckpointError: there is no run, or one has no whole checkpoint, or was trained on another store.
    """
    directories = find_runs(output)
    if not directories:
        raise CheckpointError(f"no run below {output}; run gsae train with this config first")
    runs = []
    for directory in directories:
        description = read_run(directory)
        site, store = description["site"], description["store_fingerprint"]
        is_ours = store == manifest.fingerprint or description.get("guest") is not None
        if not is_ours or site not in manifest.sites:
            raise CheckpointError(
                f"run {directory} was trained at {site} on store {store}, the config's store is {manifest.fingerprint} "
                f"with {', '.join(manifest.sites)}; use the config it was trained with, or move the run elsewhere"
            )
        checkpoint = newest_checkpoint(directory)
        sae_sha256 = json.loads((checkpoint.path / DESCRIPTION_FILE).read_text())["sha256"]
        runs.append(TrainedRun(directory, description, checkpoint.path, checkpoint.step, sae_sha256))
    return runs


def is_evaluated(run: TrainedRun, identity: Mapping[str, Any]) -> bool:
    """Whether the run's results are of this checkpoint and this evaluation."""
    try:
        results = json.loads((run.directory / RESULTS_FILE).read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(results, dict) or results.get("format") != RESULTS_FORMAT:
        return False
    found = {key: value for key, value in results.get("identity", {}).items() if key != "within_these_documents"}
    return found == _identity_of(run, identity)


def _identity_of(run: TrainedRun, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {**identity, "checkpoint": {"step": run.step, "sae_sha256": run.sae_sha256}}


def write_results(run: TrainedRun, measured: Measured, evidence: Evidence) -> dict[str, float | None]:
    """Write the run's three files; gives its metrics.

    Args:
        run: the run.
        measured: what was found of it.
        evidence: what it shares with the other runs.
    """
    (site_sums, run_sums), firing = measured.sums, measured.firing
    kept_rows = int(site_sums.kept_rows.sum())
    write_blocks(run.directory / BLOCKS_FILE, site_sums, run_sums, evidence.documents)
    with write_aside(run.directory / DENSITY_FILE) as file:
        tensors = {"firing_counts": firing.features, "l0_histogram": firing.l0_histogram}
        file.write(safetensors.torch.save(tensors, metadata={"kept_rows": str(kept_rows)}))
    scale = run.description["scale"]
    totals = (site_sums.total(), run_sums.total())
    parts = (reconstruction_metrics(*totals, scale), splice_metrics(*totals), *measured.of_features, _training_metrics(run))
    metrics = {field.name: _number(getattr(part, field.name)) for part in parts for field in fields(part)}
    num_documents = evidence.draws.shape[1]
    results = {
        "format": RESULTS_FORMAT,
        "run": run.description,
        "metrics": metrics,
        "intervals": _intervals(site_sums, run_sums, scale, evidence.draws[:, evidence.documents]),
        "by_position": [asdict(each) for each in by_position(*measured.strata)],
        "by_norm_decile": [asdict(each) for each in by_norm_decile(*measured.strata, measured.max_norm)],
        "counts": {
            "documents": num_documents,
            "blocks": len(evidence.documents),
            "contexts": evidence.contexts,
            "tokens": evidence.tokens,
            "kept_rows": kept_rows,
            "dropped_rows": int(site_sums.dropped_rows.sum()),
            "targets": int(site_sums.targets.sum()),
        },
        "checks": {name: _number(value) for name, value in asdict(evidence.checks[run.description["site"]]).items()},
        "density_log10_histogram": asdict(density_histogram(firing.features, kept_rows)),
        "definitions": _definitions(type(part) for part in parts),
        "comparability": COMPARABILITY,
        "identity": {**_identity_of(run, evidence.identity), "within_these_documents": num_documents < FEW_DOCUMENTS},
    }
    write_json_atomically(run.directory / RESULTS_FILE, results)
    return metrics


def _training_metrics(run: TrainedRun) -> TrainingMetrics:
    found = TrainingMetrics(None, None)
    for line in read_metrics(run.directory):
        if line["kind"] in ("step", "stopped", "finished") and line.get("dead_fraction") is not None:
            found = TrainingMetrics(line["dead_fraction"], line["dead_rows"])
    return found


def _intervals(site: SiteSums, run: RunSums, scale: float, draws: Float[Tensor, "draws blocks"]) -> dict[str, list[float] | None]:
    drawn = (site.drawn(draws), run.drawn(draws))
    values = {**vars(reconstruction_metrics(*drawn, scale)), **vars(splice_metrics(*drawn))}
    found = {name: interval(values[name]) for name in INTERVALS}
    return {name: None if each is None else [each.low, each.high] for name, each in found.items()}


def _definitions(parts: Iterable[type]) -> dict[str, str]:
    texts = {name: text for part in parts for name, text in definitions(part).items()}
    return {
        **texts,
        **strata.DEFINITIONS,
        "kept_rows": "rows that the site's mask lets in: not at position 0, neither BOS nor EOS nor padding, norm within the store's bound",
        "intervals": "95 %: the 2.5 % and 97.5 % quantiles of the metric over bootstrap draws of whole documents",
        "tokens": "tokens of text, BOS included, padding not",
        "blocks": "up to 512 tokens of one document, in the order of the contexts: the unit of gsae compare",
        "targets": "tokens whose prediction counts: text, and not the first of their segment",
    }


def _number(value: Any) -> float | int | None:
    """A plain number; None where it is not finite, which JSON cannot say."""
    plain = value.item() if isinstance(value, Tensor) else value
    return plain if plain is not None and math.isfinite(plain) else None
