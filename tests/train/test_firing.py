"""Firing counts by hand, the same on one rank and on two; run as a script, this file is one of the two ranks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsae.train.firing import FiringCounter
from gsae.world import Group, start

NUM_FEATURES, BATCH_ROWS, NUM_BATCHES = 8, 6, 5


@pytest.fixture(scope="module")
def group():
    with start("cpu") as world:
        yield world.group


def test_counts_by_hand(group):
    firing = FiringCounter(3, torch.device("cpu"))
    # Of the first two rows, feature 0 is on at both, feature 1 at one with its gate open at both, feature 2 at none.
    firing.update(torch.tensor([2, 1, 0]), torch.tensor([2, 2, 0]), 2)
    firing.update(torch.tensor([0, 1, 0]), torch.tensor([1, 1, 0]), 2)
    firing.synchronise(group)
    assert firing.fired.tolist() == [2, 2, 0]
    assert firing.open_at_zero.tolist() == [1, 1, 0]
    assert firing.last_fired.tolist() == [2, 4, 0]
    assert (firing.rows, firing.interval_rows) == (4, 4)
    # Four rows were seen: feature 0 has been off for 2 of them, feature 1 for 0, feature 2 for all 4.
    assert firing.dead(2).tolist() == [True, False, True]
    assert firing.dead(3).tolist() == [False, False, True]
    assert firing.dead_fraction(3) == pytest.approx(1 / 3)


def test_a_second_synchronisation_changes_nothing(group):
    firing = FiringCounter(2, torch.device("cpu"))
    on = torch.tensor([1, 0])
    firing.update(on, on, 1)
    firing.synchronise(group)
    firing.synchronise(group)
    assert firing.fired.tolist() == [1, 0]


def test_a_new_interval_forgets_counts_but_not_when_features_last_fired(group):
    firing = FiringCounter(2, torch.device("cpu"))
    firing.update(torch.tensor([1, 0]), torch.tensor([1, 1]), 1)
    firing.synchronise(group)
    firing.start_interval()
    firing.update(torch.tensor([0, 0]), torch.tensor([0, 0]), 1)
    firing.synchronise(group)
    assert firing.fired.tolist() == firing.open_at_zero.tolist() == [0, 0]
    assert firing.last_fired.tolist() == [1, 0]
    assert (firing.rows, firing.interval_rows) == (2, 1)


def test_counts_that_are_apart_cannot_be_read(group):
    firing = FiringCounter(2, torch.device("cpu"))
    on = torch.tensor([1, 0])
    firing.update(on, on, 1)
    for read in (lambda: firing.fired, lambda: firing.dead(1), firing.state_tensors, firing.start_interval):
        with pytest.raises(RuntimeError, match="call synchronise"):
            read()


def count(group: Group, batches: range, firing: FiringCounter) -> FiringCounter:
    """Rank r of R takes rows r, r + R, ... of each batch."""
    for batch in batches:
        drawn = torch.randn(BATCH_ROWS, NUM_FEATURES, generator=torch.Generator().manual_seed(batch))
        mine = drawn[group.rank :: group.size]
        firing.update((mine > 1.2).sum(0), (mine > 1).sum(0), BATCH_ROWS)
        if batch == 1:
            firing.synchronise(group)
    firing.synchronise(group)
    return firing


def test_a_restored_counter_goes_on_as_the_saved_one(group):
    whole = count(group, range(NUM_BATCHES), FiringCounter(NUM_FEATURES, torch.device("cpu")))
    first = count(group, range(3), FiringCounter(NUM_FEATURES, torch.device("cpu")))
    restored = FiringCounter(NUM_FEATURES, torch.device("cpu"))
    restored.load_state_tensors({name: value.clone() for name, value in first.state_tensors().items()})
    count(group, range(3, NUM_BATCHES), restored)
    assert all(torch.equal(value, whole.state_tensors()[name]) for name, value in restored.state_tensors().items())
    assert restored.fired.sum() > 0


def test_two_ranks_count_what_one_counts(group, tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)]) for rank in range(2)]
    alone = count(group, range(NUM_BATCHES), FiringCounter(NUM_FEATURES, torch.device("cpu"))).state_tensors()
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    for rank in range(2):
        together = load_file(tmp_path / f"{rank}.safetensors")
        assert {name: value.tolist() for name, value in together.items()} == {name: value.tolist() for name, value in alone.items()}
    assert alone["fired"].min() > 0
    assert (alone["opened"] > alone["fired"]).any()
    assert alone["last_fired"].unique().numel() > 1


if __name__ == "__main__":
    import torch.distributed as dist

    from gsae.world import cut_into_groups

    folder, this_rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=this_rank, world_size=2)
    counter = count(cut_into_groups(torch.device("cpu"), 1).group, range(NUM_BATCHES), FiringCounter(NUM_FEATURES, torch.device("cpu")))
    save_file(counter.state_tensors(), folder / f"{this_rank}.safetensors")
    dist.destroy_process_group()
