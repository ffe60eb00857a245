"""Ranks with unequal work on real ranks; a forward is a collective here, as it is where the LLM is split."""

import pytest
import ranks
import torch
from llm.conftest import save_llama

from gsae import world
from gsae.config import LLMConfig
from gsae.llm.load import load
from gsae.llm.lockstep import Lockstep
from gsae.llm.site import capture, resolve_sites


def check_counts(counts):
    """A forward adds up what the ranks bring: 1 for work, 0 for a dummy."""
    with world.start("cpu") as here:
        group, brought = here.everyone, []

        def forward(value):
            brought.append(int(group.reduce(torch.tensor(value), "sum")))

        turns: list[int] = []
        lockstep = Lockstep(group, True, lambda: forward(0), lambda: turns.append(len(brought)))
        for _ in range(counts[group.rank]):
            lockstep.before_forward()
            forward(1)
        lockstep.finish()
        assert turns == list(range(1 + max(counts)))  # a turn before each forward, and one that finds no work left
        assert brought == [sum(count > number for count in counts) for number in range(max(counts))]
        assert group.reduce(torch.tensor(1), "sum") == group.size  # nothing is left over that another collective would meet


@pytest.mark.parametrize("counts", [(5, 2), (0, 3), (2, 2), (0, 0), (4,), (1, 0, 6, 3)])
def test_all_ranks_run_as_many_forwards_as_the_busiest(counts):
    ranks.run(len(counts), check_counts, counts, timeout_seconds=60)


def refuse():
    raise AssertionError("no dummy is needed")


def check_not_needed():
    with world.start("cpu") as here:
        lockstep = Lockstep(here.everyone, False, refuse, refuse)
        if here.everyone.rank == 0:  # alone: where it talked to the other rank, this would hang
            lockstep.before_forward()
            lockstep.finish()
        here.everyone.barrier()


def test_where_ranks_hold_the_llm_whole_nothing_is_agreed_on():
    ranks.run(2, check_not_needed, timeout_seconds=60)


def check_split_llm(directory):
    with world.start("cpu") as here:
        config = {"model": str(directory), "dtype": "float32"}
        whole = load(LLMConfig(**config), here.device, 2)
        split = load(LLMConfig(**config, sharding="zero3"), here.device, 2, here.everyone)
        sites = resolve_sites([0, 2], 4)
        one = torch.zeros(1, 1, dtype=torch.int64)
        lockstep = Lockstep(here.everyone, True, lambda: capture(split.model, sites, one, one), lambda: None)
        for number in range([7, 2][here.everyone.rank]):
            tokens = torch.randint(256, (1 + number, 10 + number), generator=torch.Generator().manual_seed(number))
            positions = torch.arange(10 + number).expand_as(tokens)
            expected = capture(whole.model, sites, tokens, positions)
            lockstep.before_forward()
            for name, x in capture(split.model, sites, tokens, positions).items():
                assert torch.equal(x, expected[name])
        lockstep.finish()


def test_a_split_llm_gives_the_same_activations_beside_dummies_of_another_shape(tmp_path):
    ranks.run(2, check_split_llm, save_llama(tmp_path / "llama"), timeout_seconds=60)
