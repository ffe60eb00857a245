"""Twenty random SIGKILLs, of one rank and of all: what is left in the end is what an uninterrupted harvest leaves."""

import random
import shutil
import time
from pathlib import Path

import pytest
import yaml
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from trees import tree

from gsae.cli import main

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "runs" / "assets"
NUM_KILLS = 20


def kill_at_random(config: Path, store: Path, generator: random.Random, most_tars: int, wait_seconds: float) -> bool:
    """Start 1, 2 or 4 ranks, kill all at some moment, or one of them once they are at work; whether the store was whole by then.

    What dies before the ranks have met is the launcher's to notice; here there is none.
    """
    size, kills_all = generator.choice([1, 2, 2, 4]), generator.random() < 0.7
    with started(size, gsae, "harvest", str(config)) as ranks:
        wanted = len(list(store.glob("resid.*/*.tar"))) + generator.randint(0 if kills_all else 1, most_tars)
        until = time.monotonic() + wait_seconds
        while len(list(store.glob("resid.*/*.tar"))) < wanted and time.monotonic() < until and ranks.processes[0].is_alive():
            time.sleep(0.002)
        time.sleep(generator.random() * 0.1)
        if kills_all:
            ranks.kill()
        else:
            victim = generator.randrange(size)
            ranks.processes[victim].kill()
            codes = ranks.wait(wait_seconds)
            others = [code for rank, code in enumerate(codes) if rank != victim]
            assert None not in others, f"a rank outlives one that was killed: {codes}"
    return (store / "manifest.json").exists()


def harvest_under_kills(config: Path, store: Path, whole: dict[str, bytes], most_tars: int, wait_seconds: float) -> None:
    """Kill until so many have struck; a store that became whole in between is compared, and the next one begun."""
    generator, struck = random.Random(4), 0
    while struck < NUM_KILLS:
        if kill_at_random(config, store, generator, most_tars, wait_seconds):
            run_gsae(1, ["harvest", config], timeout_seconds=20 * wait_seconds)
            assert tree(store) == whole
            shutil.rmtree(store)
        else:
            struck += 1
    run_gsae(2, ["harvest", config], timeout_seconds=20 * wait_seconds)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(store)])
    assert ended.value.code == 0
    assert tree(store) == whole


def test_twenty_kills_leave_the_store_of_an_uninterrupted_harvest(tmp_path):
    write_text(tmp_path / "text", num_documents=300)
    stores = {}
    for name in ("whole", "killed"):
        settings = small_settings(tmp_path / name) | {"stall_timeout_seconds": 1.5}
        settings["corpus"]["path"] = f"{tmp_path}/text/*.txt"
        stores[name] = write_config(tmp_path / name / "config.yaml", settings)
    run_gsae(2, ["harvest", stores["whole"]])
    whole = tree(tmp_path / "whole/runs/store")
    harvest_under_kills(stores["killed"], tmp_path / "killed/runs/store", whole, most_tars=4, wait_seconds=60)


@pytest.mark.slow
@pytest.mark.skipif(not ASSETS.exists(), reason="the demo's LLM and text are not prepared: python launch/prepare_demo.py runs/assets")
def test_twenty_kills_of_the_real_harvest(tmp_path):
    stores = {}
    for name in ("whole", "killed"):
        settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
        settings |= {"output": str(tmp_path / name / "runs"), "stall_timeout_seconds": 20}
        for section, key in (("corpus", "path"), ("llm", "model")):
            settings[section][key] = str(ROOT / settings[section][key])
        settings["corpus"]["num_lanes"] = 4
        settings["harvest"] |= {"batch_contexts": 4, "contexts_per_shard": 4, "calibration_contexts": 4, "max_tokens": 100_000}
        stores[name] = write_config(tmp_path / name / "config.yaml", settings)
    run_gsae(2, ["harvest", stores["whole"]], timeout_seconds=1200)
    whole = tree(tmp_path / "whole/runs/store")
    harvest_under_kills(stores["killed"], tmp_path / "killed/runs/store", whole, most_tars=20, wait_seconds=120)
