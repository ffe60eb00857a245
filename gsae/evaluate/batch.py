"""One evaluation batch. In: contexts, the LLM, and the SAEs of each site. Out: the batch's sums, block by block.

The clean forward is run once and shared by all sites; at each site the ablations and every SAE's splice run only the layers above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from gsae.corpus.contexts import Context
from gsae.errors import GsaeError
from gsae.evaluate.density import FiringCounts, count_l0
from gsae.evaluate.reconstruction import Reconstruction, reconstruct, row_errors
from gsae.evaluate.splice import (
    EvaluationBatch,
    SplicedLosses,
    Targets,
    cross_entropy,
    cross_entropy_of_one,
    find_targets,
    loss_recovered,
    splice,
    spliced_losses,
)
from gsae.evaluate.strata import StratumSums, row_strata, run_strata, site_strata
from gsae.evaluate.sums import Membership, RunSums, SiteSums, find_membership
from gsae.llm.load import LLM
from gsae.llm.rows import candidates, special_tokens, within_norm
from gsae.llm.site import Site, Tail, capture, substitute
from gsae.sae.objective import SAE
from gsae.store.encoding import encode

BLOCK_TOKENS = 512
"""Of a document, the unit in which two runs are compared."""


@dataclass(frozen=True)
class SplicedRun:
    """An SAE under evaluation."""

    name: str
    """Differs from all others in the evaluation."""
    sae: SAE
    scale: float
    """Rows are multiplied by it before they reach the SAE."""


@dataclass(frozen=True)
class SplicedSite:
    """A site under evaluation: what its rows are compared with, the layers above it, and its SAEs."""

    site: Site
    tail: Tail
    mean: Float[Tensor, " d_model"]
    """Mean of the store's kept rows, float64."""
    max_norm: float
    """Rows with a larger norm are dropped."""
    storage: str
    """The store's type: that norm is one of stored values, so that the mask is the harvest's to the last row."""
    runs: tuple[SplicedRun, ...]


@dataclass(frozen=True)
class BatchSums:
    """What a batch adds to the sums, on the CPU. It does not depend on the rank that made it."""

    blocks: Int[Tensor, " blocks"]
    """The blocks of the batch; the rows of every sum below."""
    sites: Mapping[str, SiteSums]
    """By name of the site."""
    runs: Mapping[str, RunSums]
    """By name of the run."""
    strata: Mapping[str, StratumSums]
    """By name of the site or run."""


@dataclass(frozen=True)
class SpliceChecks:
    """Loss recovered where it is known beforehand, through the same code as for an SAE."""

    identity_loss_recovered: float
    """With x itself as x_hat: 1."""
    zero_loss_recovered: float
    """With zero as x_hat: 0."""


@dataclass(frozen=True)
class BatchResult:
    """All that comes of a batch."""

    sums: BatchSums
    firing: Mapping[str, FiringCounts]
    """By name of the run, on the device; integers, which may be added in any order."""
    checks: Mapping[str, SpliceChecks]
    """By name of the site; empty when they were not asked for."""


@dataclass(frozen=True)
class _Clean:
    """A batch after its clean forward."""

    batch: EvaluationBatch
    targets: Targets
    membership: Membership
    may_be_kept: Bool[Tensor, "contexts length"]
    """Rows that are kept at every site unless their norm is too large."""
    logits: Float[Tensor, "contexts length vocab_size"]
    ce: Float[Tensor, " targets"]


@dataclass(frozen=True)
class _SiteRows:
    """A batch's activations at a site and what becomes of them."""

    x: Float[Tensor, "contexts length d_model"]
    kept: Bool[Tensor, "contexts length"]
    dropped: Bool[Tensor, "contexts length"]
    """Rows of text that are not kept."""


def cut_batches(contexts: Sequence[Context], batch_contexts: int) -> list[EvaluationBatch]:
    """The contexts in order, `batch_contexts` at a time, with their documents numbered 0, 1, 2, ... in corpus order."""
    documents = np.stack([context.documents for context in contexts])
    numbered = np.where(documents < 0, -1, np.searchsorted(np.unique(documents[documents >= 0]), documents))
    tokens, positions = np.stack([context.tokens for context in contexts]), np.stack([context.positions for context in contexts])
    arrays = (tokens, positions, numbered, _cut_blocks(numbered))
    whole = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    cuts = [slice(start, start + batch_contexts) for start in range(0, len(contexts), batch_contexts)]
    return [EvaluationBatch(*(array[cut] for array in whole)) for cut in cuts]


