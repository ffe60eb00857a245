"""SAEs from elsewhere, evaluated by the command line beside our runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config, write_text
from ranks import run_gsae
from untrained import write_run

from gsae.errors import CheckpointError, ConfigError
from gsae.exchange.export import run_export
from gsae.exchange.guest import add_guest
from gsae.report.runs import read_runs
from gsae.sae.formats import save_sae
from gsae.sae.objective import build
from gsae.store import manifest

TARGETS = ("gsae", "saelens", "jumprelu", "dictionary_learning")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A folder with config, store, a gated and a plain run, and copies of each in every format, all evaluated."""
    folder = tmp_path_factory.mktemp("guests")
    write_text(folder / "text", num_documents=60)
    config = write_config(folder / "config.yaml", small_settings(folder))
    run_gsae(1, ["harvest", config])
    store = manifest.load(folder / "runs/store")
    words = []
    for objective in ("relu", "gated"):
        run = write_run(folder / "runs", store, "resid.1", objective, seed=0)
        shutil.copytree(run, folder / "elsewhere" / f"{objective}-run")
        words += ["--sae", folder / "elsewhere" / f"{objective}-run"]
        for target in TARGETS:
            if (objective, target) != ("relu", "jumprelu"):
                words += ["--sae", run_export(str(run), target, output=folder / "exported" / f"{objective}-{target}").directory]
    run_gsae(2, ["evaluate", config, *words, "--site", "resid.1"])
    return folder


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("objective", ["relu", "gated"])
def test_a_copy_in_any_format_has_the_numbers_of_the_run(pipeline, objective):
    runs = pipeline / "runs/resid.1"
    ours = results_of(runs / f"{objective}-m32-l0.1-s0")
    guests = [
        path
        for path in runs.iterdir()
        if path.name.startswith(("gsae-", "saelens-", "dictionary_learning-")) and f"-{objective}-" in path.name
    ]
    assert len(guests) == (5 if objective == "gated" else 4)
    for guest in guests:
        found = results_of(guest)
        for name, value in ours["metrics"].items():
            if (
                name in ("dead_fraction", "dead_rows", "mse_scaled")
                or "gate" in name
                or (name.startswith("encoder") and "jumprelu" in guest.name)
            ):
                continue
            assert found["metrics"][name] == pytest.approx(value, rel=1e-4), (guest.name, name)
        for part in ("counts", "checks", "comparability"):
            assert found[part] == ours[part]


def test_a_guest_is_not_made_again(pipeline):
    runs, config = pipeline / "runs/resid.1", pipeline / "config.yaml"
    guest = runs / "saelens-gated-saelens"
    before = {path: path.stat().st_mtime_ns for path in guest.rglob("*")}
    said = run_gsae(1, ["evaluate", config, "--sae", pipeline / "exported/gated-saelens"])
    assert "all 11 runs" in said
    assert {path: path.stat().st_mtime_ns for path in guest.rglob("*")} == before


def test_the_report_has_guests_in_the_same_table(pipeline, tmp_path):
    runs = {run.name: run for run in read_runs([pipeline / "runs"])}
    guest = runs["dictionary_learning-relu-dictionary_learning"]
    assert (guest.state, guest.library, guest.lambda_, guest.series) == (
        "from elsewhere",
        "dictionary_learning",
        None,
        "relu of dictionary_learning",
    )
    run_gsae(1, ["report", pipeline / "runs", "--output", tmp_path / "report"])
    assert "dictionary_learning-relu-dictionary_learning" in (tmp_path / "report" / "report.html").read_text()


def test_a_guest_of_another_width_or_place_is_refused(pipeline, tmp_path):
    store = manifest.load(pipeline / "runs/store")
    for name, d_model in (("wide", 32), ("homeless", 16)):
        save_sae(tmp_path / name, build("relu", d_model, 8, 0), {"objective": "relu"})
    with pytest.raises(ConfigError, match=r"homeless does not say which layer it belongs to; give --site, one of resid\.1, "):
        add_guest(str(tmp_path / "homeless"), None, tmp_path / "runs", store)
    with pytest.raises(ConfigError, match=r"homeless belongs to resid\.9, the config's store has resid\.1, "):
        add_guest(str(tmp_path / "homeless"), "resid.9", tmp_path / "runs", store)
    with pytest.raises(ConfigError, match="wide has d_model 32, the LLM of the config 16"):
        add_guest(str(tmp_path / "wide"), "resid.1", tmp_path / "runs", store)
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        add_guest(str(tmp_path / "nowhere" / "nowhere"), "resid.1", tmp_path / "runs", store)
    assert not (tmp_path / "runs").exists()


def test_another_sae_under_a_guests_name_is_refused(pipeline, tmp_path):
    store = manifest.load(pipeline / "runs/store")
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)
        sae = build("relu", 16, 8, seed)
        with torch.no_grad():
            sae.b_enc.fill_(seed)
        save_sae(tmp_path / "mine", sae, {"objective": "relu", "site": "resid.1", "scale": 0.5})
        if seed == 0:
            add_guest(str(tmp_path / "mine"), None, tmp_path / "runs", store)
    with pytest.raises(ConfigError, match=r"gsae-mine holds another SAE; give this one another name"):
        add_guest(str(tmp_path / "mine"), None, tmp_path / "runs", store)
