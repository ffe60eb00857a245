"""The speed of one training step against other libraries. In: a store of real activations. Out: one JSON line a case.

    bash launch/test_interop.sh          # once: makes the environment in which the other libraries are
    .venv-interop/bin/python benchmarks/step.py --store runs/demo/store --site resid.15

All SAEs get the same weights: directions of the store's rows, less their mean, and one bias for all gates that opens as many as the
case says. Their steps are timed in turn, one after another in the same process, and the medians are compared; `ratio` is the median
of the rounds' own ratios. A step is forward, backward and update; ours has the exchange of gradients over its one rank in it. Each rival
is compared with our step for its own objective. `step_bytes` is what a step's memory rises above what was resident before it (Linux):
weights, optimizer state and our bucket of gradients are resident.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dictionary_learning.trainers.gdm import GatedSAETrainer
from jaxtyping import Float
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from gsae.config import ObjectiveName
from gsae.sae.gated import GatedSAE
from gsae.sae.objective import UNIT_NORM
from gsae.store import manifest as manifests
from gsae.store.stream import Stream
from gsae.train.optim import SAEOptimizer
from gsae.train.step import TrainingModule, update
from gsae.world import Group, start

LAMBDA = 0.18
LEARNING_RATE = 1e-9  # so small that the number of open gates stays what it is
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """What is trained on."""

    x: Float[Tensor, "rows d_model"]
    """Scaled rows."""
    mean: Float[Tensor, " d_model"]
    directions: Float[Tensor, "features d_model"]
    """Unit vectors, of encoder and decoder."""
    gate_bias: float


def read_rows(store: Path, site: str, num_rows: int) -> tuple[Tensor, Tensor]:
    """Scaled rows of a store and their scaled mean, in float32."""
    manifest = manifests.load(store)
    found = manifest.sites[site]
    batch_rows = manifest.num_lanes * -(-num_rows // manifest.num_lanes)
    with Stream(store, site, range(manifest.num_lanes), batch_rows, max(batch_rows, 65_536), seed=0, verify_shards=False) as stream:
        x = stream.next_batch().decode(torch.device("cpu"), torch.float32)[:num_rows]
    return x * found.scale, (found.mean * found.scale).float()


def make_case(x: Tensor, mean: Tensor, num_rows: int, num_features: int, l0: int) -> Case:
    """The last `num_rows` rows, with features along the others."""
    directions = x[:num_features] - mean
    directions = directions / directions.norm(dim=1, keepdim=True)
    rows = x[-num_rows:]
    a = ((rows - mean) @ directions.T).flatten()
    return Case(rows, mean, directions, -float(a.topk(l0 * num_rows + 1).values[-1]))


def our_step(case: Case, group: Group, objective: ObjectiveName = "gated", *, is_sparse: bool = True) -> Step:
    """The update as gsae's training loop makes it, DDP and the counts of fired features included."""
    sae = GatedSAE(case.x.shape[1], len(case.directions))
    with torch.no_grad():
        sae.W_dec.copy_(case.directions)
        sae.W_gate.copy_(case.directions.T)
        sae.b_gate.fill_(case.gate_bias)
        sae.b_dec.copy_(case.mean)
    module = TrainingModule(sae, objective)
    module.is_sparse = is_sparse
    optimizer = SAEOptimizer(sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=objective in UNIT_NORM)
    wrapped = group.wrap(module)

    def step() -> None:
        update(wrapped, optimizer, case.x, lambda_=LAMBDA, learning_rate=LEARNING_RATE, micro_batch_rows=None)

    return step


def dictionary_learning_step(case: Case, context: Callable[[], Any]) -> Step:
    """dictionary_learning's `GatedSAETrainer.update`."""
    num_features, d_model = case.directions.shape
    schedule = {"steps": 10**6, "warmup_steps": 10, "sparsity_warmup_steps": 10}
    shape = {"activation_dim": d_model, "dict_size": num_features, "layer": 0, "lm_name": "none"}
    trainer = GatedSAETrainer(**shape, **schedule, lr=LEARNING_RATE, l1_penalty=LAMBDA, seed=0, device="cpu")
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(case.directions)
        trainer.ae.decoder.weight.copy_(case.directions.T)
        trainer.ae.gate_bias.fill_(case.gate_bias)
        trainer.ae.decoder_bias.copy_(case.mean)

    def step() -> None:
        with context():
            trainer.update(1000, case.x)

    return step


def saelens_step(case: Case, context: Callable[[], Any]) -> Step:
    """SAELens' forward pass of training, backward, and the Adam that its trainer makes; its objective is our `gated-norm-weighted`."""
    num_features, d_model = case.directions.shape
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=d_model, d_sae=num_features, l1_coefficient=LAMBDA, apply_b_dec_to_input=True))
    with torch.no_grad():
        sae.W_enc.copy_(case.directions.T)
        sae.W_dec.copy_(case.directions)
        sae.b_gate.fill_(case.gate_bias)
        sae.b_dec.copy_(case.mean)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.999))
    given = TrainStepInput(sae_in=case.x, coefficients={"l1": LAMBDA}, dead_neuron_mask=None, n_training_steps=1000, is_logging_step=False)

    def step() -> None:
        with context():
            loss = sae.training_forward_pass(given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@contextmanager
def bfloat16_autocast() -> Iterator[None]:
    """The mixed precision that SAELens offers, and that dictionary_learning offers on a GPU."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


def seconds_of(step: Step) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def bytes_of(step: Step) -> int:
    """How far one call raises the process's resident memory, at its highest, what was freed before given back."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def compare(case: Case, l0: int, group: Group, num_rounds: int) -> Iterator[dict[str, Any]]:
    """A line for each rival and precision, against our step for the same objective."""
    steps = {
        ("gsae", "gated"): our_step(case, group),
        ("gsae", "gated-norm-weighted"): our_step(case, group, "gated-norm-weighted"),
        ("dictionary_learning", "float32"): dictionary_learning_step(case, nullcontext),
        ("dictionary_learning", "bfloat16 autocast"): dictionary_learning_step(case, bfloat16_autocast),
        ("sae_lens", "float32"): saelens_step(case, nullcontext),
        ("sae_lens", "bfloat16 autocast"): saelens_step(case, bfloat16_autocast),
        ("gsae, dense step", "float32"): our_step(case, group, is_sparse=False),
    }
    for step in steps.values():
        step()
    memory = {name: bytes_of(step) for name, step in steps.items()}
    times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step))
    for rival, precision in list(steps)[2:]:
        own = ("gsae", "gated-norm-weighted" if rival == "sae_lens" else "gated")
        ratios = [theirs / ours for theirs, ours in zip(times[rival, precision], times[own], strict=True)]
        yield {
            "features": len(case.directions),
            "d_model": case.x.shape[1],
            "rows": len(case.x),
            "l0": l0,
            "objective": own[1],
            "rows_per_second": round(len(case.x) / median(times[own])),
            "step_bytes": memory[own],
            "rival": rival,
            "rival_precision": precision,
            "rival_rows_per_second": round(len(case.x) / median(times[rival, precision])),
            "rival_step_bytes": memory[rival, precision],
            "ratio": round(median(ratios), 2),
            "threads": torch.get_num_threads(),
        }


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--site", default="resid.15")
    parser.add_argument("--features", type=int, nargs="+", default=[9216])
    parser.add_argument("--l0", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with start("cpu") as world:
        x, mean = read_rows(options.store, options.site, options.rows + max(options.features))
        for num_features in options.features:
            for l0 in options.l0:
                case = make_case(x, mean, options.rows, num_features, l0)
                for line in compare(case, l0, world.group, options.rounds):
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
