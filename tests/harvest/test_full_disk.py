"""A disk that fills up: a small tmpfs."""

import subprocess
from pathlib import Path

import pytest
from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started
from trees import tree

from gsae.store.verify import verify

KIBIBYTES = 400


@pytest.fixture
def small_disk(tmp_path) -> Path:
    place = tmp_path / "small disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={KIBIBYTES}k", "tmpfs", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", [1, 3])
def test_a_full_disk_stops_all_ranks_with_one_line_and_leaves_whole_shards(tmp_path, small_disk, size):
    write_text(tmp_path / "text", num_documents=60)
    settings = small_settings(tmp_path)
    settings["corpus"]["num_lanes"] = 6
    settings["train"]["batch_rows"] = 60
    config = write_config(tmp_path / "config.yaml", settings)
    run_gsae(1, ["harvest", config])
    settings["harvest"]["store"] = str(small_disk / "store")
    on_small_disk = write_config(tmp_path / "small.yaml", settings)
    with started(size, gsae, "harvest", str(on_small_disk)) as ranks:
        assert ranks.wait() == [2] * size
        lines = [line for rank in range(size) for line in ranks.output(rank).splitlines() if line.startswith("gsae: ")]
        assert not any("Traceback" in ranks.output(rank) for rank in range(size))
    assert len(lines) == 1, lines
    assert "cannot be written" in lines[0]
    assert "No space left on device" in lines[0]
    assert "then run gsae harvest again" in lines[0]
    findings = [finding.problem for finding in verify(small_disk / "store")]
    assert len(list(small_disk.glob("store/resid.*/*.tar"))) >= 4
    assert [problem for problem in findings if "not whole" not in problem and "missing; run gsae harvest" not in problem] == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run_gsae(2, ["harvest", on_small_disk])
    assert tree(small_disk / "store") == tree(tmp_path / "runs/store")
