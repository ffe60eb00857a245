import math

import pytest
import torch

from gsae.evaluate import reconstruction as module
from gsae.evaluate.reconstruction import reconstruct, reconstruction_metrics, row_errors
from gsae.evaluate.sums import RunSums, SiteSums
from gsae.sae.objective import build
from gsae.sae.relu import ReluSAE


@pytest.fixture
def sae() -> ReluSAE:
    """Features (x_0 - 1)+ and (x_1 - 1)+ along the two axes, plus b_dec = 0."""
    sae = ReluSAE(2, 2, torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_enc.fill_(-1)
    return sae


def test_an_sae_sees_scaled_rows_and_gives_raw_ones(sae):
    # 0.5 * (4, 8) = (2, 4) -> f = (1, 3) -> x_hat = (1, 3) / 0.5 = (2, 6); (4, 1) -> (2, 0.5) -> f = (1, 0); (0, 0) -> f = 0
    x = torch.tensor([[4.0, 8], [4, 1], [0, 0]])
    found = reconstruct(sae, x, 0.5, torch.tensor([True, False, True]))
    assert found.x_hat.tolist() == [[2, 6], [2, 0], [0, 0]]
    assert found.l0.tolist() == [2, 1, 0]
    assert found.firing_counts.tolist() == [1, 1]  # the second row is not kept


def test_slices_do_not_change_the_numbers(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sae = build("gated", 8, 32, seed=0, dtype=torch.float64)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    kept = torch.rand(50, generator=generator) < 0.5
    whole = reconstruct(sae, x, 1.0, kept)
    monkeypatch.setattr(module, "SLICE_ROWS", 7)
    parts = reconstruct(sae, x, 1.0, kept)
    torch.testing.assert_close(parts.x_hat, whole.x_hat, rtol=1e-12, atol=0)
    assert parts.l0.equal(whole.l0)
    assert parts.firing_counts.equal(whole.firing_counts)
    assert whole.firing_counts.sum() == whole.l0[kept].sum() > 0


def test_row_errors_by_hand():
    # |(3, 4) - (3, 0)|^2 = 16, |x_hat|^2 = 9, inner 9, cosine 9 / (5 * 3); a zero x_hat has cosine 0
    found = row_errors(torch.tensor([[3.0, 4], [1, 0]]), torch.tensor([[3.0, 0], [0, 0]]))
    assert found.squared_error.tolist() == [16, 1]
    assert found.squared_x_hat.tolist() == [9, 0]
    assert found.inner.tolist() == [9, 0]
    assert found.cosine.tolist() == [pytest.approx(0.6, abs=1e-15), 0]
    assert found.squared_error.dtype == torch.float64


def site_sums(**values) -> SiteSums:
    zero = torch.tensor(0.0, dtype=torch.float64)
    names = SiteSums.__dataclass_fields__
    return SiteSums(**{name: torch.as_tensor(values.get(name, zero), dtype=torch.float64) for name in names})


def run_sums(**values) -> RunSums:
    return RunSums(**{name: torch.as_tensor(values.get(name, 0.0), dtype=torch.float64) for name in RunSums.__dataclass_fields__})


def test_metrics_of_two_rows_by_hand():
    # Kept rows (1, 0) and (5, 4), x_hat (1, 0) and (4, 4); reference point (1, 1), so offsets (0, -1) and (4, 3).
    # Their mean is (3, 2): sum |x - mean|^2 = 8 + 8 = 16; about (1, 1) it is 1 + 25 = 26, and |(4, 2)|^2 / 2 = 10 less.
    site = site_sums(kept_rows=2, squared_distance=26, offset=[4, 2], squared_distance_dropped=8)
    # Errors 0 + 1; |x_hat|^2 = 1 + 32; x . x_hat = 1 + 36; features on 1 + 2; cosines 1 + 36 / (sqrt 41 sqrt 32)
    run = run_sums(squared_error=1, squared_error_dropped=2, squared_x_hat=33, inner=37, l0=3, cosine=1 + 36 / math.sqrt(41 * 32))
    found = reconstruction_metrics(site, run, scale=0.5)
    assert found.fvu.item() == pytest.approx(1 / 16)
    assert found.fvu_dropped.item() == 0.25
    assert found.mse.item() == 0.5
    assert found.mse_scaled.item() == 0.125
    assert found.gamma.item() == pytest.approx(33 / 37)
    assert found.l0.item() == 1.5
    assert found.cosine.item() == pytest.approx((1 + 0.99388) / 2, abs=1e-5)


def test_fvu_does_not_depend_on_the_reference_point():
    x = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    x_hat = x * 0.9
    wanted = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    for point in (torch.zeros(3), x.mean(0), torch.tensor([7.0, -3, 4])):
        offset = x - point
        site = site_sums(kept_rows=100, squared_distance=offset.square().sum(), offset=offset.sum(0))
        found = reconstruction_metrics(site, run_sums(squared_error=(x - x_hat).square().sum()), 1.0)
        torch.testing.assert_close(found.fvu, wanted, rtol=1e-12, atol=0)
