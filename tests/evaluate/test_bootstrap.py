import pytest
import torch

from gsae.evaluate.bootstrap import draw_blocks, draw_documents, interval


def test_a_draw_holds_as_many_documents_as_there_are():
    draws = draw_documents(7, 1000, seed=0)
    assert draws.shape == (1000, 7)
    assert draws.sum(1).eq(7).all()
    assert draws.mean(0).sub(1).abs().max() < 0.15  # standard error sqrt(6 / 7 / 1000) = 0.03


def test_draws_depend_on_the_seed_alone():
    assert draw_documents(5, 20, seed=1).equal(draw_documents(5, 20, seed=1))
    assert not draw_documents(5, 20, seed=1).equal(draw_documents(5, 20, seed=2))


def test_an_interval_leaves_out_a_fortieth_on_either_side():
    found = interval(torch.arange(0, 1001, dtype=torch.float64)[torch.randperm(1001, generator=torch.Generator().manual_seed(0))])
    assert (found.low, found.high) == (pytest.approx(25), pytest.approx(975))


def test_equal_documents_have_an_interval_of_one_point():
    sums = torch.full((6,), 3.0, dtype=torch.float64)
    rows = torch.full((6,), 2.0, dtype=torch.float64)
    draws = draw_documents(6, 100, seed=0)
    found = interval((draws @ sums) / (draws @ rows))
    assert found.low == found.high == 1.5


def test_the_interval_of_a_mean_is_near_the_normal_one():
    # 400 documents of standard deviation 1: the mean's 95 % interval is +- 1.96 / 20
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = interval(draw_documents(400, 4000, seed=0) @ values / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20 * values.std().item(), rel=0.05)
    assert (found.high + found.low) / 2 == pytest.approx(values.mean().item(), abs=0.01)


def test_a_draw_without_a_value_gives_no_interval():
    assert interval(torch.tensor([1.0, float("nan")], dtype=torch.float64)) is None


def test_blocks_are_drawn_within_the_documents_that_are_drawn():
    documents = torch.tensor([0, 1, 1, 2, 2, 2])
    draws = draw_blocks(documents, 2000, seed=3)
    assert draws.equal(draw_blocks(documents, 2000, seed=3))
    of_documents = draw_documents(3, 2000, seed=3)
    for document, count in enumerate((1, 2, 3)):
        assert draws[:, documents == document].sum(1).equal(count * of_documents[:, document])
    assert draws.mean(0).sub(1).abs().max() < 0.1
    assert (draws[:, 1] != draws[:, 2]).any()
