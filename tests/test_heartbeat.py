"""Real ranks that fail, die, stop and get stuck; each test says what becomes of the others."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import rendezvous
import torch
import torch.distributed as dist
from hurry import complaints, hurry

from gsae import cli, world
from gsae.errors import GsaeError, StoreError
from gsae.heartbeat import Heartbeat, heartbeat, times
from gsae.heartbeat.judge import Judge
from gsae.heartbeat.signs import Sign, State, Verdict, describe_loss, describe_silence, find_at_fault

STALL_SECONDS = 2.0
HOST = os.uname().nodename
Work = Callable[[Heartbeat, int, Path], None]


def command(work: Work, folder: Path, stall_seconds: float = STALL_SECONDS, num_groups: int = 1) -> None:
    """A rank of a command that does `work` in a heartbeat."""
    hurry()

    def stage(words: list[str]) -> int:
        with world.start("cpu", num_groups) as here, heartbeat(here, stall_seconds) as life:
            work(life, here.everyone.rank, folder)
        return 0

    cli._dispatch = stage
    cli.main([])


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def beat_for(seconds: float, life: Heartbeat, rank: int, folder: Path) -> None:
    """Beat, and leave a file that grows by a byte with each beat."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        life.beat(tokens=1000)
        with folder.joinpath(f"rank{rank}").open("a") as file:
            file.write("x")
        time.sleep(0.01)


