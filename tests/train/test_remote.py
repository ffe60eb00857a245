"""Training from a store at a URL: the same weights as from the directory, with less room here than the store has."""

import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from store_servers import web
from trained_runs import again, assert_equal

from gsae.store.shards import tar_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text")
    settings = small_settings(folder)
    settings["harvest"] |= {"sites": [1], "contexts_per_shard": 4, "store": str(folder / "store")}
    settings["train"] |= {"total_rows": 12_800, "window_rows": 256}
    config = write_config(folder / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    run_gsae(2, ["train", config])
    return folder


def from_url(trained: Path, folder: Path, url: str, cache_gigabytes: float) -> Path:
    config = again(trained, folder)
    settings = yaml.safe_load(config.read_text())
    settings["harvest"] |= {"store": url, "cache": str(folder / "cache"), "cache_gigabytes": cache_gigabytes}
    return write_config(config, settings)


def tar_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.tar*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # gone since
    return total


def test_two_ranks_train_from_a_url_what_they_train_from_a_directory(trained, tmp_path):
    tars = list((trained / "store").rglob("*.tar"))
    room = 9 * max(path.stat().st_size for path in tars)  # two ranks read four lanes each at once, at most
    assert room < sum(path.stat().st_size for path in tars)
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most.append(tar_bytes(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with web(trained / "store") as server:
        run_gsae(2, ["train", from_url(trained, tmp_path, server.url, room / 1e9)])
        assert len([path for path in server.requests if path.endswith(".tar")]) > len(tars), "nothing had to go"
    over.set()
    watcher.join()
    assert 0 < max(most) <= room
    assert_equal(tmp_path / "runs", trained / "runs")


def test_a_shard_that_is_gone_from_the_server_ends_all_ranks_with_its_name(trained, tmp_path):
    room = 9 * max(path.stat().st_size for path in (trained / "store").rglob("*.tar"))
    lost = tar_path(trained / "store", "resid.1", 3, 1)
    with web(trained / "store") as server:
        config = from_url(trained, tmp_path, server.url, room / 1e9)
        server.status[f"/{lost.relative_to(trained / 'store')}"] = 404
        began = time.monotonic()
        with started(2, gsae, "train", str(config)) as ranks:
            assert ranks.wait(90) == [2, 2]
            shown = [line for rank in (0, 1) for line in ranks.output(rank).splitlines() if line.startswith("gsae: ")]
    assert len(shown) == 1
    assert "shard resid.1/0003-000001.tar is missing in http://127.0.0.1" in shown[0]
    assert time.monotonic() - began < 80
