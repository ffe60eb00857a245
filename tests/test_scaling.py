"""benchmarks/scaling.py: it runs, the bytes that ranks send are those that are planned, and a bank reads the store once."""

import json
import sys
from pathlib import Path

import pytest
import ranks
import torch
from test_planted import load_benchmark

from gsae import world
from gsae.plan.communication import sent_bytes
from gsae.sae.objective import build
from gsae.train.optim import SAEOptimizer
from gsae.train.step import TrainingModule, update

scaling = load_benchmark("scaling")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Rows of 16 dimensions of a small LLM."""
    from conftest import small_settings, write_config, write_text

    folder = tmp_path_factory.mktemp("store")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"]["store"] = str(folder / "store")
    ranks.run_gsae(1, ["harvest", write_config(folder / "config.yaml", settings)])
    return folder / "store"


def measure(part: str, monkeypatch, answer: Path, *words: str, size: int = 1) -> dict:
    """A part's figures, of ranks that were forked."""
    sizes = ["--features", "128", "--batch-rows", "64", "--l0", "4", "--rounds", "2", "--round-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *sizes, *words])
    ranks.run(size, be_rank, scaling.read_options(), part, answer)
    return json.loads(answer.read_text())


def be_rank(options, part: str, answer: Path) -> None:
    load_benchmark("scaling").be_rank(options, part, answer)


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_send_what_is_planned(store, monkeypatch, tmp_path, size):
    """Messages have headers and are many for gradients of 35 kB; resampling sends no more than is planned."""
    words = ["--store", str(store), "--site", "resid.1", "--window-rows", "2048", "--steps", "20"]
    found = measure("traffic", monkeypatch, tmp_path / "answer", *words, size=size)
    gradients = 2 * 4 * (2 * 16 * 128 + 3 * 128 + 16)
    assert found["planned"] == (size - 1) * gradients
    assert found["planned"] <= found["sent_bytes_per_step"] <= 1.1 * found["planned"]
    assert (size == 1) == (found["with_chores"] == 0)
    assert found["sent_bytes_per_step"] <= found["with_chores"] <= 1.2 * found["planned_with_chores"]


def test_a_bank_reads_the_store_once(store, monkeypatch, tmp_path):
    words = ["--store", str(store), "--site", "resid.1", "--window-rows", "2048", "--runs", "3"]
    found = measure("bank", monkeypatch, tmp_path / "answer", *words)
    assert found["read_bytes_of_runs_alone"] == pytest.approx(3 * found["read_bytes"], rel=0.02)
    assert found["read_bytes"] > 0.9 * found["read_bytes_of_rows"]


def test_chores_are_timed_to_the_last_step(monkeypatch, tmp_path):
    found = measure("chores", monkeypatch, tmp_path / "answer", "--d-model", "16", "--chore-steps", "20")
    assert found["ratio"] > 0.5
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def check_gradients(size: int) -> None:
    with world.start("cpu") as here:
        sae = build("gated", 64, 512, 0)
        module = here.everyone.wrap(TrainingModule(sae, "gated"))
        optimizer = SAEOptimizer(sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=True)
        for _ in range(2):
            here.everyone.barrier()
            before = scaling.sent_bytes()
            update(module, optimizer, torch.randn(8, 64), lambda_=0.1, learning_rate=1e-3, micro_batch_rows=4)
            here.everyone.barrier()
            sent = scaling.sent_bytes() - before
    assert sent == pytest.approx(sent_bytes(4 * sum(p.numel() for p in sae.parameters()), size), rel=0.02)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_ring_sends_what_its_formula_says_once_a_step(size):
    """In micro-batches too, of which only the last sums gradients."""
    ranks.run(size, check_gradients, size)
