"""Checkpoints that are written while training goes on: of which step they are, who waits for the disk, and what its failures become."""

import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hurry import complaints, hurry
from ranks import gsae, run, run_gsae, started
from trained_runs import again, assert_equal, final_states, train_small

from gsae.config import SweepConfig, TrainConfig
from gsae.errors import GsaeError
from gsae.sae.formats import write_tensors
from gsae.store.durable import write_json_atomically
from gsae.store.runs import METRICS_FILE, RUN_FILE, checkpoints, damage, find_runs
from gsae.train import bank as banks
from gsae.train import checkpoint, saving
from gsae.train.bank import Bank, Run, make_run, train_step
from gsae.train.checkpoint import Keep, restore_run
from gsae.train.chores import Log
from gsae.train.plan import BankSpec, RunSpec
from gsae.train.saving import Background, Saver
from gsae.train.stop import StopOnRequest
from gsae.world import start

BEATS = SimpleNamespace(busy=nullcontext)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory) -> dict[int, Path]:
    """The runs of one site, by the number of ranks that trained them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(trained / "runs/resid.1", folder / "1/resid.1")
    run_gsae(2, ["train", again(trained, folder / "2", sites=[1])])
    return {1: folder / "1", 2: folder / "2/runs"}


def make_bank(folder: Path, group) -> Bank:
    """Two runs of 32 x 96 with a moving average, without a store; their directories are made."""
    config = TrainConfig(sweeps=[SweepConfig(lambdas={"*": [0.1]})], ema_decay=0.9)
    specs = [RunSpec(name, "resid.1", 1, name, False, 0.0, 32, 96, 0.1, 0, 1e-2) for name in ("gated", "relu")]
    for spec in specs:
        if group.is_first:
            write_json_atomically(folder / spec.name / RUN_FILE, {"format": 2, "objective": spec.objective})
            (folder / spec.name / METRICS_FILE).touch()
    runs = [make_run(spec, folder / spec.name, config, torch.zeros(32), group) for spec in specs]
    return Bank(BankSpec("resid.1", tuple(specs), 1.0, 64, 1000), config, group, SimpleNamespace(is_part=False), runs, 1.0)


def take_steps(bank: Bank, count: int) -> None:
    for _ in range(count):
        generator = torch.Generator().manual_seed(100 * bank.step + bank.group.rank)
        x = torch.randn(64 // bank.group.size, 32, generator=generator).to(bank.group.device)
        for each in bank.runs:
            train_step(bank, each, x)
        bank.step += 1


def state_of(of: Run) -> dict[str, torch.Tensor]:
    assert of.average is not None
    parts = (of.sae.state_dict(), of.optimizer.state_tensors(), of.firing.state_tensors(), of.average.state_tensors())
    return {f"{number}.{name}": value.detach().cpu().clone() for number, part in enumerate(parts) for name, value in part.items()}


def assert_same(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []


def train_while_the_disk_is_held(folder: Path, device: str = "cpu") -> None:
    """The disk does not answer until ten more steps are made."""
    released = threading.Event()
    plain_write = checkpoint.write_checkpoint

    def held_write(*arguments) -> object:
        assert released.wait(60)
        return plain_write(*arguments)

    checkpoint.write_checkpoint = held_write
    with start(device) as world, Background() as background:
        group, saver = world.group, Saver(background, Keep(2, None), BEATS)
        bank = make_bank(folder, group)
        take_steps(bank, 5)
        bank.runs[0].low_l0_steps = 7
        saver.save(bank, bank.runs)
        for each in bank.runs:
            each.firing.synchronise(group)
        wanted = [state_of(each) for each in bank.runs]
        take_steps(bank, 10)
        bank.runs[0].low_l0_steps = 8
        saver.check(group)
        assert [checkpoints(each.directory) for each in bank.runs] == [[], []]
        released.set()
        saver.finish(group)
        for each, state in zip(bank.runs, wanted, strict=True):
            (found,) = checkpoints(each.directory)
            assert found.step == 5
            assert damage(found.path) == []
            each.firing.synchronise(group)
            assert not torch.equal(state_of(each)["0.W_dec"], state["0.W_dec"])
            restore_run(each, found.path)
            assert_same(state_of(each), state)
        assert bank.runs[0].low_l0_steps == 7
        assert json.loads((found.path / "state.json").read_text())["step"] == json.loads((found.path / "sae.json").read_text())["step"] == 5


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_while_the_disk_is_held_and_the_checkpoint_is_of_its_step(tmp_path, size):
    run(size, train_while_the_disk_is_held, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_so_it_is_on_a_gpu(tmp_path):
    run(1, train_while_the_disk_is_held, tmp_path, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_queued_before_what_changes_the_tensor_next():
    """The device is kept busy, so that the copy is not made when the host goes on; the buffer is pinned, and used again."""
    saver = Saver(Background(), Keep(2, None), BEATS)
    tensor, work = torch.zeros(1 << 20, device="cuda"), torch.randn(4096, 4096, device="cuda")
    addresses = set()
    for value in (1.0, 2.0):
        for _ in range(50):
            work = torch.nn.functional.normalize(work @ work)
        tensor.fill_(value)
        copies = saver._to_host("run", {"tensor": tensor})
        copied = saving._end_of_copies(tensor.device)
        tensor.fill_(-1.0)
        assert not copied.query(), "the host waited for the device"
        copied.synchronize()
        assert copies["tensor"].is_pinned()
        assert torch.equal(copies["tensor"], torch.full((1 << 20,), value))
        addresses.add(copies["tensor"].data_ptr())
    assert len(addresses) == 1


def save_twice_on_a_slow_disk(folder: Path) -> None:
    """What was on the disk when a checkpoint's copy was made and when its metrics were, and in which buffers the copy was."""
    seen, synced, buffers = [], [], []
    plain_take, plain_write, plain_fsync = saving.take_snapshot, checkpoint.write_checkpoint, checkpoint.fsync_file

    def watching_take(bank: Bank, of: Run, to_host: Callable) -> object:
        seen.append([found.step for each in bank.runs for found in checkpoints(each.directory)])
        snapshot = plain_take(bank, of, to_host)
        buffers.append({name: tensor.data_ptr() for name, tensor in snapshot.tensors.items() if tensor.numel()})
        return snapshot

    def slow_write(*arguments) -> object:
        time.sleep(0.2)
        return plain_write(*arguments)

    def watching_fsync(path: Path) -> None:
        synced.append((path.parent.name, path.name, len(checkpoints(path.parent))))
        plain_fsync(path)

    saving.take_snapshot, checkpoint.write_checkpoint, checkpoint.fsync_file = watching_take, slow_write, watching_fsync
    with start("cpu") as world, Background() as background:
        saver, bank = Saver(background, Keep(1, None), BEATS), make_bank(folder, world.group)
        for _ in range(2):
            take_steps(bank, 1)
            saver.save(bank, bank.runs)
        saver.finish(world.group)
    assert seen == [[], [], [1, 1], [1, 1]]
    assert synced == [(name, METRICS_FILE, before) for before in (0, 1) for name in ("gated", "relu")]
    assert buffers[:2] == buffers[2:], "the second copy takes more memory"
    assert [found.step for each in bank.runs for found in checkpoints(each.directory)] == [2, 2]


