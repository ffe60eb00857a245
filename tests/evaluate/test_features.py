"""Top activations: against loops over everything, and on real ranks."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config, write_text
from ranks import run_gsae
from untrained import write_run

from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.errors import CheckpointError, ConfigError
from gsae.evaluate.features import Wanted, choose_features, choose_runs
from gsae.evaluate.results import find_trained_runs
from gsae.evaluate.strongest import Peak, Strongest, merge
from gsae.llm.load import load
from gsae.llm.unembedding import direct_logits
from gsae.store import manifest


def random_batch(seed: int, contexts: int = 6, length: int = 9, features: int = 4):
    """Activations with many ties and zeros, a mask, and two segments a context."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randint(0, 5, (contexts, length, features), generator=generator).float()
    f[:, :, 3] = 0
    kept = torch.rand(contexts, length, generator=generator) < 0.8
    positions = torch.cat([torch.arange(4), torch.arange(length - 4)]).expand(contexts, length)
    return f, kept, positions


def slow_peaks(batches, count: int, window: int) -> list[list[Peak]]:
    found = [[] for _ in range(4)]
    context = 0
    for f, kept, positions in batches:
        for row in range(len(f)):
            for feature in range(4):
                there = [(f[row, t, feature].item(), -t) for t in range(f.shape[1]) if kept[row, t] and f[row, t, feature] > 0]
                if there:
                    value, column = max(there)[0], -max(there)[1]
                    around = []
                    for t in range(column - window, column + window + 1):
                        same = 0 <= t < f.shape[1] and kept[row, t] and t - positions[row, t] == column - positions[row, column]
                        around.append(f[row, t, feature].item() if same else None)
                    found[feature].append(Peak(value, context, column, tuple(around)))
            context += 1
    return [sorted(peaks, key=lambda peak: (-peak.activation, peak.context))[:count] for peaks in found]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_strongest_contexts_are_those_of_a_slow_search(ranks):
    batches = [random_batch(seed) for seed in range(5)]
    parts = [Strongest(4, 3, 2) for _ in range(ranks)]
    for number, batch in enumerate(batches):
        parts[number % ranks].add(*batch, first_context=6 * number)
    found = merge([part.peaks for part in parts], 3)
    assert found == slow_peaks(batches, 3, 2)
    assert found[3] == []
    assert any(peak.activation == found[0][0].activation for peak in found[0][1:])  # ties


def test_direct_logits_by_hand():
    shape = RandomLlamaConfig(num_layers=1, d_model=16, num_heads=2)
    llm = load(LLMConfig(model="random", dtype="float32", random=shape), torch.device("cpu"))
    gain = torch.linspace(0.5, 2, 16)
    with torch.no_grad():
        llm.model.model.norm.weight.copy_(gain)
    directions = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    found = direct_logits(llm.model, directions)
    for row in range(3):
        wanted = [sum((directions[row] * gain * word).tolist()) for word in llm.model.lm_head.weight.detach()[:]]
        assert found[row].tolist() == pytest.approx([value - sum(wanted) / len(wanted) for value in wanted], abs=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with config, store and three runs, one of them evaluated."""
    folder = tmp_path_factory.mktemp("features")
    write_text(folder / "text", num_documents=60)
    config = write_config(folder / "config.yaml", small_settings(folder))
    run_gsae(1, ["harvest", config])
    store = manifest.load(folder / "runs/store")
    write_run(folder / "runs", store, "resid.1", "gated", seed=0)
    run_gsae(1, ["evaluate", config])
    write_run(folder / "runs", store, "resid.2", "relu", seed=0)
    write_run(folder / "runs", store, "resid.1", "relu", seed=0)
    return folder


def take_features(folder: Path) -> dict[str, dict]:
    """What was found, by run; the files are removed."""
    found = {}
    for path in sorted((folder / "runs").rglob("features.json")):
        found[str(path.parent.relative_to(folder / "runs"))] = json.loads(path.read_text())
        path.unlink()
    return found


def test_features_do_not_depend_on_the_number_of_ranks(whole):
    found = []
    for size in (1, 2):
        said = run_gsae(size, ["features", whole / "config.yaml", "--random", "5", "--top", "4", "--window", "3"])
        found.append(take_features(whole))
    assert found[0] == found[1]
    assert set(found[0]) == {"resid.1/gated-m32-l0.1-s0", "resid.1/relu-m32-l0.1-s0", "resid.2/relu-m32-l0.1-s0"}
    assert "strongest on held-out text" in said
    for described in found[0].values():
        assert len(described["features"]) == 5
        for feature in described["features"]:
            assert len(feature["promoted"]) == len(feature["suppressed"]) == 4
            activations = [context["activation"] for context in feature["contexts"]]
            assert activations == sorted(activations, reverse=True)
            for context in feature["contexts"]:
                assert context["tokens"][context["peak"]]["activation"] == context["activation"] > 0
                assert all(each["activation"] is None or each["activation"] <= context["activation"] for each in context["tokens"])
                assert len(context["tokens"]) <= 7
    assert all(feature["density"] > 0 for feature in found[0]["resid.1/gated-m32-l0.1-s0"]["features"])
    assert all(feature["density"] is None for feature in found[0]["resid.2/relu-m32-l0.1-s0"]["features"])


def test_the_run_and_the_features_that_are_asked_for(whole):
    run_gsae(1, ["features", whole / "config.yaml", "--run", "resid.2/relu-m32-l0.1-s0", "--features", "7,3,7", "--top", "2"])
    (described,) = take_features(whole).values()
    assert [feature["feature"] for feature in described["features"]] == [7, 3]
    assert all(len(feature["contexts"]) <= 2 for feature in described["features"])


def test_what_is_not_there_is_refused(whole):
    runs = find_trained_runs(whole / "runs", manifest.load(whole / "runs/store"))
    with pytest.raises(ConfigError, match=r"has no feature 32; give numbers from 0 to 31"):
        choose_features(runs[0], Wanted(features=(3, 32)), 0)
    with pytest.raises(CheckpointError, match=r"there is no run nobody, only resid\.1/gated-m32-l0\.1-s0, "):
        choose_runs(runs, Wanted(runs=("nobody",)))
    assert [run.name for run in choose_runs(runs, Wanted(runs=(str(runs[1].directory),)))] == [runs[1].name]
    assert len(choose_runs(runs, Wanted(runs=("relu-m32-l0.1-s0",)))) == 2


def test_random_features_are_among_those_seen(whole):
    runs = {run.name: run for run in find_trained_runs(whole / "runs", manifest.load(whole / "runs/store"))}
    chosen = choose_features(runs["resid.1/gated-m32-l0.1-s0"], Wanted(random=32), 0)
    results = json.loads((whole / "runs/resid.1/gated-m32-l0.1-s0/results.json").read_text())
    assert len(chosen) == round(32 * (1 - results["metrics"]["not_seen_fraction"]))
    few = [choose_features(runs["resid.2/relu-m32-l0.1-s0"], Wanted(random=8), seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
