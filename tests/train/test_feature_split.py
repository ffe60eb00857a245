"""Dictionaries split over ranks: what they train to, against one rank; checkpoints in parts; bytes; memory.

DESIGN's invariants 1, 2, 4 and 7.
"""

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import gsae, run, run_gsae, started
from trained_runs import again, assert_equal, assert_near, final_states, lines, train_small

from gsae.config import Config, SweepConfig, TrainConfig
from gsae.plan.communication import DECODES, communication, feature_bytes
from gsae.plan.memory import part_parameters
from gsae.sae.formats import read_sae
from gsae.store.runs import checkpoints, damage, find_runs
from gsae.train import bank as banks
from gsae.train import checkpoint, sharing
from gsae.train.bank import Bank, Run, make_run, train_step
from gsae.train.plan import BankSpec, RunSpec
from gsae.world import start

LAYOUTS = {"1x2": (2, 2), "1x4": (4, 4), "2x2": (4, 2)}
"""Ranks, and those of them that share the features, by rows x features."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"))


def split(layout: str) -> tuple[int, dict[str, int]]:
    """Ranks, and the settings of a layout."""
    ranks, features = LAYOUTS.get(layout, (1, 1))
    return ranks, {"feature_ranks": features}


def assert_lines_near(output: Path, expected: Path) -> None:
    """What the metrics say: losses, L0, gradient norms, dead shares, events."""
    for found, wanted in zip(lines(output).values(), lines(expected).values(), strict=True):
        for line, other in zip(found, wanted, strict=True):
            near = {key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for key, value in other.items()}
            assert line == near


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_float64_a_split_dictionary_is_trained_as_a_whole_one(trained, tmp_path, layout):
    size, settings = split(layout)
    run_gsae(size, ["train", again(trained, tmp_path, **settings)])
    assert_near(tmp_path / "runs", trained / "runs")
    assert_lines_near(tmp_path / "runs", trained / "runs")
    steps = [line for of_run in lines(tmp_path / "runs").values() for line in of_run if line["kind"] == "step"]
    assert {line["is_sparse"] for line in steps} == {True, False}, "both steps were taken"
    events = [line for of_run in lines(tmp_path / "runs").values() for line in of_run if line["kind"].startswith("resampling")]
    wanted = [line for of_run in lines(trained / "runs").values() for line in of_run if line["kind"].startswith("resampling")]
    assert events == wanted
    assert sum(line["resampled"] for line in events) > 40


def test_each_rank_may_read_for_itself(trained, tmp_path):
    """The same numbers, bit for bit, as when one reads for both."""
    for name, shared in (("one", True), ("each", False)):
        run_gsae(2, ["train", again(trained, tmp_path / name, feature_ranks=2, shared_reads=shared, sites=[1])])
    assert_equal(tmp_path / "each/runs", tmp_path / "one/runs")


HEALTHY = [
    {"objective": objective, "expansions": [3], "lambdas": {"*": [0.2]}}
    for objective in ("gated", "relu", "gated-no-aux", "gated-norm-weighted")
]


@pytest.fixture(scope="module")
def in_float32(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float32")
    run_gsae(1, ["train", again(trained, folder, dtype="float32", learning_rate=2e-3, sweeps=HEALTHY)])
    return folder / "runs"


@pytest.mark.parametrize("layout", ["1x2", "2x2"])
def test_float32_ends_within_one_percent(trained, in_float32, tmp_path, layout):
    size, settings = split(layout)
    run_gsae(size, ["train", again(trained, tmp_path, dtype="float32", learning_rate=2e-3, sweeps=HEALTHY, **settings)])
    for one, other in zip(lines(in_float32).values(), lines(tmp_path / "runs").values(), strict=True):
        last, other_last = ([line for line in each if line["kind"] == "step"][-1] for each in (one, other))
        assert other_last == {key: pytest.approx(value, rel=0.01) if isinstance(value, float) else value for key, value in last.items()}


def leave_states(folder: Path, *words: str) -> None:
    """A rank that trains, and leaves what it holds of each run at the end of a site."""
    plain = banks.train

    def train(bank, chores) -> None:
        plain(bank, chores)
        for each in bank.runs:
            held = {**each.sae.state_dict(), **each.optimizer.state_tensors()}
            torch.save(held, folder / f"{bank.spec.site}-{each.spec.name}-{bank.group.rank}.pt")

    from gsae.train import run as training

    training.train = train
    gsae(*words)


def test_ranks_with_the_same_features_hold_the_same_and_all_the_same_b_dec(trained, tmp_path):
    (states := tmp_path / "states").mkdir()
    config = again(trained, tmp_path, sites=[1], dtype="float32", feature_ranks=2, clip_gradient_norm=0.5)
    run(4, leave_states, states, "train", str(config))
    names = {path.stem.rpartition("-")[0] for path in states.iterdir()}
    assert len(names) == 3
    for name in names:
        held = [torch.load(states / f"{name}-{rank}.pt") for rank in range(4)]
        for one, other in ((0, 2), (1, 3)):  # rows of the grid are 0, 1 and 2, 3
            assert all(torch.equal(held[one][key], value) for key, value in held[other].items())
        shared = [key for key in held[0] if key.startswith("b_dec")]
        assert len(shared) == 4
        assert all(torch.equal(held[0][key], held[1][key]) for key in shared)
        assert not torch.equal(held[0]["W_dec"], held[1]["W_dec"])


# checkpoints


def cut_back(output: Path, step: int) -> None:
    """Leave the checkpoints up to a step."""
    for each in find_runs(output):
        for found in checkpoints(each):
            if found.step > step:
                shutil.rmtree(found.path)


def files(output: Path, step: int) -> set[str]:
    return {path.name for run_ in find_runs(output) for path in (run_ / f"checkpoints/{step:08d}").glob("*.safetensors")}


EVENTS = {"event_fractions": [0.25, 0.5], "min_interval_rows": 1000, "dead_after_rows": 500}
ALL_KINDS = [
    {"objective": "gated", "expansions": [8], "lambdas": {"*": [0.4]}, "resampling": True, "learning_rate": 0.05},
    {"objective": "relu", "expansions": [3], "lambdas": {"*": [0.2]}, "pre_activation_loss": 0.03},
    {"objective": "gated-no-aux", "expansions": [3], "lambdas": {"*": [0.02]}},
    {"objective": "gated-norm-weighted", "expansions": [3], "lambdas": {"*": [0.2]}},
]


def test_a_checkpoint_moves_across_all_splits(trained, tmp_path):
    """Of every objective, with an average of weights, clipped gradients and micro-batches."""
    settings = {"sites": [1], "keep_checkpoints": 100, "ema_decay": 0.95, "sweeps": ALL_KINDS, "clip_gradient_norm": 0.01}
    settings["micro_batch_rows"] = 40
    settings["resampling"] = {**EVENTS, "gate_bias": "median-density", "direction": "residual"}
    run_gsae(1, ["train", again(trained, tmp_path / "alone", **settings)])
    logged = [line for of_run in lines(tmp_path / "alone/runs").values() for line in of_run]
    assert not any(line["kind"] == "stopped" for line in logged)
    assert sum(line["resampled"] for line in logged if line["kind"] == "resampling") > 20
    config, output = again(trained, tmp_path, **settings), tmp_path / "runs"
    shutil.copytree(tmp_path / "alone/runs", output)
    for until, layout in ((40, "1x2"), (80, "2x2"), (120, "1x4"), (160, "1x1"), (180, "1x4")):
        cut_back(output, until)
        size, grid = split(layout)
        run_gsae(size, ["train", config, "--train.feature_ranks", grid["feature_ranks"]])
        parts = grid["feature_ranks"]
        assert len(files(output, 200)) == 2 * parts
    for step in (40, 80, 120, 160, 180, 200):
        assert_near(output, tmp_path / "alone/runs", step)
    resampled = [state["resampled"] for state in final_states(output, 120).values()]
    assert max(map(max, filter(len, resampled))) >= 64, "features of the second part"
    assert_lines_near(output, tmp_path / "alone/runs")
    assert [len(files(output, step)) for step in (40, 80, 120, 160, 180, 200)] == [2, 4, 4, 8, 2, 8]
    for each in find_runs(output):
        last = checkpoints(each)[-1].path
        whole = read_sae(last).sae
        some = read_sae(last, range(30, 41)).sae  # across two parts
        assert torch.equal(some.W_dec, whole.W_dec[30:41])
        assert torch.equal(some.encoder, whole.encoder[:, 30:41])
        assert torch.equal(some.b_dec, whole.b_dec)


def test_on_the_same_split_it_resumes_bit_for_bit(trained, tmp_path):
    settings = {"sites": [1], "keep_checkpoints": 100, "feature_ranks": 2}
    config = again(trained, tmp_path, **settings)
    run_gsae(4, ["train", config])
    shutil.copytree(tmp_path / "runs", tmp_path / "uninterrupted")
    cut_back(tmp_path / "runs", 100)  # right after an event
    run_gsae(4, ["train", config])
    assert_equal(tmp_path / "runs", tmp_path / "uninterrupted")


KILLS = ("half a part", "its part is there", "before its name")


def killed_while_saving(place: str, step: int, *words: str) -> None:
    """The second rank kills itself while parts of a step's checkpoint are written; at the last place the first one does."""
    rank, plain_write, plain_finish = int(os.environ["RANK"]), checkpoint.write_tensors, checkpoint.describe_parts

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path: Path, tensors: dict) -> None:
        plain_write(path, tensors)
        if rank == 1 and path.parent.name == f"{step:08d}.partial" and path.name.startswith("state"):
            if place == "half a part":
                os.truncate(path, path.stat().st_size // 2)
            if place != "before its name":
                die()

    def describe(directory: Path, *arguments) -> None:
        plain_finish(directory, *arguments)
        if place == "before its name" and directory.name == f"{step:08d}.partial":
            die()

    checkpoint.write_tensors, checkpoint.describe_parts = write, describe
    gsae(*words)


def test_an_owner_killed_while_parts_are_saved_leaves_the_checkpoint_before(trained, tmp_path):
    settings = {"sites": [1], "feature_ranks": 2}
    config, output = again(trained, tmp_path, **settings), tmp_path / "runs"
    run_gsae(2, ["train", again(trained, tmp_path / "uninterrupted", **settings)])
    for place, step in zip(KILLS, (60, 100, 140), strict=True):
        with started(2, killed_while_saving, place, step, "train", str(config)) as ranks:
            victim = 0 if place == "before its name" else 1
            ranks.processes[victim].join(60)
            assert ranks.processes[victim].exitcode == -signal.SIGKILL, ranks.output(victim)
            ranks.wait(30)
            ranks.kill()
        found = [[each.step for each in checkpoints(run_)] for run_ in find_runs(output)]
        assert [each[-1] for each in found] == [step - 20] * 3, "the first run was being written"
        assert all(damage(each.path) == [] for run_ in find_runs(output) for each in checkpoints(run_))
        assert all(read_sae(checkpoints(run_)[-1].path).sae.num_features in (48, 128) for run_ in find_runs(output))
    run_gsae(2, ["train", config])
    assert list(output.rglob("*.partial")) == []
    assert_equal(output, tmp_path / "uninterrupted/runs")


def test_a_part_that_cannot_be_written_is_said_once_and_leaves_the_checkpoint_before(trained, tmp_path):
    config = again(trained, tmp_path, sites=[1], feature_ranks=2)
    with started(2, with_full_disk, "train", str(config)) as ranks:
        codes = ranks.wait(60)
        assert codes == [2, 2]
        assert "the checkpoint of step 60 could not be written" in ranks.output()
        assert "No space left on device" in ranks.output()
        assert "Traceback" not in ranks.output() + ranks.output(1)
    assert [checkpoints(run_)[-1].step for run_ in find_runs(tmp_path / "runs")] == [40] * 3
    assert list((tmp_path / "runs").rglob("*.partial")) == []


def with_full_disk(*words: str) -> None:
    """The second rank's disk is full when it writes a part of step 60."""
    plain = checkpoint.write_tensors

    def write(path: Path, tensors: dict) -> None:
        if os.environ["RANK"] == "1" and path.parent.name == "00000060.partial":
            raise OSError(28, "No space left on device", str(path))
        plain(path, tensors)

    checkpoint.write_tensors = write
    gsae(*words)


# bytes


OBJECTIVES = ("gated", "gated-no-aux", "gated-norm-weighted", "relu")


def made(objective: str, num_features: int, folder: Path, config: TrainConfig, group) -> tuple[RunSpec, Run]:
    spec = RunSpec(objective, "resid.1", 1, objective, False, 0.0, 32, num_features, 0.1, 0, 1e-2)
    return spec, make_run(spec, folder, config, torch.zeros(32), group)


def count_steps(folder: str) -> None:
    """Steps on a grid of 2 x 2: bytes of what its ranks sum over features, and of the buckets that DDP sums over rows."""
    counted: list[tuple[int, int]] = []
    plain = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments, group, **options):
        counted.append((dist.get_world_size(group), tensor.nbytes))
        return plain(tensor, *arguments, group=group, **options)

    with start("cpu", feature_ranks=2) as world:
        config = TrainConfig(sweeps=[SweepConfig(lambdas={"*": [0.1]})], micro_batch_rows=10)
        assert (world.group.rows.size, world.group.features.size) == (2, 2)
        for objective in OBJECTIVES:
            spec, made_run = made(objective, 96, Path(folder), config, world.group)
            bank = Bank(BankSpec("resid.1", (spec,), 1.0, 64, 100), config, world.group, None, [made_run], 1.0)
            for is_sparse in (False, True):
                made_run.training.is_sparse = is_sparse
                counted.clear()
                dist.all_reduce = all_reduce
                train_step(bank, made_run, torch.randn(32, 32, generator=torch.Generator().manual_seed(world.group.rows.rank)))
                dist.all_reduce = plain
                assert {size for size, _ in counted} == {2}
                assert sum(size for _, size in counted) == feature_bytes(config, spec, 32), objective
            told = communication(replace(Config(), train=replace(config, feature_ranks=2)), bank.spec, 4, None)
            buckets = sum(map(int, made_run.module._get_ddp_logging_data()["bucket_sizes"].split(",")))
            assert told.gradient_bytes_per_step == buckets == 4 * part_parameters(spec, 2)
            assert told.feature_bytes_per_step == 4 * (DECODES[objective] * 32 * 32 + 32) + 8


