"""The ways to lay runs out over ranks: groups, ranks in a group. What each trains, against one rank. DESIGN's invariants 1 and 7."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from ranks import gsae, run, run_gsae
from trained_runs import again, assert_near, lines, train_small

from gsae.train import bank as banks
from gsae.train import run as training
from gsae.train.bank import Bank

LAYOUTS = {"1x1": (1, 1), "1x2": (2, 1), "2x1": (2, 2), "2x2": (4, 2), "1x4": (4, 1)}
"""Ranks and groups, by groups x ranks in a group."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("trained"))


def train_with_hashes(folder: Path, *words: str) -> None:
    """A rank that trains, and leaves a line with a hash of all its parameters and optimizer state at each event and at the end."""
    plain = banks.train

    def train(bank: Bank, chores) -> None:
        plain(bank, [*chores, _LeaveHashes(folder)])

    training.train = train
    gsae(*words)


class _LeaveHashes:
    """A chore: what this rank holds, after all others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_due(self, bank: Bank) -> bool:
        return bank.step % 50 == 0

    def run(self, bank: Bank) -> None:
        for each in bank.runs:
            digest = hashlib.sha256()
            for tensor in [*each.sae.state_dict().values(), *each.optimizer.state_tensors().values()]:
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            key = f"{bank.spec.site}/{each.spec.name}/{bank.step}"
            line = {"key": key, "rank": bank.group.rank, "hash": digest.hexdigest(), "resampled": each.event_step == bank.step}
            with (self._folder / f"{key.replace('/', '_')}.{bank.group.rank}").open("w") as file:
                file.write(json.dumps(line))


@pytest.mark.parametrize("layout", ["2x2", "1x4"])
def test_all_ranks_of_a_group_hold_the_same_and_the_same_as_one_rank(trained, tmp_path, layout):
    size, groups = LAYOUTS[layout]
    hashes = tmp_path / "hashes"
    hashes.mkdir()
    run(size, train_with_hashes, hashes, "train", str(again(trained, tmp_path)), "--train.groups", str(groups))
    assert_near(tmp_path / "runs", trained / "runs")
    found: dict[str, set[str]] = {}
    ranks: dict[str, int] = {}
    after_event = 0
    for path in hashes.iterdir():
        line = json.loads(path.read_text())
        found.setdefault(line["key"], set()).add(line["hash"])
        ranks[line["key"]] = ranks.get(line["key"], 0) + 1
        after_event += line["resampled"]
    assert set(ranks.values()) == {size // groups}
    assert len(ranks) == 4 * 6, "four times each of two sites with three runs"
    assert after_event > 0, "no hash was taken right after a resampling event"
    assert {key: len(values) for key, values in found.items()} == dict.fromkeys(found, 1)


def train_in_float32(trained: Path, folder: Path, layout: str) -> Path:
    size, groups = LAYOUTS[layout]
    config = again(trained, folder, dtype="float32", learning_rate=2e-3, sweeps=HEALTHY, groups=groups)
    run_gsae(size, ["train", config])
    return folder / "runs"


@pytest.fixture(scope="module")
def in_float32(trained, tmp_path_factory) -> Path:
    """The output of a training in float32 on one rank."""
    return train_in_float32(trained, tmp_path_factory.mktemp("float32"), "1x1")


@pytest.mark.parametrize("layout", ["1x2", "2x1", "2x2", "1x4"])
def test_float32_ends_within_one_percent(trained, in_float32, tmp_path, layout):
    runs = lines(train_in_float32(trained, tmp_path, layout))
    for one, other in zip(lines(in_float32).values(), runs.values(), strict=True):
        last, other_last = ([line for line in each if line["kind"] == "step"][-1] for each in (one, other))
        assert other_last["fvu"] == pytest.approx(last["fvu"], rel=0.01)
        assert other_last["l0"] == pytest.approx(last["l0"], rel=0.01)


HEALTHY = [
    {"objective": "gated", "expansions": [3], "lambdas": {"*": [0.2]}},
    {"objective": "relu", "expansions": [3], "lambdas": {"*": [0.2]}},
]


def one_float32_step(folder: Path, config: str) -> None:
    """A rank that leaves the gradients of the first steps of each run, as they are after the ranks' sum."""
    plain = banks.update
    taken: list[dict[str, torch.Tensor]] = []

    def update(module, optimizer, x, **settings):
        step = optimizer.step

        def note(*args, **words):
            sae = module.module.sae if hasattr(module, "module") else module.sae
            taken.append({name: parameter.grad.detach().clone() for name, parameter in sae.named_parameters()})
            return step(*args, **words)

        optimizer.step = note
        try:
            return plain(module, optimizer, x, **settings)
        finally:
            del optimizer.step

    banks.update = update
    try:
        gsae("train", config)
    finally:
        torch.save(taken[:2], folder / f"{os.environ['RANK']}.pt")


@pytest.mark.parametrize("layout", ["1x2", "1x4"])
def test_a_float32_step_is_within_1e_5_of_the_gradient_s_norm(trained, tmp_path, layout):
    for name in ("1x1", layout):
        folder = tmp_path / name
        folder.mkdir()
        config = again(trained, folder, dtype="float32", total_rows=64, sweeps=HEALTHY, sites=[1])
        run(LAYOUTS[name][0], one_float32_step, folder, str(config))
    (one, *_), wanted = torch.load(tmp_path / layout / "0.pt"), torch.load(tmp_path / "1x1/0.pt")
    assert len(wanted) == 2, "a step of each run"
    for got, expected in zip(torch.load(tmp_path / layout / "0.pt"), wanted, strict=True):
        norm = torch.stack([value.norm() for value in expected.values()]).norm()
        difference = torch.stack([(got[name] - value).norm() for name, value in expected.items()]).norm()
        assert 0 < difference < 1e-5 * norm
    others = torch.load(tmp_path / layout / f"{LAYOUTS[layout][0] - 1}.pt")
    assert all(torch.equal(others[0][name], value) for name, value in one.items()), "ranks sum alike"
