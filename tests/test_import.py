"""Importing as a user does it, from files written by our own exports or by hand. The libraries' own code is in tests/interop."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from exchange_commands import close, command, mistake
from made_up_run import D_MODEL, FEATURES, MadeUpRun, as_trained, raw_rows
from safetensors.torch import load_file, save_file

import gsae
from gsae.sae.objective import SAE_CLASS


@pytest.fixture
def run(tmp_path) -> Path:
    return MadeUpRun().write(tmp_path / "runs")


@pytest.mark.parametrize("objective", SAE_CLASS)
@pytest.mark.parametrize("target", ["saelens", "dictionary_learning", "jumprelu"])
def test_what_is_exported_and_imported_is_the_same_sae(tmp_path, capsys, objective, target):
    run, x = MadeUpRun(objective).write(tmp_path / "runs"), raw_rows()
    command("export", run, "--to", target)
    assert command("import", run / "exports" / target, tmp_path / "back") == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'back'}\n")
    back = gsae.load_sae(tmp_path / "back")
    close(back.encode(x), as_trained(run, x)[0])
    close(back(x), as_trained(run, x)[1])
    assert {key: back.description[key] for key in ("site", "layer", "module", "context_length")} == {
        "site": "resid.1",
        "layer": 1,
        "module": "model.layers.1",
        "context_length": 128,
    }
    assert back.description["llm"] == {"name": "owner/llama"}
    assert "Not evaluated." in (tmp_path / "back" / "README.md").read_text()


def test_an_import_keeps_decoder_norms_and_an_export_makes_them_1(tmp_path):
    source, x = tmp_path / "theirs", raw_rows()
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {"W_enc": torch.randn(D_MODEL, FEATURES, generator=generator), "W_dec": torch.randn(FEATURES, D_MODEL, generator=generator)}
    weights |= {"b_enc": torch.randn(FEATURES, generator=generator), "b_dec": torch.randn(D_MODEL, generator=generator)}
    save_file(weights, source / "sae_weights.safetensors")
    cfg = {"architecture": "standard", "d_in": D_MODEL, "d_sae": FEATURES, "metadata": {"sae_lens_version": "6.0.0"}}
    (source / "cfg.json").write_text(json.dumps(cfg))
    command("import", source, tmp_path / "ours")
    command("export", tmp_path / "ours", "--to", "saelens", "--output", tmp_path / "unit")
    sae, unit = gsae.load_sae(tmp_path / "ours"), load_file(tmp_path / "unit" / "sae_weights.safetensors")
    f = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    close(sae.encode(x), f)
    norms = weights["W_dec"].norm(dim=1)
    torch.testing.assert_close(unit["W_dec"], weights["W_dec"] / norms[:, None])
    torch.testing.assert_close(unit["W_enc"], weights["W_enc"] * norms)


def test_a_damaged_source_leaves_nothing(run, tmp_path, capsys):
    command("export", run, "--to", "dictionary_learning", "--output", tmp_path / "theirs")
    command("export", run, "--to", "saelens", "--output", tmp_path / "lens")
    (tmp_path / "theirs" / "ae.pt").write_bytes((tmp_path / "theirs" / "ae.pt").read_bytes()[:3000])
    (tmp_path / "lens" / "sae_weights.safetensors").write_bytes(b"1234567890")
    assert "ae.pt: not a plain state dict" in mistake(capsys, "import", tmp_path / "theirs", tmp_path / "out")
    assert "sae_weights.safetensors" in mistake(capsys, "import", tmp_path / "lens", tmp_path / "out")
    (tmp_path / "lens" / "cfg.json").write_text("[]")
    assert "cfg.json: not a JSON object" in mistake(capsys, "import", tmp_path / "lens", tmp_path / "out")
    weights = run / "checkpoints" / "00000100" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "SHA-256 differs" in mistake(capsys, "export", run, "--to", "gsae", "--output", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_code_in_an_archive_is_not_run(run, tmp_path, capsys):
    command("export", run, "--to", "dictionary_learning", "--output", tmp_path / "theirs")
    torch.save({"decoder_bias": Evil(tmp_path / "hacked")}, tmp_path / "theirs" / "ae.pt")
    assert zipfile.is_zipfile(tmp_path / "theirs" / "ae.pt")
    assert "ae.pt: not a plain state dict" in mistake(capsys, "import", tmp_path / "theirs", tmp_path / "out")
    torch.save([torch.zeros(2)], tmp_path / "theirs" / "ae.pt")
    assert "ae.pt: not a state dict of tensors" in mistake(capsys, "import", tmp_path / "theirs", tmp_path / "out")
    assert not (tmp_path / "hacked").exists()


def test_files_of_two_libraries_need_a_word(run, tmp_path, capsys):
    command("export", run, "--to", "saelens", "--output", tmp_path / "both")
    command("export", run, "--to", "dictionary_learning", "--output", tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / "both" / path.name)
    assert "holds files of saelens and dictionary_learning; say which" in mistake(capsys, "import", tmp_path / "both", tmp_path / "out")
    assert command("import", tmp_path / "both", tmp_path / "out", "--from", "saelens") == 0
    assert gsae.load_sae(tmp_path / "out").description["imported_from"]["library"] == "saelens"
