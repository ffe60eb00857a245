"""What splicing does to the LLM's predictions. In: activations and what takes their place, logits. Out: losses a target, and the metrics.

Cross-entropy and KL are computed in float32 (float64 from float64 logits), a slice of targets at a time, so that beside the
LLM's own logits memory holds only the slice; sums are float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gsae.evaluate.sums import RunSums, SiteSums, Values

SLICE_LOGITS = 2**20
"""Logits taken to float32 at once: 4 MiB, which stays in a CPU's cache. Being fixed, it does not change the numbers."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Contexts that go through the LLM together."""

    tokens: Int[Tensor, "contexts length"]
    positions: Int[Tensor, "contexts length"]
    documents: Int[Tensor, "contexts length"]
    """Index among the documents of this evaluation, -1 on padding."""
    blocks: Int[Tensor, "contexts length"]
    """Index among its blocks, of up to 512 tokens of a document each; -1 on padding."""

    @property
    def num_tokens(self) -> int:
        """Tokens of text, BOS included."""
        return int((self.documents >= 0).sum())

    def to(self, device: torch.device) -> "EvaluationBatch":
        """The batch on another device."""
        return EvaluationBatch(self.tokens.to(device), self.positions.to(device), self.documents.to(device), self.blocks.to(device))


@dataclass(frozen=True)
class Targets:
    """The predictions of a batch that count: the next token stands in the same segment."""

    rows: Int[Tensor, " targets"]
    """The rows that predict, counted through the batch's contexts."""
    tokens: Int[Tensor, " targets"]
    """The tokens that follow."""
    num_rows: int
    """Rows of the batch."""

    def at_rows(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " rows"]:
        """Values a target, in float64 at the rows that predict; 0 at other rows."""
        return torch.zeros(self.num_rows, dtype=torch.float64, device=values.device).index_copy_(0, self.rows, values.double())


@dataclass(frozen=True)
class SplicedLosses:
    """Losses with a splice, in nats."""

    ce: Float[Tensor, " targets"]
    """Cross-entropy of the target."""
    kl: Float[Tensor, " targets"]
    """KL(clean || spliced) of the next-token distribution."""


@dataclass(frozen=True)
class SpliceMetrics:
    """Means over targets, in nats, and their ratios. Fields are scalars, or have one value a bootstrap draw."""

    ce_clean: Annotated[Values, "cross-entropy of the untouched LLM over the targets, in nats a token"]
    ce_spliced: Annotated[Values, "cross-entropy with x_hat in place of x at kept rows, in nats a token; other rows keep their activation"]
    ce_zero: Annotated[Values, "cross-entropy with zero in place of x at kept rows, in nats a token"]
    ce_mean: Annotated[Values, "cross-entropy with the mean of the store's kept rows in place of x at kept rows, in nats a token"]
    ce_zero_all_rows: Annotated[Values, "cross-entropy with zero in place of x at all rows, in nats a token"]
    ce_mean_all_rows: Annotated[Values, "cross-entropy with the mean of the store's kept rows in place of x at all rows, in nats a token"]
    delta_ce: Annotated[Values, "ce_spliced - ce_clean, in nats a token"]
    kl: Annotated[Values, "mean over targets of KL(clean || spliced), the distance of the next-token distributions, in nats"]
    loss_recovered: Annotated[Values, "1 - (ce_spliced - ce_clean) / (ce_zero - ce_clean), from totals, not clamped"]
    loss_recovered_mean: Annotated[Values, "1 - (ce_spliced - ce_clean) / (ce_mean - ce_clean), from totals, not clamped"]
    loss_recovered_all_rows: Annotated[
        Values, "1 - (ce_spliced - ce_clean) / (ce_zero_all_rows - ce_clean), from totals, not clamped; x_hat still replaces kept rows only"
    ]
    loss_recovered_mean_all_rows: Annotated[
        Values, "1 - (ce_spliced - ce_clean) / (ce_mean_all_rows - ce_clean), from totals, not clamped; x_hat still replaces kept rows only"
    ]


