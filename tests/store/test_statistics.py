import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_rows import spell, statistics_of

from gsae.store.statistics import (
    LOWEST_NORM_BIN,
    NORM_MULTIPLES,
    DroppedRows,
    SiteStatistics,
    Tally,
    measure_rows,
    merge,
    no_rows,
    site_statistics,
)

MEDIAN_NORM = 2.0


def random_rows(num_rows, seed, dtype=torch.float32):
    """Rows of norms from about 1 to 60, and the mask that keeps those within 3 x the median norm."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 3, generator=generator) * torch.exp(3 * torch.rand(num_rows, 1, generator=generator))
    x = x.to(dtype)
    return x, x.float().norm(dim=1) <= 3 * MEDIAN_NORM


def reference_tally(rows):
    return Tally(len(rows), math.fsum(sum(value * value for value in row) for row in rows))


def assert_tally(tally, rows):
    assert tally.rows == len(rows)
    assert tally.squared_norm == pytest.approx(reference_tally(rows).squared_norm, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_a_slow_reference(dtype):
    x, kept = random_rows(500, 0, dtype)
    statistics = statistics_of(x, kept, MEDIAN_NORM, {"position_0": 4, "special": 1})
    rows = x.double().tolist()
    kept_rows = [row for row, is_kept in zip(rows, kept.tolist(), strict=True) if is_kept]
    assert 100 < len(kept_rows) < 400
    assert_tally(statistics.kept, kept_rows)
    assert_tally(statistics.candidates, rows)
    for multiple in NORM_MULTIPLES:
        assert_tally(statistics.kept_above[multiple], [row for row in kept_rows if math.hypot(*row) > multiple * MEDIAN_NORM])
        assert_tally(statistics.candidates_above[multiple], [row for row in rows if math.hypot(*row) > multiple * MEDIAN_NORM])
    assert statistics.dropped == {"position_0": 4, "special": 1, "outlier": 500 - len(kept_rows), "non_finite": 0}
    mean = [math.fsum(column) / len(kept_rows) for column in zip(*kept_rows, strict=True)]
    assert statistics.mean.tolist() == pytest.approx(mean, rel=1e-12)
    deviations = [math.dist(row, mean) ** 2 for row in kept_rows]
    assert statistics.variance == pytest.approx(math.fsum(deviations) / len(kept_rows), rel=1e-12)


def test_mean_and_variance_by_hand():
    # (3, 0) and (5, 4): mean (4, 2), E|x|^2 = (9 + 41) / 2 = 25, variance 25 - 20 = 5 = E(1 + 4).
    statistics = statistics_of(torch.tensor([[3.0, 0.0], [5.0, 4.0]]), torch.tensor([True, True]), 1.0, {})
    assert statistics.mean.tolist() == [4, 2]
    assert (statistics.mean_square, statistics.variance) == (25, 5)


def test_a_row_at_the_bound_is_not_above_it():
    statistics = statistics_of(torch.tensor([[3.0, 4.0]]), torch.tensor([True]), 2.5, {})  # norm 5 = 2 x 2.5
    assert statistics.kept_above[2] == Tally(0, 0.0)


def test_rows_that_are_not_finite_are_counted_apart_and_poison_no_sum():
    x = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, math.inf], [9.0, 0.0]])
    statistics = statistics_of(x, torch.tensor([True, False, False, False]), 1.0, {})
    assert statistics.dropped == {"outlier": 1, "non_finite": 2}
    assert (statistics.candidates, statistics.kept) == (Tally(2, 82.0), Tally(1, 1.0))
    with pytest.raises(ValueError, match="NaN or infinite is marked as kept"):
        statistics_of(x, torch.tensor([True, True, False, False]), 1.0, {})


def test_a_row_that_is_no_candidate_may_be_anything():
    x = torch.tensor([[[math.nan, 0.0], [1.0, 0.0], [math.inf, 0.0]]])
    kept = torch.tensor([[False, True, False]])
    statistics = site_statistics(
        measure_rows(x, kept), kept, kept, {"first": torch.tensor([[True, False, False]])}, kept.long(), spell, 1.0
    )
    assert statistics.dropped == {"first": 1, "outlier": 0, "non_finite": 0}
    assert statistics.dropped_rows["first"] == DroppedRows({"<0>": 1}, {})
    assert statistics.sum.tolist() == [1, 0]


@given(cuts=st.lists(st.integers(0, 60), max_size=4))
def test_merged_parts_equal_the_whole(cuts):
    x, kept = random_rows(60, 1)
    edges = [0, *sorted(cuts), 60]
    parts = [statistics_of(x[a:b], kept[a:b], MEDIAN_NORM, {"special": b - a}) for a, b in pairwise(edges)]
    merged, whole = merge([no_rows(3), *parts]), statistics_of(x, kept, MEDIAN_NORM, {"special": 60})
    assert merged.dropped == whole.dropped
    assert torch.allclose(merged.sum, whole.sum, rtol=1e-12)
    pairs = [(merged.kept, whole.kept), (merged.candidates, whole.candidates)]
    for multiple in NORM_MULTIPLES:
        pairs.append((merged.kept_above[multiple], whole.kept_above[multiple]))
        pairs.append((merged.candidates_above[multiple], whole.candidates_above[multiple]))
    for part, total in pairs:
        assert part.rows == total.rows
        assert part.squared_norm == pytest.approx(total.squared_norm, rel=1e-12)


def test_statistics_survive_json_bit_for_bit():
    statistics = statistics_of(*random_rows(50, 2), MEDIAN_NORM, {"special": 3})
    text = json.dumps(statistics.to_json())
    again = SiteStatistics.from_json(json.loads(text))
    assert torch.equal(again.sum, statistics.sum)
    assert json.dumps(again.to_json()) == text
    assert again.kept == statistics.kept
    assert again.candidates_above == statistics.candidates_above


def test_the_error_of_storing_is_that_of_kept_rows_and_adds_up():
    # Kept rows are off by (0, 1) and (2, 0): 1 + 4. The third is dropped, the fourth was NaN before it was stored.
    x = torch.tensor([[1.0, 1.0], [2.0, 1.0], [9.0, 0.0], [math.nan, 0.0]])
    original = torch.tensor([[1.0, 2.0], [4.0, 1.0], [0.0, 0.0], [math.nan, 1.0]])
    statistics = statistics_of(x, torch.tensor([True, True, False, False]), 1.0, {"special": 1}, original=original)
    assert statistics.squared_error == 5
    assert (statistics + statistics).squared_error == 10
    assert statistics.variance == 0.25  # mean (1.5, 1)
    assert statistics.storage_fvu == 5 / (2 * 0.25)
    old = statistics.to_json()
    assert SiteStatistics.from_json(old).squared_error == 5
    del old["squared_error"]
    assert SiteStatistics.from_json(old).squared_error == 0


def test_sums_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    x, original = torch.randn(2, 3, 500, 96, generator=generator)
    kept = torch.rand(3, 500, generator=generator) < 0.7
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(measure_rows(x, kept, original))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(vars(found[0]).values(), vars(found[1]).values(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_are_measured_on_the_gpu_as_on_the_cpu_without_waiting_for_it():
    x = torch.randn(4, 300, 64)
    x[1, 5] = math.nan
    kept = (torch.rand(4, 300) < 0.7) & torch.isfinite(x).all(dim=-1)
    device = [tensor.cuda() for tensor in (x, kept, x + 0.5)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = measure_rows(*device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = measure_rows(x, kept, x + 0.5)
    for one, other in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert torch.allclose(one.cpu(), other, rtol=1e-12, atol=1e-12, equal_nan=True)


def with_dropped(**reasons):
    return replace(no_rows(2), dropped_rows=reasons)


def test_dropped_rows_by_hand():
    # Norms 5, 10 and 0 with a median of 5: octaves 0 and 1 are bins 0 and 4, zeros are in the lowest. Tokens 7 and 8 are spelled alike.
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0], [math.inf, 0.0], [1.0, 0.0]])
    kept = torch.tensor([False, False, False, False, True])
    statistics = statistics_of(x, kept, 5.0, {"first": 0, "special": 2}, tokens=torch.tensor([8, 2, 7, 8, 3]))
    assert statistics.dropped_rows == {
        "first": DroppedRows({}, {}),
        "special": DroppedRows({"<0>": 2}, {-8: 2}),  # norm sqrt(2): log2(sqrt(2) / 5) = -1.82 octaves = -7.3 bins
        "outlier": DroppedRows({"<2>": 1, "<7>": 2}, {LOWEST_NORM_BIN: 1, 0: 1, 4: 1}),
        "non_finite": DroppedRows({"<7>": 1}, {}),
    }


def test_dropped_rows_add_up_by_reason_and_survive_json():
    one = with_dropped(first=DroppedRows({"<s>": 2}, {8: 2}))
    other = with_dropped(first=DroppedRows({"<s>": 1, "a": 1}, {-3: 1, 8: 1}), outlier=DroppedRows({".": 1}, {20: 1}))
    together = merge([one, other])
    assert together.dropped_rows == {
        "first": DroppedRows({"<s>": 3, "a": 1}, {-3: 1, 8: 3}),
        "outlier": DroppedRows({".": 1}, {20: 1}),
    }
    assert SiteStatistics.from_json(json.loads(json.dumps(together.to_json()))).dropped_rows == together.dropped_rows


def test_statistics_of_before_dropped_rows_were_recorded_are_read():
    old = with_dropped(first=DroppedRows({"<s>": 2}, {8: 2})).to_json()
    del old["dropped_rows"]
    assert SiteStatistics.from_json(old).dropped_rows == {}