def test_a_checkpoint_waits_until_the_one_before_is_on_the_disk_and_takes_its_memory(tmp_path):
    run(1, save_twice_on_a_slow_disk, tmp_path)


def full_at(step: int, *words: str) -> None:
    """A training whose disk is full at a step's checkpoint, when the first run is written."""
    hurry()
    plain_tensors = checkpoint.write_tensors

    def write_tensors(path: Path, tensors: dict) -> None:
        plain_tensors(path, tensors)
        if path.parent.name == f"{step:08d}.partial":
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    checkpoint.write_tensors = write_tensors
    gsae(*words)


@pytest.mark.parametrize(("size", "step"), [(1, 60), (2, 60), (2, 200)])
def test_a_full_disk_is_one_line_on_all_ranks_and_the_last_whole_checkpoint_stays(trained, uninterrupted, tmp_path, size, step):
    config, output = again(trained, tmp_path, sites=[1]), tmp_path / "runs"
    with started(size, full_at, step, "train", str(config)) as ranks:
        assert ranks.wait(60) == [2] * size
        (line,) = complaints(ranks)
        assert f"the checkpoint of step {step} could not be written: {output}/resid.1/" in line
        assert "No space left on device; free some space or mend the permissions, then run the same again: the training continues" in line
        assert "Traceback" not in "".join(map(ranks.output, range(size)))
    for each in find_runs(output):
        assert [found.step for found in checkpoints(each)] == [step - 40, step - 20]
        assert all(damage(found.path) == [] for found in checkpoints(each))
    assert list(output.rglob("*.partial")) == []
    run_gsae(size, ["train", config])
    assert_equal(output, uninterrupted[size])


