import math

import pytest
import torch

from gsae.evaluate.pairs import BlockSums, differences, match, read_blocks, write_blocks
from gsae.evaluate.sums import RunSums, SiteSums
from gsae.sae.objective import build

BLOCKS = 40


def make_sums(error: float, noise: float, seed: int) -> BlockSums:
    """Blocks of 100 rows whose difficulty all runs share; `error` of each, and a little of its own."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    difficulty = 1 + 9 * torch.rand(BLOCKS, generator=shared, dtype=torch.float64)
    rows = torch.full((BLOCKS,), 100.0, dtype=torch.float64)
    values = rows * difficulty * (error + noise * torch.randn(BLOCKS, generator=own, dtype=torch.float64))
    site = {name: rows.clone() for name in SiteSums.__dataclass_fields__}
    site |= {"ce_clean": 2 * rows, "ce_zero": 12 * rows, "squared_distance": 10 * rows, "offset": torch.zeros(BLOCKS, 3).double()}
    run = {name: values.clone() for name in RunSums.__dataclass_fields__} | {"ce_spliced": 2 * rows + values}
    return BlockSums(torch.arange(BLOCKS) // 2, SiteSums(**site), RunSums(**run))


def test_a_difference_is_the_second_less_the_first_by_hand():
    first, second = make_sums(0.1, 0, 1), make_sums(0.2, 0, 2)
    total = first.run.l0.sum().item() / 0.1 / (BLOCKS * 100)  # mean difficulty
    found = differences(first, second, (1.0, 1.0), 200, seed=0)
    assert found["fvu"].first == pytest.approx(0.1 * total / 10)
    assert found["fvu"].second == pytest.approx(0.2 * total / 10)
    assert found["fvu"].difference == pytest.approx(0.1 * total / 10)
    assert found["delta_ce"].difference == pytest.approx(0.1 * total)
    assert found["loss_recovered"].difference == pytest.approx(-0.1 * total / 10)


def test_a_certain_difference_is_certain_though_the_runs_intervals_overlap():
    first, second, nothing = make_sums(0.5, 0.002, 1), make_sums(0.52, 0.002, 2), make_sums(0, 0, 3)
    alone = differences(nothing, first, (1.0, 1.0), 500, seed=0)["l0"].interval
    paired = differences(first, second, (1.0, 1.0), 500, seed=0)["l0"]
    assert alone.high - alone.low > 5 * paired.difference
    assert 0 < paired.interval.low < paired.difference < paired.interval.high
    assert paired.interval.high - paired.interval.low < 0.5 * paired.difference


def test_a_run_does_not_differ_from_itself():
    for each in differences(make_sums(0.1, 0.1, 1), make_sums(0.1, 0.1, 1), (1.0, 1.0), 50, seed=0).values():
        assert each.difference == each.interval.low == each.interval.high == 0


def test_other_rows_are_refused():
    first, second = make_sums(0.1, 0, 1), make_sums(0.1, 0, 1)
    second.site.kept_rows[3] -= 1
    with pytest.raises(ValueError, match="not evaluated on the same rows"):
        differences(first, second, (1.0, 1.0), 50, seed=0)


def test_sums_are_read_as_they_were_written(tmp_path):
    sums = make_sums(0.1, 0.1, 1)
    write_blocks(tmp_path / "blocks.safetensors", sums.site, sums.run, sums.documents)
    found = read_blocks(tmp_path / "blocks.safetensors")
    assert found.documents.equal(sums.documents)
    for part in ("site", "run"):
        for name, value in vars(getattr(sums, part)).items():
            assert getattr(getattr(found, part), name).equal(value), name


def test_matched_cosines_by_hand():
    # Directions at 0 and 90 degrees; at 30, 60 and 180: largest cosines cos 30, cos 30; and the other way cos 30, cos 30, 0
    def at(*degrees: float) -> torch.Tensor:
        return torch.tensor([[3 * math.cos(math.radians(a)), 3 * math.sin(math.radians(a))] for a in degrees], dtype=torch.float64)

    found, back = match(at(0, 90), at(30, 60, 180)), match(at(30, 60, 180), at(0, 90))
    near = math.cos(math.pi / 6)
    assert (found.features, found.mean, found.share_above_0_9) == (2, pytest.approx(near), 0)
    assert (back.features, back.mean, back.median) == (3, pytest.approx(2 / 3 * near), pytest.approx(near))


def test_the_same_directions_in_another_order_are_found_and_random_ones_are_not():
    directions = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    found = match(directions, directions[torch.randperm(300, generator=torch.Generator().manual_seed(2))])
    assert (found.mean, found.share_above_0_9) == (pytest.approx(1), 1)
    assert 0.2 < found.random_mean < 0.5


def test_chance_is_not_where_saes_begin():
    """2304 random directions in 576 dimensions: the largest of as many normal cosines, about sqrt(2 ln 2304 / 576) = 0.16."""
    directions = build("gated", 576, 2304, seed=0).W_dec.detach()
    assert 0.13 < match(directions, directions).random_mean < 0.17


def test_no_directions_match_nothing():
    assert match(torch.zeros(0, 4), torch.ones(2, 4)) is None
