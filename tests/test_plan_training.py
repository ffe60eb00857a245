"""What `gsae plan` says of training, against what training allocates, writes and sends, and against queues worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import LARGE, cures_of, large_machine, planned, run, set_machine
from torch.profiler import ProfilerActivity, profile

from gsae import world
from gsae.config import Config, SweepConfig, TrainConfig
from gsae.plan.budget import Assumptions, budget
from gsae.plan.communication import Communication, sent_bytes
from gsae.plan.disk import checkpoint_bytes, num_parameters, row_bytes
from gsae.plan.grid import train_bytes
from gsae.plan.limits import warnings
from gsae.plan.memory import part_parameters, snapshot_bytes, state_bytes, step_bytes
from gsae.plan.queue import take_turns
from gsae.plan.show import lines
from gsae.sae.objective import UNIT_NORM, build
from gsae.settings import read_config
from gsae.store.durable import write_json_atomically
from gsae.store.runs import METRICS_FILE, RUN_FILE, prune_checkpoints
from gsae.train.bank import Bank, make_run, train_step
from gsae.train.checkpoint import Keep, take_snapshot, write_snapshots
from gsae.train.chores import checkpoint_interval
from gsae.train.optim import SAEOptimizer
from gsae.train.plan import BankSpec, RunSpec
from gsae.train.step import TrainingModule, update

__all__ = ["large_machine"]  # a fixture of all tests here too


def make_bank(folder: Path, group, **train) -> Bank:
    """Three runs of 32 x 96 after a step."""
    config = TrainConfig(sweeps=[SweepConfig(lambdas={"*": [0.1]})], **train)
    names = ("gated", "gated-norm-weighted", "relu")
    specs = [RunSpec(name, "resid.1", 1, name, False, 0.0, 32, 96, 0.1, 0, 1e-2) for name in names]
    for spec in specs:
        write_json_atomically(folder / spec.name / RUN_FILE, {"format": 2, "objective": spec.objective})
        (folder / spec.name / METRICS_FILE).touch()
    runs = [make_run(spec, folder / spec.name, config, torch.zeros(32), group) for spec in specs]
    bank = Bank(BankSpec("resid.1", tuple(specs), 1.0, 64, 1000), config, group, SimpleNamespace(is_part=False), runs, 1.0)
    for each in runs:
        train_step(bank, each, torch.randn(64, 32, dtype=runs[0].sae.b_dec.dtype))
        each.firing.synchronise(group)
    bank.step += 1
    return bank


def peak_bytes(work) -> int:
    """The most that torch holds at once during a call, of what the call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


# memory


def check_state(folder: str, train: dict) -> None:
    with world.start("cpu") as here:
        bank = make_bank(Path(folder), here.group, **train)
    held = 0
    for each in bank.runs:
        parameters = list(each.sae.parameters())
        held += sum(p.nbytes + p.grad.nbytes for p in parameters)
        held += sum(map(int, each.module._get_ddp_logging_data()["bucket_sizes"].split(",")))
        held += sum(value.nbytes for value in each.optimizer.state_tensors().values())
        held += 0 if each.average is None else sum(value.nbytes for value in each.average.state_tensors().values())
    assert state_bytes(bank.config, sum(map(num_parameters, bank.spec.runs))) == pytest.approx(held, rel=0.002)  # but for step counts


STATES = [{}, {"dtype": "float64"}, {"ema_decay": 0.9}]


@pytest.mark.parametrize("train", STATES, ids=str)
def test_what_stays_from_step_to_step_takes_the_planned_bytes(tmp_path, train):
    ranks.run(1, check_state, str(tmp_path), train)


def check_split_state(folder: str) -> None:
    with world.start("cpu", feature_ranks=2) as here:
        bank = make_bank(Path(folder) / str(here.group.rank), here.group)
    held = 0
    for each in bank.runs:
        held += sum(p.nbytes + p.grad.nbytes for p in each.sae.parameters())
        held += sum(map(int, each.module._get_ddp_logging_data()["bucket_sizes"].split(",")))
        held += sum(value.nbytes for value in each.optimizer.state_tensors().values())
    config = replace(Config(), train=replace(bank.config, feature_ranks=2))
    parameters = sum(part_parameters(run, 2) for run in bank.spec.runs)
    assert state_bytes(config.train, parameters) == pytest.approx(held, rel=0.002)
    largest = max(step_bytes(config.train, run, config.train.batch_rows) for run in bank.spec.runs)
    assert train_bytes(config.train, [bank.spec], 2) == state_bytes(config.train, parameters) + largest


