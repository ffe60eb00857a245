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
    assert {key: back.description[key] for key in ("site", "layer", "context_length")} == {
        "site": "resid.1",
        "layer": 1,
        "context_length": 128,
    }
    assert "module" not in back.description  # what the LLM calls the layer is not known
    assert back.description["llm"] == {"name": "owner/llama"}
    assert "Not evaluated." in (tmp_path / "back" / "README.md").read_text()


def changed(run, target, directory, *changes):
    """An export of the run whose config has other values at dotted names."""
    command("export", run, "--to", target, "--output", directory)
    path = directory / ("cfg.json" if target == "saelens" else "config.json")
    config = json.loads(path.read_text())
    for name, value in changes:
        *parents, last = name.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("target", "change", "site"),
    [
        ("saelens", ("metadata.hook_name", "blocks.8.hook_resid_post"), "resid.8"),
        ("saelens", ("metadata.hook_name", "blocks.8.hook_resid_pre"), None),
        ("saelens", ("metadata.hook_name", None), None),
        ("dictionary_learning", ("trainer.submodule_name", "resid_post_layer_1"), "resid.1"),
        ("dictionary_learning", ("trainer.submodule_name", "resid_post_layer_3"), None),  # the layer says 1
        ("dictionary_learning", ("trainer.submodule_name", "mlp_out_layer_1"), None),
        ("dictionary_learning", ("trainer.submodule_name", None), None),
    ],
)
def test_a_site_is_named_only_where_it_is_ours_and_no_module(run, tmp_path, target, change, site):
    assert command("import", changed(run, target, tmp_path / "theirs", change), tmp_path / "out") == 0
    description = gsae.load_sae(tmp_path / "out").description
    assert description.get("site") == site
    assert description.get("layer") == (None if site is None else int(site.removeprefix("resid.")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.layers" not in card
    assert (f"| site | `{site}`, the residual stream after layer {site[6:]} |" in card) if site else "| site |" not in card


@pytest.mark.parametrize("path", ["/home/alice/run/ae.pt", "~/run", "C:\\Users\\alice\\run", "file:///home/alice", "--out=/home/alice -v"])
def test_no_absolute_path_is_kept(run, tmp_path, path):
    names = ["checkpoint_path", "metadata.gsae.deep", "metadata.dataset_path"]
    theirs = changed(run, "saelens", tmp_path / "theirs", *((name, [{"at": path, "dir": "a/b", "n": 1 / 2}, path]) for name in names))
    assert command("import", theirs, tmp_path / "out") == 0
    config = gsae.load_sae(tmp_path / "out").description["imported_from"]["config"]
    assert config["checkpoint_path"] == config["metadata"]["gsae"]["deep"] == [{"dir": "a/b", "n": 0.5}]
    assert not any("alice" in file.read_text() for file in (tmp_path / "out" / "sae.json", tmp_path / "out" / "README.md"))
    theirs = changed(run, "saelens", tmp_path / "again", ("url", "https://hf.co/alice"), ("metadata.model_name", path + "/llama"))
    assert command("import", theirs, tmp_path / "second") == 0
    description = gsae.load_sae(tmp_path / "second").description
    assert description["imported_from"]["config"]["url"] == "https://hf.co/alice"
    assert description["llm"] == {"name": "llama"}


def test_an_import_with_nan_in_its_config_can_be_exported(run, tmp_path):
    theirs = changed(run, "saelens", tmp_path / "theirs", ("lr", float("nan")), ("metadata.loss", [float("inf"), 2.0]))
    assert command("import", theirs, tmp_path / "out") == 0
    assert command("export", tmp_path / "out", "--to", "saelens", "--output", tmp_path / "back") == 0
    assert gsae.load_sae(tmp_path / "out").description["imported_from"]["config"]["metadata"]["loss"] == [2.0]


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("saelens", ("architecture", ["gated"]), "theirs: architecture is ['gated'], not a text; fetch it again"),
        ("saelens", ("d_in", 16.0), "d_in is 16.0, not a whole number above 0"),
        ("saelens", ("d_sae", True), "d_sae is True, not a whole number above 0"),
        ("saelens", ("apply_b_dec_to_input", "false"), "apply_b_dec_to_input is 'false', not true or false"),
        ("saelens", ("metadata", "x"), "metadata is 'x', not an object"),
        ("saelens", ("metadata.model_name", ["gpt2"]), "model_name is ['gpt2'], not a text"),
        ("saelens", ("metadata.context_size", "128"), "context_size is '128', not a whole number"),
        ("dictionary_learning", ("trainer", None), "trainer is None, not an object"),
        ("dictionary_learning", ("buffer", ["a"]), "buffer is ['a'], not an object"),
        ("dictionary_learning", ("trainer.dict_class", ["AutoEncoder"]), "dict_class is ['AutoEncoder'], not a text"),
        ("dictionary_learning", ("trainer.layer", True), "layer is True, not a whole number"),
        ("dictionary_learning", ("trainer.lm_name", {"a": 1}), "lm_name is {'a': 1}, not a text"),
        ("dictionary_learning", ("buffer.ctx_len", -1), "ctx_len is -1, not a whole number"),
    ],
)
def test_a_config_of_other_types_is_one_line(run, tmp_path, capsys, target, change, message):
    theirs = changed(run, target, tmp_path / "theirs", change)
    assert message in mistake(capsys, "import", theirs, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to_sparse(), "theirs: tensor gate_bias is not plain floating point"),
        (lambda tensor: tensor.to(torch.int64), "theirs: tensor gate_bias is not plain floating point"),
        (lambda tensor: tensor.to(torch.complex64), "theirs: tensor gate_bias is not plain floating point"),
        (lambda tensor: tensor.to("meta"), "theirs: tensor gate_bias is not plain floating point"),
        (lambda tensor: tensor / 0 * 0, "theirs: tensor gate_bias holds NaN or infinite values"),
        (lambda tensor: tensor.abs() / 0, "theirs: tensor gate_bias holds NaN or infinite values"),
    ],
)
def test_weights_that_are_no_weights_are_refused(run, tmp_path, capsys, change, message):
    command("export", run, "--to", "dictionary_learning", "--output", tmp_path / "theirs")
    path = tmp_path / "theirs" / "ae.pt"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "gate_bias": change(tensors["gate_bias"])}, path)
    assert message in mistake(capsys, "import", tmp_path / "theirs", tmp_path / "out")
    torch.save({**tensors, 5: tensors["gate_bias"]}, path)
    assert "not a state dict of tensors" in mistake(capsys, "import", tmp_path / "theirs", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_import_is_stored_in_a_type_that_holds_all_its_tensors(run, tmp_path, dtype):
    command("export", run, "--to", "dictionary_learning", "--output", tmp_path / "theirs")
    path = tmp_path / "theirs" / "ae.pt"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "mag_bias": tensors["mag_bias"].to(dtype)}, path)
    assert command("import", tmp_path / "theirs", tmp_path / "out") == 0
    assert gsae.load_sae(tmp_path / "out").b_enc.dtype == torch.promote_types(dtype, torch.float32)


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
