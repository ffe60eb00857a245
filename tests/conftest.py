"""A small pipeline that tests share: a random Llama of four layers over byte tokens reads seeded text."""

import os
import random
from pathlib import Path

import pytest
import torch
import yaml

from gsae.sae.products import is_quick_at_bfloat16

torch.set_num_threads(1)
REAL_LLM_DTYPE = "bfloat16" if is_quick_at_bfloat16(torch.device("cpu")) else "float32"
"""Of SmolLM2 in tests: a CPU without instructions for bfloat16 products takes a hundred times as long for them."""
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter, on the CPU


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests are for `-m slow`. The file that takes longest comes first, so that no worker has it left at the end."""
    items.sort(key=lambda item: item.path.name != "test_requeue.py")
    if "slow" not in (config.getoption("markexpr") or ""):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m slow"))


WORDS = ("the", "of", "and", "a", "in", "to", "sparse", "gate", "magnitude", "feature", "layer", "row", "lane", "shard", "Paris", "1990")


def write_text(folder: Path, num_documents: int = 30, num_words: int = 120) -> None:
    """Documents of seeded words, one a file."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for number in range(num_documents):
        (folder / f"{number:03d}.txt").write_text(" ".join(generator.choices(WORDS, k=num_words)))


def small_settings(folder: Path) -> dict:
    """Settings of a pipeline that takes seconds; its text is at <folder>/text, its output at <folder>/runs."""
    return {
        "output": str(folder / "runs"),
        "device": "cpu",
        "corpus": {"format": "text", "path": f"{folder}/text/*.txt", "held_out_fraction": 0.2, "piece_characters": 100, "num_lanes": 4},
        "llm": {"model": "random", "dtype": "float32", "random": {"num_layers": 4, "d_model": 16, "num_heads": 2}},
        "harvest": {"sites": [1, -2], "context_length": 32, "batch_contexts": 4, "contexts_per_shard": 8, "calibration_contexts": 8},
        "train": {
            "total_rows": 12_800,
            "batch_rows": 64,
            "window_rows": 2048,
            "learning_rate": 2e-3,
            "dtype": "float64",
            "log_every_steps": 10,
            "resampling": {"event_fractions": [0.25, 0.5], "min_interval_rows": 1000, "dead_after_rows": 500},
            "sweeps": [
                {"objective": "gated", "expansions": [3], "lambdas": {"*": [0.2]}},
                # A learning rate so high that features die and are resampled.
                {"objective": "gated", "expansions": [8], "lambdas": {"*": [0.9]}, "resampling": True, "learning_rate": 0.1},
                {"objective": "relu", "expansions": [8], "lambdas": {"*": [0.9]}, "resampling": True, "learning_rate": 0.1},
            ],
        },
        "evaluate": {"max_tokens": 1500, "max_document_tokens": 500, "batch_contexts": 4, "min_documents": 2, "bootstrap_draws": 50},
    }


def write_config(path: Path, settings: dict) -> Path:
    """Write settings as a config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """The config of a small pipeline, its text in place, nothing run yet."""
    write_text(tmp_path / "text")
    return write_config(tmp_path / "config.yaml", small_settings(tmp_path))