def full_and_seen(folder: Path) -> None:
    """A full disk is known to all ranks before the next checkpoint."""
    with start("cpu") as world, Background() as background:
        saver, bank = Saver(background, Keep(2, None), BEATS), make_bank(folder, world.group)
        if world.is_first:
            (bank.runs[0].directory / METRICS_FILE).unlink()
        saver.save(bank, bank.runs)
        with pytest.raises(GsaeError, match=r"could not be written: .*metrics\.jsonl: No such file") as failure:
            check_for_a_minute(saver, world.group)
        assert failure.value.spoken_by == 0


def check_for_a_minute(saver: Saver, group) -> None:
    until = time.monotonic() + 60
    while not group.any(time.monotonic() > until):
        saver.check(group)


def test_a_failure_reaches_all_ranks_without_waiting_for_the_next_checkpoint(tmp_path):
    run(2, full_and_seen, tmp_path)


def write_beyond_the_limit(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError, match="File too large") as failure:
        write_tensors(path, {"a": torch.zeros(1000)})
    assert (failure.value.errno, failure.value.filename) == (errno.EFBIG, str(path))


def test_what_stops_the_writing_of_tensors_is_said_as_the_system_says_it(tmp_path):
    run(1, write_beyond_the_limit, tmp_path / "tensors")


def stopped_while_writing(step: int, after: int, *words: str) -> None:
    """SIGTERM while a step's checkpoint is being written, which ends when the training waits for it: that step or later."""
    plain_write, plain_wait = checkpoint.write_checkpoint, Background.wait
    is_told, is_waited_for = threading.Event(), threading.Event()

    def write(directory: Path, at: int, fill: Callable) -> object:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
            is_told.set()
            assert is_waited_for.wait(60)
        return plain_write(directory, at, fill)

    def wait(self: Background) -> None:
        if is_told.is_set():
            is_waited_for.set()
        plain_wait(self)

    def is_due(self: StopOnRequest, bank: Bank) -> bool:
        assert bank.step < step + after or not bank.group.is_first or is_told.wait(60)
        return bank.step >= step + after and is_always_due(self, bank)

    checkpoint.write_checkpoint, Background.wait, StopOnRequest.is_due = write, wait, is_due
    gsae(*words)


def is_always_due(self: StopOnRequest, bank: Bank) -> bool:
    """The ranks ask each other after each step."""
    self._every_steps = 1
    return bank.step < bank.spec.total_steps


@pytest.mark.parametrize(("size", "after", "steps"), [(1, 0, [20, 40]), (1, 3, [40, 43]), (2, 3, [40, 43])])
def test_a_request_to_stop_while_a_checkpoint_is_written_has_all_on_the_disk(trained, uninterrupted, tmp_path, size, after, steps):
    config, output = again(trained, tmp_path, sites=[1]), tmp_path / "runs"
    with started(size, stopped_while_writing, 40, after, "train", str(config)) as ranks:
        assert ranks.wait(60) == [0] * size, ranks.output()
    assert json.loads((output / "stopped.json").read_text())["step"] == steps[-1]
    for each in find_runs(output):
        assert [found.step for found in checkpoints(each)] == steps
        assert all(damage(found.path) == [] for found in checkpoints(each))
    run_gsae(size, ["train", config])
    states, wanted = final_states(output), final_states(uninterrupted[size])
    assert states.keys() == wanted.keys()
    for name, tensors in wanted.items():  # its metrics have a line more
        assert_same(states[name], tensors)


