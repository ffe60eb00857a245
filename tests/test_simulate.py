"""The simulation of many ranks, against courses worked out by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from simulate import CONFIG, HELD_OUT_TOKENS, NUM_FEATURES, ROWS, SITES, Stage, bank_of, largest_of, simulate, unit_seconds

from gsae.settings import read_config

PLAIN = Stage(tasks=3, groups=2, units=100, compute_seconds=1.0, start_seconds=10.0, saved_every=20)


def test_groups_take_sites_in_turns():
    """Both begin at 10 and end at 110; the third site takes one of them to 210, while the other has none."""
    found = simulate(PLAIN)
    assert (found.seconds, found.idle_seconds, found.failures) == (210, 100, 0)


def test_a_failure_falls_back_to_the_last_checkpoint_and_starts_anew():
    """At 65 each group is at unit 55, of which 40 are saved: 60 are left, from 75 on, to 135; the third site is through at 235."""
    found = simulate(PLAIN, iter([65.0]))
    assert (found.seconds, found.lost_seconds, found.failures) == (pytest.approx(235), pytest.approx(2 * 15), 1)


def test_a_failure_while_it_starts_costs_the_start():
    assert simulate(PLAIN, iter([4.0])).seconds == pytest.approx(214)


def test_groups_share_a_disk():
    """2 s a unit while both read, 1 s alone: through with two at 210, with the third at 310."""
    found = simulate(Stage(3, 2, 100, 0.5, start_seconds=10.0, disk_bytes=1.0, disk_rate=1.0))
    assert (found.seconds, found.binds) == (pytest.approx(310), "disk")


def test_ranks_wait_for_the_slowest_and_tell_each_other():
    stage = Stage(1, 1, 1, compute_seconds=2.0, ranks_per_group=2, spread=0.1, slow_seconds=0.5, told_seconds=0.25)
    assert largest_of(2) == pytest.approx(0.564, abs=0.03), "1 / sqrt(pi)"
    assert unit_seconds(stage, 1)[0] == pytest.approx(2 * (1 + 0.1 * largest_of(2)) + 0.5 + 0.25)
    hidden = Stage(1, 1, 1, compute_seconds=2.0, hidden_seconds=3.0, save_seconds=5.0, saved_every=10)
    assert unit_seconds(hidden, 1) == (3.5, "network")


def test_its_constants_are_those_of_the_config():
    config = read_config("plan", [str(CONFIG)])
    assert len(config.harvest.sites) == SITES
    assert (config.train.total_rows, config.evaluate.max_tokens, bank_of(config).runs[0].num_features) == (
        ROWS,
        HELD_OUT_TOKENS,
        NUM_FEATURES,
    )
