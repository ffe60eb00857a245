"""Each protocol against a server of this host, and one line for each mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fsspec.registry import _registry
from store_servers import google, s3, tls_of_this_host, web

from gsae.cli import main
from gsae.config import Config, CorpusConfig, HarvestConfig
from gsae.errors import ConfigError, StoreError
from gsae.store.opening import open_store
from gsae.store.remote import RETRY_WAITS_SECONDS, MissingError, Remote
from gsae.verify import verify


@pytest.fixture(scope="module")
def home(stores, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home") / "some/store"
    stores.build(home, [[[5, 3], [4, 4]], [[6], [2, 1]]])
    return home


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr("gsae.store.remote.RETRY_WAITS_SECONDS", (0.0,) * 3)


def said(capsys, *words: object) -> str:
    """What a command complains of, in one line."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1, output.err
    return output.err.removeprefix("gsae: ").rstrip()


@pytest.fixture(scope="module")
def bucket(home) -> str:
    """Of S3; the store is in it as `store`."""
    with s3(home.parent, "bucket") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield "s3://bucket"


def test_a_store_on_s3(bucket, home, tmp_path):
    store = open_store(f"{bucket}/store", tmp_path, 1.0)
    assert verify(store).problems == []
    tars = {path.relative_to(store): path.read_bytes() for path in store.glob("*/*.tar")}
    assert tars == {path.relative_to(home): path.read_bytes() for path in home.glob("*/*.tar")}


@pytest.mark.parametrize("place", ["bucket", "bucket/other", "other"])
def test_what_is_not_on_s3_is_said_to_be_missing(bucket, tmp_path, place):
    with pytest.raises(StoreError, match=f"there is no whole store at s3://{place}: manifest.json is missing"):
        open_store(f"s3://{place}", tmp_path, 1.0)
    with pytest.raises(MissingError, match=f"progress/0007.jsonl is missing in s3://{place}; copy the whole store there again"):
        Remote(f"s3://{place}").read("progress/0007.jsonl")


def test_a_file_that_is_read_in_pieces_is_whole(bucket, home, monkeypatch):
    monkeypatch.setattr("gsae.store.remote.CHUNK_BYTES", 1000)
    assert Remote(f"{bucket}/store").read("resid.0/0000-000000.tar") == (home / "resid.0/0000-000000.tar").read_bytes()


def test_a_store_on_googles_storage(home, tmp_path, monkeypatch):
    with google(home, "bucket") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert verify(open_store("gs://bucket", tmp_path, 1.0)).problems == []
        with pytest.raises(MissingError, match=r"progress/0007.jsonl is missing in gs://bucket"):
            Remote("gs://bucket").read("progress/0007.jsonl")


def verify_over_tls(url: str, cache: Path, certificate: Path) -> subprocess.CompletedProcess:
    """In a process of its own: certificates are read when aiohttp is imported."""
    program = "import sys, gsae.store.remote as remote; remote.RETRY_WAITS_SECONDS = (); from gsae.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "verify", url, "--cache", str(cache)]
    return subprocess.run(command, env={"SSL_CERT_FILE": str(certificate)}, capture_output=True, text=True, timeout=120, check=False)


def test_a_store_on_https_whose_certificate_is_trusted(home, tmp_path):
    tls, certificate = tls_of_this_host(tmp_path)
    with web(home, tls) as server:
        done = verify_over_tls(server.url, tmp_path / "cache", certificate)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{server.url}: 1 stores, 0 runs with 0 checkpoints; no problems\n"
        (tmp_path / "empty.pem").write_text("")
        refused = verify_over_tls(server.url, tmp_path / "cache", tmp_path / "empty.pem")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "certificate verify failed" in refused.stderr


def test_a_server_that_fails_twice_is_asked_a_third_time(home, tmp_path):
    tar = "resid.0/0000-000000.tar"
    with web(home) as server:
        server.failures[f"/{tar}"] = 3  # of these, fsspec takes two to learn the size
        assert Remote(server.url).read(tar) == (home / tar).read_bytes()
        assert server.failures[f"/{tar}"] == 0


def test_waits_grow_between_tries(home, monkeypatch):
    waits = []
    monkeypatch.setattr("gsae.store.remote.RETRY_WAITS_SECONDS", RETRY_WAITS_SECONDS)
    monkeypatch.setattr("time.sleep", waits.append)
    with web(home) as server:
        server.status["/manifest.json"] = 500
        with pytest.raises(StoreError, match=r"manifest.json in .* could not be read in 4 tries \(500, .*run the same again"):
            Remote(server.url).read("manifest.json")
    assert waits == sorted(waits)
    assert len(waits) == 3
    assert sum(waits) > 10


@pytest.mark.parametrize("trouble", ["cut_short", "wordless"])
def test_what_is_not_known_to_be_whole_is_not_taken(home, trouble):
    with web(home) as server:
        getattr(server, trouble).add("/manifest.json")
        with pytest.raises(StoreError, match=r"manifest.json in .* could not be read in 4 tries"):
            Remote(server.url).read("manifest.json")


def test_inspect_shows_what_it_shows_of_the_store_itself(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = []
    with web(home) as server:
        for words in ([str(home), "--output", "there"], [server.url, "--cache", "cache"]):
            with pytest.raises(SystemExit) as ended:
                main(["inspect", *words, "--json"])
            assert ended.value.code == 0
            shown.append(json.loads(capsys.readouterr().out))
    assert shown[1].pop("pictures") == ["inspect/norms.png", "inspect/norms.svg"]
    assert (tmp_path / "inspect/norms.png").exists()
    del shown[0]["pictures"]
    assert shown[0] == shown[1]


def test_a_plan_asks_for_nothing(home, pipeline, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, 1))
    with web(home) as server, pytest.raises(SystemExit) as ended:
        main(["plan", str(pipeline), "--json", "--harvest.store", server.url])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert server.requests == []
    assert found["store"]["directory"] == server.url
    assert any("the checkpoints will not fit" in line for line in found["warnings"])
    assert not any("the store will not fit" in line for line in found["warnings"])


