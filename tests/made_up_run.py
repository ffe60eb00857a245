"""A run directory made up for tests of export and loading: the files that the stages write, around an SAE of random weights."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from gsae.sae.formats import read_sae, save_sae
from gsae.sae.objective import build
from gsae.store.runs import write_checkpoint

D_MODEL, FEATURES, SCALE = 16, 64, 0.0123
DEFINITIONS = {"l0": "features on", "fvu": "sum |x - x_hat|^2 / sum |x - mean|^2", "intervals": "95 %: bootstrap over documents"}
METRICS = {
    **{"l0": 40.5, "fvu": 0.25, "loss_recovered": 0.96, "delta_ce": 0.5},
    **{"ce_clean": 3.25, "ce_spliced": 3.75, "ce_zero": 15.5, "ce_mean": 11.125},
}


@dataclass(frozen=True)
class MadeUpRun:
    """What distinguishes one made-up run."""

    objective: str = "gated"
    pre_activation_loss: float | None = None
    """None as in a run.json of before there was pre-activation loss."""
    layer: int = 1
    llm: str = "owner/llama"
    steps: tuple[int, ...] = (90, 100)
    is_evaluated: bool = True
    has_store: bool = True

    def write(self, output: Path, name: str | None = None) -> Path:
        """Write it below `output` and return its directory."""
        directory = output / f"resid.{self.layer}" / (name or f"{self.objective}-m{FEATURES}-l0.17-s0")
        directory.mkdir(parents=True)
        described = {"name": directory.name, "site": f"resid.{self.layer}", "layer": self.layer, "objective": self.objective}
        described |= {"resampling": False, "lambda": 0.17, "seed": 0, "learning_rate": 0.003, "scale": SCALE, "batch_rows": 512}
        described |= {} if self.pre_activation_loss is None else {"pre_activation_loss": self.pre_activation_loss}
        described |= {"d_model": D_MODEL, "num_features": FEATURES, "store_fingerprint": "7d7a", "train_fingerprint": "dfbf"}
        (directory / "run.json").write_text(json.dumps({"format": 1, **described, "settings": {}}))
        for step in self.steps:
            sae = self.sae(step)
            at = {**described, "step": step, "rows": 512 * step}
            write_checkpoint(directory, step, lambda aside, sae=sae, at=at: save_sae(aside, sae, at))
        corpus, harvest = {"format": "text", "path": "/somewhere/secret/pages.txt"}, {"context_length": 32, "outlier_multiple": 3.0}
        config = {"corpus": corpus, "llm": {"model": f"/somewhere/secret/{self.llm}"}, "harvest": harvest}
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        if self.has_store:
            self._write_manifest(output / "store" / "manifest.json")
        if self.is_evaluated:
            newest = directory / "checkpoints" / f"{self.steps[-1]:08d}"
            sha256 = hashlib.sha256((newest / "sae.safetensors").read_bytes()).hexdigest()
            (directory / "results.json").write_text(json.dumps(self._results(sha256)))
        return directory

    def sae(self, seed: int):
        """Decoder rows of any norm where the objective leaves them free; gates and magnitudes of both signs."""
        sae = build(self.objective, D_MODEL, FEATURES, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                if name != "W_dec" or self.objective == "gated-norm-weighted":
                    parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
        return sae

    def _results(self, sha256: str) -> dict:
        counts = {"kept_rows": 12281, "documents": 25}
        identity = {"llm": self._identity(), "dtype": "bfloat16", "within_these_documents": True, "checkpoint": {"sae_sha256": sha256}}
        intervals = {"l0": [39.6, 41.4], "fvu": None}
        return {"metrics": METRICS, "intervals": intervals, "counts": counts, "definitions": DEFINITIONS, "identity": identity}

    def _identity(self) -> dict:
        return {"name": self.llm, "revision": "abc123"}

    def _write_manifest(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        llm = {**self._identity(), "dtype": "bfloat16", "attention": "sdpa"}
        site = {"max_norm": 512.25, "median_norm": 170.75}
        identity = {"llm": llm, "context_length": 128, "outlier_multiple": 3.0}
        path.write_text(json.dumps({"fingerprint": "7d7a", "identity": identity, "sites": {f"resid.{self.layer}": site}}))


def raw_rows(num_rows: int = 300) -> torch.Tensor:
    """Activations with norms near 100 and a mean as large as their spread."""
    generator = torch.Generator().manual_seed(5)
    mean = 20 * torch.randn(D_MODEL, generator=generator)
    return 20 * torch.randn(num_rows, D_MODEL, generator=generator) + mean


def as_trained(run: Path, x: torch.Tensor, step: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (in the unit of raw activations, of unit directions) and reconstructions by the checkpoint itself, in float64."""
    sae = read_sae(run / "checkpoints" / f"{step:08d}").sae.double()
    with torch.no_grad():
        f = sae.encode(SCALE * x.double())
        return f * sae.W_dec.norm(dim=1) / SCALE, sae.decode(f) / SCALE
