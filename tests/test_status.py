"""`gsae status`, from a config that has done nothing to one that has done all."""

import json
import shutil

import pytest
import yaml
from conftest import small_settings, write_config, write_text
from ranks import run_gsae

from gsae.cli import main
from gsae.store.runs import checkpoints, find_runs


def status(capsys, *words) -> list[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["status", *map(str, words)])
    assert ended.value.code == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder whose config has done all, at one site, with three runs of 200 steps."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text", num_documents=60)
    settings = small_settings(folder)
    settings["train"]["sites"] = [1]
    config = write_config(folder / "config.yaml", settings)
    for stage in ("harvest", "train", "evaluate"):
        run_gsae(1, [stage, config])
    return folder


def copied(whole, folder):
    shutil.copytree(whole / "runs", folder / "runs")
    settings = yaml.safe_load((whole / "config.yaml").read_text()) | {"output": str(folder / "runs")}
    return write_config(folder / "config.yaml", settings)


def test_before_anything(pipeline, tmp_path, capsys):
    assert status(capsys, pipeline) == [
        f"harvest unfinished 0 shards in {tmp_path}/runs/store",
        "train unfinished there is no whole store yet",
        "evaluate unfinished there is no run yet",
    ]
    assert not (tmp_path / "runs").exists(), "it changes nothing"


def test_after_everything(whole, capsys):
    shards = len(list((whole / "runs/store/resid.1").glob("*.tar")))
    assert status(capsys, whole / "config.yaml") == [
        f"harvest ended {shards} shards in {whole}/runs/store",
        "train ended 3 of 3 runs have ended, 600 of 600 steps are saved",
        "evaluate ended 3 of 3 runs have the results of their newest checkpoint",
    ]
    assert status(capsys, whole / "config.yaml", "--stage", "train", "--brief") == ["ended 3/600/0"]


def test_a_stop_is_its_own_stage_s(whole, tmp_path, capsys):
    config, output = copied(whole, tmp_path), tmp_path / "runs"
    first, *others = find_runs(output)
    shutil.rmtree(checkpoints(first)[-1].path)
    lines = (first / "metrics.jsonl").read_text().splitlines(keepends=True)
    (first / "metrics.jsonl").write_text("".join(lines[:-1]))
    for run in others:
        (run / "results.json").unlink()
    stop = {"stage": "train", "time": "then"}
    (output / "stopped.json").write_text(json.dumps(stop))
    newest = checkpoints(first)[-1].step
    assert status(capsys, config, "--brief")[1:] == [f"stopped 2/{400 + newest}/0 then", "unfinished 0"]
    (output / "stopped.json").write_text(json.dumps(stop | {"stage": "evaluate"}))
    assert status(capsys, config, "--brief")[1:] == [f"unfinished 2/{400 + newest}/0", "stopped 0 then"]


def test_a_store_that_is_not_whole(whole, tmp_path, capsys):
    config, store = copied(whole, tmp_path), tmp_path / "runs/store"
    shutil.rmtree(store)
    shutil.copytree(whole / "runs/store", store)
    (store / "manifest.json").unlink()
    logs = sorted((store / "progress").glob("*.jsonl"))
    before = int(status(capsys, config, "--stage", "harvest", "--brief")[0].split()[1])
    logs[0].write_text("".join(logs[0].read_text().splitlines(keepends=True)[:1]))
    after = status(capsys, config, "--stage", "harvest", "--brief")
    assert after[0].split()[0] == "unfinished"
    assert 0 < int(after[0].split()[1]) < before


def test_pilots_and_parts_count(tmp_path, capsys):
    write_text(tmp_path / "text", num_documents=80, num_words=300)
    settings = small_settings(tmp_path)
    settings["corpus"]["parts"] = 2
    settings["train"] |= {"sites": [1], "total_rows": 150_000, "target_l0": {"1": [15]}}
    settings["train"]["sweeps"] = [{"objective": "gated", "expansions": [3]}]
    config = write_config(tmp_path / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    assert [line.split()[0] for line in status(capsys, config, "--brief")] == ["waiting", "unfinished", "unfinished"]
    marks = [status(capsys, config, "--stage", "train", "--brief")]
    run_gsae(1, ["train", config], timeout_seconds=300)
    marks.append(status(capsys, config, "--stage", "train", "--brief"))
    assert marks[0] == ["unfinished 0/0/0"]
    state, mark = marks[1][0].split()
    assert state == "waiting"
    ended, steps, pilots = map(int, mark.split("/"))
    assert (ended, steps > 0, pilots > 0) == (0, True, True)


@pytest.mark.parametrize(("words", "message"), [(["--stage", "report"], "invalid choice"), ([], "no config given")])
def test_a_mistake_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["status", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