def test_a_part_of_a_dictionary_takes_its_share_of_the_bytes(tmp_path):
    ranks.run(2, check_split_state, str(tmp_path))


def check_step(shapes: list, products: str) -> None:
    with world.start("cpu") as here:
        for objective in ("relu", "gated", "gated-no-aux", "gated-norm-weighted"):
            for d_model, num_features, rows in shapes:
                sae = build(objective, d_model, num_features, 0)
                module = here.group.wrap(TrainingModule(sae, objective, products=products))
                optimizer = SAEOptimizer(sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=objective in UNIT_NORM)
                x = torch.randn(rows, d_model)

                def step(module=module, optimizer=optimizer, x=x) -> None:
                    update(module, optimizer, x, lambda_=0.1, learning_rate=1e-3, micro_batch_rows=None)

                step()
                optimizer.zero_grad()  # as the step does first; these bytes are the state's
                spec = RunSpec("", "", 1, objective, False, 0.0, d_model, num_features, 0.1, 0, 1e-2)
                found = peak_bytes(step) - 4 * num_parameters(spec)
                expected = step_bytes(TrainConfig(products=products), spec, rows)
                assert 0.95 * found < expected < 1.35 * found, (objective, d_model, num_features, rows)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_a_dense_step_takes_about_the_planned_bytes(products):
    """Many rows, as many as features, few: the peak is before there are gradients, or beside them."""
    ranks.run(1, check_step, [(64, 512, 1024), (256, 1024, 512), (256, 2048, 256)], products)


def check_snapshot(folder: str, train: dict) -> None:
    with world.start("cpu") as here:
        bank = make_bank(Path(folder), here.group, **train)
    found = []

    def save() -> None:
        found.extend(take_snapshot(bank, each, lambda tensors: {name: t.clone() for name, t in tensors.items()}) for each in bank.runs)
        write_snapshots(found, Keep(2, None))

    parameters = sum(map(num_parameters, bank.spec.runs))
    assert snapshot_bytes(bank.config, bank.spec.runs, parameters) == pytest.approx(peak_bytes(save), rel=0.02)
    written = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    config = replace(Config(), train=replace(bank.config, keep_checkpoints=1))
    # One that stays, and one that is being written; files have counters and headers besides.
    assert checkpoint_bytes(config, [bank.spec]) == pytest.approx(2 * written, rel=0.1)


@pytest.mark.parametrize("train", STATES, ids=str)
def test_a_checkpoint_takes_the_planned_bytes_on_its_way_to_the_disk_and_on_it(tmp_path, train):
    ranks.run(1, check_snapshot, str(tmp_path), train)


