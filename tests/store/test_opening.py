"""Opening a store at a URL: always what is there now, one store at a time, and only a whole one."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from store_servers import web

from gsae.config import Config, HarvestConfig
from gsae.errors import ConfigError, StoreError
from gsae.store.manifest import load
from gsae.store.mirror import mirror_of
from gsae.store.opening import open_store, store_of
from gsae.store.progress import progress_path, read_records
from gsae.store.shards import read_tar
from gsae.verify import verify

TAR = "resid.0/0000-000000.tar"
LANES = [[[5, 3], [4, 4]], [[6, 1], [2, 1]]]


@pytest.fixture
def home(stores, tmp_path) -> Path:
    stores.build(tmp_path / "home", LANES)
    return tmp_path / "home"


@pytest.fixture
def server(home):
    with web(home) as server:
        yield server


def opened(server, tmp_path: Path, gigabytes: float = 1.0) -> Path:
    return open_store(server.url, tmp_path / "cache", gigabytes)


def rebuild(stores, home: Path) -> None:
    """Another store of the same settings, with tars of the same size."""
    shutil.rmtree(home)
    stores.build(home, [LANES[0], [[5, 1], [2, 1]]])


def test_a_directory_is_returned_as_it_is():
    assert open_store("runs/my store", Path("/nowhere"), 1.0) == Path("runs/my store")
    assert store_of(Config(output="runs/x")) == Path("runs/x/store")


def test_the_config_says_where_the_files_go(server, tmp_path):
    store = store_of(Config(harvest=HarvestConfig(store=f"{server.url}/", cache=str(tmp_path / "here"), cache_gigabytes=0.5)))
    mirror = mirror_of(store)
    assert store.parent == tmp_path / "here"
    assert mirror is not None
    assert (mirror.url, mirror.max_bytes) == (server.url, 500_000_000)


def test_the_manifest_is_that_of_the_store(server, home, tmp_path):
    assert load(opened(server, tmp_path)).fingerprint == load(home).fingerprint
    assert not any(path.endswith(".tar") for path in server.requests)


def test_what_is_there_is_kept_when_the_store_is_the_same(server, tmp_path):
    mirror_of(opened(server, tmp_path)).fetch(opened(server, tmp_path) / TAR)
    store = opened(server, tmp_path)
    mirror_of(store).fetch(store / TAR)
    assert server.requests.count(f"/{TAR}") == 1
    assert server.requests.count("/manifest.json") == 3


def test_nothing_is_kept_of_a_store_that_was_made_anew(stores, server, home, tmp_path):
    store, tar = opened(server, tmp_path), "resid.0/0001-000000.tar"
    before = load(store)
    read_records(store, 1)
    mirror_of(store).fetch(store / tar)
    old_size = (store / tar).stat().st_size
    rebuild(stores, home)
    assert opened(server, tmp_path) == store
    assert not (store / tar).exists()
    assert load(store).sites["resid.0"].rows == before.sites["resid.0"].rows - 1
    assert [record.contexts for record in read_records(store, 1)] == [2, 2]
    assert [len(member.rows.x) for member in read_tar(store / tar)] == [5, 1]
    assert (store / tar).stat().st_size == old_size


def test_a_log_that_was_mended_is_fetched_again(server, home, tmp_path):
    good = progress_path(home, 1).read_bytes()
    progress_path(home, 1).write_bytes(good[: len(good) // 2])
    assert len(read_records(opened(server, tmp_path), 1)) == 1
    progress_path(home, 1).write_bytes(good)
    assert len(read_records(opened(server, tmp_path), 1)) == 2


def test_less_room_is_made_at_once(server, tmp_path):
    store = opened(server, tmp_path)
    for shard in range(2):
        mirror_of(store).fetch(store / f"resid.0/0000-00000{shard}.tar")
    opened(server, tmp_path, gigabytes=15_000 / 10**9)
    assert [path.name for path in store.glob("*/*.tar")] == ["0000-000001.tar"]
    assert mirror_of(store).max_bytes == 15_000


def test_stores_of_two_urls_do_not_meet(home, tmp_path):
    shutil.copytree(home, tmp_path / "homes/a")
    shutil.copytree(home, tmp_path / "homes/b")
    with web(tmp_path / "homes") as server:
        stores = {open_store(f"{server.url}/{name}", tmp_path / "cache", 1.0) for name in ("a", "b", "b/")}
    assert len(stores) == 2


def change(home: Path, name: str, **values) -> None:
    (home / name).write_text(json.dumps({**json.loads((home / name).read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda home: (home / "manifest.json").unlink(), "there is no whole store at http.*: manifest.json is missing; copy"),
        (lambda home: (home / "identity.json").unlink(), "no identity.json: it is a store in parts, .* or not whole"),
        (lambda home: (home / "manifest.json").write_text("<html>"), "manifest.json in http.* is not one of gsae's"),
        (lambda home: (home / "manifest.json").write_text("[]"), "manifest.json in http.* is not one of gsae's"),
        (lambda home: change(home, "manifest.json", lanes=[]), "manifest.json in http.* was changed"),
        (lambda home: change(home, "identity.json", fingerprint="0"), "is of another store than identity.json"),
    ],
    ids=["no manifest", "no identity", "a web page", "other JSON", "changed", "two stores"],
)
def test_what_is_no_whole_store_is_refused(server, home, tmp_path, spoil, message):
    spoil(home)
    with pytest.raises(StoreError, match=message):
        opened(server, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"harvest.cache is .*, which cannot be written"):
        opened(server, tmp_path)


def test_verify_reads_every_file_of_the_store(server, home, tmp_path):
    assert verify(opened(server, tmp_path, gigabytes=11_000 / 10**9)).problems == []
    wanted = {f"/{path.relative_to(home).as_posix()}" for path in home.rglob("*") if path.is_file()}
    assert set(server.requests) == wanted


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda home: (home / TAR).unlink(), "shard resid.0/0000-000000.tar is missing in http"),
        (lambda home: (home / TAR).write_bytes(b"\0" * 10_240), "shard resid.0/0000-000000.tar: its SHA-256 differs"),
        (lambda home: (home / "calibration.json").unlink(), "calibration.json: missing"),
        (lambda home: progress_path(home, 1).unlink(), "progress/0001.jsonl: missing"),
    ],
    ids=["no tar", "another tar", "no calibration", "no log"],
)
def test_verify_finds_what_is_wrong_there(server, home, tmp_path, spoil, problem):
    spoil(home)
    problems = verify(opened(server, tmp_path)).problems
    assert len(problems) == 1
    assert problem in problems[0]


def test_verify_says_nothing_of_files_on_their_way(server, tmp_path):
    store = opened(server, tmp_path)
    (store / "resid.0").mkdir()
    with (store / "resid.0/0001-000009.tar.host.7.0.partial").open("wb") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)
        assert verify(store).problems == []
    assert len(list(store.rglob("*.partial"))) == 1