def test_the_bytes_of_a_step_are_those_of_the_formula(tmp_path):
    run(4, count_steps, str(tmp_path))


def count_rows(answer: str, *words: str) -> None:
    sizes = []
    plain = sharing.SharedStream._send

    def send(self, value):
        sizes.append(value.nbytes)
        return plain(self, value)

    sharing.SharedStream._send = send
    with pytest.raises(SystemExit):
        gsae(*words)
    Path(f"{answer}{os.environ['RANK']}").write_text(json.dumps(sizes))


def test_rows_travel_to_a_feature_group_once_as_they_are_stored(trained, tmp_path):
    config = again(trained, tmp_path, feature_ranks=2, sites=[1], total_rows=640)
    run(2, count_rows, str(tmp_path / "sizes"), "train", str(config))
    sizes = [json.loads((tmp_path / f"sizes{rank}").read_text()) for rank in range(2)]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) >= 2
    assert set(sizes[0]) == {64 * 16 * 2}, "rows of a batch, in bfloat16"


# memory


def grow(kind: str, headroom: int, num_features: int) -> None:
    """A rank that may allocate so many bytes more than it has, and trains a dictionary for two steps."""
    with start("cpu", feature_ranks=2 if kind == "split" else 1) as world:
        config = TrainConfig(sweeps=[SweepConfig(lambdas={"*": [0.1]})], micro_batch_rows=8)
        small, small_run = made("gated", 64, Path("/nowhere"), config, world.group)
        for spec, of in ((small, small_run), (None, None)):
            if spec is None:  # torch has loaded and allocated what it needs
                in_use = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line).split()[1])
                limit = in_use * 1024 + headroom
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
                spec, of = made("gated", num_features, Path("/nowhere"), config, world.group)
            bank = Bank(BankSpec("resid.1", (spec,), 1.0, 16, 100), config, world.group, None, [of], 1.0)
            for _ in range(2):
                train_step(bank, of, torch.randn(16, 32))


def test_a_dictionary_that_is_too_large_for_a_rank_trains_on_two():
    """Weights, gradients, DDP's buffers and Adam's moments of 262,144 features of width 32 are 344 MB and a step's features are more."""
    num_features, headroom = 2**18, 430 * 2**20
    with pytest.raises(AssertionError, match=r"can't allocate memory|std::bad_alloc|MemoryError"):
        run(1, grow, "whole", headroom, num_features)
    run(2, grow, "split", headroom, num_features)