@given(steps=st.integers(1, 40), fraction=st.floats(0.02, 1), keep=st.integers(1, 4), every=st.none() | st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_as_many_checkpoints_are_planned_as_are_kept(tmp_path_factory, steps, fraction, keep, every):
    run_directory = tmp_path_factory.mktemp("run")
    train = TrainConfig(checkpoint_every_fraction=fraction, keep_checkpoints=keep, keep_every=every)
    interval = checkpoint_interval(steps, train)
    for step in range(1, steps + 1):
        if step % interval == 0 or step == steps:
            (run_directory / "checkpoints" / f"{step:08d}").mkdir(parents=True)
            prune_checkpoints(run_directory, keep, every and every * interval)
    spec = RunSpec("", "", 1, "relu", False, 0.0, 1, 1, 0.1, 0, 1e-2)  # 2 + 1 + 1 parameters, three copies of 4 bytes
    kept = len(list((run_directory / "checkpoints").iterdir()))
    assert checkpoint_bytes(replace(Config(), train=train), [BankSpec("", (spec,), 1.0, 1, steps)]) == 3 * 4 * 4 * (kept + 1)


def test_a_group_without_a_site_writes_no_checkpoint():
    spec = RunSpec("", "", 1, "gated", False, 0.0, 1, 1, 0.1, 0, 1e-2)
    banks = [BankSpec(site, (spec,), 1.0, 1, 100) for site in ("resid.1", "resid.2")]
    one, two, three = (checkpoint_bytes(Config(train=TrainConfig(groups=groups)), banks) for groups in (1, 2, 3))
    assert one < two == three


# communication


def test_a_rank_that_is_alone_tells_nobody(pipeline):
    told = planned(pipeline, "--train.groups", "2", ranks=2)[0].train.communication
    assert (told.gradient_bytes_per_step, told.chore_bytes_per_step, told.sent_bytes_per_step) == (0, 0, 0)


def test_a_ring_of_two_sends_a_tensor_once_and_one_of_many_nearly_twice():
    assert [sent_bytes(1000, ranks) for ranks in (1, 2, 4, 1000)] == [0, 1000, 1500, 1998]


def check_chores(answer: str, *words: str) -> None:
    """Train, counting the bytes of all tensors that the ranks sum or hand round; plain data travels as bytes and is left out."""
    counted = []

    def counting(collective):
        def call(tensor, *arguments, **options):
            counted.extend(0 if part.dtype == torch.uint8 else part.nbytes for part in (tensor if isinstance(tensor, list) else [tensor]))
            return collective(tensor, *arguments, **options)

        return call

    for name in ("all_reduce", "broadcast", "all_gather"):
        setattr(dist, name, counting(getattr(dist, name)))
    with pytest.raises(SystemExit) as ended:
        ranks.gsae("train", *words)
    assert ended.value.code == 0
    Path(answer).write_text(str(sum(counted)))


def count_chores(pipeline: Path, sweeps: list[dict]) -> tuple[Communication, int]:
    """What is planned for two ranks, and the bytes counted over 200 steps."""
    words = ["--train.sweeps", json.dumps(sweeps), "--train.sites", "[1]", "--train.log_every_steps", "7"]
    ranks.run_gsae(1, ["harvest", str(pipeline)])
    answer = pipeline.parent / "counted"
    ranks.run(2, check_chores, str(answer), str(pipeline), *words)
    return planned(pipeline, *words, ranks=2)[0].train.communication, int(answer.read_text())


def test_chores_sum_the_planned_tensors(pipeline):
    """Without resampling the plan is exact but for flags and for questions whether to stop, which are a few bytes each."""
    sweep = {"expansions": [8], "lambdas": {"*": [0.9]}, "learning_rate": 0.1}
    told, counted = count_chores(pipeline, [{"objective": name, **sweep} for name in ("gated", "relu")])
    assert told.chore_bytes_per_step * 200 == pytest.approx(counted, rel=0.005)
    assert told.gradient_bytes_per_step == 8 * (2 * 2 * 16 * 128 + 4 * 128 + 2 * 16)


def test_resampling_sums_no_more_than_is_planned(pipeline):
    """Features die at this learning rate. Were none resampled, 3 x 8 bytes of each feature at two events and after would be all."""
    sweep = {"objective": "gated", "expansions": [8], "lambdas": {"*": [0.9]}, "resampling": True, "learning_rate": 0.1}
    told, counted = count_chores(pipeline, [sweep])
    without = planned(pipeline, "--train.sweeps", json.dumps([{**sweep, "resampling": False}]), "--train.log_every_steps", "7", ranks=2)
    counts = without[0].train.communication.chore_bytes_per_step * 200
    assert 1.01 * (counts + 3 * 24 * 128) < counted < told.chore_bytes_per_step * 200


def test_the_time_of_a_link_is_that_of_what_is_sent(pipeline, capsys):
    words = ["--ranks", "4", "--rows-per-second", "6400", "--link-gigabytes-per-second", "0.001"]
    assert run(str(pipeline), *words, "--json") == 0
    train = json.loads(capsys.readouterr().out)["train"]
    told = train["communication"]
    assert told["sent_bytes_per_step"] == pytest.approx(1.5 * (told["gradient_bytes_per_step"] + told["chore_bytes_per_step"]), rel=1e-12)
    assert told["seconds_per_step"] == told["sent_bytes_per_step"] / 1e6
    # Two sites of 200 steps, each of 64 rows at that rate and what is told meanwhile.
    assert train["hours"] == pytest.approx(2 * 200 * (64 / 6400 + told["seconds_per_step"]) / 3600)
    assert run(str(pipeline), *words) == 0
    assert f"in {1000 * told['seconds_per_step']:.1f} ms at 0.001 GB/s" in capsys.readouterr().out


# grids


def test_of_the_grids_that_fit_the_one_that_sends_least_is_advised(pipeline, monkeypatch):
    """Many rows and few features: whole dictionaries, while they fit. A rank with less memory must split them."""
    words = ["--train.sweeps", json.dumps([{"objective": "gated", "expansions": [8], "lambdas": {"*": [0.9]}}])]
    config = read_config("plan", [str(pipeline), *words])
    grids = budget(config, Assumptions(ranks=4)).train.grids
    assert [(grid.row_ranks, grid.feature_ranks) for grid in grids.possible] == [(4, 1), (2, 2), (1, 4)]
    needed = [grid.device_bytes_per_rank for grid in grids.possible]
    sent = {grid.feature_ranks: grid.sent_bytes_per_step for grid in grids.possible}
    for grid in grids.possible:
        split = replace(config, train=replace(config.train, feature_ranks=grid.feature_ranks))
        found = budget(split, Assumptions(ranks=4)).train
        assert found.communication.sent_bytes_per_step == grid.sent_bytes_per_step
        assert found.device_bytes_per_rank == grid.device_bytes_per_rank
    assert grids.chosen.feature_ranks == min(sent, key=sent.get)
    short = budget(config, Assumptions(ranks=4, memory_bytes=(needed[0] + needed[1]) // 2))
    assert [grid.fits for grid in short.train.grids.possible] == [False, True, True]
    assert short.train.grids.chosen.feature_ranks == min((2, 4), key=sent.get)
    (line,) = [line for line in warnings(config, short) if line.startswith("training will not fit")]
    assert f"set train.feature_ranks {short.train.grids.chosen.feature_ranks}, or " in line
    none = budget(config, Assumptions(ranks=4, memory_bytes=1)).train.grids
    assert none.chosen.device_bytes_per_rank == min(needed)


def test_features_are_split_where_they_are_more_than_rows(pipeline):
    """2 d M numbers of gradients for whole dictionaries, 2 d B of reconstructions for split ones."""
    for expansion, rows, feature_ranks in ((256, 64, 2), (2, 512, 1)):
        sweep = {"objective": "gated", "expansions": [expansion], "lambdas": {"*": [0.9]}}
        words = ["--train.sweeps", json.dumps([sweep]), "--train.batch_rows", str(rows), "--train.log_every_steps", "1000"]
        found = budget(read_config("plan", [str(pipeline), *words]), Assumptions(ranks=2))
        assert found.train.grids.chosen.feature_ranks == feature_ranks
        advice = [line for line in lines(found, []) if "train.feature_ranks" in line]
        assert len(advice) == (feature_ranks != 1)


def test_the_readers_of_a_grid_are_shown_with_both_ways(pipeline, capsys):
    for shared, first in (("true", "one rank of 2 reads, "), ("false", "each reads, 2 times the bytes, ")):
        assert run(str(pipeline), "--ranks", "4", "--train.feature_ranks", "2", "--train.shared_reads", shared) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("readers")]
        assert line.split("readers")[1].strip().startswith(first)


def test_each_rank_is_to_read_if_the_disk_gives_enough(pipeline, capsys):
    """Two groups of 2 x 2 ranks at 1000 rows/s take 2000 rows a second together, or twice as many."""
    words = [str(pipeline), "--ranks", "8", "--train.groups", "2", "--train.feature_ranks", "2", "--rows-per-second", "1000"]
    taken = 2 * 1000 * row_bytes(16, "bfloat16")
    for share, shared, advice in (
        (1.9, "true", None),
        (2.0, "true", "train.shared_reads false instead of true: the disk gives enough"),
        (1.9, "false", "train.shared_reads true instead of false: the disk gives less"),
        (2.0, "false", None),
        (None, "true", None),
        (None, "false", "train.shared_reads true instead of false: nothing says"),
    ):
        disk = [] if share is None else ["--disk-gigabytes-per-second", str(share * taken / 1e9)]
        assert run(*words, *disk, "--train.shared_reads", shared, "--json") == 0
        told = json.loads(capsys.readouterr().out)["train"]["readers"]
        rates = {way["shared_reads"]: way["disk_bytes_per_second"] for way in (told["configured"], told["other"])}
        assert rates == {True: taken, False: 2 * taken}
        assert run(*words, *disk, "--train.shared_reads", shared) == 0
        said = [line.split("advice")[1].strip() for line in capsys.readouterr().out.splitlines() if "advice" in line]
        said = [line for line in said if "shared_reads" in line]
        assert said == [] if advice is None else said[0].startswith(advice)


# groups


def test_groups_take_the_next_site_when_they_are_through():
    """The second has two short ones while the first is busy; both are free at 3, and the first comes first."""
    assert take_turns([3, 1, 2, 5, 1], 2) == [(0, 0, 3), (1, 0, 1), (1, 1, 3), (0, 3, 8), (1, 3, 4)]
    assert take_turns([3, 1], 3) == [(0, 0, 3), (1, 0, 1)]


@given(times=st.lists(st.integers(1, 9), min_size=1, max_size=12), groups=st.integers(1, 5))
def test_no_group_waits_while_a_site_is_left(times, groups):
    """Against a clock: at each tick every group that is free takes the next site, in the order of groups."""
    left, busy, taken = list(times), [0] * groups, []
    for tick in range(sum(times) + 1):
        for group in range(groups):
            if busy[group] <= tick and left:
                time = left.pop(0)
                taken.append((group, tick, tick + time))
                busy[group] = tick + time
    assert take_turns(times, groups) == taken


def sweeps(*runs_a_site: int) -> str:
    """A setting: so many runs at resid.1, resid.2, ..."""
    lambdas = {layer: [0.1 * (1 + n) for n in range(count)] for layer, count in enumerate(runs_a_site, start=1)}
    return json.dumps([{"objective": "gated", "expansions": [3], "lambdas": lambdas}])


def test_a_site_takes_time_by_its_runs_and_who_is_through_takes_the_next(pipeline):
    words = ["--harvest.sites", "[1, 2, 3]", "--train.groups", "2", "--train.sweeps", sweeps(4, 1, 2)]
    config = read_config("plan", [str(pipeline), *words])
    found = budget(config, Assumptions(ranks=2, rows_per_second=64.0))
    largest = 200 / 3600  # of 200 steps of 64 rows
    turns = [(turn.site, turn.group, turn.begin_hours, turn.end_hours) for turn in found.train.queue.turns]
    assert turns == [
        ("resid.1", 0, 0, pytest.approx(largest)),
        ("resid.2", 1, 0, pytest.approx(largest / 4)),
        ("resid.3", 1, pytest.approx(largest / 4), pytest.approx(3 * largest / 4)),
    ]
    assert found.train.hours == pytest.approx(largest)
    assert [line.split(maxsplit=1)[1] for line in lines(found, []) if " until " in line] == [
        "0     resid.1 until 3.3 min",
        "1     resid.2 until 0.8 min, then resid.3 until 2.5 min",
    ]


def test_runs_that_start_from_others_count_by_their_own_length(pipeline):
    sweep = {"objective": "gated", "expansions": [3], "lambdas": {"*": [0.1, 0.2, 0.3]}, "warm_start": True}
    words = ["--train.sweeps", json.dumps([sweep]), "--train.warm_start_fraction", "0.25"]
    found = budget(read_config("plan", [str(pipeline), *words]), Assumptions(rows_per_second=64.0)).train
    assert (found.sites, found.runs, found.warm_runs, found.steps_per_warm_run) == (2, 6, 4, 50)
    assert found.hours == pytest.approx(2 * (200 + 50 + 50) / 3600)
    assert found.state_bytes_per_rank == 5 * 8 * (2 * 16 * 48 + 3 * 48 + 16), "one run at a time"


def test_groups_without_a_site_are_named_with_a_cure_that_is_one(pipeline):
    found, shown = planned(pipeline, "--train.groups", "4", ranks=4)
    assert found.train.queue.idle_groups == (2, 3)
    assert len(shown) == 1
    assert shown[0].startswith("train.groups (4) is more than the sites (2), so groups 2 to 3 get none; ")
    cures = [word for setting, value in cures_of(shown) for word in (f"--{setting}", value)]
    cured, no_more = planned(pipeline, "--train.groups", "4", *cures, ranks=4)
    assert cured.train.groups in (1, 2)
    assert no_more == []


def test_a_number_of_groups_that_ends_sooner_is_advised(pipeline):
    """Three equal sites on two groups of a rank: one has two of them. One group of both ranks takes three quarters of the time..."""
    words = ["--harvest.sites", "[1, 2, 3]", "--train.groups", "2"]
    found, shown = planned(pipeline, *words, ranks=2)
    assert (found.train.queue.sooner.groups, found.train.queue.sooner.time_fraction) == (1, pytest.approx(0.75))
    assert shown == []
    assert any("train.groups 1 would take 75% of the time" in line for line in lines(found, []))
    # ... unless it talks over a slow link.
    slow = budget(read_config("plan", [str(pipeline), *words]), Assumptions(2, rows_per_second=1e6, link_bytes_per_second=1e6))
    assert slow.train.queue.sooner is None
    assert planned(pipeline, "--harvest.sites", "[1, 2, 3]", ranks=2)[0].train.queue.sooner is None


# limits


def test_copies_of_checkpoints_count_in_the_host_s_memory(pipeline, monkeypatch):
    words = ["--train.window_rows", "64"]
    found, _ = planned(pipeline, *words, "--train.groups", "2", ranks=2)
    needed = 2 * (found.train.window_bytes_per_rank + found.train.snapshot_bytes_per_group)
    set_machine(monkeypatch, host=needed, gpus=(LARGE, LARGE))
    assert planned(pipeline, *words, "--train.groups", "2", ranks=2)[1] == []
    set_machine(monkeypatch, host=needed - 1, gpus=(LARGE, LARGE))
    (line,) = planned(pipeline, *words, "--train.groups", "2", ranks=2)[1]
    assert line.startswith("the windows and checkpoints of training will not fit: ")
    assert line.endswith("are free; ask for fewer runs a site, or smaller expansions, in train.sweeps")
    assert planned(pipeline, *words, ranks=2)[1] == [], "one group of two ranks has one first rank"


def test_without_gpus_the_host_holds_all(pipeline, monkeypatch):
    found, _ = planned(pipeline, ranks=2)
    train = found.train
    needed = 2 * (train.device_bytes_per_rank + train.window_bytes_per_rank) + train.snapshot_bytes_per_group

    def complaints(free: int) -> list[str]:
        set_machine(monkeypatch, host=free)
        config = read_config("plan", [str(pipeline)])
        return [line for line in warnings(config, budget(config, Assumptions(ranks=2))) if line.startswith("training will not fit")]

    assert complaints(needed) == []
    assert len(complaints(needed - 4)) == 1


def test_memory_that_is_given_is_that_of_gpus_which_hold_no_windows(pipeline):
    """Unless `device: cpu` says that ranks compute where the windows are."""
    needed = budget(read_config("plan", [str(pipeline)]), Assumptions()).train.device_bytes_per_rank
    for device, fits in (("auto", True), ("cpu", False)):
        config = read_config("plan", [str(pipeline), "--device", device])
        said = [line for line in warnings(config, budget(config, Assumptions(memory_bytes=needed))) if line.startswith("training")]
        assert (said == []) == fits, said
        assert all("--memory-gibibytes gives " in line for line in said)


def test_an_evaluation_that_does_not_fit_is_told_how_to_split_the_dictionaries(pipeline):
    sweeps = json.dumps([{"objective": "gated", "expansions": [1024], "lambdas": {"*": [0.9]}}])
    words = [str(pipeline), "--device", "auto", "--train.sweeps", sweeps]
    config = read_config("plan", words)
    whole = budget(config, Assumptions(ranks=4)).llm.evaluation_bytes_per_rank
    halves = budget(read_config("plan", [*words, "--train.feature_ranks", "2"]), Assumptions(ranks=4)).llm.evaluation_bytes_per_rank
    for free, cure in ((whole - 1, 2), (halves, 2), (halves - 1, 4)):
        (line,) = [each for each in warnings(config, budget(config, Assumptions(ranks=4, memory_bytes=free))) if "evaluation" in each]
        assert f"evaluate with --train.feature_ranks {cure}, " in line
    (line,) = [each for each in warnings(config, budget(config, Assumptions(ranks=4, memory_bytes=1))) if "evaluation" in each]
    assert "feature_ranks" not in line
