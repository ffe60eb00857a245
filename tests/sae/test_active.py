"""The active set: which entries, their products and sums, that none is missed in bfloat16, and how much is in memory for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gsae.sae import active
from gsae.sae.active import find_active

ROWS, D_MODEL, FEATURES = 40, 8, 24


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entries(found):
    return list(zip(found.row.tolist(), found.feature.tolist(), strict=True))


def expected(x, encoder, bias):
    return [tuple(place) for place in (x @ encoder + bias > 0).nonzero().tolist()]


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_features", [24, 23])  # a whole number of eight-byte words, and not
def test_entries_are_where_the_gate_is_open_in_order(in_bfloat16, dtype, num_features):
    x, encoder, bias = (
        drawn(ROWS, D_MODEL, dtype=dtype),
        drawn(D_MODEL, num_features, seed=1, dtype=dtype),
        drawn(num_features, seed=2, dtype=dtype),
    )
    found = find_active(x, encoder, bias, in_bfloat16=in_bfloat16)
    assert entries(found) == expected(x, encoder, bias)
    torch.testing.assert_close(found.a, (x @ encoder)[found.row, found.feature])
    assert found.row_offsets.tolist() == [sum(row < each for row, _ in entries(found)) for each in range(ROWS + 1)]


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, encoder, bias = drawn(ROWS, D_MODEL), drawn(D_MODEL, FEATURES, seed=1), drawn(FEATURES, seed=2)
    monkeypatch.setitem(active.BLOCK_ELEMENTS, "cpu", 7 * FEATURES)
    assert entries(find_active(x, encoder, bias)) == expected(x, encoder, bias)


def test_bfloat16_misses_no_entry_at_its_worst():
    # 1 + 1/257 is rounded down to 1 in bfloat16 (the next number is 1 + 1/128): the product of 64 such pairs is 64, which is
    # 0.5 too small. A gate that opens at 64.4 is open by 0.1, and its bfloat16 product 0.4 below it.
    value = 1 + 1 / 257
    x, encoder = torch.full((1, 64), value), torch.full((64, 1), value)
    exact, bias = float((x.double() @ encoder.double()).item()), torch.tensor([-64.4])
    assert exact - 64.4 > 0
    assert float(x.bfloat16() @ encoder.bfloat16()) - 64.4 < 0
    assert entries(find_active(x, encoder, bias, in_bfloat16=True)) == [(0, 0)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_bfloat16_finds_the_same_entries_whatever_the_scale(scale, offset):
    x, encoder = drawn(300, 64, dtype=torch.float32) * scale, drawn(64, 200, seed=1, dtype=torch.float32)
    bias = drawn(200, seed=2, dtype=torch.float32) * scale
    x = x + offset * scale * torch.ones(64) / 8  # a large mean that the biases take away again
    bias = bias - (x.mean(0) @ encoder)
    exact = find_active(x.double(), encoder.double(), bias.double())
    found = find_active(x, encoder, bias, in_bfloat16=True)
    # Entries whose gate is within float32's own rounding of zero may fall on either side.
    unclear = (x.double() @ encoder.double() + bias.double()).abs() < 1e-5 * x.norm(dim=1, keepdim=True).double() * encoder.norm(
        dim=0
    ).double()
    differing = set(entries(exact)) ^ set(entries(found))
    assert all(unclear[place] for place in differing)
    assert len(differing) < 0.001 * len(exact.row) + 10
    assert 0.1 < len(exact.row) / unclear.numel() < 0.9


def test_sums_and_products_are_those_of_the_dense_matrix():
    x, encoder, bias = drawn(ROWS, D_MODEL), drawn(D_MODEL, FEATURES, seed=1), drawn(FEATURES, seed=2) - 1
    found = find_active(x, encoder, bias)
    values, by_feature, by_row = drawn(len(found.row), seed=3), drawn(FEATURES, 5, seed=4), drawn(ROWS, 5, seed=5)
    dense = torch.zeros(ROWS, FEATURES, dtype=torch.float64)
    dense[found.row, found.feature] = values
    torch.testing.assert_close(found.sums_over_features(values, by_feature), dense @ by_feature)
    torch.testing.assert_close(found.sums_over_rows(values, by_row), dense.T @ by_row)
    torch.testing.assert_close(found.products(by_row, by_feature), (by_row @ by_feature.T)[found.row, found.feature])
    torch.testing.assert_close(found.feature_totals(values), dense.sum(0))
    assert torch.equal(found.feature_counts(), (dense != 0).sum(0))
    assert torch.equal(found.feature_counts(values > 0), (dense > 0).sum(0))


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that was made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.layout == torch.strided:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_rows_times_features_are_never_in_memory_together(monkeypatch, in_bfloat16):
    x, encoder, bias = drawn(64, 4), drawn(4, 256, seed=1), torch.full((256,), -6.0, dtype=torch.float64)
    monkeypatch.setitem(active.BLOCK_ELEMENTS, "cpu", 16 * 256)
    with LargestTensor() as largest:
        find_active(x, encoder, bias, in_bfloat16=in_bfloat16)
    assert largest.elements == 16 * 256


@pytest.mark.parametrize("d_model", [1021, 1024])
def test_an_entry_is_proposed_though_all_of_it_is_rounded_against_it(d_model):
    """Factors are rounded to 1: their product is too small by all that the bound allows. With 1021 of them the bias is rounded away too."""
    x = torch.full((1, d_model), 1 + 2.0**-8 - 2.0**-16, dtype=torch.float64)
    bias = -(x @ x.T)[0] * (1 - 1e-9)
    assert entries(find_active(x, x.T, bias, in_bfloat16=True)) == expected(x, x.T, bias)
    assert len(expected(x, x.T, bias)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_cuda_finds_what_the_cpu_finds(in_bfloat16):
    x, encoder, bias = drawn(500, 64), drawn(64, 1000, seed=1), drawn(1000, seed=2) - 8
    found = find_active(x.cuda(), encoder.cuda(), bias.cuda(), in_bfloat16=in_bfloat16)
    assert entries(found) == expected(x, encoder, bias)