def _cut_blocks(documents: Int64[np.ndarray, "contexts length"]) -> Int64[np.ndarray, "contexts length"]:
    """The index of each token's block, -1 on padding: every document's tokens, in the order of the contexts, 512 at a time."""
    flat = documents.ravel()
    order = np.argsort(flat, kind="stable")
    in_order = flat[order]
    numbers = np.arange(len(flat)) - np.searchsorted(in_order, in_order)  # of the token within its document
    is_first = (np.diff(in_order, prepend=-1) != 0) | (numbers % BLOCK_TOKENS == 0)
    blocks = np.empty_like(flat)
    blocks[order] = np.where(in_order < 0, -1, np.cumsum(is_first & (in_order >= 0)) - 1)
    return blocks.reshape(documents.shape)


def documents_of_blocks(batches: Sequence[EvaluationBatch]) -> Int[Tensor, " blocks"]:
    """The document of every block of an evaluation."""
    found = torch.empty(1 + max(int(batch.blocks.max()) for batch in batches), dtype=torch.int64)
    for batch in batches:
        is_text = batch.blocks >= 0
        found[batch.blocks[is_text]] = batch.documents[is_text]
    return found


def evaluate_batch(llm: LLM, sites: Sequence[SplicedSite], batch: EvaluationBatch, check: bool) -> BatchResult:
    """The sums of one batch at all sites and runs.

    Args:
        llm: the whole LLM.
        sites: in layer order.
        batch: on the LLM's device.
        check: whether to check the splicing too.

    Raises:
        GsaeError: the layers above a site are not the LLM's, splicing the identity changes the loss, or splicing zero is not the
            zero ablation: a bug.
    """
    x = capture(llm.model, [each.site for each in sites], batch.tokens, batch.positions)
    clean = _clean_forward(llm, sites[-1], x[sites[-1].site.name], batch)
    site_sums: dict[str, SiteSums] = {}
    run_sums: dict[str, RunSums] = {}
    strata: dict[str, StratumSums] = {}
    firing: dict[str, FiringCounts] = {}
    checks: dict[str, SpliceChecks] = {}
    if check:
        _check_clean(llm, sites[-1], clean)
    for each in sites:
        rows = _mask(each, x.pop(each.site.name), clean)
        site_values = _site_values(each, rows, clean)
        if check:
            checks[each.site.name] = _check(each, rows, site_values, clean)
        site_sums[each.site.name] = site_values.by_block(clean.membership.matrix)
        in_strata = row_strata(batch.positions.flatten(), rows.x.flatten(0, 1), each.max_norm)
        strata[each.site.name] = site_strata(in_strata, site_values)
        for run in each.runs:
            reconstruction = reconstruct(run.sae, rows.x.flatten(0, 1), run.scale, rows.kept.flatten())
            run_values = _run_values(each, reconstruction, rows, clean)
            run_sums[run.name] = run_values.by_block(clean.membership.matrix)
            strata[run.name] = run_strata(in_strata, run_values)
            l0_histogram = count_l0(reconstruction.l0, rows.kept.flatten(), run.sae.total_features)
            firing[run.name] = FiringCounts(reconstruction.firing_counts, l0_histogram, reconstruction.gates)
    return BatchResult(BatchSums(clean.membership.blocks, site_sums, run_sums, strata), firing, checks)


def _clean_forward(llm: LLM, last: SplicedSite, x: Float[Tensor, "contexts length d_model"], batch: EvaluationBatch) -> _Clean:
    """The logits that follow from the last site's own activations, which are exactly the whole LLM's."""
    targets = find_targets(batch)
    logits = last.tail.logits(x, batch.positions)
    may_be_kept = candidates(batch.tokens, batch.positions, batch.documents, special_tokens(llm.tokenizer)).rows
    return _Clean(batch, targets, find_membership(batch.blocks), may_be_kept, logits, cross_entropy(logits, targets))


def _mask(each: SplicedSite, x: Float[Tensor, "contexts length d_model"], clean: _Clean) -> _SiteRows:
    kept = clean.may_be_kept & within_norm(encode(x, each.storage).decode(), each.max_norm)
    return _SiteRows(x, kept, (clean.batch.documents >= 0) & ~kept)


def _check_clean(llm: LLM, last: SplicedSite, clean: _Clean) -> None:
    """The clean losses must be those of the whole LLM, bit for bit."""
    whole = substitute(llm.model, last.site, clean.batch.tokens, clean.batch.positions, lambda x: x)
    _require_equal(cross_entropy(whole, clean.targets), clean.ce, f"the layers above {last.site.name} give clean losses")


