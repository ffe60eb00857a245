"""Dictionaries split over ranks: what they train to, against one rank; checkpoints in parts; bytes; memory. DESIGN's invariants 1, 2, 4, 7."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import gsae, run, run_gsae, started
from trained_runs import again, assert_equal, assert_near, final_states, lines, train_small

from gsae.sae.formats import read_sae
from gsae.store.runs import checkpoints, damage, find_runs
from gsae.train import bank as banks
from gsae.train import checkpoint

LAYOUTS = {"1x2": (2, 2), "1x4": (4, 4), "2x2": (4, 2)}
"""Ranks, and those of them that share the features, by rows x features."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"))


def split(layout: str) -> tuple[int, dict[str, int]]:
    """Ranks, and the settings of a layout."""
    ranks, features = LAYOUTS.get(layout, (1, 1))
    return ranks, {"feature_ranks": features}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_float64_a_split_dictionary_is_trained_as_a_whole_one(trained, tmp_path, layout):
    size, settings = split(layout)
    run_gsae(size, ["train", again(trained, tmp_path, **settings)])
    assert_near(tmp_path / "runs", trained / "runs")
    events = [line for of_run in lines(tmp_path / "runs").values() for line in of_run if line["kind"].startswith("resampling")]
    wanted = [line for of_run in lines(trained / "runs").values() for line in of_run if line["kind"].startswith("resampling")]
    assert events == wanted
    assert sum(line["resampled"] for line in events) > 100
