"""Metrics by hand on a model whose activations and logits are known, and definitions that others use, which differ where they should.

The model's residual stream at the site is the embedding of the token, and its logits are the residual stream itself: what is spliced in
is what is predicted with.
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from gsae.evaluate.reconstruction import ReconstructionMetrics, reconstruction_metrics, row_errors
from gsae.evaluate.splice import EvaluationBatch, SpliceMetrics, cross_entropy, find_targets, splice, splice_metrics, spliced_losses
from gsae.evaluate.sums import RunSums, SiteSums

SCALE = 0.5
# Two contexts; position 0 is BOS (token 0), which is not kept. Its row is huge, as an attention sink's.
TOKENS = torch.tensor([[0, 1, 2, 1], [0, 1, 3, 2]])
POSITIONS = torch.arange(4).expand(2, 4)
KEPT = POSITIONS > 0
EMBEDDING = torch.tensor([[0, 30.0, 0, 0], [0, 1, 3, 0], [0, 2.5, 1, 2], [0, 1, 5, 4]], dtype=torch.float64)
X = EMBEDDING[TOKENS]


def x_hat_of(x: torch.Tensor) -> torch.Tensor:
    """A reconstruction that shrinks by a fifth, and ruins one token."""
    return torch.where(x[..., 3:] > 3, 5 - x, 0.8 * x)


@dataclass(frozen=True)
class Found:
    splice: SpliceMetrics
    reconstruction: ReconstructionMetrics

    def value(self, name: str) -> float:
        part = self.splice if hasattr(self.splice, name) else self.reconstruction
        return getattr(part, name).item()


def batch_sums(tokens, positions, kept, x, x_hat, mean):
    """The sums of a batch as gsae makes them."""
    targets = find_targets(EvaluationBatch(tokens, positions, torch.zeros_like(tokens), torch.zeros_like(tokens)))
    flat, is_kept = x.flatten(0, 1), kept.flatten()
    errors = row_errors(flat, x_hat.flatten(0, 1))

    def only(values: torch.Tensor, mask: torch.Tensor = is_kept) -> torch.Tensor:
        return torch.where(mask if values.ndim == 1 else mask[:, None], values, 0.0).sum(0)

    losses = spliced_losses(splice(x, x_hat, kept), x, targets)
    offset = flat - mean

    def ce(replacement: torch.Tensor, where: torch.Tensor = kept) -> torch.Tensor:
        return cross_entropy(splice(x, replacement, where), targets).sum()

    zero, everywhere = torch.zeros_like(mean), torch.ones_like(kept)
    site = SiteSums(
        kept_rows=is_kept.double().sum(),
        dropped_rows=(~is_kept).double().sum(),
        squared_distance=only(offset.square().sum(1)),
        squared_distance_dropped=only(offset.square().sum(1), ~is_kept),
        offset=only(offset),
        targets=torch.tensor(float(len(targets.rows)), dtype=torch.float64),
        ce_clean=cross_entropy(x, targets).sum(),
        ce_zero=ce(zero),
        ce_mean=ce(mean),
        ce_zero_all_rows=ce(zero, everywhere),
        ce_mean_all_rows=ce(mean, everywhere),
    )
    run = RunSums(
        squared_error=only(errors.squared_error),
        squared_error_dropped=only(errors.squared_error, ~is_kept),
        squared_x_hat=only(errors.squared_x_hat),
        inner=only(errors.inner),
        cosine=only(errors.cosine),
        l0=only(torch.full((len(flat),), 2.0, dtype=torch.float64)),
        ce_spliced=losses.ce.sum(),
        kl=losses.kl.sum(),
    )
    return site, run


def found_with(x_hat: torch.Tensor, kept: torch.Tensor = KEPT) -> Found:
    sums = batch_sums(TOKENS, POSITIONS, kept, X, x_hat, X[KEPT].mean(0))
    return Found(splice_metrics(*sums), reconstruction_metrics(*sums, SCALE))


def log_p(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.exp().sum(-1, keepdim=True).log()


def by_hand(rows_of: dict[int, torch.Tensor]) -> float:
    """Cross-entropy a target where the row of each token is `rows_of[token]`; BOS rows stay."""
    losses = []
    for context in TOKENS.tolist():
        for token, following in pairwise(context):
            losses.append(-log_p(rows_of[token])[following].item())
    return sum(losses) / len(losses)


def test_every_metric_by_hand():
    """Kept rows: token 1 three times, token 2 twice, token 3 once."""
    found = found_with(x_hat_of(X))
    rows = [EMBEDDING[1]] * 3 + [EMBEDDING[2]] * 2 + [EMBEDDING[3]]
    hats = [0.8 * EMBEDDING[1]] * 3 + [0.8 * EMBEDDING[2]] * 2 + [5 - EMBEDDING[3]]
    mean = [sum(row[i].item() for row in rows) / 6 for i in range(4)]
    error = sum((a - b).square().sum().item() for a, b in zip(rows, hats, strict=True))
    assert error == pytest.approx(0.04 * (3 * 10 + 2 * 11.25) + 25 + 9 + 25 + 9)  # 5 - 2 x of token 3 is (5, 3, -5, -3)
    bos, zero = EMBEDDING[0], torch.zeros(4, dtype=torch.float64)
    keep = {0: bos, 1: EMBEDDING[1], 2: EMBEDDING[2], 3: EMBEDDING[3]}
    spliced = {0: bos, 1: 0.8 * EMBEDDING[1], 2: 0.8 * EMBEDDING[2], 3: 5 - EMBEDDING[3]}
    average = torch.tensor(mean, dtype=torch.float64)
    clean, with_sae = by_hand(keep), by_hand(spliced)
    without, with_mean = by_hand({0: bos, 1: zero, 2: zero, 3: zero}), by_hand({0: bos, 1: average, 2: average, 3: average})
    kl = []
    for context in TOKENS.tolist():
        for token in context[:-1]:
            p = log_p(keep[token]).exp()
            kl.append((p * (log_p(keep[token]) - log_p(spliced[token]))).sum().item())
    wanted = {
        "l0": 2,
        "mse": error / 6,
        "mse_scaled": error / 6 * SCALE**2,
        "fvu": error / sum((row - average).square().sum().item() for row in rows),
        "cosine": sum(F.cosine_similarity(a, b, dim=0).item() for a, b in zip(rows, hats, strict=True)) / 6,
        "gamma": sum(b.square().sum().item() for b in hats) / sum((a * b).sum().item() for a, b in zip(rows, hats, strict=True)),
        "fvu_dropped": 0.04 * 900 / (bos - average).square().sum().item(),
        "ce_clean": clean,
        "ce_spliced": with_sae,
        "ce_zero": without,
        "ce_mean": with_mean,
        "ce_zero_all_rows": math.log(4),
        "ce_mean_all_rows": by_hand(dict.fromkeys(range(4), average)),
        "delta_ce": with_sae - clean,
        "kl": sum(kl) / len(kl),
        "loss_recovered": 1 - (with_sae - clean) / (without - clean),
        "loss_recovered_mean": 1 - (with_sae - clean) / (with_mean - clean),
        "loss_recovered_all_rows": 1 - (with_sae - clean) / (math.log(4) - clean),
        "loss_recovered_mean_all_rows": 1 - (with_sae - clean) / (by_hand(dict.fromkeys(range(4), average)) - clean),
    }
    assert set(wanted) == {field.name for part in (SpliceMetrics, ReconstructionMetrics) for field in fields(part)}
    for name, value in wanted.items():
        assert found.value(name) == pytest.approx(value, rel=1e-12), name


def test_the_identity_is_one_zero_is_zero_and_the_mean_is_its_own():
    identity, zero, mean = (found_with(value) for value in (X, torch.zeros_like(X), X[KEPT].mean(0).expand_as(X)))
    assert (identity.value("loss_recovered"), identity.value("kl"), identity.value("fvu"), identity.value("gamma")) == (1, 0, 0, 1)
    assert zero.value("loss_recovered") == 0
    assert mean.value("loss_recovered_mean") == 0
    ce_clean, ce_zero, ce_mean = (zero.value(name) for name in ("ce_clean", "ce_zero", "ce_mean"))
    assert mean.value("loss_recovered") == pytest.approx(1 - (ce_mean - ce_clean) / (ce_zero - ce_clean))
    assert mean.value("fvu") == pytest.approx(1)


def test_fvu_without_the_mean_is_smaller():
    """Explained variance that is not centred (SAEBench 0.6.0) counts the mean as explained."""
    found, kept = found_with(x_hat_of(X)), X[KEPT]
    uncentred = (kept - x_hat_of(kept)).square().sum() / kept.square().sum()
    assert uncentred < 0.75 * found.value("fvu")


def test_mse_divided_by_tokens_twice_shrinks_with_the_text():
    once = found_with(x_hat_of(X)).value("mse")
    error = (X - x_hat_of(X))[KEPT].square().sum().item()
    assert once == pytest.approx(error / 6)
    assert error / 6 / 6 < 0.2 * once


def test_a_mean_of_ratios_of_batches_is_not_the_ratio_of_totals():
    """As dictionary_learning averages: the two contexts a batch each."""
    found, x_hat, mean = found_with(x_hat_of(X)), x_hat_of(X), X[KEPT].mean(0)
    parts = [[part[number : number + 1] for part in (TOKENS, POSITIONS, KEPT, X, x_hat)] for number in range(2)]
    of_batches = [batch_sums(*part, mean) for part in parts]
    for name, metrics in (("loss_recovered", splice_metrics), ("fvu", lambda *sums: reconstruction_metrics(*sums, SCALE))):
        ratios = [getattr(metrics(*sums), name).item() for sums in of_batches]
        assert abs(sum(ratios) / 2 - found.value(name)) > 0.01, name
    site, run = (type(a)(**{name: value + vars(b)[name] for name, value in vars(a).items()}) for a, b in zip(*of_batches, strict=True))
    assert splice_metrics(site, run).loss_recovered.item() == pytest.approx(found.value("loss_recovered"), rel=1e-12)


def test_splicing_at_bos_too_is_another_number():
    """A sink's row is huge, and no SAE is trained on it."""
    ours, with_bos = found_with(x_hat_of(X)), found_with(x_hat_of(X), torch.ones_like(KEPT))
    assert abs(ours.value("loss_recovered") - with_bos.value("loss_recovered")) > 0.01
    assert abs(ours.value("fvu") - with_bos.value("fvu")) > 0.01


def test_what_is_worse_than_the_ablation_is_below_zero():
    """A recipe that clamps says 0; one that inverts says that the ablation is 1."""
    found = found_with(-5 * X)
    assert found.value("loss_recovered") < -0.5
    inverted = (found.value("ce_spliced") - found.value("ce_clean")) / (found.value("ce_zero") - found.value("ce_clean"))
    assert found.value("loss_recovered") == pytest.approx(1 - inverted)
