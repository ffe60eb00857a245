import math

import pytest
import torch

from gsae.evaluate import density
from gsae.evaluate.density import FiringCounts, count_l0, density_histogram, density_metrics, l0_quantile, max_decoder_cosine_mean


def test_l0_histogram_counts_kept_rows_only():
    l0 = torch.tensor([0, 3, 3, 1, 2])
    kept = torch.tensor([True, True, True, True, False])
    assert count_l0(l0, kept, num_features=4).tolist() == [1, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("rows", "median", "p90"),
    [
        ([5], 5, 5),
        ([0, 0, 7], 0, 7),
        ([1, 2, 3, 4], 2, 4),  # two of four rows do not exceed 2
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 5, 9),
        ([1] * 9 + [10], 1, 1),
    ],
)
def test_l0_quantiles_by_hand(rows, median, p90):
    histogram = torch.bincount(torch.tensor(rows), minlength=11)
    assert (l0_quantile(histogram, 50), l0_quantile(histogram, 90)) == (median, p90)


def test_seen_features_stand_in_the_bin_of_their_density():
    # Over 1000 rows: 1 row is 10^-3, the first edge; 10 are 10^-2; 11 are above it; 1000 are the last edge; 0 is not seen.
    found = density_histogram(torch.tensor([0, 1, 10, 11, 1000]), rows=1000)
    assert found.edges == [-3 + i / 4 for i in range(13)]
    wanted = dict.fromkeys(range(12), 0) | {0: 1, 3: 1, 4: 1, 11: 1}
    assert found.counts == list(wanted.values())


def test_shares_of_features_by_hand():
    # 20 kept rows: on at 0, 2 (10 %), 3 (15 %) and 20 of them
    counts = FiringCounts(torch.tensor([0, 2, 3, 20]), torch.tensor([0, 18, 1, 1, 0]), torch.zeros(3))
    found = density_metrics(counts, torch.eye(4))
    assert found.not_seen_fraction == 0.25
    assert found.dense_fraction == 0.5
    assert (found.l0_median, found.l0_p90) == (1, 1)
    assert found.max_decoder_cosine_mean == 0


def test_counts_add_up():
    none = FiringCounts.none(2, torch.device("cpu"))
    one = FiringCounts(torch.tensor([1, 2]), torch.tensor([0, 3, 0]), torch.tensor([4, 5, 3]))
    both = none + one + one
    assert both.features.tolist() == [2, 4]
    assert both.l0_histogram.tolist() == [0, 6, 0]
    assert both.gates.tolist() == [8, 10, 6]


def test_decoder_cosines_by_hand(monkeypatch):
    monkeypatch.setattr(density, "SLICE_FEATURES", 2)
    # Directions at 0, 60 and 180 degrees, of any length: largest cosines 0.5 (0 with 60), 0.5, and -0.5 (180 with 60)
    angles = [0, math.pi / 3, math.pi]
    W_dec = torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64) * torch.tensor([[1.0], [2], [3]])
    assert max_decoder_cosine_mean(W_dec) == pytest.approx(0.5 / 3)


def test_a_duplicate_has_cosine_one():
    assert max_decoder_cosine_mean(torch.tensor([[3.0, 4], [6, 8]], dtype=torch.float64)) == pytest.approx(1)
