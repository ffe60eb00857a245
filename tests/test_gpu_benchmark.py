"""The benchmark of a GPU, as far as a machine without one can run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
SMALL = ("--device", "cpu", "--d-model", "16", "--features", "48", "--rows", "12", "--rounds", "1")


def run(*words):
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable})


def test_the_script_writes_a_json_file_and_a_table(tmp_path):
    pytest.importorskip("triton")
    done = run(sys.executable, SCRIPT, *SMALL, "--l0", "4", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == found
    steps = {(line["step"], line["l0"]): line for line in found["steps"]}
    assert steps["gsae, sparse, bfloat16", 4]["rows_per_second"] > 0
    assert ("gsae, sparse, bfloat16", 2) in steps
    assert {line["skipped"] for line in found["steps"] if "skipped" in line} <= {
        "dictionary_learning is not installed",
        "sae_lens is not installed",
    }
    assert (tmp_path / "gpu.md").read_text().count("| gsae, sparse, bfloat16 |") == 2


def test_what_is_counted_grows_with_the_features():
    pytest.importorskip("triton")
    done = run(sys.executable, SCRIPT, "--counted", "--features", "1024", "2048", "--d-model", "256", "--rows", "512")
    assert done.returncode == 0, done.stderr
    totals = [float(line.split("|")[2]) for line in done.stdout.splitlines() if line.startswith("| all")]
    assert 1 < totals[1] / totals[0] < 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so():
    for words in (("bash", "benchmarks/gpu.sh"), (sys.executable, SCRIPT)):
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("gpu: torch sees no CUDA device here")
        assert done.stderr.count("\n") == 1