def slow_without_patience(*words: str) -> None:
    """A slow disk; whoever leaves before its time does not wait for it."""
    plain_write = checkpoint.write_checkpoint

    def write(*arguments) -> object:
        time.sleep(0.1)
        return plain_write(*arguments)

    checkpoint.write_checkpoint, saving.LEAVING_SECONDS = write, 0.0
    gsae(*words)


def test_a_training_ends_when_its_last_checkpoints_are_on_the_disk(trained, tmp_path):
    run(1, slow_without_patience, "train", str(again(trained, tmp_path)))
    assert_equal(tmp_path / "runs", trained / "runs")


def interrupted_while_the_disk(hangs: bool, by: Callable[[], None], step: int, *words: str) -> None:
    """A training that ends before its time when a checkpoint is being written, to a disk that hangs or is slow."""
    hurry()
    saving.LEAVING_SECONDS = 0.5 if hangs else 60.0
    plain_write, plain_log, is_writing = checkpoint.write_checkpoint, Log.run, threading.Event()

    def write(directory: Path, at: int, fill: Callable) -> object:
        if at < step:
            return plain_write(directory, at, fill)

        def slow_fill(aside: Path) -> None:
            fill(aside)
            is_writing.set()
            time.sleep(1000 if hangs else 0.5)

        return plain_write(directory, at, slow_fill)

    def log(self: Log, bank: Bank) -> None:
        plain_log(self, bank)
        if bank.step > step:
            assert is_writing.wait(60)
            by()

    checkpoint.write_checkpoint, Log.run = write, log
    gsae(*words)


def fail() -> None:
    raise GsaeError("the store is gone")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("by", "code"), [(fail, 2), (interrupt, 130)])
@pytest.mark.parametrize("hangs", [True, False])
def test_whoever_leaves_before_its_time_waits_for_a_slow_disk_but_not_for_one_that_hangs(trained, uninterrupted, tmp_path, by, code, hangs):
    config, output = again(trained, tmp_path, sites=[1]), tmp_path / "runs"
    with started(1, interrupted_while_the_disk, hangs, by, 60, "train", str(config)) as ranks:
        assert ranks.wait(60) == [code], ranks.output()
    steps = [[found.step for found in checkpoints(each)] for each in find_runs(output)]
    assert steps == ([[20, 40]] if hangs else [[40, 60]]) * 3
    assert bool(list(output.rglob("*.partial"))) == hangs
    assert all(damage(found.path) == [] for each in find_runs(output) for found in checkpoints(each))
    run_gsae(1, ["train", config])
    assert_equal(output, uninterrupted[1])


def stopping_at(step: int, *words: str) -> None:
    plain_step = banks.train_step

    def train_step(bank: Bank, *arguments) -> None:
        if bank.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        plain_step(bank, *arguments)

    banks.train_step, StopOnRequest.is_due = train_step, is_always_due
    gsae(*words)


def test_every_so_many_checkpoints_one_is_kept_also_by_a_training_that_goes_on(trained, tmp_path):
    config, output = again(trained, tmp_path, sites=[1], keep_every=3), tmp_path / "runs"
    run(1, stopping_at, 125, "train", str(config))
    assert {tuple(found.step for found in checkpoints(each)) for each in find_runs(output)} == {(60, 120, 126)}
    run_gsae(1, ["train", config])
    assert {tuple(found.step for found in checkpoints(each)) for each in find_runs(output)} == {(60, 120, 180, 200)}
    assert "keep_every" not in json.loads((find_runs(output)[0] / "run.json").read_text())["settings"]
