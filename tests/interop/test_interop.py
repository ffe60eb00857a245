"""The real sae_lens and dictionary_learning: they load what we export, we import what they save. Run by launch/test_interop.sh."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config, write_text
from made_up_run import D_MODEL, FEATURES, MadeUpRun, as_trained, raw_rows
from ranks import run_gsae
from untrained import write_run

import gsae
from gsae.errors import CheckpointError
from gsae.exchange.export import run_export
from gsae.exchange.importing import run_import
from gsae.sae.objective import SAE_CLASS
from gsae.store import manifest

WHERE = "bash launch/test_interop.sh runs this with the real packages"
sae_lens = pytest.importorskip("sae_lens", reason=WHERE)
dictionary_learning = pytest.importorskip("dictionary_learning", reason=WHERE)

TOLERANCE = 1e-5
"""Largest difference, relative to the largest value."""


def assert_same(ours, theirs):
    assert theirs.shape == ours.shape
    distance = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert distance < TOLERANCE, f"{distance:.2e}"


def card_code(directory: Path) -> dict:
    """What the names in the card's code are after it ran in the directory."""
    before, names = Path.cwd(), {}
    os.chdir(directory)
    try:
        exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], names)
    finally:
        os.chdir(before)
    return names


@pytest.mark.parametrize("objective", SAE_CLASS)
@pytest.mark.parametrize("target", ["saelens", "jumprelu", "dictionary_learning"])
def test_they_load_what_we_export(tmp_path, objective, target):
    run, x = MadeUpRun(objective).write(tmp_path / "runs"), raw_rows()
    assert 50 < x.norm(dim=1).mean() < 200
    directory = run_export(str(run), target).directory
    theirs = card_code(directory)["sae"]
    f, x_hat = as_trained(run, x)
    assert 0.02 < (f > 0).double().mean() < 0.9
    with torch.no_grad():
        assert_same(f, theirs.encode(x))
        assert_same(x_hat, theirs(x))
        assert torch.equal(theirs.encode(x) > 0, f > 0)
        assert_same(theirs.encode(x), gsae.load_sae(run).encode(x))


@pytest.mark.parametrize("target", ["saelens", "jumprelu"])
def test_saelens_sees_where_the_sae_belongs(tmp_path, target):
    run = MadeUpRun().write(tmp_path / "runs")
    sae = sae_lens.SAE.load_from_disk(run_export(str(run), target).directory)
    assert sae.cfg.architecture() == {"saelens": "gated"}.get(target, target)
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.context_size) == ("owner/llama", "blocks.1.hook_resid_post", 128)
    assert metadata.prepend_bos is True
    assert metadata.sae_lens_training_version is None
    assert metadata.gsae["mask"]["max_norm"] == 512.25
    assert metadata.gsae["lambda"] == 0.17
    assert sae.get_name() == f"sae_owner/llama_blocks.1.hook_resid_post_{FEATURES}"
    folded = sae_lens.SAE.load_from_disk(run_export(str(run), target, output=tmp_path / "again").directory, fold_W_dec_norm=True)
    assert_same(folded.encode(raw_rows()), sae.encode(raw_rows()))  # directions have norm 1 already


def test_dictionary_learning_s_own_loader_finds_the_class(tmp_path):
    run = MadeUpRun("relu").write(tmp_path / "runs")
    directory = run_export(str(run), "dictionary_learning").directory
    from dictionary_learning.utils import load_dictionary

    dictionary, config = load_dictionary(str(directory), "cpu")
    assert_same(as_trained(run, raw_rows())[0], dictionary.encode(raw_rows()))
    assert (config["trainer"]["lm_name"], config["trainer"]["layer"], config["buffer"]["ctx_len"]) == ("owner/llama", 1, 128)


def randomise(module):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(20 * drawn.abs() if name == "threshold" else 0.3 * drawn if name == "r_mag" else drawn)
    return module


