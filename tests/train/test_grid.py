"""Lambda from what pilots found, on numbers worked out by hand."""

import math

import pytest

from gsae.errors import ConfigError
from gsae.train.grid import Pilot, extrapolate, falling, interpolate, near, wanted_lambdas


def pilots(**l0s: float | None) -> list[Pilot]:
    return [Pilot(float(lambda_[1:].replace("_", ".")), l0, 0.5, 100) for lambda_, l0 in l0s.items()]


def test_between_two_pilots_log_lambda_is_straight_in_log_l0():
    found = pilots(l0_1=100.0, l0_4=25.0)
    assert interpolate(found, 50) == pytest.approx(0.2)  # halfway in both logarithms
    assert interpolate(found, 100) == pytest.approx(0.1)
    assert interpolate(found, 25) == pytest.approx(0.4)
    # a quarter of the way: 100 / 4^(1/4) at 0.1 x 4^(1/4)
    assert interpolate(found, 100 / math.sqrt(2)) == pytest.approx(0.1 * math.sqrt(2), rel=1e-3)


def test_only_the_two_neighbours_of_the_target_count():
    found = pilots(l0_05=1000.0, l0_1=100.0, l0_4=25.0, l0_8=0.0)
    assert interpolate(found, 50) == pytest.approx(0.2)
    assert interpolate(list(reversed(found)), 50) == pytest.approx(0.2)


def test_l0_that_rises_with_lambda_is_averaged():
    assert falling([5, 3, 4, 1]) == [5, 3.5, 3.5, 1]
    assert falling([1, 2, 3]) == [2, 2, 2]
    assert falling([4, 1, 3, 5]) == [4, 3, 3, 3]
    found = pilots(l0_1=640.0, l0_2=20.0, l0_4=80.0, l0_8=2.5)  # 20 and 80 share 40, at 0.2 to 0.4
    assert interpolate(found, 160) == pytest.approx(0.1 * math.sqrt(2), rel=1e-3)  # halfway from 640 to 40
    assert interpolate(found, 10) == pytest.approx(0.4 * math.sqrt(2), rel=1e-3)  # halfway from 40 to 2.5


def test_a_pilot_that_diverged_tells_nothing():
    assert interpolate(pilots(l0_1=100.0, l0_2=None, l0_4=25.0), 50) == pytest.approx(0.2)


def test_two_lengths_are_followed_to_the_whole_one():
    def lambda_at(length: float) -> float:
        return 0.15 * math.exp(0.2 / math.sqrt(length))

    for share in (0.05, 0.2, 1.0):
        found = extrapolate(lambda_at(share / 2), lambda_at(share), share)
        assert found == pytest.approx(lambda_at(1), rel=1e-3)
    assert lambda_at(0.2) > 1.2 * lambda_at(1)


def test_lambdas_of_the_config_are_tried_first_then_a_decade_more_where_a_target_lies_beyond():
    first = [0.1, 0.2, 0.4]
    assert wanted_lambdas([], [30], first, "here") == first
    assert wanted_lambdas(pilots(l0_1=100.0), [30], first, "here") == [0.2, 0.4]
    all_tried = pilots(l0_1=100.0, l0_2=50.0, l0_4=25.0)
    assert wanted_lambdas(all_tried, [30, 25, 100], first, "here") == []
    assert wanted_lambdas(all_tried, [20], first, "here") == [0.8618, 1.857, 4.0]
    assert wanted_lambdas(all_tried, [30, 120], first, "here") == [0.01, 0.02154, 0.04642]
    assert len(wanted_lambdas(all_tried, [20, 120], first, "here")) == 6


def test_after_two_decades_the_range_is_named():
    found = pilots(l0_1=100.0, l0_4=25.0, l4_0=20.0)
    assert wanted_lambdas(found, [10], [0.1, 0.4], "here") == [8.618, 18.57, 40.0]
    with pytest.raises(
        ConfigError, match=r"here: pilots with lambda 0.1 to 40 ended with L0 100 to 15, so none is near train.target_l0 10"
    ):
        wanted_lambdas([*found, *pilots(l40_0=15.0)], [10], [0.1, 0.4], "here")
    down = pilots(l0_001=90.0, l0_1=80.0, l0_4=25.0)
    with pytest.raises(ConfigError, match=r"lambda 0.001 to 0.4 ended with L0 90 to 25, so none is near train.target_l0 100"):
        wanted_lambdas(down, [100], [0.1, 0.4], "here")


def test_pilots_that_all_diverged_are_one_line():
    with pytest.raises(ConfigError, match="all pilots diverged; lower the learning rate"):
        wanted_lambdas(pilots(l0_1=None, l0_4=None), [10], [0.1, 0.4], "here")


def test_longer_pilots_try_the_answers_of_shorter_ones_and_less():
    found = pilots(l0_1=100.0, l0_4=25.0)
    assert near(found, [50]) == [0.13, 0.2]
    assert near(found, [25, 50]) == [0.13, 0.2, 0.26, 0.4]
