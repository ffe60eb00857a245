"""From contexts to the rows that are stored. In: the contexts of a shard. Out: kept rows and their statistics at every site."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gsae.config import HarvestConfig
from gsae.corpus.contexts import Context
from gsae.llm.load import LLM
from gsae.llm.rows import Candidates, candidates, special_tokens, within_norm
from gsae.llm.site import Site, capture
from gsae.store.manifest import Layout
from gsae.store.progress import SiteRows
from gsae.store.shards import DTYPES, ContextRows
from gsae.store.statistics import SiteStatistics, dropped_rows, merge, no_rows, site_statistics


@dataclass(frozen=True)
class LLMBatch:
    """Contexts that go through the LLM at once, on its device."""

    tokens: Int[Tensor, "contexts length"]
    positions: Int[Tensor, "contexts length"]
    documents: Int[Tensor, "contexts length"]
    candidates: Candidates


def llm_batches(contexts: Sequence[Context], batch_contexts: int, llm: LLM) -> Iterator[LLMBatch]:
    """The contexts in order, `batch_contexts` at a time; the last batch may be smaller."""
    special = special_tokens(llm.tokenizer)
    for start in range(0, len(contexts), batch_contexts):
        part = contexts[start : start + batch_contexts]
        stacks = (np.stack([getattr(context, name) for context in part]) for name in ("tokens", "positions", "documents"))
        tokens, positions, documents = (torch.from_numpy(stack).to(llm.model.device, torch.int64) for stack in stacks)
        yield LLMBatch(tokens, positions, documents, candidates(tokens, positions, documents, special))


def calibrate(contexts: Sequence[Context], config: HarvestConfig, llm: LLM, sites: Sequence[Site]) -> dict[str, float]:
    """The median norm of the candidate rows of each site, in the storage type."""
    norms: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for batch in llm_batches(contexts, config.batch_contexts, llm):
        activations = capture(llm.model, sites, batch.tokens, batch.positions)
        for name, x in activations.items():
            stored = x[batch.candidates.rows].to(DTYPES[config.storage_dtype])
            norms[name].append(stored.double().norm(dim=-1).cpu())
    return {name: float(torch.cat(parts).median()) for name, parts in norms.items()}


class ShardRows:
    """Runs the LLM over a shard's contexts and keeps the rows that the mask lets in."""

    def __init__(self, config: HarvestConfig, llm: LLM, layout: Layout, median_norms: Mapping[str, float]) -> None:
        self._config = config
        self._llm = llm
        self._layout = layout
        self._median_norms = median_norms
        self._dtype = DTYPES[config.storage_dtype]

    def __call__(self, contexts: Sequence[Context]) -> dict[str, SiteRows]:
        """The rows of every site; all sites have the same contexts, in the same order."""
        rows: dict[str, list[ContextRows]] = {site.name: [] for site in self._layout.sites}
        statistics: dict[str, list[SiteStatistics]] = {name: [no_rows(self._layout.d_model)] for name in rows}
        for batch in llm_batches(contexts, self._config.batch_contexts, self._llm):
            activations = capture(self._llm.model, self._layout.sites, batch.tokens, batch.positions)
            for name, x in activations.items():
                stored = x.to(self._dtype)
                kept = batch.candidates.rows & within_norm(stored, self._config.outlier_multiple * self._median_norms[name])
                statistics[name].append(self._statistics(name, batch, stored, kept))
                rows[name] += _split_by_context(batch, stored, kept)
        return {name: SiteRows(rows[name], merge(statistics[name])) for name in rows}

    def _statistics(
        self, site: str, batch: LLMBatch, x: Float[Tensor, "contexts length d_model"], kept: Bool[Tensor, "contexts length"]
    ) -> SiteStatistics:
        found, median_norm = batch.candidates, self._median_norms[site]
        dropped = {"first": int(found.first.sum()), "special": int(found.special.sum())}
        statistics = site_statistics(x[found.rows], kept[found.rows], median_norm, dropped)
        is_finite = torch.isfinite(x).all(dim=-1)
        reasons = {
            "first": found.first,
            "special": found.special,
            "outlier": found.rows & ~kept & is_finite,
            "non_finite": found.rows & ~is_finite,
        }
        spell = self._llm.tokenizer.convert_ids_to_tokens
        rows = {reason: dropped_rows(x[out], spell(batch.tokens[out].tolist()), median_norm) for reason, out in reasons.items()}
        return replace(statistics, dropped_rows=rows)


def _split_by_context(
    batch: LLMBatch, x: Float[Tensor, "contexts length d_model"], kept: Bool[Tensor, "contexts length"]
) -> Iterator[ContextRows]:
    """The kept rows of each context, on the CPU; one copy from the device for the whole batch."""
    counts = kept.sum(dim=1).tolist()
    columns = (x[kept], batch.tokens[kept].int(), batch.positions[kept].int(), batch.documents[kept].int())
    parts = (torch.split(column.cpu(), counts) for column in columns)
    for x_rows, token, position, document in zip(*parts, strict=True):
        yield ContextRows(x_rows, token, position, document)
