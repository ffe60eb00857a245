import subprocess
import sys

import pytest

from gsae.cli import STAGES, main


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code)


def test_the_overview_names_every_command(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_command_has_help(stage, capsys):
    assert run(stage, "--help") == 0
    assert "usage: gsae" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'"),
        (["train"], "no config given"),
        (["train", "no.yaml"], "no.yaml: No such file"),
        (["report", "--colour", "x"], "gsae report cannot use --colour"),
        (["report", "/nowhere"], "/nowhere"),
        (["verify", "/nowhere"], "/nowhere holds neither"),
        (["export", "/nowhere", "--to", "gsae"], "/nowhere: no such directory"),
        (["import", "/nowhere"], "gsae import: the following arguments are required: OUTPUT"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(words, message, capsys):
    assert run(*words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("gsae: ")
    assert shown.count("\n") == 1


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gsae", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gsae 0.")
