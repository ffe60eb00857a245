"""Runs that a test trained: what they ended with, what they logged, and whether two trainings agree."""

from pathlib import Path

import torch
import yaml
from conftest import small_settings, write_config, write_text
from ranks import run_gsae
from safetensors.torch import load_file

from gsae.store.runs import checkpoints, damage, find_runs, read_metrics

TIMES = ("seconds", "rows_per_second", "shares")


def train_small(folder: Path) -> Path:
    """The folder, with a store, a config, and the runs that one rank trained: two sites, three runs each, 200 steps in float64."""
    write_text(folder / "text")
    settings = small_settings(folder)
    config = write_config(folder / "config.yaml", settings | {"harvest": {**settings["harvest"], "store": str(folder / "store")}})
    run_gsae(1, ["harvest", config])
    run_gsae(1, ["train", config])
    return folder


def again(trained: Path, folder: Path, **train) -> Path:
    """A config that trains the same runs, or changed ones, into another folder."""
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    settings["output"] = str(folder / "runs")
    settings["train"] |= train
    return write_config(folder / "config.yaml", settings)


def final_states(output: Path, step: int | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of the last checkpoint of each run, or of the one of a step, whatever parts they are in."""
    states = {}
    for run in find_runs(output):
        path = checkpoints(run)[-1].path if step is None else run / "checkpoints" / f"{step:08d}"
        assert damage(path) == []
        states[str(run.relative_to(output))] = whole(path, "sae") | whole(path, "state")
    return states


def whole(checkpoint: Path, stem: str) -> dict[str, torch.Tensor]:
    """The tensors of the files of this name, joined by features."""
    parts = [load_file(path) for path in sorted(checkpoint.glob(f"{stem}*.safetensors"))]
    return {name: join(name, [part[name] for part in parts]) for name in parts[0]}


def join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts of a tensor, of encoders by columns; of what does not belong to features all are the same."""
    if name.endswith((".step", "position")) or "b_dec" in name:
        assert all(torch.equal(part, parts[0]) for part in parts), name
        return parts[0]
    return torch.cat(parts, dim=1 if "W_gate" in name or "W_enc" in name else 0)


def lines(output: Path) -> dict[str, list[dict]]:
    """The metrics of each run, without the times."""
    return {
        str(run.relative_to(output)): [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]
        for run in find_runs(output)
    }


def assert_equal(output: Path, expected: Path) -> None:
    states, wanted = final_states(output), final_states(expected)
    assert states.keys() == wanted.keys()
    for run, tensors in wanted.items():
        assert [name for name in tensors if not torch.equal(tensors[name], states[run][name])] == [], run
    assert lines(output) == lines(expected)


def assert_near(output: Path, expected: Path, step: int | None = None) -> None:
    """Weights and optimizer state within 1e-9, counters equal."""
    states, wanted = final_states(output, step), final_states(expected, step)
    assert states.keys() == wanted.keys()
    for run, tensors in wanted.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                states[run][name], tensor, rtol=0, atol=1e-9 if tensor.is_floating_point() else 0, msg=f"{run}: {name}"
            )


def num_lines(output: Path) -> int:
    return sum(path.read_text().count("\n") for path in output.glob("*/*/metrics.jsonl"))
