"""From contexts to the rows that are stored. In: contexts, the LLM. Out: LLM batches, harvested: rows, masks and measures at every site.

What needs the vectors is done on the LLM's device and only queued there; what is left is done by the thread that writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gsae.config import HarvestConfig
from gsae.corpus.contexts import Context
from gsae.harvest.transfer import HostCopies, Wait
from gsae.llm.load import LLM
from gsae.llm.rows import Candidates, candidates, special_tokens, within_norm
from gsae.llm.site import Site, capture
from gsae.store.encoding import Encoded, encode
from gsae.store.manifest import Layout
from gsae.store.shards import ContextRows
from gsae.store.statistics import RowMeasures, SiteStatistics, measure_rows, site_statistics


@dataclass(frozen=True, eq=False)
class LLMBatch:
    """Contexts that go through the LLM at once; on the CPU."""

    tokens: Int[Tensor, "contexts length"]
    positions: Int[Tensor, "contexts length"]
    documents: Int[Tensor, "contexts length"]
    candidates: Candidates


@dataclass(frozen=True, eq=False)
class SiteBatch:
    """An LLM batch at one site."""

    encoded: Encoded
    """Every row as it is stored, contexts x length x d_model."""
    kept: Bool[Tensor, "contexts length"]
    measures: RowMeasures
    median_norm: float


@dataclass(frozen=True, eq=False)
class HarvestedBatch:
    """An LLM batch at every site, on its way to the host."""

    batch: LLMBatch
    sites: Mapping[str, SiteBatch]
    """By name; their tensors may be read after `arrive`."""
    arrive: Wait
    """Waits until they are on the host."""
    llm: LLM

    def rows_of(self, site: str) -> tuple[Iterator[ContextRows], SiteStatistics]:
        """The kept rows of each context, and the statistics of all of them; waits until they are on the host."""
        self.arrive()
        batch, here = self.batch, self.sites[site]
        found = batch.candidates
        dropped = {"first": found.first, "special": found.special}
        statistics = site_statistics(here.measures, here.kept, found.rows, dropped, batch.tokens, self._spell, here.median_norm)
        return _split_by_context(batch, here), statistics

    def _spell(self, tokens: list[int]) -> list[str]:
        return [str(word) for word in self.llm.tokenizer.convert_ids_to_tokens(tokens)]


def llm_batches(contexts: Sequence[Context], batch_contexts: int, llm: LLM) -> Iterator[LLMBatch]:
    """The contexts in order, `batch_contexts` at a time; the last batch may be smaller."""
    special = special_tokens(llm.tokenizer)
    for start in range(0, len(contexts), batch_contexts):
        part = contexts[start : start + batch_contexts]
        stacks = (np.stack([getattr(context, name) for context in part]) for name in ("tokens", "positions", "documents"))
        tokens, positions, documents = (torch.from_numpy(stack).long() for stack in stacks)
        yield LLMBatch(tokens, positions, documents, candidates(tokens, positions, documents, special))


def calibrate(contexts: Sequence[Context], config: HarvestConfig, llm: LLM, sites: Sequence[Site]) -> dict[str, float]:
    """The median norm of the candidate rows of each site, as they are stored."""
    norms: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    device = llm.model.device
    for batch in llm_batches(contexts, config.batch_contexts, llm):
        may_be_kept = batch.candidates.rows.to(device)
        for name, x in capture(llm.model, sites, batch.tokens.to(device), batch.positions.to(device)).items():
            stored = encode(x[may_be_kept], config.storage_dtype).decode()
            norms[name].append(stored.double().norm(dim=-1).cpu())
    return {name: float(torch.cat(parts).median()) for name, parts in norms.items()}


class RowHarvest:
    """Runs the LLM over batches and tells which rows the mask lets in.

    Args:
        config: the storage type and the mask.
        llm: the LLM.
        layout: the sites.
        median_norms: of each site, from the calibration sample.
    """

    def __init__(self, config: HarvestConfig, llm: LLM, layout: Layout, median_norms: Mapping[str, float]) -> None:
        self._config, self._llm, self._layout, self._median_norms = config, llm, layout, median_norms
        self._copies = HostCopies(llm.model.device)

    def __call__(self, batch: LLMBatch) -> HarvestedBatch:
        """One forward; what comes after it is queued on the device and not waited for."""
        device = self._llm.model.device
        tokens, positions, may_be_kept = (
            each.to(device, non_blocking=True) for each in (batch.tokens, batch.positions, batch.candidates.rows)
        )
        activations = capture(self._llm.model, self._layout.sites, tokens, positions)
        on_device: list[Tensor] = []
        for name, x in activations.items():
            encoded = encode(x, self._config.storage_dtype)
            stored = encoded.decode()
            kept = may_be_kept & within_norm(stored, self._config.outlier_multiple * self._median_norms[name])
            measures = measure_rows(stored, kept, None if encoded.x.dtype == x.dtype else x)
            scales = [] if encoded.row_scale is None else [encoded.row_scale]
            on_device += [encoded.x, kept, measures.sum, measures.squared_norms, measures.squared_errors, *scales]
        on_host, arrive = self._copies.start(on_device)
        each = len(on_host) // len(activations)
        sites = {}
        for place, name in enumerate(activations):
            x, kept, total, norms, errors, *scales = on_host[place * each : (place + 1) * each]
            row_scale = scales[0] if scales else None
            sites[name] = SiteBatch(Encoded(x, row_scale), kept, RowMeasures(total, norms, errors), self._median_norms[name])
        return HarvestedBatch(batch, sites, arrive, self._llm)


def _split_by_context(batch: LLMBatch, site: SiteBatch) -> Iterator[ContextRows]:
    """The kept rows of each context."""
    kept = site.kept
    columns = [site.encoded.x, batch.tokens.int(), batch.positions.int(), batch.documents.int()]
    if site.encoded.row_scale is not None:
        columns.append(site.encoded.row_scale)
    for context in range(len(kept)):
        yield ContextRows(*(column[context][kept[context]] for column in columns))
