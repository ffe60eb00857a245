"""A store in parts on the disk: what is used up goes, and is never read as whole."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from in_parts import begin, copied, fail_with, part_stores
from ranks import run_gsae

from gsae.errors import StoreError
from gsae.store import manifest
from gsae.store.parts import Used, remove_used, rows_of_visit, write_used
from gsae.verify import verify


@pytest.fixture(scope="module")
def waiting(tmp_path_factory) -> Path:
    """A folder in which two parts have been harvested and nothing trained."""
    folder = tmp_path_factory.mktemp("waiting")
    run_gsae(1, ["harvest", begin(folder)])
    return folder


def test_a_store_that_is_half_removed_is_not_whole_and_goes_at_the_next_start(waiting, tmp_path, monkeypatch):
    copied(waiting, tmp_path)
    store = tmp_path / "runs/store"
    write_used(store, Used(1))

    def remove_some(directory: Path, **how: object) -> None:
        next(directory.glob("resid.1/*.tar")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("gsae.store.parts.shutil.rmtree", remove_some)
        with pytest.raises(KeyboardInterrupt):
            remove_used(store)
    assert (store / "part-0000/identity.json").exists()
    with pytest.raises(StoreError, match="not whole"):
        manifest.load(store / "part-0000")
    assert verify(tmp_path / "runs").problems == []
    assert rows_of_visit(store, 0, "resid.1") > 0
    remove_used(store)
    assert part_stores(tmp_path) == ["part-0001"]


def test_harvest_and_training_may_remove_a_part_at_once(waiting, tmp_path):
    copied(waiting, tmp_path)
    store = tmp_path / "runs/store"
    write_used(store, Used(1))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove_used, [store] * 8))
    assert part_stores(tmp_path) == ["part-0001"]
    assert rows_of_visit(store, 0, "resid.1") > 0


def test_inspect_says_that_a_store_is_in_parts(waiting):
    assert "is in parts; give one of them" in fail_with(1, "inspect", waiting / "runs/store")