def _check(each: SplicedSite, rows: _SiteRows, values: SiteSums, clean: _Clean) -> SpliceChecks:
    """Splice in x itself and zero as if they came from an SAE: the losses must be the clean and the ablated ones, bit for bit."""
    x = rows.x.flatten(0, 1)
    identity, zero = (clean.targets.at_rows(_losses_with(each, rows, x_hat, clean).ce) for x_hat in (x, torch.zeros_like(x)))
    _require_equal(identity, values.ce_clean, f"{each.site.name}: splicing in the activations themselves gives losses")
    _require_equal(zero, values.ce_zero, f"{each.site.name}: splicing in zero gives losses")
    clean_sum, zero_sum = values.ce_clean.sum(), values.ce_zero.sum()
    recovered = (loss_recovered(clean_sum, spliced.sum(), zero_sum) for spliced in (identity, zero))
    return SpliceChecks(*(float(value) for value in recovered))


def _require_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    if not torch.equal(found, wanted):
        raise GsaeError(
            f"{what} that are {(found - wanted).abs().max():.3g} nats off; this is a bug in gsae, "
            "or the LLM computes differently above a site than as a whole: report it with the config"
        )


def _site_values(each: SplicedSite, rows: _SiteRows, clean: _Clean) -> SiteSums:
    """One value a row of the batch; a row that a sum does not count has 0."""
    kept, dropped = rows.kept.flatten(), rows.dropped.flatten()
    offset = rows.x.flatten(0, 1).double() - each.mean
    squared_distance = offset.square().sum(-1)
    at_rows = clean.targets.at_rows
    return SiteSums(
        kept_rows=kept.double(),
        dropped_rows=dropped.double(),
        squared_distance=torch.where(kept, squared_distance, 0.0),
        squared_distance_dropped=torch.where(dropped, squared_distance, 0.0),
        offset=torch.where(kept[:, None], offset, 0.0),
        targets=at_rows(torch.ones_like(clean.ce)),
        ce_clean=at_rows(clean.ce),
        ce_zero=at_rows(_ce_with(each, rows, torch.zeros_like(each.mean), clean)),
        ce_mean=at_rows(_ce_with(each, rows, each.mean, clean)),
        ce_zero_all_rows=at_rows(_ce_everywhere(each, torch.zeros_like(each.mean), clean)),
        ce_mean_all_rows=at_rows(_ce_everywhere(each, each.mean, clean)),
    )


def _run_values(each: SplicedSite, reconstruction: Reconstruction, rows: _SiteRows, clean: _Clean) -> RunSums:
    """One value a row of the batch; a row that a sum does not count has 0."""
    kept, dropped = rows.kept.flatten(), rows.dropped.flatten()
    errors = row_errors(rows.x.flatten(0, 1), reconstruction.x_hat)
    losses = _losses_with(each, rows, reconstruction.x_hat, clean)
    return RunSums(
        squared_error=torch.where(kept, errors.squared_error, 0.0),
        squared_error_dropped=torch.where(dropped, errors.squared_error, 0.0),
        squared_x_hat=torch.where(kept, errors.squared_x_hat, 0.0),
        inner=torch.where(kept, errors.inner, 0.0),
        cosine=torch.where(kept, errors.cosine, 0.0),
        l0=torch.where(kept, reconstruction.l0.double(), 0.0),
        ce_spliced=clean.targets.at_rows(losses.ce),
        kl=clean.targets.at_rows(losses.kl),
    )


def _losses_with(each: SplicedSite, rows: _SiteRows, x_hat: Float[Tensor, "rows d_model"], clean: _Clean) -> SplicedLosses:
    """Losses with x_hat at kept rows."""
    logits = each.tail.logits(splice(rows.x, x_hat, rows.kept), clean.batch.positions)
    return spliced_losses(logits, clean.logits, clean.targets)


def _ce_with(each: SplicedSite, rows: _SiteRows, vector: Float[Tensor, " d_model"], clean: _Clean) -> Float[Tensor, " targets"]:
    """Cross-entropy with one vector at kept rows."""
    return cross_entropy(each.tail.logits(splice(rows.x, vector, rows.kept), clean.batch.positions), clean.targets)


def _ce_everywhere(each: SplicedSite, vector: Float[Tensor, " d_model"], clean: _Clean) -> Float[Tensor, " targets"]:
    """Cross-entropy with one vector at all rows.

    Attention then averages equal values, so every row above the site is the same, wherever it stands: one row is computed.
    """
    first_position = clean.batch.positions.new_zeros(1, 1)
    return cross_entropy_of_one(each.tail.logits(vector[None, None], first_position)[0, 0], clean.targets)
