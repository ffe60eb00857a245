"""Mirrors of a store on a web server of this host: what is fetched, what goes, and what killed and concurrent processes do to them."""

import errno
import hashlib
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import mirror_readers
import pytest
from ranks import started
from store_servers import web

from gsae.errors import ConfigError, StoreError
from gsae.store import mirror as mirrors
from gsae.store.mirror import Mirror, open_stored
from gsae.store.opening import open_store
from gsae.store.progress import read_records
from gsae.store.shards import map_tar, read_documents, read_tar, tar_path

TARS = [f"{site}/{lane:04d}-{shard:06d}.tar" for site in ("resid.0", "resid.2") for lane in range(2) for shard in range(2)]
A, B, C, D = TARS[:4]
TAR_BYTES = 10_240


@pytest.fixture(scope="module")
def home(stores, tmp_path_factory) -> Path:
    """The store that the server has: eight tars of the same size."""
    home = tmp_path_factory.mktemp("home") / "store"
    stores.build(home, [[[5, 3], [4, 4]], [[6, 1], [2, 1]]])
    assert {(home / name).stat().st_size for name in TARS} == {TAR_BYTES}
    return home


@pytest.fixture
def server(home):
    with web(home) as server:
        yield server


def mirror_with_room(server, folder: Path, num_tars: float) -> Mirror:
    room = int(num_tars * TAR_BYTES)
    return Mirror(open_store(server.url, folder / "cache", room / 10**9), server.url, room)


def tars_of(mirror: Mirror) -> list[str]:
    return sorted(path.relative_to(mirror.directory).as_posix() for path in mirror.directory.glob("*/*.tar"))


def partials_of(mirror: Mirror) -> list[Path]:
    return list(mirror.directory.rglob("*.partial"))


def size_of(mirror: Mirror) -> int:
    """Of its tars, whole and partial, at one moment."""
    with mirror.locked():
        return sum(path.stat().st_size for path in mirror.directory.glob("*/*.tar*"))


