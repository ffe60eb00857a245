"""Trackers against the record: what TensorBoard and wandb hold of a run is what stands in its metrics.jsonl."""

import json
import os
import struct
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from ranks import run as run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained_runs import again, assert_equal, lines, num_lines

from gsae.errors import ConfigError
from gsae.store.runs import find_runs, read_metrics
from gsae.world import tracking
from gsae.world.tracking import TrackedRun, Tracking, require_trackers

Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder, with a store, a config, and the runs that one rank trained without trackers: two sites, two runs each, 200 steps."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"]["store"] = str(folder / "store")
    settings["train"]["sweeps"] = settings["train"]["sweeps"][::2]
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    run_gsae(1, ["train", config])
    return folder


def recorded(run: Path) -> Points:
    """The numbers of metrics.jsonl."""
    points = defaultdict(list)
    for line in read_metrics(run):
        for name, value in line.items():
            for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
                if name not in ("kind", "step") and isinstance(number, int | float):
                    points["/".join(filter(None, (line["kind"], name, inner)))].append((line["step"], float(number)))
    return points


def read_event_files(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def in_event_files(run: Path) -> Points:
    """The same in TensorBoard's eyes."""
    found = read_event_files(run)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def in_wandb_files(run: Path) -> list[dict]:
    """What wandb kept of each session, as it will send it: the run, its config and the points."""
    from wandb.proto.wandb_internal_pb2 import Record

    sessions = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        sessions.append(session := {"config": {}, "points": defaultdict(list)})
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                session |= {"id": record.run.run_id, "project": record.run.project, "group": record.run.run_group}
            for item in record.config.update:
                session["config"][item.key] = json.loads(item.value_json)
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name, value in values.items():
                if "/" in name and not isinstance(value, str):
                    session["points"][name].append((values["_step"], float(value)))
    return sessions


def records(data: bytes):
    """The records of a LevelDB log after a header of 7 bytes: blocks of 32 KiB with chunks of checksum, length, part, content."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 0 < (left := -at % 32768) < 7:
            at += left
            continue
        length, part = struct.unpack_from("<HB", data, at + 4)
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if part in (1, 4):  # a whole record, or its end
            yield record
            record = b""


def assert_same_points(found: Points, wanted: Points) -> None:
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (2, 1), (2, 2)])
def test_event_files_hold_the_numbers_of_the_metrics(trained, tmp_path, size, groups):
    run_gsae(size, ["train", again(trained, tmp_path, trackers=["tensorboard"], groups=groups)])
    runs = find_runs(tmp_path / "runs")
    assert len(runs) == 4
    tags = set()
    for run in runs:
        points = recorded(run)
        assert len(points["step/fvu"]) == 20
        assert_same_points(in_event_files(run), points)
        assert len(list((run / "tensorboard").rglob("*"))) == 1, "one event file, and no other run inside"
        tags |= points.keys()
    assert {"step/l0", "step/shares/waiting", "resampling/resampled", "resampling_outcome/alive", "finished/dead_fraction"} <= tags


def test_trackers_change_nothing_else(trained, tmp_path):
    """Nor does a run's training depend on which trackers it had before."""
    run_gsae(1, ["train", again(trained, tmp_path, trackers=["tensorboard"])])
    assert_equal(tmp_path / "runs", trained / "runs")
    assert "trackers" not in json.loads((find_runs(tmp_path / "runs")[0] / "run.json").read_text())["settings"]
    assert "have ended before" in run_gsae(1, ["train", again(trained, tmp_path)])
    assert "no problems" in run_gsae(1, ["verify", tmp_path / "runs"])


def test_the_settings_of_a_run_are_its_hyper_parameters(trained, tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run_gsae(1, ["train", again(trained, tmp_path, trackers=["tensorboard"], sites=[1])])
    for run in find_runs(tmp_path / "runs"):
        summary = read_event_files(run).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        given = HParamsPluginData.FromString(summary).session_start_info.hparams
        described = json.loads((run / "run.json").read_text())
        assert given["lambda"].number_value == described["lambda"]
        assert given["objective"].string_value == described["objective"]
        assert given["settings.schedule.kind"].string_value == described["settings"]["schedule"]["kind"]


def test_a_resumed_run_has_each_point_once(trained, tmp_path):
    """Killed between checkpoints, so that there are points which the second session makes again."""
    config = again(trained, tmp_path, trackers=["tensorboard"], sites=[1], checkpoint_every_fraction=0.25)
    first, _ = kill_after_lines(config, tmp_path / "runs", 26)
    assert in_event_files(first)["step/fvu"][-1][0] % 50, "the second session makes nothing again"
    run_gsae(1, ["train", config])
    for run in find_runs(tmp_path / "runs"):
        assert len(list((run / "tensorboard").iterdir())) == 2
        assert_same_points(in_event_files(run), recorded(run))
    assert lines(tmp_path / "runs") == {name: run for name, run in lines(trained / "runs").items() if name.startswith("resid.1/")}


def kill_after_lines(config: Path, output: Path, number: int, environment: dict[str, str] | None = None) -> list[Path]:
    """SIGKILL when the runs' metrics have so many lines; the runs."""
    with started(1, gsae_with, environment or {}, "train", str(config)) as ranks:
        until = time.monotonic() + 60
        while num_lines(output) < number and time.monotonic() < until:
            time.sleep(0.002)
        ranks.kill()
        assert ranks.wait() == [-9], ranks.output()
    return find_runs(output)


def test_a_tracker_that_comes_later_gets_the_points_before(trained, tmp_path):
    kill_after_lines(again(trained, tmp_path, sites=[1]), tmp_path / "runs", 26)
    run_gsae(1, ["train", again(trained, tmp_path, sites=[1], trackers=["tensorboard"])])
    for run in find_runs(tmp_path / "runs"):
        assert_same_points(in_event_files(run), recorded(run))


def test_a_tracker_that_cannot_write_is_named_once_and_training_goes_on(trained, tmp_path):
    config = again(trained, tmp_path, trackers=["tensorboard"], sites=[1])
    with started(2, gsae, "train", str(config)) as ranks:
        until = time.monotonic() + 60
        while num_lines(tmp_path / "runs") < 8 and time.monotonic() < until:
            time.sleep(0.002)
        for run in find_runs(tmp_path / "runs"):
            (run / "tensorboard").rename(run / "elsewhere")
        assert ranks.wait() == [0, 0]
        shown = ranks.output()
    assert shown.count("warning: resid.1: tensorboard takes no more, and training goes on without it; metrics.jsonl has it all") == 1
    assert "Traceback" not in shown
    assert lines(tmp_path / "runs").keys() == {name for name in lines(trained / "runs") if name.startswith("resid.1/")}
    assert all(run[-1]["kind"] == "finished" for run in lines(tmp_path / "runs").values())


def test_a_tracker_that_hangs_is_left_behind(tmp_path, monkeypatch):
    freed = threading.Event()
    monkeypatch.setattr(tracking._TensorBoard, "start", lambda self: freed.wait(60))
    monkeypatch.setattr(tracking, "LEAVING_SECONDS", 0.2)
    said, began = [], time.monotonic()
    hanging = Tracking(["tensorboard"], said.append)
    hanging.begin(TrackedRun("a", "resid.1", tmp_path, {}, []))
    hanging.log("a", {"kind": "step", "step": 1, "fvu": 0.5})
    hanging.close()
    assert time.monotonic() - began < 30
    assert said == ["tensorboard did not take everything within 0.2 s of the end; metrics.jsonl has it all"]
    freed.set()
    hanging._thread.join(60)
    assert len(said) == 1


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.trackers has wandb, but its package is not installed: pip install 'gsae\[wandb\]'"):
        require_trackers(["wandb"])


def test_wandb_offline_holds_the_numbers_of_the_metrics_under_one_id(trained, tmp_path):
    config = again(trained, tmp_path, trackers=["wandb"], sites=[1])
    offline = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    kill_after_lines(config, tmp_path / "runs", 26, offline)
    run_ranks(2, gsae_with, offline, "train", str(config))
    ids = set()
    for run in find_runs(tmp_path / "runs"):
        sessions = [session for session in in_wandb_files(run) if "id" in session]  # the kill may have come before wandb wrote
        described = json.loads((run / "run.json").read_text())
        (of_wandb,) = {(session["id"], session["project"], session["group"]) for session in sessions}
        assert of_wandb[1:] == ("gsae", "resid.1")
        assert sessions[-1]["config"]["settings.schedule.kind"] == described["settings"]["schedule"]["kind"]
        assert_same_points(sessions[-1]["points"], recorded(run))
        assert (run / "wandb" / "id").read_text() == of_wandb[0]
        ids.add(of_wandb[0])
    assert len(ids) == 2, "each run is one of wandb's"


def test_wandb_without_a_key_is_one_line_before_anything_is_trained(trained, tmp_path):
    config = again(trained, tmp_path, trackers=["wandb"])
    environment = {"HOME": str(tmp_path), "WANDB_MODE": "online"}
    with started(2, gsae_with, environment, "train", str(config)) as ranks:
        assert ranks.wait() == [2, 2]
        shown = ranks.output(0) + ranks.output(1)
    (line,) = [line for line in shown.splitlines() if line.startswith("gsae: ")]
    assert "train.trackers has wandb, which has no API key: run wandb login on this host, or set WANDB_MODE=offline" in line
    assert not (tmp_path / "runs").exists()


def gsae_with(environment: dict[str, str], *words: str) -> None:
    os.environ.update(environment)
    gsae(*words)


def test_a_tracker_is_named_once(trained, tmp_path):
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    settings["train"]["trackers"] = ["wandb", "wandb"]
    with started(1, gsae, "train", str(write_config(tmp_path / "config.yaml", settings))) as ranks:
        assert ranks.wait() == [2]
        assert "train.trackers is ['wandb', 'wandb']; name each once" in ranks.output()
