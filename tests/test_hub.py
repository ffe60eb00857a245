"""The Hugging Face hub, played by a small server: pushed, loaded from there, and each way it can refuse. Each client is a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Hub, Repository, running_hub
from made_up_run import MadeUpRun, as_trained, raw_rows

NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens
LOAD = """
import sys, torch, gsae
from gsae.errors import GsaeError
try:
    sae = gsae.load_sae(sys.argv[1])
    torch.save({"x_hat": sae(torch.load("x.pt")), "description": sae.description}, "answer.pt")
except GsaeError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def run(tmp_path) -> Path:
    torch.save(raw_rows(), tmp_path / "x.pt")
    return MadeUpRun().write(tmp_path / "runs")


@pytest.fixture
def client(tmp_path):
    """A process in tmp_path with a hub cache of its own; the environment says which hub."""

    def start(*words, endpoint: str, token: str | None = None) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False)

    return start


def push(client, run, name, *words, endpoint, token=TOKEN):
    return client("-m", "gsae", "export", run, "--to", "gsae", "--push", name, *words, endpoint=endpoint, token=token)


def test_what_is_pushed_is_loaded_from_there(hub: Hub, run, client, tmp_path):
    done = push(client, run, "alice/sae", endpoint=hub.address)
    local = run / "exports" / "gsae"
    assert (done.returncode, done.stdout) == (0, f"{local}\n{hub.address}/alice/sae\n"), done.stderr
    there = hub.repositories["alice/sae"]
    assert there.files == {path.name: path.read_bytes() for path in local.iterdir()}
    assert not there.private
    assert 'gsae.load_sae("alice/sae")' in there.files["README.md"].decode()

    there.files["extra.bin"] = b"not needed"
    before = len(hub.requests)
    assert client("-c", LOAD, "alice/sae", endpoint=hub.address).returncode == 0
    answer = torch.load(tmp_path / "answer.pt")
    torch.testing.assert_close(answer["x_hat"].double(), as_trained(run, raw_rows())[1], rtol=1e-5, atol=1e-3)
    assert answer["description"]["site"] == "resid.1"
    fetched = [request for request in hub.requests[before:] if "resolve" in request]
    assert {request.rpartition("/")[2] for request in fetched} == {"sae.json", "sae.safetensors"}

    assert client("-c", LOAD, "alice/sae", endpoint=NOBODY).returncode == 0  # from the cache
    wrong = client("-c", LOAD, "alice/sae@v9", endpoint=hub.address)
    assert wrong.stderr == f"'v9' is no branch, tag or commit of {hub.address}/alice/sae; check what follows the @\n"


def test_a_revision_is_what_was_pushed_then(hub: Hub, run, client, tmp_path):
    for step in ("00000090", "00000100"):
        assert push(client, run / "checkpoints" / step, "alice/steps", "--output", step, endpoint=hub.address).returncode == 0
    old = next(commit for commit, files in hub.repositories["alice/steps"].older.items() if files)
    for name, step in (("alice/steps", 100), (f"alice/steps@{old}", 90)):
        assert client("-c", LOAD, name, endpoint=hub.address).returncode == 0
        answer = torch.load(tmp_path / "answer.pt")
        torch.testing.assert_close(answer["x_hat"].double(), as_trained(run, raw_rows(), step)[1], rtol=1e-5, atol=1e-3)


def test_private_is_private_or_nothing_is_pushed(hub: Hub, run, client):
    assert push(client, run, "alice/secret", "--private", endpoint=hub.address).returncode == 0
    assert hub.repositories["alice/secret"].private
    assert push(client, run, "alice/open", "--output", "open", endpoint=hub.address).returncode == 0
    before = dict(hub.repositories["alice/open"].files)
    done = push(client, run, "alice/open", "--output", "other", "--private", endpoint=hub.address)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"gsae: {hub.address}/alice/open is there already and public: nothing was pushed; choose another name (other stays)\n"
    )
    assert hub.repositories["alice/open"].files == before


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("alice/other", None, "does not know you: log in with `hf auth login` or set HF_TOKEN"),
        ("bob/sae", TOKEN, "you may not write {hub}/bob/sae: use a token that may, or another name"),
    ],
)
def test_a_push_that_is_refused_keeps_the_export(hub: Hub, run, client, name, token, message):
    done = push(client, run, name, endpoint=hub.address, token=token)
    local = run / "exports" / "gsae"
    assert done.returncode == 2
    assert message.format(hub=hub.address) in done.stderr
    assert done.stderr.endswith(f"; {local} stays, `hf upload {name} {local}` pushes it later\n")
    assert done.stderr.count("\n") == 1
    assert len(list(local.iterdir())) == 3


def test_without_a_hub_a_push_and_a_download_are_one_line(run, client):
    done = push(client, run, "alice/sae", endpoint=NOBODY)
    assert done.returncode == 2
    assert f"gsae: {NOBODY}/alice/sae could not be written (ConnectError: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert (run / "exports" / "gsae" / "sae.json").exists()
    missing = client("-c", LOAD, "alice/unseen", endpoint=NOBODY)
    assert missing.returncode == 1
    assert f"'alice/unseen' is no directory here and could not be fetched from {NOBODY}/alice/unseen (ConnectError: " in missing.stderr
    assert missing.stderr.count("\n") == 1


def test_a_repository_that_is_not_there_or_not_ours_is_one_line(hub: Hub, client, tmp_path):
    done = client("-m", "gsae", "export", "alice/nothing", "--to", "saelens", "--output", "out", endpoint=hub.address)
    assert done.returncode == 2
    assert "'alice/nothing' is no directory here and no public repository at" in done.stderr
    hub.repositories["alice/theirs"] = Repository(private=False, files={"cfg.json": b"{}", "sae_weights.safetensors": b""})
    done = client("-c", LOAD, "alice/theirs", endpoint=hub.address)
    assert done.stderr.startswith("alice/theirs on the hub holds no sae.json; fetch it with `hf download alice/theirs`")
    assert not (tmp_path / "out").exists()
