"""The whole pipeline as a user starts it: the scripts of launch/, on one process and on two real ranks."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES_OUTPUT = ("report.html", "report.md", "results.csv", "plots/l0_loss_recovered.png")


def pipeline(config: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "launch" / "pipeline.sh"), str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def table(output: Path) -> list[dict[str, str]]:
    with (output / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The output of the smoke config on one process."""
    output = tmp_path_factory.mktemp("smoke") / "runs"
    pipeline(ROOT / "configs" / "smoke.yaml", "--output", str(output))
    return output


def test_the_smoke_config_runs_through_all_stages(smoke):
    assert [name for name in STAGES_OUTPUT if not (smoke / name).exists()] == []
    rows = table(smoke)
    assert len(rows) == 8  # two sites, four sweeps
    assert {row["site"] for row in rows} == {"resid.0", "resid.1"}
    assert all(row["l0"] and float(row["fvu"]) < 1 for row in rows)


def test_a_second_call_does_nothing_twice(smoke):
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("*") if path.suffix in (".tar", ".json", ".jsonl", ".safetensors")}
    shown = pipeline(ROOT / "configs" / "smoke.yaml", "--output", str(smoke)).stdout
    assert "nothing to do" in shown
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_ranks_of_accelerate_give_the_results_of_one(smoke, tmp_path):
    """Float32, so the weights part ways; the metrics stay within a percent, and the ranks are counted."""
    done = pipeline(ROOT / "configs" / "smoke.yaml", "2", "--output", str(tmp_path / "runs"))
    assert "Traceback" not in done.stdout + done.stderr
    one, two = table(smoke), table(tmp_path / "runs")
    assert [row["run"] for row in one] == [row["run"] for row in two]
    for alone, shared in zip(one, two, strict=True):
        for metric in ("l0", "fvu", "mse"):
            assert float(shared[metric]) == pytest.approx(float(alone[metric]), rel=0.01), (alone["run"], metric)
        assert shared["ce_clean"] == alone["ce_clean"]


def test_a_checkpoint_that_was_touched_is_found(smoke):
    (run,) = smoke.glob("resid.0/gated-m128-*")
    weights = sorted(run.glob("checkpoints/*/sae.safetensors"))[-1]
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = subprocess.run([sys.executable, "-m", "gsae", "verify", str(run)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "SHA-256 differs" in done.stdout
    finally:
        weights.write_bytes(whole)


def test_the_identity_splice_gives_1_and_zero_ablation_0(smoke):
    for path in smoke.rglob("results.json"):
        checks = json.loads(path.read_text())["checks"]
        assert checks["identity_loss_recovered"] == 1
        assert checks["zero_loss_recovered"] == 0


def test_a_mistake_under_accelerate_is_one_line_of_ours(tmp_path):
    settings = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text()) | {"output": str(tmp_path / "runs")}
    settings["harvest"]["sites"] = [7]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    done = pipeline(config, "2", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gsae: site 7 is not in this LLM of 2 layers")
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "slurm").iterdir(), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_pass_shellcheck(script):
    if not any((Path(folder) / "shellcheck").exists() for folder in os.environ["PATH"].split(":")):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", script], check=True)
