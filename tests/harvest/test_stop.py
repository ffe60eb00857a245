"""A harvest that is told to stop, by one signal to one rank, and goes on."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from trees import tree

from gsae.harvest import lanes


def slow(*words: str) -> None:
    """A rank whose LLM batches take a while."""
    plain = lanes.llm_batches

    def llm_batches(*arguments):
        for batch in plain(*arguments):
            time.sleep(0.02)
            yield batch

    lanes.llm_batches = llm_batches
    gsae(*words)


def shards(store: Path) -> int:
    return sum(path.read_text().count("\n") for path in store.glob("progress/*.jsonl"))


def stop(config: Path, store: Path, size: int, number: signal.Signals) -> str:
    """Run until some shards are there, then tell the last rank to stop."""
    before = shards(store)
    with started(size, slow, "harvest", str(config)) as ranks:
        until = time.monotonic() + 60
        while shards(store) < before + 4 and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(ranks.processes[-1].pid, number)
        assert ranks.wait(25) == [0] * size, ranks.output()
        return ranks.output()


@pytest.mark.parametrize(("size", "sharding"), [(1, "replicate"), (2, "replicate"), (4, "replicate"), (2, "zero3")])
def test_it_ends_after_a_shard_and_goes_on_to_the_same_bytes(tmp_path, size, sharding):
    write_text(tmp_path / "text", num_documents=60, num_words=300)
    settings = small_settings(tmp_path)
    settings["harvest"]["contexts_per_shard"] = 16
    config = write_config(tmp_path / "config.yaml", settings)
    store, whole = tmp_path / "runs/store", tmp_path / "whole"
    run_gsae(1, ["harvest", config, "--harvest.store", whole])
    again = write_config(tmp_path / "again.yaml", settings | {"llm": {**settings["llm"], "sharding": sharding}})
    shown = stop(again, store, size, signal.SIGUSR1)
    assert f"harvest: stopped on request; the same command continues from here ({store / 'stopped.json'})" in shown
    stopped = json.loads((store / "stopped.json").read_text())
    assert (stopped["stage"], stopped["signal"], stopped["shards"]) == ("harvest", "SIGUSR1", shards(store))
    assert not list(store.rglob("*.partial"))
    first = shards(store)
    stop(again, store, size, signal.SIGTERM)
    assert first < shards(store) < shards(whole)
    run_gsae(size, ["harvest", again])
    assert tree(store) == tree(whole)


def test_parts_go_on_too(tmp_path):
    write_text(tmp_path / "text", num_documents=80, num_words=300)
    settings = small_settings(tmp_path)
    config = write_config(tmp_path / "config.yaml", settings | {"corpus": {**settings["corpus"], "parts": 2}})
    store, whole = tmp_path / "runs/store", tmp_path / "whole"
    run_gsae(2, ["harvest", config, "--harvest.store", whole])
    with started(2, slow, "harvest", str(config)) as ranks:
        until = time.monotonic() + 60
        while shards(store / "part-0000") < 4 and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(ranks.processes[0].pid, signal.SIGUSR1)
        assert ranks.wait(25) == [0, 0], ranks.output()
    assert (store / "stopped.json").exists()
    assert not (store / "part-0001").exists(), "a part was begun after the stop"
    run_gsae(2, ["harvest", config])
    assert tree(store) == tree(whole)
