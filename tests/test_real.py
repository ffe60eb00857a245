"""The whole pipeline on the real thing, small: SmolLM2's 30 layers over Wikipedia articles, a few thousand tokens."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from conftest import REAL_LLM_DTYPE, write_config
from ranks import gsae, run_gsae, started

from gsae.store.runs import find_runs

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "runs" / "assets"

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not ASSETS.exists(), reason="the demo's LLM and text are not prepared: python launch/prepare_demo.py runs/assets"),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The demo's config made small: two sites, 4096 tokens, 30 steps a run; harvested by two ranks, trained and evaluated by one."""
    folder = tmp_path_factory.mktemp("real")
    settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    settings["output"] = str(folder / "runs")
    for section, name in (("corpus", "path"), ("llm", "model")):
        settings[section][name] = str(ROOT / settings[section][name])
    settings["llm"]["dtype"] = REAL_LLM_DTYPE
    settings["corpus"]["num_lanes"] = 4
    settings["harvest"] |= {
        "sites": [2, "middle"],
        "batch_contexts": 4,
        "contexts_per_shard": 4,
        "calibration_contexts": 4,
        "max_tokens": 4096,
    }
    settings["train"] |= {
        "total_rows": 7680,
        "batch_rows": 256,
        "sweeps": [{"objective": "gated", "expansions": [1], "lambdas": {"*": [0.1]}}],
    }
    settings["evaluate"] |= {"max_tokens": 2560, "batch_contexts": 4}
    config = write_config(folder / "config.yaml", settings)
    run_gsae(2, ["harvest", config], timeout_seconds=300)
    run_gsae(1, ["train", config], timeout_seconds=300)
    run_gsae(1, ["evaluate", config], timeout_seconds=300)
    run_gsae(1, ["report", folder / "runs"])
    return folder


def test_real_numbers_have_their_known_sizes(real):
    with (real / "runs" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["site"] for row in rows] == ["resid.2", "resid.15"]
    for row in rows:
        assert 2.5 < float(row["ce_clean"]) < 4.5  # nats a token, of a 135 M model on Wikipedia
        assert float(row["ce_zero"]) > float(row["ce_spliced"]) > float(row["ce_clean"])
        assert 0.2 < float(row["fvu"]) < 1  # 30 steps are few


def test_splicing_the_identity_changes_nothing(real):
    for run in find_runs(real / "runs"):
        results = json.loads((run / "results.json").read_text())
        assert results["checks"] == {"identity_loss_recovered": 1.0, "zero_loss_recovered": 0.0}
        assert results["counts"]["documents"] >= 20


def test_position_0_is_out_and_held_out_text_is_not_in(real):
    manifest = json.loads((real / "runs/store/manifest.json").read_text())
    for site in manifest["sites"].values():
        assert site["dropped"]["first"] > 0
        assert site["rows"] + sum(site["dropped"].values()) <= 4096


def test_a_site_out_of_range_is_one_line(real, tmp_path):
    settings = yaml.safe_load((real / "config.yaml").read_text()) | {"output": str(tmp_path / "runs")}
    settings["harvest"]["sites"] = [30]
    with started(1, gsae, "harvest", str(write_config(tmp_path / "config.yaml", settings))) as ranks:
        assert ranks.wait() == [2]
        assert "site 30 is not in this LLM of 30 layers" in ranks.output()
    assert not (tmp_path / "runs").exists()
