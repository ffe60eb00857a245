"""slurm/env.sh: what wins over what, and the ways to the Python that has gsae."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shell(script: str, *words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """What bash makes of a script that has sourced env.sh and read the words as settings."""
    return subprocess.run(
        ["bash", "-euc", f'source "{ROOT}/slurm/env.sh"; read_settings "$@"; {script}', "-", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "GSAE_SLURM": "", **environment},
    )


def test_words_win_over_the_file_and_a_stage_s_over_all_stages(tmp_path):
    (tmp_path / "our cluster").write_text("# ours\npartition=gpu  # the only one\nnodes=3\nharvest.nodes=5\nmodules=cuda/12.4 gcc/13\n")
    show = 'echo "$stage: $(setting partition) $(setting nodes) $(setting modules) $(setting cpus_per_rank)"'
    script = f'for stage in harvest train; do {show}; done; printf "%s|" "${{given[@]}}" "${{words[@]}}"'
    done = shell(script, "nodes=4", "c d.yaml", "a=b", GSAE_SLURM=str(tmp_path / "our cluster"))
    assert done.stdout.splitlines() == [
        "harvest: gpu 5 cuda/12.4 gcc/13 4",
        "train: gpu 4 cuda/12.4 gcc/13 4",
        "partition=gpu|nodes=3|harvest.nodes=5|modules=cuda/12.4 gcc/13|nodes=4|c d.yaml|a=b|",
    ], done.stderr


def test_a_mistake_in_the_file_names_the_file(tmp_path):
    (tmp_path / "file").write_text("partitoin=gpu\n")
    done = shell("true", "c.yaml", GSAE_SLURM=str(tmp_path / "file"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"gsae: there is no setting partitoin ({tmp_path}/file)")


@pytest.mark.parametrize(
    ("words", "ranks"),
    [((), "1"), (("gpus_per_node=8",), "8"), (("ranks_per_node=3",), "3"), (("gpus_per_node=8", "ranks_per_node=4"), "4")],
)
def test_a_rank_a_gpu_or_as_many_as_are_wanted(words, ranks):
    assert shell("ranks_on_a_node", *words, SLURM_GPUS_ON_NODE="").stdout == ranks


def python_of(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return shell(
        """enter_environment; "${python[@]}" -c 'import os, sys; print(sys.prefix); print(os.uname().nodename)'""", *words, **environment
    )


def test_the_checkout_s_own_environment_is_taken():
    assert python_of().stdout.splitlines()[0] == str(ROOT / ".venv")


def test_another_virtual_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "an env"], check=True)
    assert python_of(f"venv={tmp_path}/an env").stdout.splitlines()[0] == str(tmp_path / "an env")


def test_what_runs_in_a_container_is_started_by_its_command(tmp_path):
    """Namespaces of the kernel, which are what containers are made of."""
    (tmp_path / "inside").write_text('#!/bin/sh\nexec unshare --uts sh -c \'hostname inside && exec "$@"\' - "$@"\n')
    (tmp_path / "inside").chmod(0o755)
    done = python_of(f"container={tmp_path}/inside", PATH=f"{ROOT}/.venv/bin:{os.environ['PATH']}")
    assert done.stdout.splitlines()[1:] == ["inside"], done.stderr


def test_a_setup_file_is_sourced(tmp_path):
    (tmp_path / "setup").write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    assert shell('enter_environment; echo "$NCCL_SOCKET_IFNAME"', f"setup={tmp_path}/setup").stdout == "ib0\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["venv=/nowhere"], "/nowhere/bin/python is not there on"),
        (["modules=cuda"], "modules is 'cuda', but"),
        (["conda=gsae"], "conda is 'gsae', but"),
        (["setup=/nowhere"], "setup is /nowhere, which"),
    ],
)
def test_what_is_not_there_is_one_line(words, message):
    if words == ["modules=cuda"] and Path("/etc/profile.d/modules.sh").exists():
        pytest.skip("this machine has environment modules")
    done = shell("enter_environment", *words, PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