@pytest.mark.parametrize(("off_by", "come"), [(100, "{size} of its {told}"), (-100, "more of its {told}")])
def test_a_file_of_another_size_than_was_told_is_not_taken(home, tmp_path, off_by, come):
    size = (home / "manifest.json").stat().st_size
    with web(home) as server, (tmp_path / "copy").open("w+b") as copy:
        server.off_by["/manifest.json"] = off_by
        remote = Remote(server.url)
        assert remote.size("manifest.json") == size + off_by
        with pytest.raises(StoreError, match=come.format(size=size, told=size + off_by)):
            remote.copy("manifest.json", size + off_by, copy)
        assert copy.seek(0, 2) <= size + off_by


def test_files_are_not_packed_on_the_way(home):
    with web(home) as server:
        Remote(server.url).read("manifest.json")
        assert server.encodings == {"identity"}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "there is no whole store at {url}: manifest.json is missing; copy the whole store there again, or correct its URL"),
        (403, "manifest.json in {url} may not be read (403, message='Forbidden'"),
        (401, "manifest.json in {url} may not be read (401, message='Unauthorized'"),
        (503, "manifest.json in {url} could not be read in 4 tries (503, message='Service Unavailable'"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_a_server_refuses_is_one_line(home, tmp_path, capsys, command, status, message):
    with web(home) as server:
        server.status["/manifest.json"] = status
        assert said(capsys, command, server.url, "--cache", tmp_path).startswith(message.format(url=server.url))


def test_a_host_that_cannot_be_reached_is_one_line(home, tmp_path, capsys):
    with web(home) as server:
        url = server.url
    line = said(capsys, "verify", url, "--cache", tmp_path)
    assert line.startswith(f"manifest.json in {url} could not be read in 4 tries (")
    assert "see that the URL is right and can be reached from here" in line


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp"), ("http", "aiohttp")])
def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch, scheme, package):
    monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    line = said(capsys, "verify", f"{scheme}://bucket/store", "--cache", tmp_path)
    assert line == f"{scheme}://bucket/store needs the package {package}, which is not installed; pip install {package}"


BAD_URLS = {
    "pipe:cat store": "begins with pipe:, from which gsae reads nothing; give a directory",
    "ftp://host/store": "begins with ftp:, from which gsae reads nothing",
    "file:///store": "begins with file:, from which gsae reads nothing",
    "s3:/bucket/store": "begins with s3:, from which gsae reads nothing",
    "s3://": "give the URL of a directory, with a host or bucket",
    "https://host/store?key=1": "give the URL of a directory, with a host or bucket and without ? and #",
    "https://me:secret@host/store": "has a user or password in its URL; leave them out",
}


@pytest.mark.parametrize("location", BAD_URLS)
def test_a_url_that_cannot_be_is_refused_before_anything_is_read(tmp_path, capsys, location):
    message = BAD_URLS[location]
    for words in (["verify", location], ["inspect", location], ["verify", location, "--repair"]):
        assert message in said(capsys, *words, "--cache", tmp_path / "cache")
    with pytest.raises(ConfigError) as refused:
        HarvestConfig(store=location)
    assert str(refused.value).startswith("harvest.store ")
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_a_directory_may_have_a_colon_in_its_name():
    assert not HarvestConfig(store="./a:b").is_remote
    assert not HarvestConfig(store="runs/a:b").is_remote
    assert HarvestConfig(store="s3://bucket/a:b").is_remote


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "s3://bucket/cache"}, "harvest.cache is s3://bucket/cache; give a directory of this machine"),
        ({"cache_gigabytes": 0}, "harvest.cache_gigabytes is 0; give a positive number"),
    ],
)
def test_settings_of_the_cache_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        HarvestConfig(**settings)


def test_parts_are_read_in_a_directory():
    with pytest.raises(ConfigError, match=r"corpus.parts is 4, .* give harvest.store a directory, or set corpus.parts to 1"):
        Config(corpus=CorpusConfig(parts=4), harvest=HarvestConfig(store="s3://bucket/store"))


def test_a_url_is_not_repaired(capsys):
    line = said(capsys, "verify", "s3://bucket/store", "--repair")
    assert line == "gsae verify --repair is for directories; repair the store that s3://bucket/store is a copy of, and copy it again"


def test_a_mirror_is_not_repaired(home, tmp_path, capsys):
    with web(home) as server:
        store = open_store(server.url, tmp_path, 1.0)
        line = said(capsys, "verify", store, "--repair")
    assert line.startswith(f"gsae verify --repair is for directories; repair the store that {server.url} is a copy of")


def test_a_harvest_writes_to_a_directory(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("harvest:\n  store: s3://bucket/store\n")
    line = said(capsys, "harvest", tmp_path / "config.yaml")
    assert line.startswith("harvest.store is s3://bucket/store, and a harvest writes to a directory; give one")


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert HarvestConfig().cache_directory == tmp_path / ".cache/gsae/stores"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert HarvestConfig().cache_directory == tmp_path / "elsewhere/gsae/stores"
    assert HarvestConfig(cache="here").cache_directory == Path("here")