def beat_for_a_while(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_for(2.5 * STALL_SECONDS, life, rank, folder)


def beat_on(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_for(1000, life, rank, folder)


def wait_for_beats(folder: Path, size: int) -> None:
    """Until all ranks beat and the others had time to see it."""
    wait_until(lambda: all((folder / f"rank{rank}").exists() for rank in range(size)))
    time.sleep(0.5)


def test_a_killed_rank_ends_the_others_with_one_line_that_names_it(tmp_path):
    with ranks.started(3, command, beat_on, tmp_path) as started:
        wait_for_beats(tmp_path, 3)
        started.processes[1].kill()
        assert started.wait(30) == [2, -signal.SIGKILL, 2]
        (line,) = complaints(started)
        silence = rf"gsae: rank 1 on {re.escape(HOST)} has got no further for 2 s \(last: [\d,]+,000 tokens\); look at its log, "
        assert re.fullmatch(silence + r"then run the same again: .* \(stall_timeout_seconds\)", line)


def test_a_stopped_rank_ends_the_others_and_itself_once_it_goes_on(tmp_path):
    with ranks.started(3, command, beat_on, tmp_path) as started:
        wait_for_beats(tmp_path, 3)
        os.kill(started.processes[2].pid, signal.SIGSTOP)
        for process in started.processes[:2]:
            process.join(30)
        assert started.wait(0) == [2, 2, None]
        beats = (tmp_path / "rank2").stat().st_size
        os.kill(started.processes[2].pid, signal.SIGCONT)
        assert started.wait(20) == [2, 2, 2]
        # One more where it was stopped between a beat and its byte.
        assert (tmp_path / "rank2").stat().st_size <= beats + 1, "it went on before it looked whether it may"
        (line,) = complaints(started)
        assert line.startswith(f"gsae: rank 2 on {HOST} has got no further")


def test_ranks_that_were_all_stopped_for_long_go_on(tmp_path):
    with ranks.started(2, command, beat_for_a_while, tmp_path) as started:
        wait_for_beats(tmp_path, 2)
        for process in started.processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5 * STALL_SECONDS)
        for process in started.processes:
            os.kill(process.pid, signal.SIGCONT)
        assert started.wait(30) == [0, 0], complaints(started)


def test_a_killed_first_rank_ends_the_others(tmp_path):
    with ranks.started(3, command, beat_on, tmp_path) as started:
        wait_for_beats(tmp_path, 3)
        started.processes[0].kill()
        assert started.wait(30) == [-signal.SIGKILL, 2, 2]
        assert all(f": rank 0 on {HOST} has got no further for 2 s" in line for line in complaints(started))
        assert len(complaints(started)) == 2, "who else lives is not known, so both speak"


def beat_less_on(failing: int, life: Heartbeat, rank: int, folder: Path) -> None:
    beat_for(0.3 if rank == failing else 1000, life, rank, folder)


def fail_on_1(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_less_on(1, life, rank, folder)
    raise StoreError("lane 7 is damaged")


def fail_on_0(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_less_on(0, life, rank, folder)
    raise StoreError("lane 7 is damaged")


def fill_disk_on_1(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_less_on(1, life, rank, folder)
    raise OSError(28, "No space left on device", "0001-000002.tar")


def fail_everywhere(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_for(0.3, life, rank, folder)
    raise StoreError("lane 7 is damaged")


def agree_to_fail(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_for(0.3 if rank else 1000, life, rank, folder)  # the first rank is about to raise the same, and hears of it before
    error = StoreError("lane 7 is damaged (on rank 2)")
    error.spoken_by = 0
    raise error


def keep_error(life: Heartbeat, rank: int, folder: Path) -> None:
    try:
        fail_on_1(life, rank, folder)
    except GsaeError as error:
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {error}, spoken by {error.spoken_by}")
        raise


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (keep_error, "gsae: rank 1: lane 7 is damaged"),
        (fail_on_0, "gsae: lane 7 is damaged"),
        (fill_disk_on_1, "gsae: rank 1: 0001-000002.tar: No space left on device; free some space"),
        (fail_everywhere, "lane 7 is damaged"),
        (agree_to_fail, "gsae: lane 7 is damaged (on rank 2)"),
    ],
)
def test_one_rank_speaks_for_all_when_one_fails(tmp_path, work, line):
    with ranks.started(3, command, work, tmp_path) as started:
        assert started.wait(30) == [2, 2, 2]
        (said,) = complaints(started)
        assert line in said
        assert said.count("(on rank") == line.count("(on rank")
        assert "Traceback" not in "".join(map(started.output, range(3)))
    if work is keep_error:
        raised = [(tmp_path / f"error{rank}").read_text() for rank in (0, 1)]
        assert raised == ["GsaeError: lane 7 is damaged (on rank 1), spoken by 1", "StoreError: lane 7 is damaged, spoken by None"]


def break_on_1(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_less_on(1, life, rank, folder)
    _ = 1 // 0


def test_a_bug_is_a_traceback_on_its_rank_and_a_line_of_another(tmp_path):
    with ranks.started(3, command, break_on_1, tmp_path) as started:
        assert started.wait(30) == [2, 1, 2]
        assert "Traceback" in started.output(1)
        assert complaints(started) == ["gsae: ZeroDivisionError integer division or modulo by zero (on rank 1)"]


def meet_in_collective(life: Heartbeat, rank: int, folder: Path) -> None:
    if rank == 1:
        fail_on_1(life, rank, folder)
    dist.all_reduce(torch.zeros(1))


def test_ranks_that_are_in_a_collective_with_the_failed_one_end(tmp_path):
    with ranks.started(3, command, meet_in_collective, tmp_path) as started:
        assert started.wait(30) == [2, 2, 2]
        assert complaints(started) == ["gsae: rank 1: lane 7 is damaged"]


def be_stuck_on_0(life: Heartbeat, rank: int, folder: Path) -> None:
    if rank == 0:
        life.beat(tokens=7)
        time.sleep(1000)
    beat_for(1000, life, rank, folder)


def test_a_stuck_rank_is_ended_and_speaks_first_if_it_is_the_one_to_speak(tmp_path):
    with ranks.started(3, command, be_stuck_on_0, tmp_path) as started:
        while all(process.exitcode is None for process in started.processes):
            time.sleep(0.01)
        (line,) = complaints(started)
        assert line.startswith(f"gsae: rank 0 on {HOST} has got no further for 2 s (last: 7 tokens)")
        assert started.wait(30) == [2, 2, 2]
        assert complaints(started) == [line]


def be_no_fault(life: Heartbeat, rank: int, folder: Path) -> None:
    """The first rank beats all the while, the second is done early, the third beats seldom, the fourth is busy for long."""
    if rank == 3:
        with life.busy():
            time.sleep(2 * STALL_SECONDS)
    elif rank == 2:
        for _ in range(4):
            time.sleep(0.6 * STALL_SECONDS)
            life.beat()
    else:
        beat_for(0.3 if rank == 1 else 2 * STALL_SECONDS, life, rank, folder)


def test_a_rank_that_is_done_early_or_slow_or_busy_for_longer_than_the_time_out_is_no_fault(tmp_path):
    with ranks.started(4, command, be_no_fault, tmp_path) as started:
        assert started.wait(30) == [0] * 4, complaints(started)


def be_done_on_1(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_less_on(1, life, rank, folder)


def test_a_rank_that_dies_while_it_waits_for_the_others_is_named(tmp_path):
    with ranks.started(2, command, be_done_on_1, tmp_path) as started:
        wait_for_beats(tmp_path, 2)
        time.sleep(1)
        started.processes[1].kill()
        assert started.wait(30) == [2, -signal.SIGKILL]
        assert complaints(started)[0].startswith(f"gsae: rank 1 on {HOST} has got no further")


def check_totals(size: int) -> None:
    hurry()
    shown: list[dict[str, int]] = []
    with world.start("cpu") as here:
        for use in (1, 2):  # the second begins at zero
            with heartbeat(here, 60, shown.append) as life:
                for _ in range(use * (here.everyone.rank + 1)):
                    life.beat(tokens=10)
                    life.beat(tokens=1, shards=1)
            beats = use * size * (size + 1) // 2
            if here.is_first:
                assert life.totals() == shown[-1] == {"tokens": 11 * beats, "shards": beats}
            else:
                assert shown == []


@pytest.mark.parametrize("size", [1, 3])
def test_totals_are_the_counts_of_all_ranks(size):
    ranks.run(size, check_totals, size)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(times, "INTERVAL_SECONDS", 0.05)
    with world.start("cpu") as here:
        yield here


class SlowlyAdded(int):
    """A count during whose addition another thread takes its turn."""

    def __radd__(self, other: int) -> int:
        time.sleep(0)
        return other + int(self)


def test_beats_of_several_threads_add_up(alone):
    def write() -> None:
        for _ in range(200):
            life.beat(bytes=SlowlyAdded(3))

    with heartbeat(alone, 60) as life:
        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert life.totals() == {"bytes": 3 * 4 * 200}


def test_a_rank_that_has_not_looked_at_the_board_for_long_looks_before_it_goes_on(alone, monkeypatch):
    monkeypatch.setattr(times, "NAP_SECONDS", 0.2)
    answers, plain_read = threading.Event(), world.Board.read
    with heartbeat(alone, 60) as life:
        monkeypatch.setattr(world.Board, "read", lambda board, keys: answers.wait() and plain_read(board, keys))
        time.sleep(0.5)
        beating = threading.Thread(target=life.beat)
        beating.start()
        time.sleep(0.2)
        assert beating.is_alive()
        answers.set()
        beating.join(10)
        assert not beating.is_alive()


def test_what_shows_the_totals_may_fail(alone, tmp_path):
    def show(totals: dict[str, int]) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), heartbeat(alone, 60, show) as life:
        beat_on(life, 0, tmp_path)


def test_a_rank_that_gets_no_further_writes_nothing(alone, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(world.Board, "write", lambda board, key, value: written.append(key))
    monkeypatch.setattr(world.Board, "read", lambda board, keys: [None for _ in keys])
    life = Heartbeat(alone, 60, None, "it goes on")
    life.start()
    for num_beats in (0, 1):
        time.sleep(0.5)
        assert written == ["0"] * (num_beats + 1)
        life.beat()
    life.close()


def check_reads(size: int) -> None:
    hurry()
    read: set[str] = set()
    plain_read = world.Board.read

    def note(board: world.Board, keys: list[str]) -> list[str | None]:
        read.update(keys)
        return plain_read(board, keys)

    world.Board.read = note
    with world.start("cpu") as here, heartbeat(here, 60):
        time.sleep(0.5)
    assert read == ({"0", "1", "2"} if here.is_first else {"0", "verdict"})


def test_only_the_first_rank_reads_all_signs():
    ranks.run(3, check_reads, 3)


def test_no_thread_is_left(alone):
    before = threading.active_count()
    with heartbeat(alone, 60) as life:
        life.beat()
    assert threading.active_count() == before


def command_on_tcp(port: int, work: Work, folder: Path) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    rendezvous.join(port, rank, size)
    command(work, folder, 2 * STALL_SECONDS)  # whoever holds the values must come to its turn, too


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        (signal.SIGKILL, "the ranks' rendezvous is gone ("),
        (
            signal.SIGSTOP,
            "the ranks' rendezvous has not answered for 4 s: its host is stopped or out of reach; look at the first rank's log",
        ),
    ],
)
def test_ranks_end_when_their_rendezvous_does_not_answer(tmp_path, sent, line):
    with rendezvous.held() as (holder, port), ranks.started(2, command_on_tcp, port, beat_on, tmp_path) as started:
        wait_for_beats(tmp_path, 2)
        holder.send_signal(sent)
        assert started.wait(30) == [2, 2]
        assert [line in said for said in complaints(started)] == [True, True]
        assert "Traceback" not in started.output(0) + started.output(1)


def command_on_tcp_of_first(work: Work, folder: Path) -> None:
    """The first rank itself holds the ranks' values, as without a launcher's agent: they end with it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    rendezvous.hold_and_join(folder, rank, size)
    command(work, folder)


def beat_a_little(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_for(0.5, life, rank, folder)


@pytest.mark.parametrize(("work", "codes", "said"), [(beat_a_little, [0, 0, 0], []), (fail_on_0, [2, 2, 2], ["gsae: lane 7 is damaged"])])
def test_a_first_rank_that_holds_the_rendezvous_leaves_when_the_others_know_how_it_ended(tmp_path, work, codes, said):
    with ranks.started(3, command_on_tcp_of_first, work, tmp_path) as started:
        found = started.wait(30)
        assert found == codes, [started.output(rank) for rank in range(3)]
        assert complaints(started) == said


def stuck_between_turns(life: Heartbeat, rank: int, folder: Path) -> None:
    """All ranks take turns in a collective, as forwards of a split LLM are; one does not come to the third."""
    for turn in range(3):
        if rank == 2 and turn == 2:
            time.sleep(600)
        life.beat(turns=1)
        dist.all_reduce(torch.zeros(1))


def test_where_ranks_take_turns_the_one_that_is_behind_is_named_alone(tmp_path):
    with ranks.started(4, command, stuck_between_turns, tmp_path) as started:
        assert started.wait(60) == [2] * 4
        (line,) = complaints(started)
    assert f"rank 2 on {HOST} has got no further" in line


def wait_for_a_slow_one(life: Heartbeat, rank: int, folder: Path) -> None:
    """One rank takes longer between turns than the time-out, and shows that it lives; the others wait for it in a collective."""
    for turn in range(3):
        if rank == 2 and turn == 2:
            beat_for(2 * STALL_SECONDS, life, rank, folder)
        life.beat(turns=1)
        dist.all_reduce(torch.zeros(1))


def test_waiting_for_a_rank_that_is_at_work_is_no_fault(tmp_path):
    with ranks.started(3, command, wait_for_a_slow_one, tmp_path) as started:
        assert started.wait(60) == [0] * 3
        assert complaints(started) == []


def die_in_collective(life: Heartbeat, rank: int, folder: Path) -> None:
    """Some turns in, a rank dies; the others notice by the collective that it does not come to."""
    for turn in range(1000):
        if rank == 2 and turn == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        life.beat(turns=1, tokens=10)
        dist.all_reduce(torch.zeros(1))


def test_a_rank_that_dies_in_a_collective_is_named_whatever_the_time_out(tmp_path):
    with ranks.started(4, command, die_in_collective, tmp_path, 600) as started:
        assert started.wait(30) == [2, 2, -signal.SIGKILL, 2]
        (line,) = complaints(started)
        assert line.startswith(f"gsae: rank 2 on {HOST} has died or is out of reach; look at its log, ")
        assert "Traceback" not in "".join(map(started.output, range(4)))


def break_collective_on_1(life: Heartbeat, rank: int, folder: Path) -> None:
    beat_less_on(1, life, rank, folder)
    raise RuntimeError("[third_party/gloo/transport/tcp/pair.cc] Connection closed by peer")


def test_a_collective_that_breaks_though_nobody_is_missing_is_the_failure_itself(tmp_path):
    with ranks.started(3, command, break_collective_on_1, tmp_path, 600) as started:
        assert started.wait(30) == [2, 1, 2]
        assert "Traceback" in started.output(1)
        (line,) = complaints(started)
        assert line.startswith("gsae: RuntimeError [third_party/gloo/")
        assert line.endswith("(on rank 1)")


def be_busy_on_1(life: Heartbeat, rank: int, folder: Path) -> None:
    with life.busy() if rank == 1 else nullcontext():
        (folder / f"rank{rank}").touch()
        time.sleep(3 * STALL_SECONDS if rank == 1 else 0)


def test_a_rank_that_dies_while_it_is_busy_is_named(tmp_path):
    with ranks.started(2, command, be_busy_on_1, tmp_path) as started:
        wait_for_beats(tmp_path, 2)
        started.processes[1].kill()
        assert started.wait(30) == [2, -signal.SIGKILL]
        assert complaints(started)[0].startswith(f"gsae: rank 1 on {HOST} has got no further")


def check_end() -> None:
    times.INTERVAL_SECONDS = 5.0
    with world.start("cpu") as here:
        here.everyone.barrier()
        began = time.monotonic()
        with heartbeat(here, 60) as life:
            life.beat()
        assert time.monotonic() - began < 4


def test_ranks_that_end_together_hardly_wait():
    ranks.run(3, check_end)


def signs_with(turns: Sequence[int | None]) -> list[Sign | None]:
    """Signs of ranks that are at work and had so many turns; None for one that left no sign."""
    return [None if each is None else Sign("node", 5, {"turns": each}, "working", None, False) for each in turns]


@pytest.mark.parametrize(
    ("turns", "silent", "gone", "at_fault"),
    [
        ([7, 7, 4, 3], [2, 3], [], [3]),  # of a group that is behind, the one that has had the fewest
        ([7, 6, 4, 3], [0, 1, 2, 3], [], [1, 3]),
        ([7, 7, 4, 3], [0, 2], [], []),  # rank 1 has had no more turns and is at work, so is 3
        ([7, 7, 4, 4], [0, 1], [], [0, 1]),
        ([7, 7, 4, 4], [0, 1], [1], [1]),  # rank 0 waits for the one that is gone
        ([7, 7, 4, 4], [0], [1], []),  # the same, a moment before
        ([6, 7, 4, 4], [0, 1], [1], [1]),
        ([7, None, 4, 4], [0, 1], [], [1]),
    ],
)
def test_within_a_group_that_takes_turns_ranks_wait_for_others(turns, silent, gone, at_fault):
    assert find_at_fault(signs_with(turns), silent, gone, group_size=2) == at_fault


def test_a_rank_that_is_done_is_not_waited_for():
    done = Sign("node", 5, {"turns": 7}, "done", None, False)
    assert find_at_fault([done, *signs_with([7])], [1], [], group_size=2) == [1]


def judged(looks: Sequence[tuple[float, Sequence[Sign | None]]], monkeypatch, timeout_seconds: float = 2.0) -> list[Verdict | None]:
    """The verdicts on one group's signs at these times, in seconds; between them nothing changes, and the judge looks all the while."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    judge, verdicts = Judge(len(looks[0][1]), len(looks[0][1]), timeout_seconds, "it continues"), []
    for (at, signs), until in zip(looks, [*(at for at, _ in looks[1:]), looks[-1][0] + 0.1], strict=True):
        now, verdict = at, None
        while now < until - 1e-9 and verdict is None:
            kept = [sign and replace(sign, looks=int(now * 10)) for sign in signs]
            verdict = judge.judge(kept)
            now += 0.1
        verdicts.append(verdict)
    return verdicts


def sign(turns: int, beats: int, state: State = "working", failure: Verdict | None = None) -> Sign:
    return Sign("node", beats, {"turns": turns}, state, failure, False)


def test_who_waited_for_a_slow_one_has_the_whole_time_out_once_that_one_has_come(monkeypatch):
    at_work = [(0.1 * tenth, [sign(3, 3), sign(3, 3), sign(2, tenth)]) for tenth in range(60)]
    come = [(6.0, [sign(3, 3), sign(3, 3), sign(3, 60)]), (7.0, [sign(3, 3, "done"), sign(3, 3), sign(3, 60, "done")])]
    *earlier, verdict, _ = judged([*at_work, *come, (7.8, come[1][1]), (8.5, come[1][1])], monkeypatch)
    assert earlier == [None] * 62
    assert verdict is not None
    assert verdict.failed == (1,)


def test_who_was_cut_off_is_not_silent(monkeypatch):
    cut = sign(3, 3, "cut off", Verdict("Connection closed by peer", 0, (1,)))
    signs = [sign(3, 3), cut]
    pending, verdict = judged([(0.0, signs), (5.0, signs), (8.0, signs)], monkeypatch, timeout_seconds=4)[:2]
    assert pending is None
    assert verdict == cut.failure


def hang_ahead_of_the_other_group(life: Heartbeat, rank: int, folder: Path) -> None:
    """Ranks 2 and 3 have had many turns when 3 hangs and 2 waits for it; 0 and 1 have nothing to do with them."""
    for turn in range(1000):
        time.sleep(600 if (rank, turn) in ((3, 500), (2, 501)) else 0)
        life.beat(turns=1)
        time.sleep(0.3 if rank < 2 else 0)


def test_turns_are_compared_within_a_group(tmp_path):
    with ranks.started(4, command, hang_ahead_of_the_other_group, tmp_path, STALL_SECONDS, 2) as started:
        assert started.wait(30) == [2] * 4
        (line,) = complaints(started)
        assert line.startswith(f"gsae: rank 3 on {HOST} has got no further for 2 s; look at its log, ")


def test_of_many_silent_ranks_a_few_are_named():
    signs = [Sign(f"node{rank}", 5, {"tokens": 120_832, "shards": 3, "turns": 7}, "working", None, False) for rank in range(9)]
    advice = "then run the same again: the harvest continues where it is"
    last = "(last of rank 3: 120,832 tokens, 3 shards); look at their logs, " + advice
    end = "continues where it is"

    def silence(signs: list[Sign | None], silent: list[int], seconds: float) -> str:
        return describe_silence(signs, silent, seconds, f"the harvest {end}")

    assert silence(signs, [3, 4], 600) == f"ranks 3 on node3 and 4 on node4 have got no further for 600 s {last} (stall_timeout_seconds)"
    many = "ranks 3 on node3, 4 on node4, 5 on node5 and 3 others have got no further for 600 s "
    assert silence(signs, [3, 4, 5, 6, 7, 8], 600) == f"{many}{last} (stall_timeout_seconds)"
    assert silence([None], [0], 1.5) == f"rank 0 has got no further for 1.5 s; look at its log, {advice} (stall_timeout_seconds)"
    assert describe_loss(signs, [3, 4], f"the harvest {end}") == f"ranks 3 on node3 and 4 on node4 have died or are out of reach {last}"
