"""Run directories made up for the report's tests: the files that gsae train and gsae evaluate write, with believable numbers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Mean CE of clean, zero-ablated and mean-ablated runs, in nats, and FVU at L0 40.
SITES = {"resid.2": (2, 15.8, 9.4, 0.19), "resid.15": (15, 22.6, 10.1, 0.29), "resid.28": (28, 12.0, 8.2, 0.38)}
CE_CLEAN = 3.3124
BETTER = {"gated": 1.0, "relu": 1.22, "gated-no-aux": 1.6, "gated-norm-weighted": 1.05}


@dataclass(frozen=True)
class FakeRun:
    """What distinguishes one made-up run."""

    site: str = "resid.15"
    objective: str = "gated"
    lambda_: float = 0.175
    resampling: bool = False
    pre_activation_loss: float | None = None
    """None as in a run.json of before there was pre-activation loss."""
    seed: int = 0
    num_features: int = 2304
    l0: float = 46.4
    end: str = "finished"
    """`finished`, `stopped` or `unfinished`."""
    is_evaluated: bool = True
    documents: int = 97

    @property
    def name(self) -> str:
        weight = f"-preact{self.pre_activation_loss:g}" if self.pre_activation_loss else ""
        kind = f"{self.objective}{'-resampled' if self.resampling else ''}{weight}"
        return f"{kind}-m{self.num_features}-l{self.lambda_:g}-s{self.seed}"

    def write(self, output: Path) -> Path:
        """Write its directory under `<output>/<site>/` and return it."""
        directory = output / self.site / self.name
        directory.mkdir(parents=True)
        (directory / "run.json").write_text(json.dumps(self.asked()))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines()))
        if self.is_evaluated:
            (directory / "results.json").write_text(json.dumps(self.results()))
        return directory

    def asked(self) -> dict[str, Any]:
        return {
            "format": 1,
            "name": self.name,
            "site": self.site,
            "layer": SITES[self.site][0],
            "objective": self.objective,
            "resampling": self.resampling,
            "num_features": self.num_features,
            "d_model": 576,
            "lambda": self.lambda_,
            "seed": self.seed,
            "learning_rate": 0.003,
            "total_steps": 586,
            "batch_rows": 512,
            "store_fingerprint": "6b1f",
            "scale": 0.0123,
            "train_fingerprint": "77aa",
            **({} if self.pre_activation_loss is None else {"pre_activation_loss": self.pre_activation_loss}),
        }

    @property
    def last_step(self) -> int:
        return {"finished": 586, "stopped": 178, "unfinished": 298}[self.end]

    @property
    def fvu(self) -> float:
        return SITES[self.site][3] * BETTER[self.objective] * (40 / max(self.l0, 1e-3)) ** 0.35

    def lines(self) -> list[dict[str, Any]]:
        random = np.random.default_rng(len(self.name) + int(1000 * self.lambda_))
        last = self.last_step
        lines: list[dict[str, Any]] = []
        for step in range(10, last + 1, 8):
            t = step / 586
            noise = 1 + 0.01 * random.standard_normal()
            dead = {"relu": 0.3, "gated": 0.012, "gated-no-aux": 0.55, "gated-norm-weighted": 0.03}[self.objective] * max(0.0, t - 0.2)
            lines.append(
                {
                    "kind": "step",
                    "step": step,
                    "rows": 512 * step,
                    "loss": 0.9,
                    "reconstruction": 0.3,
                    "sparsity": 1.8,
                    "auxiliary": 0.33,
                    "l0": (self.l0 + 900 * np.exp(-14 * t)) * noise,
                    "fvu": (self.fvu + 0.8 * np.exp(-9 * t)) * noise,
                    "dead_fraction": dead if t > 0.2 else None,
                    "dead_rows": 60_000,
                    "gradient_norm": 0.4,
                    "learning_rate": 0.003,
                    "lambda": self.lambda_,
                    "rows_per_second": 3700.0,
                    "seconds": 0.14 * step,
                }
            )
        if self.resampling:
            lines += self.resampling_lines()
        if self.end == "stopped":
            lines.append({"kind": "stopped", "step": last, "rows": 512 * last, "reason": "L0 0.62 over the last 50 steps is under 1"})
        if self.end == "finished":
            dead = lines[-1].get("dead_fraction") or 0.0123
            lines.append(
                {"kind": "finished", "step": last, "rows": 512 * last, "dead_fraction": dead, "dead_rows": 60_000, "seconds": 81.4}
            )
        return lines

    def resampling_lines(self) -> list[dict[str, Any]]:
        def event(step: int, dead: int, resampled: int, refused: str | None) -> dict[str, Any]:
            rows = {"rows": 512 * step, "dead_rows": 60_000, "candidate_rows": 0 if refused else 15_000}
            return {"kind": "resampling", "step": step, "dead": dead, "resampled": resampled, "refused": refused, **rows}

        outcome = {"kind": "resampling_outcome", "step": 205, "rows": 512 * 205, "event_step": 147, "resampled": 184, "alive": 171}
        return [
            event(58, 0, 0, "the firing interval holds 29,696 rows, fewer than train.resampling.min_interval_rows (50,000)"),
            event(147, 184, 184, None),
            outcome,
            event(264, 0, 0, None),
        ]

    def results(self) -> dict[str, Any]:
        _, ce_zero, ce_mean, _ = SITES[self.site]
        delta_ce = 2.1 * self.fvu
        recovered = 1 - delta_ce / (ce_zero - CE_CLEAN)
        unseen = {"relu": 0.31, "gated": 0.007, "gated-no-aux": 0.62, "gated-norm-weighted": 0.04}[self.objective]
        edges = np.linspace(-5, 0, 26)
        shape = np.exp(-((edges[:-1] - np.log10(self.l0 / self.num_features)) ** 2) / 0.5)
        return {
            "format": 1,
            "run": self.asked(),
            "metrics": {
                "l0": self.l0,
                "l0_median": self.l0 * 0.9,
                "l0_p90": self.l0 * 1.7,
                "fvu": self.fvu,
                "fvu_dropped": 0.98,
                "mse": 5123.4 * self.fvu,
                "mse_scaled": self.fvu,
                "cosine": 0.91,
                "gamma": 0.93 if self.objective == "relu" else 1.001,
                "ce_clean": CE_CLEAN,
                "ce_spliced": CE_CLEAN + delta_ce,
                "ce_zero": ce_zero,
                "ce_mean": ce_mean,
                "delta_ce": delta_ce,
                "kl": 0.9 * delta_ce,
                "loss_recovered": recovered,
                "loss_recovered_mean": 1 - delta_ce / (ce_mean - CE_CLEAN),
                "loss_recovered_all_rows": recovered - 0.02,
                "not_seen_fraction": unseen,
                "dense_fraction": 0.002,
                "dead_fraction": 0.0123,
                "max_decoder_cosine_mean": None,
            },
            "intervals": {
                "loss_recovered": [recovered - 0.004, recovered + 0.0035],
                "fvu": [self.fvu * 0.97, self.fvu * 1.03],
                "l0": [self.l0 * 0.975, self.l0 * 1.025],
                "delta_ce": [delta_ce * 0.94, delta_ce * 1.05],
            },
            "counts": {"documents": self.documents, "contexts": 186, "tokens": 23_808, "kept_rows": 21_960, "targets": 23_101},
            "checks": {"identity_loss_recovered": 1.0, "zero_loss_recovered": 0.0},
            "density_log10_histogram": {
                "edges": edges.tolist(),
                "counts": np.round(self.num_features * shape / shape.sum()).astype(int).tolist(),
            },
            "definitions": {
                "l0": "mean number of features on (f > 0) over kept rows",
                "fvu": "fraction of variance unexplained: sum |x - x_hat|^2 / sum |x - mean|^2 over kept rows",
                "loss_recovered": "1 - (ce_spliced - ce_clean) / (ce_zero - ce_clean), from totals; not clamped",
                "dead_fraction": "share of features not on for dead_rows rows over all ranks, at the end of training",
                "novel_metric": "a metric that the report has no word for",
            },
            "identity": {
                "llm": {"name": "smollm2", "config_sha256": "51c2"},
                "dtype": "bfloat16",
                "text": {
                    "format": "mediawiki",
                    "files": {"first": "enwiki-pages-articles1.xml.bz2", "number": 1, "bytes": 15_000_000},
                    "held_out_fraction": 0.2,
                },
                "checkpoint": {"step": self.last_step, "sae_sha256": f"{self.lambda_}"},
                "within_these_documents": self.documents < 30,
            },
        }


@pytest.fixture(scope="session")
def fake_run() -> type[FakeRun]:
    return FakeRun


def study(sites: Sequence[str], documents: int) -> list[FakeRun]:
    """At each site: relu, gated with and without resampling, gated-no-aux with a stopped run, and a run still training."""
    runs = []
    for site in sites:
        grids = {"relu": {0.1: 61.0, 0.15: 34.5, 0.22: 19.8}, "gated": {0.12: 68.2, 0.175: 46.4, 0.25: 28.9}}
        for objective, grid in grids.items():
            runs += [FakeRun(site, objective, lambda_, l0=l0, documents=documents) for lambda_, l0 in grid.items()]
        runs += [
            FakeRun(site, "gated", lambda_, resampling=True, l0=l0, documents=documents)
            for lambda_, l0 in {0.12: 71.0, 0.175: 48.8}.items()
        ]
        runs += [
            FakeRun(site, "gated-no-aux", 0.02, l0=33.0, documents=documents),
            FakeRun(site, "gated-no-aux", 0.06, l0=0.62, end="stopped", documents=documents),
            FakeRun(site, "gated-norm-weighted", 0.175, l0=39.0, end="unfinished", is_evaluated=False, documents=documents),
        ]
    return runs


@pytest.fixture(scope="session")
def make_study() -> Callable[[Path, Sequence[str], int], Path]:
    """Writes the whole made-up study under a directory and returns it."""

    def write(output: Path, sites: Sequence[str], documents: int) -> Path:
        for run in study(sites, documents):
            run.write(output)
        return output

    return write
