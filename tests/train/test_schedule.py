"""Learning rate, lambda and event times, at steps worked out by hand."""

import math

import pytest

from gsae.config import ResamplingConfig, ScheduleConfig
from gsae.train.schedule import event_steps, lambda_multiplier, learning_rate_multiplier, recovery_multiplier, warmup_steps


def rates(total_steps, **settings):
    config = ScheduleConfig(**settings)
    return [learning_rate_multiplier(step, total_steps, config) for step in range(total_steps)]


def test_constant_after_a_warm_up():
    # 20 % of 10 steps is 2: 1/2, 1, 1, ...
    assert rates(10, kind="constant", warmup_fraction=0.2) == [0.5] + [1.0] * 9


def test_the_warm_up_is_capped_in_steps():
    # 20 % of 100 is 20, capped at 4.
    assert rates(100, kind="constant", warmup_fraction=0.2, max_warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_over_the_last_share_and_reaches_zero_after_the_last_update():
    # Last 40 % of 10 steps: updates 6..9 are at 4/4, 3/4, 2/4, 1/4; update 10 would be at 0.
    assert rates(10, kind="linear", warmup_fraction=0, decay_fraction=0.4) == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25])
    assert learning_rate_multiplier(10, 10, ScheduleConfig(kind="linear", decay_fraction=0.4)) == 0


def test_linear_without_decay_is_constant():
    assert rates(5, kind="linear", warmup_fraction=0, decay_fraction=0) == [1.0] * 5


def test_cosine_falls_over_the_whole_run():
    # cos(pi step / 4) for steps 0..3: 1, sqrt(1/2), 0, -sqrt(1/2).
    half = math.sqrt(0.5)
    assert rates(4, kind="cosine", warmup_fraction=0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_cosine_restarts_at_every_cycle():
    # Two cycles of four steps.
    once = rates(4, kind="cosine", warmup_fraction=0)
    assert rates(8, kind="cosine-restarts", warmup_fraction=0, num_cycles=2) == pytest.approx(once + once)


def test_the_warm_up_multiplies_the_shape():
    plain = rates(10, kind="cosine", warmup_fraction=0)
    assert rates(10, kind="cosine", warmup_fraction=0.4) == pytest.approx([plain[0] / 4, plain[1] / 2, plain[2] * 3 / 4, *plain[3:]])


def test_lambda_rises_over_its_own_warm_up():
    config = ScheduleConfig(lambda_warmup_fraction=0.5, max_lambda_warmup_steps=4)
    assert [lambda_multiplier(step, 6, config) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert [lambda_multiplier(step, 100, config) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize(("fractions", "wanted"), [((0.2, 0.5), 4), ((0.3, 0.1), 3)])
def test_the_warm_up_ends_when_both_have_risen(fractions, wanted):
    # Of 10 steps: 2 and 5, capped at 4; then 3 and 1.
    config = ScheduleConfig(kind="constant", warmup_fraction=fractions[0], lambda_warmup_fraction=fractions[1], max_lambda_warmup_steps=4)
    assert warmup_steps(10, config) == wanted
    both = [min(learning_rate_multiplier(step, 10, config), lambda_multiplier(step, 10, config)) for step in range(10)]
    assert both.index(1) == wanted - 1


def test_the_rate_drops_at_an_event_and_returns_over_half_a_cosine():
    config = ResamplingConfig(learning_rate_factor=0.1, recovery_steps=4)
    factors = [recovery_multiplier(step, 20, 1000, config) for step in range(20, 26)]
    # 0.1 + 0.9 (1 - cos(pi t / 4)) / 2
    half = math.sqrt(0.5)
    assert factors == pytest.approx([0.1, 0.1 + 0.45 * (1 - half), 0.55, 0.1 + 0.45 * (1 + half), 1, 1])


def test_the_return_is_capped_at_a_twentieth_of_the_run():
    config = ResamplingConfig(learning_rate_factor=0.1, recovery_steps=1000)
    # 5 % of 80 steps is 4; at half of them the rate is half way back.
    assert [recovery_multiplier(step, 10, 80, config) for step in (10, 12, 14)] == pytest.approx([0.1, 0.55, 1])


def test_no_event_no_drop():
    assert recovery_multiplier(7, None, 100, ResamplingConfig()) == 1


def test_events_are_the_nearest_steps_and_each_comes_once():
    assert event_steps([0.1, 0.25, 0.4], 1000) == (100, 250, 400)
    assert event_steps([0.1, 0.2, 0.3, 0.4], 4) == (1, 2)
    assert event_steps([], 100) == ()