def in_time(condition, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(condition())


@contextmanager
def half_fetched(server, mirror: Mirror, name: str):
    """A process that has half of a tar, and gets the rest when the server is told."""
    server.until = threading.Event()
    with started(1, mirror_readers.fetch, str(mirror.directory), mirror.url, mirror.max_bytes, name) as ranks:
        assert in_time(lambda: f"/{name}" in server.requests and partials_of(mirror)), ranks.output()
        yield ranks


def test_what_is_read_is_what_is_there(server, home, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    for lane in range(2):
        records = read_records(mirror.directory, lane)
        assert [record.to_json() for record in records] == [record.to_json() for record in read_records(home, lane)]
        for record in records:
            for site, described in record.sites.items():
                ours, theirs = (tar_path(store, site, lane, record.shard) for store in (mirror.directory, home))
                assert ours.exists() is False
                mapped = map_tar(ours, described.tar, "float32", 4, verify=True)
                assert all(a.has_same_bytes(b) for a, b in zip(mapped, map_tar(theirs, described.tar, "float32", 4), strict=True))
                assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("read", ["map_tar", "read_tar", "read_documents"])
def test_a_tar_that_is_gone_is_brought_again(server, home, tmp_path, read):
    mirror = mirror_with_room(server, tmp_path, 1)
    tar = read_records(mirror.directory, 0)[0].sites["resid.0"].tar
    ways = {
        "map_tar": lambda path: [encoded.x.tolist() for encoded in map_tar(path, tar, "float32", 4)],
        "read_tar": lambda path: [member.rows.x.tolist() for member in read_tar(path)],
        "read_documents": lambda path: read_documents(path, tar, 0, tar.rows).tolist(),
    }
    wanted = ways[read](home / A)
    for _ in range(2):
        assert ways[read](mirror.directory / A) == wanted
        mirror.fetch(mirror.directory / B)
        assert tars_of(mirror) == [B]


def test_a_file_is_fetched_once(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    for _ in range(3):
        mirror.fetch(mirror.directory / A)
        read_records(mirror.directory, 1)
    assert server.requests.count(f"/{A}") == 1
    assert server.requests.count("/progress/0001.jsonl") == 1


def test_the_least_recently_used_tar_goes(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 3.9)
    for name in (A, B, C):
        mirror.fetch(mirror.directory / name)
    open_stored(mirror.directory / A).close()
    mirror.fetch(mirror.directory / D)
    assert tars_of(mirror) == sorted([A, C, D])
    mirror.fetch(mirror.directory / B)
    assert tars_of(mirror) == sorted([A, B, D])


def test_being_used_does_not_make_a_tar_look_changed(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 3)
    with mirror.open(mirror.directory / A) as file:
        before = os.fstat(file.fileno())
        time.sleep(0.02)
        mirror.fetch(mirror.directory / A)
        after = os.fstat(file.fileno())
    assert (after.st_mtime_ns, after.st_ino, after.st_size) == (before.st_mtime_ns, before.st_ino, before.st_size)
    assert after.st_atime_ns > before.st_atime_ns


def test_a_tar_that_is_open_stays_readable_when_it_goes(server, home, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 1)
    with mirror.open(mirror.directory / A) as file:
        mirror.fetch(mirror.directory / B)
        assert tars_of(mirror) == [B]
        assert file.read() == (home / A).read_bytes()


@pytest.mark.parametrize(("num_tars", "passes"), [(1, 2), (3, 8)])
def test_processes_that_share_a_mirror_never_exceed_its_room(server, home, tmp_path, num_tars, passes):
    mirror = mirror_with_room(server, tmp_path, num_tars)
    names = {name: hashlib.sha256((home / name).read_bytes()).hexdigest() for name in TARS}
    arguments = (server.url, str(tmp_path / "cache"), mirror.max_bytes, names, passes)
    largest = 0
    with started(2, mirror_readers.read_tars, *arguments) as ranks:
        while any(process.is_alive() for process in ranks.processes):
            largest = max(largest, size_of(mirror))
            time.sleep(0.002)
        assert ranks.wait() == [0, 0], ranks.output(0) + ranks.output(1)
    assert TAR_BYTES <= largest <= num_tars * TAR_BYTES
    assert partials_of(mirror) == []
    assert len([path for path in server.requests if path.endswith(".tar")]) > len(TARS)


def test_what_another_process_is_bringing_is_waited_for(server, home, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    with half_fetched(server, mirror, A) as first:
        thread = threading.Thread(target=mirror.fetch, args=(mirror.directory / A,), daemon=True)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        assert not (mirror.directory / A).exists()
        server.until.set()
        thread.join(20)
        assert first.wait(20) == [0]
    assert (mirror.directory / A).read_bytes() == (home / A).read_bytes()
    assert server.requests.count(f"/{A}") == 1


def test_what_is_on_its_way_keeps_its_room(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 1.5)
    with half_fetched(server, mirror, A) as first:
        thread = threading.Thread(target=mirror.fetch, args=(mirror.directory / B,), daemon=True)
        thread.start()
        time.sleep(0.3)
        assert f"/{B}" not in server.requests
        assert size_of(mirror) == TAR_BYTES
        server.until.set()
        assert first.wait(20) == [0]
        thread.join(20)
    assert tars_of(mirror) == [B]


def test_a_killed_process_leaves_no_tar_and_takes_no_room(server, home, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 1)
    with half_fetched(server, mirror, A) as ranks:
        assert size_of(mirror) == TAR_BYTES
        ranks.kill()
        assert tars_of(mirror) == []
        assert len(partials_of(mirror)) == 1
        server.until.set()
        with started(1, mirror_readers.fetch, str(mirror.directory), server.url, mirror.max_bytes, B) as other:
            assert other.wait(20) == [0], other.output()
    assert partials_of(mirror) == []
    assert tars_of(mirror) == [B]
    with mirror.open(mirror.directory / A) as file:
        assert file.read() == (home / A).read_bytes()


def test_what_was_on_its_way_when_the_store_changed_is_not_taken(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    with half_fetched(server, mirror, A) as ranks:
        with mirror.locked():
            mirror.empty()
        server.until.set()
        assert ranks.wait(20) == [0], ranks.output()
    assert server.requests.count(f"/{A}") == 2
    assert tars_of(mirror) == [A]


def test_a_missing_shard_is_named(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    server.status[f"/{C}"] = 404
    with pytest.raises(StoreError, match=rf"shard {C} is missing in {server.url}; copy the whole store there again"):
        mirror.fetch(mirror.directory / C)
    assert partials_of(mirror) == []


def test_a_tar_that_comes_cut_off_is_not_taken(server, tmp_path, monkeypatch):
    monkeypatch.setattr("gsae.store.remote.RETRY_WAITS_SECONDS", (0.0,) * 3)
    mirror = mirror_with_room(server, tmp_path, 8)
    server.cut_short.add(f"/{A}")
    with pytest.raises(StoreError, match=f"shard {A} in {server.url} could not be read in 4 tries"):
        mirror.fetch(mirror.directory / A)
    assert tars_of(mirror) == []
    assert partials_of(mirror) == []


def test_a_tar_larger_than_the_room_names_the_setting(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 0.9)
    with pytest.raises(StoreError, match=f"shard {A} .* has 10240 bytes, and all tars may take 9216; raise harvest.cache_gigabytes"):
        mirror.fetch(mirror.directory / A)


def test_only_files_of_a_store_are_asked_for(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    for name in ("../x/0000-000000.tar", "resid.0/../../x.tar", "parts.json", "resid.0/x.tar", ".ssh/0000-000000.tar"):
        with pytest.raises(StoreError, match="which no store has"):
            mirror.fetch(mirror.directory / name)
    assert set(server.requests) == {"/manifest.json", "/identity.json"}


def test_a_tar_that_is_not_that_of_the_log_is_brought_again(server, home, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    tar = read_records(mirror.directory, 0)[0].sites["resid.0"].tar
    for damaged in (b"\1" * TAR_BYTES, b"\1" * 100):
        (mirror.directory / A).parent.mkdir(exist_ok=True)
        (mirror.directory / A).write_bytes(damaged)
        with pytest.raises(StoreError, match=A):
            map_tar(mirror.directory / A, tar, "float32", 4, verify=True)
        map_tar(mirror.directory / A, tar, "float32", 4, verify=True)


def test_a_full_disk_is_told_apart_from_a_failing_server(server, tmp_path, monkeypatch):
    mirror = mirror_with_room(server, tmp_path, 8)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gsae.store.remote.Remote._copy", full)
    with pytest.raises(StoreError, match=r"does not fit on the disk of .* lower harvest.cache_gigabytes, or put harvest.cache"):
        mirror.fetch(mirror.directory / A)
    assert partials_of(mirror) == []


def test_a_file_system_without_locks_is_named(server, tmp_path, monkeypatch):
    mirror = mirror_with_room(server, tmp_path, 8)

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ConfigError, match=r"harvest.cache: the file system of .* has no file locks"):
        mirror.fetch(mirror.directory / A)


def test_a_mirror_of_another_version_is_refused(server, tmp_path):
    mirror = mirror_with_room(server, tmp_path, 8)
    (mirror.directory / mirrors.REMOTE_FILE).write_text('{"format": 2}')
    with pytest.raises(StoreError, match="has format 2, this version of gsae reads 1; delete"):
        open_stored(mirror.directory / A)


def test_a_store_in_a_directory_is_no_mirror(home, tmp_path):
    shutil.copytree(home, tmp_path / "store")
    (tmp_path / "store" / A).unlink()
    with pytest.raises(FileNotFoundError):
        open_stored(tmp_path / "store" / A)
