from itertools import pairwise

import pytest
import torch

from gsae.evaluate.strata import BINS_AN_OCTAVE, NORM_BINS, Stratum, StratumSums, by_norm_decile, by_position, row_strata


def test_rows_are_in_the_stratum_of_their_position_and_norm():
    positions = torch.tensor([0, 1, 2, 3, 4, 7, 8, 127, 128])
    x = torch.zeros(9, 2)
    x[:, 0] = torch.tensor([8.0, 8, 7.999, 4, 4.01, 2, 1, 0, 9])
    found = row_strata(positions, x, max_norm=8.0)
    assert found.position.tolist() == [0, 0, 1, 1, 2, 2, 3, 6, 7]
    top, octave = NORM_BINS - 1, BINS_AN_OCTAVE
    assert found.norm.tolist() == [top, top, top, top - octave, top - octave + 1, top - 2 * octave, top - 3 * octave, 0, top]


def test_a_table_of_positions_by_hand():
    site, run = torch.zeros(2, 24).double(), torch.zeros(2, 24).double()
    site[:, 0], run[:, 0] = torch.tensor([2.0, 10]), torch.tensor([1.0, 6])
    site[:, 3], run[:, 3] = torch.tensor([4.0, 8]), torch.tensor([2.0, 4])
    none = torch.zeros(2, NORM_BINS).double()
    assert by_position(StratumSums(site, none), StratumSums(run, none)) == [Stratum(1, 1, 2, 3.0, 0.1), Stratum(8, 15, 4, 1.0, 0.25)]


def test_deciles_have_a_tenth_of_the_rows_and_meet():
    norms = torch.linspace(1, 10, 5000, dtype=torch.float64)
    bins = row_strata(torch.ones(5000, dtype=torch.int64), norms[:, None], 10.0).norm
    site, run = torch.zeros(2, NORM_BINS).double(), torch.zeros(2, NORM_BINS).double()
    site[0], site[1], run[0] = bins.bincount(minlength=NORM_BINS), 2 * bins.bincount(minlength=NORM_BINS), bins.bincount(norms, NORM_BINS)
    none = torch.zeros(2, 24).double()
    found = by_norm_decile(StratumSums(none, site), StratumSums(none, run), 10.0)
    assert len(found) == 10
    assert sum(each.rows for each in found) == 5000
    assert all(each.rows == pytest.approx(500, rel=0.15) for each in found)  # a bin is 1.1 %
    assert all(a.high == b.low for a, b in pairwise(found))
    assert found[-1].high == 10
    for each in found:
        inside = norms[(norms > each.low) & (norms <= each.high)]
        assert each.rows == pytest.approx(len(inside), abs=1)
        assert each.fvu == pytest.approx(inside.mean().item() / 2, rel=1e-2)


def test_rows_of_one_norm_are_one_line():
    site = torch.zeros(2, NORM_BINS).double()
    site[:, 700] = torch.tensor([100.0, 50])
    none = torch.zeros(2, 24).double()
    (only,) = by_norm_decile(StratumSums(none, site), StratumSums(none, site), 1.0)
    assert (only.rows, only.l0, only.fvu) == (100, 0.5, 2.0)