def find_targets(batch: EvaluationBatch) -> Targets:
    """Tokens that are text and not first in their segment, each with the row before it, which is of the same segment."""
    follows = (batch.positions[:, 1:] > 0) & (batch.documents[:, 1:] >= 0) & (batch.documents[:, :-1] >= 0)
    context, column = follows.nonzero(as_tuple=True)
    return Targets(context * batch.tokens.shape[1] + column, batch.tokens[context, column + 1], batch.tokens.numel())


def splice(
    x: Float[Tensor, "contexts length d_model"],
    replacement: Float[Tensor, "*shape d_model"],
    kept: Bool[Tensor, "contexts length"],
) -> Float[Tensor, "contexts length d_model"]:
    """The activations with kept rows replaced, in the LLM's type. `replacement` is one vector, or a vector for every row."""
    wanted = replacement if replacement.ndim == 1 else replacement.view(x.shape)
    return torch.where(kept[..., None], wanted.to(x.dtype), x)


def cross_entropy(logits: Float[Tensor, "contexts length vocab_size"], targets: Targets) -> Float[Tensor, " targets"]:
    """-log softmax(logits) of each target, in nats."""
    return torch.cat([-_at(_log_softmax(logits, rows), tokens) for rows, tokens in _slices(targets, logits.shape[-1])])


def cross_entropy_of_one(logits: Float[Tensor, " vocab_size"], targets: Targets) -> Float[Tensor, " targets"]:
    """The same where every row has the same logits."""
    first = torch.zeros(1, dtype=torch.int64, device=logits.device)
    return -_log_softmax(logits, first)[0, targets.tokens]


def spliced_losses(
    logits: Float[Tensor, "contexts length vocab_size"], clean_logits: Float[Tensor, "contexts length vocab_size"], targets: Targets
) -> SplicedLosses:
    """Cross-entropy, and KL(clean || spliced) = sum p_clean (log p_clean - log p_spliced), at each target's row."""
    ce, kl = [], []
    for rows, tokens in _slices(targets, logits.shape[-1]):
        spliced, clean = _log_softmax(logits, rows), _log_softmax(clean_logits, rows)
        ce.append(-_at(spliced, tokens))
        kl.append(torch.linalg.vecdot(clean.exp(), clean - spliced))
    return SplicedLosses(torch.cat(ce), torch.cat(kl))


def _slices(targets: Targets, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and tokens of some targets at a time; one empty slice when there are none."""
    length = max(1, SLICE_LOGITS // vocab_size)
    for start in range(0, max(1, len(targets.rows)), length):
        yield targets.rows[start : start + length], targets.tokens[start : start + length]


def _log_softmax(logits: Tensor, rows: Tensor) -> Tensor:
    flat = logits.view(-1, logits.shape[-1])[rows]
    return F.log_softmax(flat, dim=-1, dtype=torch.promote_types(flat.dtype, torch.float32))


def _at(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return log_probabilities.gather(1, tokens[:, None])[:, 0]


def loss_recovered(clean: Values, spliced: Values, ablated: Values) -> Values:
    """1 - (spliced - clean) / (ablated - clean): 1 for the identity, 0 for the ablation itself. Never clamped."""
    return 1 - (spliced - clean) / (ablated - clean)


def splice_metrics(site: SiteSums, run: RunSums) -> SpliceMetrics:
    """One division each, from totals."""
    return SpliceMetrics(
        ce_clean=site.ce_clean / site.targets,
        ce_spliced=run.ce_spliced / site.targets,
        ce_zero=site.ce_zero / site.targets,
        ce_mean=site.ce_mean / site.targets,
        ce_zero_all_rows=site.ce_zero_all_rows / site.targets,
        ce_mean_all_rows=site.ce_mean_all_rows / site.targets,
        delta_ce=(run.ce_spliced - site.ce_clean) / site.targets,
        kl=run.kl / site.targets,
        loss_recovered=loss_recovered(site.ce_clean, run.ce_spliced, site.ce_zero),
        loss_recovered_mean=loss_recovered(site.ce_clean, run.ce_spliced, site.ce_mean),
        loss_recovered_all_rows=loss_recovered(site.ce_clean, run.ce_spliced, site.ce_zero_all_rows),
        loss_recovered_mean_all_rows=loss_recovered(site.ce_clean, run.ce_spliced, site.ce_mean_all_rows),
    )