@pytest.mark.parametrize("architecture", ["gated", "standard", "jumprelu"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_we_import_what_saelens_saves(tmp_path, architecture, subtracts):
    kind, config = sae_lens.registry.get_sae_class(architecture)
    theirs, x = randomise(kind(config(d_in=D_MODEL, d_sae=FEATURES, apply_b_dec_to_input=subtracts))), raw_rows()
    theirs.save_model(tmp_path / "theirs")
    run_import(tmp_path / "theirs", tmp_path / "ours", None)
    ours = gsae.load_sae(tmp_path / "ours")
    assert 0.02 < (theirs.encode(x) > 0).float().mean() < 0.9
    with torch.no_grad():
        assert_same(ours.encode(x), theirs.encode(x))
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["GatedAutoEncoder", "AutoEncoder"])
def test_we_import_what_dictionary_learning_saves(tmp_path, name):
    """As its train_sae saves it: torch.save of the state dict, and the trainer's own config."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.standard import StandardTrainer

    trainer_class = {"GatedAutoEncoder": GatedSAETrainer, "AutoEncoder": StandardTrainer}[name]
    settings = {"activation_dim": D_MODEL, "dict_size": FEATURES, "layer": 3, "lm_name": "owner/llama", "device": "cpu"}
    settings["submodule_name"] = "resid_post_layer_3"
    trainer = trainer_class(steps=20_000, dict_class=getattr(dictionary_learning, name), **settings)
    theirs, x = randomise(trainer.ae), raw_rows()
    (tmp_path / "theirs").mkdir()
    torch.save({key: value.cpu() for key, value in theirs.state_dict().items()}, tmp_path / "theirs" / "ae.pt")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    run_import(tmp_path / "theirs", tmp_path / "ours", None)
    ours = gsae.load_sae(tmp_path / "ours")
    assert ours.description["site"] == "resid.3"
    assert 0.02 < (theirs.encode(x) > 0).float().mean() < 0.9
    with torch.no_grad():
        assert_same(ours.encode(x), theirs.encode(x))
        assert_same(ours(x), theirs(x))


def test_what_saelens_cannot_give_exactly_is_refused(tmp_path):
    kind, config = sae_lens.registry.get_sae_class("topk")
    kind(config(d_in=D_MODEL, d_sae=FEATURES, k=3)).save_model(tmp_path / "topk")
    kind, config = sae_lens.registry.get_sae_class("standard")
    kind(config(d_in=D_MODEL, d_sae=FEATURES, normalize_activations="layer_norm")).save_model(tmp_path / "normalised")
    for name, message in (("topk", "architecture 'topk'"), ("normalised", "normalize_activations 'layer_norm'")):
        with pytest.raises(CheckpointError, match=message):
            run_import(tmp_path / name, tmp_path / "ours", None)
    assert not (tmp_path / "ours").exists()


def test_their_saes_are_evaluated_beside_ours(tmp_path):
    """Saved by their own code, in the same table on the same rows."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    write_text(tmp_path / "text", num_documents=60)
    config = write_config(tmp_path / "config.yaml", small_settings(tmp_path))
    run_gsae(1, ["harvest", config])
    write_run(tmp_path / "runs", manifest.load(tmp_path / "runs/store"), "resid.1", "gated", seed=0)
    kind, settings = sae_lens.registry.get_sae_class("gated")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post")
    randomise(kind(settings(d_in=16, d_sae=32, metadata=metadata))).save_model(tmp_path / "theirs")
    names = {"layer": 1, "lm_name": "owner/llama", "submodule_name": "resid_post_layer_1", "device": "cpu"}
    trainer = GatedSAETrainer(steps=20_000, activation_dim=16, dict_size=32, **names)
    (tmp_path / "theirs too").mkdir()
    torch.save(randomise(trainer.ae).state_dict(), tmp_path / "theirs too" / "ae.pt")
    (tmp_path / "theirs too" / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    run_gsae(2, ["evaluate", config, "--sae", tmp_path / "theirs", "--sae", tmp_path / "theirs too"])
    found = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs/resid.1").rglob("results.json")}
    assert set(found) == {"gated-m32-l0.1-s0", "saelens-theirs", "dictionary_learning-theirs-too"}
    assert len({json.dumps(results["counts"]) for results in found.values()}) == 1
    assert len({results["metrics"]["ce_zero"] for results in found.values()}) == 1
    assert len({results["metrics"]["fvu"] for results in found.values()}) == 3
