"""Collectives and boards on real ranks; each rank asserts for itself."""

import contextlib
import copy
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks
import rendezvous
import torch
import torch.distributed as dist

from gsae import world
from gsae.errors import ConfigError, GsaeError, StoreError


def check_collectives(size: int) -> None:
    with world.start("cpu") as here:
        group = here.everyone
        assert group.size == size
        mine = torch.tensor([group.rank, 1.0], dtype=torch.float64)
        assert group.reduce(mine, "sum").tolist() == [size * (size - 1) / 2, size]
        assert group.reduce(mine, "max").tolist() == [size - 1, 1]
        assert mine.tolist() == [group.rank, 1]
        assert group.broadcast(mine).tolist() == [0, 1]
        rows = torch.full((group.rank + 1, 2), group.rank)
        assert group.gather(rows)[:, 0].tolist() == [rank for rank in range(size) for _ in range(rank + 1)]
        assert group.gather(rows[:0]).shape == (0, 2)
        assert group.any(group.rank == size - 1)
        assert not group.any(False)
        assert group.broadcast_object({"rank": group.rank}) == {"rank": 0}
        assert group.on_first(lambda: group.rank) == 0


def check_together(size: int) -> None:
    with world.start("cpu") as here:
        with pytest.raises(StoreError if here.everyone.rank == 1 else GsaeError, match="disk full") as raised:
            fail_on_rank_1(here.everyone)
        assert raised.value.spoken_by == 0
        with pytest.raises(GsaeError if here.everyone.rank else ZeroDivisionError):
            here.everyone.on_first(lambda: 1 // 0)
        here.everyone.barrier()


def fail_on_rank_1(group: world.Group) -> None:
    with group.together():
        if group.rank == 1:
            raise StoreError("disk full")


def check_time_of_sums(size: int) -> None:
    """The time between the two calls is what DDP's own stopwatch found, step by step; the last rank is late at the fourth."""
    with world.start("cpu") as here:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
        layers.unused = torch.nn.Parameter(torch.zeros(3))
        module, untouched = (here.everyone.wrap(copy.deepcopy(layers)) for _ in range(2))
        module._set_ddp_runtime_logging_sample_rate(1)
        times: list[float] = []
        world.on_sum(module, *2 * [lambda: times.append(time.perf_counter())])
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(here.everyone.rank))
        for step in range(6):
            for wrapped in (untouched, module):
                wrapped.zero_grad()
                if wrapped is module and step == 3 and here.everyone.rank == size - 1:
                    time.sleep(0.3)
                wrapped(x).square().mean().backward()
            before, after = times
            assert all(
                theirs.grad is None if own.grad is None else torch.equal(own.grad, theirs.grad)
                for own, theirs in zip(module.parameters(), untouched.parameters(), strict=True)
            )
            times.clear()
            with world.without_sum(module):
                module(x).square().mean().backward()
            assert times[1] - times[0] < 0.1, "nothing is waited for"
            times.clear()
            module(x)  # which lets DDP take stock
            found = module._get_ddp_logging_data()
            its_own = (int(found["backward_comm_time"]) - int(found["backward_compute_comm_overlap_time"])) / 1e9
            assert after - before == pytest.approx(its_own, abs=0.05)
            assert step != 3 or here.everyone.rank == size - 1 or after - before > 0.25


