"""The small evaluation that training makes as it goes. In: the config, the ranks. Out: a function of a site's SAEs, and their metrics.

The LLM and the text are loaded once and stay; the same contexts are used every time, so that the lines of a run can be compared.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from gsae.config import Config
from gsae.evaluate.batch import SplicedRun, cut_batches, documents_of_blocks
from gsae.evaluate.progress import Progress, Totals
from gsae.evaluate.reconstruction import reconstruction_metrics
from gsae.evaluate.run import evaluate_rounds, require_same_source, share_contexts, spliced_site
from gsae.evaluate.splice import splice_metrics
from gsae.llm.load import describe, load
from gsae.sae.objective import SAE
from gsae.store.manifest import load as load_manifest
from gsae.store.opening import store_of
from gsae.world import Group, World

PROBED = ("loss_recovered", "delta_ce", "ce_clean", "ce_spliced", "fvu", "l0", "gamma")
"""Metrics of a line."""


class NamedSAE(Protocol):
    """An SAE in training."""

    @property
    def name(self) -> str:
        """Differs from the others'."""

    @property
    def sae(self) -> SAE:
        """On the group's device."""

    @property
    def scale(self) -> float:
        """Rows are multiplied by it before they reach the SAE."""


class Probe:
    """A fixed evaluation of SAEs of any site. All ranks of the world make one together.

    Raises:
        ConfigError: the config's LLM or text is not the store's.
        CorpusError: there is no held-out text.
        ModelError: the LLM cannot be loaded.
    """

    def __init__(self, config: Config, world: World) -> None:
        with world.everyone.together():
            self._manifest = load_manifest(store_of(config))
            require_same_source(config, self._manifest, describe(config.llm))
            self._llm = load(replace(config.llm, sharding="replicate", offload=False), world.device)
        settings = replace(config.evaluate, max_tokens=config.train.evaluate_tokens, min_documents=1)
        contexts = share_contexts(config, settings, self._manifest, self._llm, world.everyone)
        self._batches = cut_batches(contexts, settings.batch_contexts)

    @torch.no_grad()
    def __call__(self, group: Group, site: str, runs: Sequence[NamedSAE]) -> dict[str, dict[str, float | None]]:
        """Metrics by name of the run, None where not finite, on the group's first rank; elsewhere nothing."""
        spliced = tuple(SplicedRun(run.name, run.sae, run.scale) for run in runs)
        sites = [spliced_site(self._manifest, site, self._llm, spliced, group.device)]
        totals = Totals(documents_of_blocks(self._batches))
        for _ in evaluate_rounds(self._llm, sites, self._batches, group, Progress(totals), check=False):
            pass
        found: dict[str, dict[str, float | None]] = {}
        for run in runs if group.is_first else ():
            sums = totals.sites[site].total(), totals.runs[run.name].total()
            metrics = {**vars(reconstruction_metrics(*sums, run.scale)), **vars(splice_metrics(*sums))}
            values = {name: metrics[name].item() for name in PROBED}
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            found[run.name] = {**finite, "tokens": sum(batch.num_tokens for batch in self._batches)}
        return found
