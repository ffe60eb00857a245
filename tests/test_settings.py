import subprocess
import sys
import time
from pathlib import Path

import pytest

from gsae.config import Config, CorpusConfig, TrainConfig
from gsae.errors import ConfigError
from gsae.settings import config_parser, dump_config, read_config

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_survives_being_saved(path, tmp_path):
    config = read_config("train", [str(path)])
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config))
    assert read_config("train", [str(saved)]) == config


def test_the_command_line_wins_over_the_file_which_wins_over_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {batch_rows: 128, learning_rate: 1e-3}\n")
    config = read_config("train", [str(path), "--train.batch_rows", "256", "--corpus.num_lanes=32"])
    assert (config.train.batch_rows, config.train.learning_rate, config.corpus.num_lanes) == (256, 1e-3, 32)
    assert config.train.window_rows == TrainConfig().window_rows


def test_sites_may_be_keys_of_either_type(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {sweeps: [{objective: gated, lambdas: {2: [0.1], middle: [0.2]}}]}\n")
    (sweep,) = read_config("train", [str(path)]).train.sweeps
    assert {str(key): values for key, values in sweep.lambdas.items()} == {"2": [0.1], "middle": [0.2]}


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("train: {batch_rowz: 1}", [], "unknown setting train.batch_rowz in {path}; did you mean train.batch_rows?"),
        ("train: {sweeps: [{objektive: gated}]}", [], "did you mean train.sweeps.objective?"),
        ("lr: 1", [], "unknown setting lr in {path}"),
        ("llm: 3", [], "llm is 3, but it is a section"),
        (
            "output: x",
            ["--train.lerning_rate", "1"],
            "unknown setting train.lerning_rate in the command line; did you mean train.learning_rate?",
        ),
        ("output: x", ["--train.batch_rows", "many"], "train.batch_rows"),
        ("train: {batch_rows: 100}", [], "train.batch_rows (100) is not a multiple of corpus.num_lanes (64); set it to 64 or 128"),
        ("train: {sweeps: [{objective: gatd, lambdas: {'*': [1]}}]}", [], "gated-no-aux"),
        ("train: {sweeps: [{objective: gated}]}", [], "has no lambdas"),
        ("harvest: {contexts_per_shard: 7}", [], "not a whole number of LLM batches"),
        ("train: {resampling: {event_fractions: [0.6]}}", [], "between 0 and 0.5"),
        ("a: [1", [], "is not YAML"),
        ("[1, 2]", [], "holds no settings"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_cure(tmp_path, text, words, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_config("train", [str(path), *words])
    assert message.format(path=path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no/such\.yaml: No such file"):
        read_config("train", ["no/such.yaml"])


def test_values_are_checked_where_they_are_made():
    with pytest.raises(ConfigError, match="held_out_fraction is 2"):
        CorpusConfig(held_out_fraction=2)
    with pytest.raises(ConfigError, match="set it to 128 or 192"):
        Config(train=TrainConfig(batch_rows=130))


def test_help_shows_every_field_and_its_meaning():
    text = " ".join(config_parser("train").format_help().split())
    for words in (
        "--train.batch_rows",
        "Rows of one step, over all ranks",
        "default: 4096",
        "--lambdas",
        "--corpus.num_lanes",
        "--llm.random.d_model",
    ):
        assert words in text


def test_help_is_quick_and_imports_no_torch():
    script = (
        "import sys; from gsae.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    again = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, capture_output=True)
    assert again - started < time.monotonic() - again, "help took longer than importing torch does"
