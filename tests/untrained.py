"""Run directories of untrained SAEs for tests of what comes after training."""

import json
from pathlib import Path

import torch

from gsae.sae.formats import save_sae
from gsae.sae.objective import build
from gsae.store import manifest
from gsae.store.runs import write_checkpoint


def write_run(runs: Path, store: manifest.Manifest, site: str, objective: str, seed: int, step: int = 20) -> Path:
    """A run directory with an untrained SAE of random biases."""
    described = store.sites[site]
    directory = runs / site / f"{objective}-m32-l0.1-s{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    run = {
        "format": 1,
        "name": directory.name,
        "site": site,
        "layer": described.layer,
        "objective": objective,
        "resampling": False,
        "num_features": 32,
        "d_model": 16,
        "lambda": 0.1,
        "seed": seed,
        "total_steps": 20,
        "batch_rows": 64,
        "store_fingerprint": store.fingerprint,
        "scale": described.scale,
    }
    (directory / "run.json").write_text(json.dumps(run))
    lines = [
        {"kind": "step", "step": 10, "rows": 640, "dead_fraction": 0.5, "dead_rows": 500},
        {"kind": "finished", "step": 20, "rows": 1280, "dead_fraction": 0.25, "dead_rows": 600, "seconds": 1.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sae = build(objective, 16, 32, seed + step)
    with torch.no_grad():
        sae.b_dec.copy_(described.mean * described.scale)
    write_checkpoint(directory, step, lambda folder: save_sae(folder, sae, run))
    return directory
