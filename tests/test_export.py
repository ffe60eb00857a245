"""Loading, exporting and importing as a user does it. Other libraries' own code is in tests/interop, the hub in test_hub.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from exchange_commands import close, command, mistake
from made_up_run import D_MODEL, FEATURES, SCALE, MadeUpRun, as_trained, raw_rows
from ranks import run_gsae

import gsae
from gsae.cli import main
from gsae.errors import CheckpointError
from gsae.sae.formats import read_sae, save_sae
from gsae.sae.objective import SAE_CLASS
from gsae.store.runs import newest_checkpoint

TARGETS = ("gsae", "saelens", "dictionary_learning", "jumprelu")
FILES = {
    "gsae": {"sae.safetensors", "sae.json", "README.md"},
    "saelens": {"sae_weights.safetensors", "cfg.json", "README.md"},
    "jumprelu": {"sae_weights.safetensors", "cfg.json", "README.md"},
    "dictionary_learning": {"ae.pt", "config.json", "README.md"},
}


@pytest.fixture
def run(tmp_path) -> Path:
    return MadeUpRun().write(tmp_path / "runs")


def test_importing_gsae_does_not_import_torch():
    code = "import sys, gsae, gsae.cli; assert 'torch' not in sys.modules; gsae.load_sae; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_sea'"):
        gsae.load_sea  # noqa: B018


@pytest.mark.parametrize("objective", SAE_CLASS)
def test_a_run_and_each_of_its_checkpoints_can_be_loaded(tmp_path, objective):
    run, x = MadeUpRun(objective).write(tmp_path / "runs"), raw_rows()
    for path, step in ((run, 100), (str(run), 100), (run / "checkpoints" / "00000090", 90)):
        sae = gsae.load_sae(path)
        f, x_hat = as_trained(run, x, step)
        close(sae.encode(x), f)
        close(sae(x), x_hat)
        assert sae.description["step"] == step
    assert gsae.load_sae(run, dtype=torch.float64).encode(x).dtype == torch.float64


def test_a_run_tells_what_it_knows_and_no_path(run):
    description = gsae.load_sae(run).description
    known = {"site": "resid.1", "layer": 1, "module": "model.layers.1", "objective": "gated", "lambda": 0.17, "rows": 51200}
    known |= {"llm": {"name": "owner/llama", "revision": "abc123"}, "context_length": 128, "scale": 1.0, "training_scale": SCALE}
    known |= {"text": {"format": "text", "name": "pages.txt"}}
    known |= {"mask": {"position_0": "dropped", "special_tokens": "dropped", "outlier_multiple": 3.0, "max_norm": 512.25}}
    assert description.items() >= known.items()
    assert description["results"]["metrics"]["fvu"] == 0.25
    assert "secret" not in json.dumps(description)


def test_results_of_other_weights_and_another_store_are_left_out(tmp_path):
    run = MadeUpRun().write(tmp_path / "runs")
    assert "results" not in gsae.load_sae(run / "checkpoints" / "00000090").description
    manifest = tmp_path / "runs" / "store" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": "other"}))
    description = gsae.load_sae(run).description
    assert description["mask"] == {"position_0": "dropped", "special_tokens": "dropped", "outlier_multiple": 3.0}
    assert description["context_length"] == 32  # the config's
    assert description["llm"]["revision"] == "abc123"  # the evaluation's


def test_a_checkpoint_alone_is_enough(run, tmp_path):
    alone = (run / "checkpoints" / "00000100").rename(tmp_path / "alone")
    sae = gsae.load_sae(alone)
    assert repr(sae) == f"FoldedSAE(resid.1, gated, d_model={D_MODEL}, num_features={FEATURES}, dtype=torch.float32)"
    assert sae.description["training_scale"] == SCALE


@pytest.mark.parametrize("objective", SAE_CLASS)
@pytest.mark.parametrize("target", TARGETS)
def test_an_export_is_whole_and_the_same_each_time(tmp_path, capsys, objective, target):
    run = MadeUpRun(objective).write(tmp_path / "runs")
    assert command("export", run, "--to", target) == 0
    made = run / "exports" / target
    assert capsys.readouterr().out == f"{made}\n"
    assert {path.name for path in made.iterdir()} == FILES[target]
    assert command("export", run / "checkpoints" / "00000100", "--to", target, "--output", tmp_path / "again" / "other") == 0
    assert all(path.read_bytes() == (tmp_path / "again" / "other" / path.name).read_bytes() for path in made.iterdir())
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("objective", SAE_CLASS)
def test_the_published_form_does_what_the_run_does(tmp_path, objective):
    run, x = MadeUpRun(objective).write(tmp_path / "runs"), raw_rows()
    command("export", run, "--to", "gsae", "--output", tmp_path / "published")
    sae, published = gsae.load_sae(run), gsae.load_sae(tmp_path / "published")
    assert published.description == sae.description
    assert json.loads((tmp_path / "published" / "sae.json").read_text())["scale"] == 1.0
    close(published.encode(x), sae.encode(x))
    stored = read_sae(tmp_path / "published").sae
    assert stored.W_dec.dtype == torch.float32
    torch.testing.assert_close(stored.W_dec.norm(dim=1), torch.ones(FEATURES))
    close(stored.encode(x), sae.encode(x))  # with the scale in the weights, as they are
    command("export", tmp_path / "published", "--to", "gsae", "--output", tmp_path / "twice")
    close(gsae.load_sae(tmp_path / "twice")(x), as_trained(run, x)[1])


def test_the_archive_of_dictionary_learning_holds_tensors_only(run):
    command("export", run, "--to", "dictionary_learning")
    tensors = torch.load(run / "exports" / "dictionary_learning" / "ae.pt", weights_only=True)
    assert set(tensors) == {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"}
    assert all(value.dtype == torch.float32 for value in tensors.values())
    torch.testing.assert_close(tensors["decoder.weight"].norm(dim=0), torch.ones(FEATURES))


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("target", TARGETS)
def test_the_card_says_what_it_is(run, target):
    command("export", run, "--to", target)
    card = (run / "exports" / target / "README.md").read_text()
    front = front_matter(card)
    assert front["license"] == "unknown"
    assert front["library_name"] == {"jumprelu": "saelens"}.get(target, target)
    assert front["base_model"] == "owner/llama"
    assert "gated-sae" in front["tags"]
    for words in ("resid.1 of owner/llama", "`gated`, lambda 0.17", "51,200 rows", "model.layers.1", "commit abc123", "128 tokens"):
        assert words in card
    for words in ("no row at position 0", "3.0 times the site's median (512.2)", "12,281 kept rows of 25 held-out documents", "bfloat16"):
        assert words in card
    assert "| l0 | 40.5 | 39.6 to 41.4 | features on |" in card
    assert r"| fvu | 0.25 |  | sum \|x - x_hat\|^2 / sum \|x - mean\|^2 |" in card
    for name in ("loss_recovered", "delta_ce", "ce_clean", "ce_spliced", "ce_zero", "ce_mean"):
        assert f"| {name} |" in card
    assert "secret" not in card
    assert "{{" not in card


def test_the_card_and_the_description_tell_of_pre_activation_loss(tmp_path):
    run = MadeUpRun(pre_activation_loss=0.03125).write(tmp_path / "runs")
    command("export", run, "--to", "gsae")
    card = (run / "exports" / "gsae" / "README.md").read_text()
    assert "Trained with gsae as `gated` with pre-activation loss (weight 0.03125), lambda 0.17" in card
    assert "| objective | `gated`, with pre-activation loss (weight 0.03125) |" in card
    assert gsae.load_sae(run / "exports" / "gsae").description["pre_activation_loss"] == 0.03125
    plain = MadeUpRun(pre_activation_loss=0.0).write(tmp_path / "plain")
    command("export", plain, "--to", "gsae")
    assert "pre-activation loss" not in (plain / "exports" / "gsae" / "README.md").read_text()


def test_the_card_of_a_run_without_results_says_so(tmp_path):
    run = MadeUpRun("relu", is_evaluated=False, has_store=False).write(tmp_path / "runs")
    command("export", run, "--to", "gsae")
    card = (run / "exports" / "gsae" / "README.md").read_text()
    assert "Not evaluated." in card
    assert "base_model" not in front_matter(card)
    assert card.startswith("---\n")
    assert "# Plain sparse autoencoder of resid.1 of llama" in card


def test_the_card_s_code_loads_it(run, monkeypatch):
    command("export", run, "--to", "gsae")
    monkeypatch.chdir(run / "exports" / "gsae")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], names)
    close(names["sae"](raw_rows()), as_trained(run, raw_rows())[1])


def test_an_output_that_is_there_is_refused_and_left_alone(run, tmp_path, capsys):
    taken, empty = tmp_path / "taken", tmp_path / "empty"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    empty.mkdir()
    assert "taken is there already; give another directory" in mistake(capsys, "export", run, "--to", "gsae", "--output", taken)
    command("export", run, "--to", "saelens", "--output", tmp_path / "theirs")
    assert "taken is there already" in mistake(capsys, "import", tmp_path / "theirs", taken)
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    assert command("import", tmp_path / "theirs", empty) == 0


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("gsae.exchange.export.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["export", str(run), "--to", "saelens", "--output", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_directory_beside_the_output_is_left_alone(run, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    assert command("export", run, "--to", "gsae", "--output", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES["gsae"]
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out", "out.partial"}
    assert (tmp_path / "out.partial" / "mine").exists()


def test_the_directory_one_is_in_and_a_link_are_filled(run, tmp_path, monkeypatch, capsys):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "here")
    assert command("export", run, "--to", "saelens", "--output", ".") == 0
    assert {path.name for path in Path().iterdir()} == FILES["saelens"]  # still the directory one is in
    assert command("export", run, "--to", "gsae", "--output", tmp_path / "link") == 0
    assert {path.name for path in (tmp_path / "there").iterdir()} == FILES["gsae"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert command("import", tmp_path / "here", ".") == 0
    assert gsae.load_sae(".").d_model == D_MODEL
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "here").stat().st_mode
    assert command("export", run, "--to", "gsae", "--output", tmp_path / "new") == 0
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "empty").stat().st_mode


@pytest.mark.parametrize("output", ["file/out", "file/deep/out", "a" * 300, "loop"])
def test_an_output_that_cannot_be_made_is_one_line(run, tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    assert "cannot be written (" in mistake(capsys, "export", run, "--to", "gsae", "--output", output)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop", "runs"}


def test_an_export_of_a_hub_s_repository_without_an_output_is_refused_before_it_is_fetched(capsys, monkeypatch):
    monkeypatch.setattr("gsae.exchange.hub.download", lambda *_: 1 / 0)
    assert "owner/name is no directory here, and an export of the hub's needs" in mistake(capsys, "export", "owner/name", "--to", "gsae")


def test_weights_that_are_not_finite_are_refused(run, tmp_path, capsys):
    command("export", run, "--to", "gsae", "--output", tmp_path / "ours")
    saved = read_sae(tmp_path / "ours")
    with torch.no_grad():
        saved.sae.b_dec[0] = float("nan")
    save_sae(tmp_path / "ours", saved.sae, saved.description)
    with pytest.raises(CheckpointError, match="ours: tensor b_dec holds NaN or infinite values"):
        gsae.load_sae(tmp_path / "ours")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export"], "gsae export: the following arguments are required: RUN, --to"),
        (["export", "x", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["export", "x", "--to", "gsae", "--privat"], "unrecognized arguments: --privat"),
        (["export", "no/such/run", "--to", "gsae"], "no/such/run: no such directory; give a run"),
        (["export", "x", "--to", "gsae", "--push", "name"], "--push 'name' is not a repository's name; give OWNER/NAME"),
        (["export", "x", "--to", "gsae", "--private"], "--private says how to make a repository"),
        (["import", "x"], "gsae import: the following arguments are required: OUTPUT"),
        (["import", "no/such/directory", "out"], "no/such/directory holds no sae_weights.safetensors (saelens) or ae.pt"),
        (["import", "no/such/directory", "out", "--from", "saelens"], "cfg.json: No such file"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_sae_is_told_apart(run, tmp_path, capsys):
    assert f"it holds 1 runs: give one of them, such as {run}" in mistake(capsys, "export", tmp_path / "runs", "--to", "gsae")
    command("export", run, "--to", "saelens", "--output", tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"theirs holds no sae.json; it is saelens's: make it ours with `gsae import"):
        gsae.load_sae(tmp_path / "theirs")
    command("export", run, "--to", "gsae", "--output", tmp_path / "ours")
    said = mistake(capsys, "export", tmp_path / "ours", "--to", "saelens")
    assert "ours belongs to no run here; say where the export goes with --output" in said
    assert "sae.json is a file; give the directory" in mistake(capsys, "export", tmp_path / "ours" / "sae.json", "--to", "saelens")
    empty = MadeUpRun(steps=(), is_evaluated=False, layer=2).write(tmp_path / "runs")
    assert "has no checkpoint yet" in mistake(capsys, "export", empty, "--to", "gsae")


def test_what_the_stages_write_is_what_an_export_reads(pipeline, tmp_path):
    """Harvested, trained and evaluated for real, small."""
    settings = yaml.safe_load(pipeline.read_text())
    settings["train"] |= {"total_rows": 1280, "sweeps": settings["train"]["sweeps"][:1], "sites": [1], "dtype": "float32"}
    pipeline.write_text(yaml.safe_dump(settings))
    for stage in ("harvest", "train", "evaluate"):
        run_gsae(1, [stage, pipeline])
    (run,) = (tmp_path / "runs" / "resid.1").iterdir()
    sae, x = gsae.load_sae(run), raw_rows()
    trained = read_sae(newest_checkpoint(run).path)
    close(sae(x), trained.sae(x * trained.description["scale"]) / trained.description["scale"])
    known = sae.description
    assert (known["llm"]["name"], known["context_length"], known["mask"]["outlier_multiple"]) == ("random", 32, 3.0)
    assert known["mask"]["max_norm"] > 0
    assert known["results"]["metrics"]["ce_zero"] is not None
    command("export", run, "--to", "gsae")
    card = (run / "exports" / "gsae" / "README.md").read_text()
    assert "| ce_zero |" in card
    assert gsae.load_sae(run / "exports" / "gsae").description == known
    assert str(tmp_path) not in card + (run / "exports" / "gsae" / "sae.json").read_text()
