"""A small pipeline in parts, for tests: its config, its commands in turn, and what is on the disk."""

import shutil
from pathlib import Path

from conftest import small_settings, write_config, write_text
from ranks import gsae, run_gsae, started

NUM_PARTS = 3


def settings_in(folder: Path, **train) -> dict:
    """About 13,500 rows in three parts, of which training takes 19,200: parts 0, 1, 2, 0, 1."""
    settings = small_settings(folder)
    settings["corpus"]["parts"] = NUM_PARTS
    sweeps = settings["train"]["sweeps"][:2]  # one resamples
    settings["train"] |= {"total_rows": 19_200, "checkpoint_every_fraction": 0.05, "sweeps": sweeps, **train}
    return settings


def begin(folder: Path, **train) -> Path:
    write_text(folder / "text")
    return write_config(folder / "config.yaml", settings_in(folder, **train))


def part_stores(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs/store").glob("part-*"))


def is_waiting(folder: Path) -> bool:
    return (folder / "runs/waiting.json").exists()


def alternate(folder: Path, size: int = 1) -> list[list[str]]:
    """Harvest and train in turns to the end; the parts on the disk after each command."""
    seen = []
    while not seen or is_waiting(folder):
        for stage in ("harvest", "train"):
            run_gsae(size, [stage, folder / "config.yaml"])
            seen.append(part_stores(folder))
            assert len(seen[-1]) <= 2
        assert len(seen) <= 12, "training does not end"
    return seen


def copied(source: Path, folder: Path, **train) -> Path:
    """A copy of a folder's output, with a config of its own for the same text."""
    shutil.copytree(source / "runs", folder / "runs")
    settings = settings_in(source, **train)
    settings["output"] = str(folder / "runs")
    return write_config(folder / "config.yaml", settings)


def fail_with(size: int, *words: str | Path) -> str:
    """The one line of a command that must be refused."""
    with started(size, gsae, *map(str, words)) as ranks:
        assert ranks.wait() == [2] * size, ranks.output()
        shown = [line for rank in range(size) for line in ranks.output(rank).splitlines()]
    assert not any("Traceback" in line for line in shown)
    (line,) = [line for line in shown if line.startswith("gsae: ")]
    return line