def check_groups(size: int) -> None:
    with world.start("cpu", num_groups=2) as here:
        assert here.group.size == size // 2
        total = here.group.reduce(torch.tensor(here.everyone.rank), "sum")
        assert int(total) == sum(here.group.ranks)
        tickets = [here.next_ticket("sites") for _ in range(3)]
        everyone = here.everyone.gather_objects(tickets)
        assert all(everyone[rank] == tickets for rank in here.group.ranks)
        of_first_ranks = [ticket for rank in (0, size // 2) for ticket in everyone[rank]]
        assert sorted(of_first_ranks) == list(range(6))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives(size):
    ranks.run(size, check_collectives, size)


def test_ranks_fail_together():
    ranks.run(2, check_together, 2)


def test_the_time_of_a_sum_of_gradients_is_what_ddp_found_and_changes_no_gradient():
    ranks.run(2, check_time_of_sums, 2)


@pytest.mark.parametrize("size", [2, 4])
def test_groups_share_a_queue(size):
    ranks.run(size, check_groups, size)


def check_lanes(size: int) -> None:
    with world.start("cpu") as here:
        taken = here.everyone.gather_objects(list(world.lanes_of(here.everyone, 8)))
        assert sorted(lane for lanes in taken for lane in lanes) == list(range(8))
        with pytest.raises(ConfigError, match="do not divide"):
            world.lanes_of(here.everyone, 7)


def test_lanes_are_dealt_to_ranks():
    ranks.run(2, check_lanes, 2)


def check_too_many_groups() -> None:
    with (
        pytest.raises(ConfigError, match=r"train.groups is 3 but there are 2 ranks; set it to one of \[1, 2\]"),
        world.start("cpu", num_groups=3),
    ):
        pass


def join_in_turn(folder: Path, port: int) -> None:
    rank, join = dist.get_rank(), dist.init_process_group
    dist.destroy_process_group()

    def slow(*arguments: Any, **settings: Any) -> None:
        join(*arguments, **settings)
        if rank == 1:
            time.sleep(1)
            (folder / "joined").touch()

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group = slow
    world._join("gloo", timedelta(seconds=30))
    assert (folder / "joined").exists()


def test_no_rank_goes_on_before_all_have_joined(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks.run(2, join_in_turn, tmp_path, port)


def test_groups_must_divide_the_ranks():
    ranks.run(2, check_too_many_groups)


def check_board(size: int) -> None:
    with world.start("cpu") as here:
        rank, board = here.everyone.rank, here.board("signs")
        names = [str(other) for other in range(size)]
        began = time.monotonic()
        assert board.read(["never", *names])[0] is None
        assert time.monotonic() - began < 10, "what is not there is not waited for"
        here.everyone.barrier()
        for value in ("old", f"of {rank} ü"):
            board.write(str(rank), value)
            here.everyone.barrier()
            assert board.read(["never", *names])[1:] == [value if value == "old" else f"of {other} ü" for other in range(size)]
            here.everyone.barrier()
        assert here.board("other").read(names) == [None] * size
        assert here.board("signs").read(names)[0] == "of 0 ü"


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_leave_values_for_each_other(size):
    ranks.run(size, check_board, size)


def test_a_board_is_not_held_up_by_another_thread_and_says_when_its_holder_is_gone():
    def wait_for_what_never_comes() -> None:
        with contextlib.suppress(RuntimeError):  # the holder is killed in the end
            dist.distributed_c10d._get_default_store().get("never")

    with rendezvous.held() as (holder, port):
        rendezvous.join(port, rank=0, size=1)
        with world.start("cpu") as here:
            waiting = threading.Thread(target=wait_for_what_never_comes, daemon=True)
            waiting.start()
            time.sleep(0.2)
            board, began = here.board("signs"), time.monotonic()
            board.write("a", "1")
            assert board.read(["a", "b"]) == ["1", None]
            assert waiting.is_alive()
            assert time.monotonic() - began < 10
            holder.kill()
            holder.wait()
            for _ in range(2):
                with pytest.raises(ConnectionError, match=r"^[^\n]+$"):
                    board.read(["a"])
            waiting.join(10)


# grids


def check_grid(num_groups: int) -> None:
    with world.start("cpu", num_groups, feature_ranks=2) as here:
        rank, group = dist.get_rank(), here.group
        size = 4 // num_groups
        first = rank // size * size
        row, column = divmod(rank - first, 2)
        assert group.rows.ranks == tuple(range(first + column, first + size, 2))
        assert group.features.ranks == group.mesh.writers.ranks == (first + 2 * row, first + 2 * row + 1)
        assert (group.rows.rank, group.features.rank) == (row, column)
        assert here.everyone.features is None
        assert list(world.lanes_of(group, 8)) == list(range(row, 8, size // 2)), "the ranks of a row have the same lanes"
        number = torch.tensor([rank + 1])
        assert int(group.rows.reduce(number, "sum")) == sum(other + 1 for other in group.rows.ranks)
        assert int(group.features.reduce(number, "sum")) == 4 * row + 2 * first + 3


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_group_is_a_grid_of_rows_and_features(num_groups):
    ranks.run(4, check_grid, num_groups)


def check_refused() -> None:
    said = r"train.feature_ranks is 3 but there are 2 ranks in a group; set it to one of \[1, 2\], or start a multiple of 3 ranks"
    with pytest.raises(ConfigError, match=said), world.start("cpu", feature_ranks=3):
        pass


def test_feature_ranks_that_do_not_divide_a_group_are_refused_with_those_that_do():
    ranks.run(2, check_refused)
