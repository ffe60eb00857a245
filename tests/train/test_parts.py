"""Training in parts, from the harvest to the report: real ranks, real kills."""

import json
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_config
from in_parts import alternate, begin, copied, fail_with, part_stores, settings_in
from ranks import gsae, run_gsae, started
from trained_runs import assert_equal, assert_near, final_states, lines, num_lines

from gsae.config import TrainConfig
from gsae.errors import CheckpointError
from gsae.settings import read_config
from gsae.store import manifest
from gsae.store.parts import Used, read_used, rows_of_visit
from gsae.store.runs import checkpoints, find_runs, write_checkpoint
from gsae.train.bank import Bank, Position, Stretch, fresh_rows, train
from gsae.train.checkpoint import STATE_FILE
from gsae.train.parts import find_stretch, remove_finished_parts
from gsae.train.plan import BankSpec, outline, plan_banks
from gsae.verify import verify
from gsae.world.group import Group


class GroupOfOne(Group):
    """A rank that works alone and needs no process group."""

    def gather_objects(self, value):
        return [value]

    def broadcast_object(self, value):
        return value


ALONE = GroupOfOne(ranks=(0,), rank=0, device=torch.device("cpu"), process_group=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with runs at two sites that one rank trained on all visits, and what was on the disk on the way."""
    folder = tmp_path_factory.mktemp("trained")
    begin(folder)
    (folder / "seen.json").write_text(json.dumps(alternate(folder)))
    return folder


@pytest.fixture(scope="module")
def waiting(tmp_path_factory) -> Path:
    """A folder in which two parts have been harvested and nothing trained."""
    folder = tmp_path_factory.mktemp("waiting")
    run_gsae(1, ["harvest", begin(folder)])
    return folder


def test_parts_come_and_go_two_at_a_time_until_all_is_trained(trained):
    seen = json.loads((trained / "seen.json").read_text())
    assert seen == [["part-0000", "part-0001"], [], ["part-0002", "part-0003"], [], ["part-0004"], []]
    assert {run[-1]["kind"] for run in lines(trained / "runs").values()} == {"finished"}
    assert {run[-1]["step"] for run in lines(trained / "runs").values()} == {300}
    assert len(lines(trained / "runs")) == 4


def test_parts_come_again_as_the_same_store(trained):
    manifests = [json.loads((trained / f"runs/store/manifests/part-000{visit}.json").read_text()) for visit in range(5)]
    assert manifests[3:] == manifests[:2]
    corpora = [content["identity"]["corpus"] for content in manifests]
    assert [(corpus["part"], corpus["parts"]) for corpus in corpora] == [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3)]


def test_a_part_that_comes_again_is_read_in_another_order(waiting, tmp_path):
    config = read_config("train", [str(copied(waiting, tmp_path))])
    store = tmp_path / "runs/store"
    shutil.copytree(store / "part-0000", store / "part-0003")
    shared = manifest.load(store)
    bank = plan_banks(config, outline(shared))[0]
    read = []
    for visit in (0, 3):
        stretch = find_stretch(config, shared, bank, ALONE, visit, first_step=100)
        assert (stretch.first_step, stretch.end_step) == (100, 100 + rows_of_visit(store, visit, bank.site) // 64)
        with stretch.open_stream() as stream:
            batch = stream.next_batch()
        read.append(list(zip(batch.lane.tolist(), batch.row.tolist(), strict=True)))
    assert read[0] != read[1]


def test_all_parts_are_masked_and_scaled_alike(trained):
    store = trained / "runs/store"
    shared = manifest.load(store)
    for visit in range(4):
        sites = json.loads((store / f"manifests/part-000{visit}.json").read_text())["sites"]
        assert {name: site["median_norm"] for name, site in sites.items()} == {s.name: s.median_norm for s in shared.sites.values()}
        for name, site in shared.sites.items():
            assert sites[name]["scale"] == pytest.approx(site.scale, rel=0.1)  # 8 contexts of 32 tokens
            assert sites[name]["scale"] != site.scale
    for run in find_runs(trained / "runs"):
        described = json.loads((run / "run.json").read_text())
        assert described["scale"] == shared.sites[described["site"]].scale
        assert described["store_fingerprint"] == shared.fingerprint


def test_a_part_is_left_after_as_many_batches_as_it_has_rows_for(trained):
    store = trained / "runs/store"
    for site in ("resid.1", "resid.2"):
        steps = [rows_of_visit(store, visit, site) // 64 for visit in range(3)]
        logged = {line["step"] for line in lines(trained / "runs")[f"{site}/gated-m48-l0.2-s0"] if line["kind"] == "step"}
        assert {steps[0], sum(steps[:2]), sum(steps)} <= logged  # each ends with a checkpoint, which is logged


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_random_points_it_ends_as_an_uninterrupted_one(trained, tmp_path, size):
    """SIGKILL after random amounts of work of harvests and trainings. Two ranks train one site, against two that are not killed."""
    reference, sites = trained, []
    if size == 2:
        reference, sites = tmp_path / "uninterrupted", [1]
        begin(reference, sites=sites)
        alternate(reference, size)
    folder, generator, killed = tmp_path / "killed", random.Random(size), dict.fromkeys(("harvest", "train", "within a part"), 0)
    config = begin(folder, sites=sites)
    while not read_used(folder / "runs/store").is_over:
        for stage, most in (("harvest", 12), ("train", 60)):
            for _ in range(2):
                killed[stage] += kill_after(folder, size, stage, generator.randint(1, most))
                killed["within a part"] += stage == "train" and goes_on_within_a_part(folder)
                assert len(part_stores(folder)) <= 2
            run_gsae(size, [stage, config])
            assert len(part_stores(folder)) <= 2
    assert min(killed.values()) >= 2, killed
    assert_equal(folder / "runs", reference / "runs")


def goes_on_within_a_part(folder: Path) -> bool:
    """Whether an unfinished run has its newest checkpoint neither at the start nor at the end of a part."""
    newest = [found[-1].path / STATE_FILE for run in find_runs(folder / "runs") if (found := checkpoints(run))]
    states = [json.loads(path.read_text()) for path in newest]
    return any(not state["finished"] and state["position"]["rows"] > 0 for state in states)


def kill_after(folder: Path, size: int, stage: str, work: int) -> bool:
    """SIGKILL to all ranks of a command after it has written so many tars, or lines of metrics; whether that was before its end."""

    def done() -> int:
        return num_lines(folder / "runs") if stage == "train" else len(list(folder.glob("runs/store/part-*/*/*.tar")))

    with started(size, gsae, stage, str(folder / "config.yaml")) as ranks:
        target, until = done() + work, time.monotonic() + 60
        while done() < target and time.monotonic() < until and all(process.is_alive() for process in ranks.processes):
            time.sleep(0.002)
        was_running = all(process.is_alive() for process in ranks.processes)
        ranks.kill()
    return was_running


def test_ranks_train_the_same_weights(trained, tmp_path):
    begin(tmp_path)
    alternate(tmp_path, size=2)
    assert_near(tmp_path / "runs", trained / "runs")
    events = [[line for line in run if line["kind"].startswith("resampling")] for run in lines(trained / "runs").values()]
    assert any(event.get("resampled") for run in events for event in run)
    assert events == [[line for line in run if line["kind"].startswith("resampling")] for run in lines(tmp_path / "runs").values()]


def test_groups_train_what_one_rank_trains(trained, tmp_path):
    config = begin(tmp_path)
    while not read_used(tmp_path / "runs/store").is_over:
        run_gsae(2, ["harvest", config])
        run_gsae(2, ["train", config, "--train.groups", "2"])
    assert_equal(tmp_path / "runs", trained / "runs")


def test_when_parts_become_whole_changes_nothing(trained, tmp_path):
    """One part at a time instead of two: the second is taken away until the first is trained."""
    config = begin(tmp_path)
    store, rounds = tmp_path / "runs/store", 0
    while not read_used(store).is_over:
        run_gsae(1, ["harvest", config])
        *_, last = part_stores(tmp_path)
        if len(part_stores(tmp_path)) == 2:
            (store / last).rename(tmp_path / last)
        run_gsae(1, ["train", config])
        rounds += 1
        with suppress(FileNotFoundError):
            (tmp_path / last).rename(store / last)
    assert rounds == 5
    assert_equal(tmp_path / "runs", trained / "runs")


def test_a_part_stays_while_a_run_of_any_site_has_not_been_through_it(waiting, tmp_path):
    config = copied(waiting, tmp_path)
    with started(1, gsae, "train", str(config)) as ranks:  # makes the runs of both sites
        while not list(tmp_path.glob("runs/resid.2/*/run.json")) and ranks.processes[0].is_alive():
            time.sleep(0.01)
        ranks.kill()
    run_gsae(1, ["train", config, "--train.sites", "[1]"])
    assert all(checkpoints(run)[-1].step > 0 for run in find_runs(tmp_path / "runs/resid.1"))
    assert part_stores(tmp_path) == ["part-0000", "part-0001"]
    run_gsae(1, ["train", config])
    assert part_stores(tmp_path) == []


def save(run: Path, step: int, visit: int, rows: int, finished: bool = False) -> None:
    state = {"step": step, "finished": finished, "stopped": None, "position": {"visit": visit, "rows": rows}}
    write_checkpoint(run, step, lambda directory: (directory / STATE_FILE).write_text(json.dumps(state)))


def test_a_part_stays_until_a_checkpoint_of_all_runs_is_beyond_it(waiting, tmp_path):
    """Checkpoints are made up, one after another; what has ended does not count."""
    config = read_config("train", [str(copied(waiting, tmp_path))])
    shared = manifest.load(tmp_path / "runs/store")
    banks = plan_banks(config, outline(shared))
    runs = [tmp_path / "runs" / bank.site / run.name for bank in banks for run in bank.runs]

    def left_after(*saved: object, **state: object) -> list[str]:
        save(*saved, **state)
        remove_finished_parts(config, shared, banks)
        return part_stores(tmp_path)

    both = ["part-0000", "part-0001"]
    assert [left_after(run, 50, 0, 3200) for run in runs] == [both] * 4
    assert [left_after(run, 70, 1, 0) for run in runs[:-1]] == [both] * 3
    assert left_after(runs[-1], 60, 0, 3840) == both  # 50 is the newest step that all runs of its site have
    assert left_after(runs[-1], 70, 1, 0) == ["part-0001"]
    assert [left_after(run, 90, 1, 1280) for run in runs] == [["part-0001"]] * 4
    assert [left_after(run, 300, 4, 64, finished=True) for run in runs[:-1]] == [["part-0001"]] * 3
    assert left_after(runs[-1], 300, 4, 64, finished=True) == []


def test_a_part_stays_when_a_checkpoint_beyond_it_is_damaged(waiting, tmp_path):
    config = read_config("train", [str(copied(waiting, tmp_path))])
    shared = manifest.load(tmp_path / "runs/store")
    banks = plan_banks(config, outline(shared))
    for run in (tmp_path / "runs" / bank.site / run.name for bank in banks for run in bank.runs):
        save(run, 70, 1, 0)
    changed = checkpoints(run)[-1].path / STATE_FILE
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        remove_finished_parts(config, shared, banks)
    assert part_stores(tmp_path) == ["part-0000", "part-0001"]


def test_evaluation_report_and_verify_work_after_all_parts_are_gone(trained, tmp_path):
    config = copied(trained, tmp_path)
    assert part_stores(tmp_path) == []
    run_gsae(1, ["evaluate", config])
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("results.json")]
    assert len(results) == 4
    assert all(0 < result["metrics"]["fvu"] < 1 for result in results)
    run_gsae(1, ["report", config])
    assert (tmp_path / "runs/report.html").exists()
    found = verify(tmp_path / "runs")
    assert found.problems == []
    assert found.checked.startswith("1 stores in parts, 0 stores, 4 runs")
    run = find_runs(tmp_path / "runs")[0]
    run_gsae(1, ["export", run, "--to", "gsae"])
    described = json.loads((run / "exports/gsae/sae.json").read_text())
    assert described["mask"]["max_norm"] == manifest.load(tmp_path / "runs/store").sites["resid.1"].max_norm


def test_when_all_is_trained_nothing_is_harvested_or_trained_again(trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("*.safetensors")}
    assert "nothing to do" in run_gsae(1, ["harvest", trained / "config.yaml"])
    assert "no site is left" in run_gsae(1, ["train", trained / "config.yaml"])
    assert part_stores(trained) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_training_that_waits_is_neither_evaluated_nor_trained_further(waiting, tmp_path):
    config = copied(waiting, tmp_path)
    assert "waits for" in run_gsae(1, ["train", config])
    assert json.loads((tmp_path / "runs/waiting.json").read_text()) == {"waits_for": "part-0002"}
    before = final_states(tmp_path / "runs").keys()
    assert "waits for a part of its store" in fail_with(1, "evaluate", config)
    assert "waits for" in run_gsae(1, ["train", config])
    assert json.loads((tmp_path / "runs/waiting.json").read_text()) == {"waits_for": "part-0002"}
    assert final_states(tmp_path / "runs").keys() == before


def test_a_removal_is_recorded_before_anything_is_removed(waiting, tmp_path, monkeypatch):
    config = copied(waiting, tmp_path)
    run_gsae(1, ["train", config])
    run_gsae(1, ["harvest", config])
    config, store = read_config("train", [str(config)]), tmp_path / "runs/store"
    shared = manifest.load(store)
    at_removal = []
    monkeypatch.setattr("gsae.train.parts.remove_used", lambda store: at_removal.append((read_used(store), part_stores(tmp_path))))
    for run in find_runs(tmp_path / "runs"):
        shutil.rmtree(run)
    assert remove_finished_parts(config, shared, []) is None
    assert at_removal == [(Used(4, is_over=True), ["part-0002", "part-0003"])]


def test_a_part_of_another_store_is_refused(waiting, tmp_path):
    config = copied(waiting, tmp_path)
    shutil.rmtree(tmp_path / "runs/store/part-0000")
    shutil.copytree(tmp_path / "runs/store/part-0001", tmp_path / "runs/store/part-0000")
    assert "part-0000 was harvested with corpus.part 1" in fail_with(1, "train", config)


def test_runs_that_begin_after_their_part_is_gone_are_refused_before_they_are_made(waiting, tmp_path):
    config = copied(waiting, tmp_path)
    run_gsae(1, ["train", config])
    sweeps = [*settings_in(tmp_path)["train"]["sweeps"], {"objective": "relu", "expansions": [2], "lambdas": {"1": [0.1]}}]
    before = find_runs(tmp_path / "runs")
    config = write_config(
        tmp_path / "more.yaml", {**yaml.safe_load(config.read_text()), "train": settings_in(tmp_path, sweeps=sweeps)["train"]}
    )
    assert "goes on in part-0000" in fail_with(1, "train", config)
    assert find_runs(tmp_path / "runs") == before


def test_a_part_shorter_than_a_batch_is_named(waiting, tmp_path):
    config = copied(waiting, tmp_path)
    assert "fewer than a batch" in fail_with(1, "train", config, "--train.batch_rows", "32768")


def test_a_training_in_one_part_knows_nothing_of_parts(tmp_path):
    config = begin(tmp_path, total_rows=1280)
    for stage in ("harvest", "train"):
        run_gsae(1, [stage, config, "--corpus.parts", "1"])
    assert sorted(path.name for path in (tmp_path / "runs/store").iterdir() if path.is_file()) == [
        "calibration.json",
        "identity.json",
        "manifest.json",
    ]
    assert "parts" not in json.dumps(json.loads((tmp_path / "runs/store/manifest.json").read_text())["identity"])
    states = list((tmp_path / "runs").rglob("state.json"))
    assert states
    assert not any("position" in json.loads(path.read_text()) for path in states)


class FakeStream:
    """Keeps where it was read from."""

    def __init__(self) -> None:
        self.sought: list[int] = []

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def seek(self, rows: int) -> None:
        self.sought.append(rows)


def test_training_and_candidates_are_read_from_the_place_in_the_present_part():
    stream = FakeStream()
    stretch = Stretch(lambda: stream, first_step=70, end_step=90, visit=1, is_part=True)
    spec = BankSpec("resid.1", (), scale=1.0, batch_rows=64, total_steps=250)
    bank = Bank(spec, TrainConfig(), ALONE, stretch, runs=[], variance=1.0, step=75)
    train(bank, [])
    list(fresh_rows(bank, 0))
    assert stream.sought == [5 * 64, 5 * 64]
    assert bank.position == Position(1, 5 * 64)
    bank.step = 90
    assert bank.position == Position(2, 0)
