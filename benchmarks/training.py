"""A whole short training against dictionary_learning's. In: a store of real activations. Out: one JSON line.

    bash launch/test_interop.sh          # once: makes the environment in which the other library is
    .venv-interop/bin/python benchmarks/training.py --store runs/demo/store --site resid.15

Both train a gated SAE on the same batches, held in memory, from the same kind of start to the end of the same schedule: lr warm-up
5 %, lambda warm-up 10 %, decay over the last 20 %. They take turns, a tenth of the run each, so that a noisy machine slows both.
Only steps are timed. L0 and FVU are of the last tenth's batches.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.gdm import GatedSAETrainer
from jaxtyping import Float
from torch import Tensor

from gsae.config import ScheduleConfig, TrainConfig
from gsae.sae.objective import build
from gsae.store import manifest as manifests
from gsae.store.stream import Stream
from gsae.train.chores import CHOOSE_EVERY_STEPS
from gsae.train.optim import SAEOptimizer
from gsae.train.schedule import lambda_multiplier, learning_rate_multiplier
from gsae.train.step import TrainingModule, update
from gsae.world import Group, start

Train = Callable[[int, Tensor], None]
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def read_batches(store: Path, site: str, batch_rows: int, num_batches: int) -> tuple[list[Tensor], Tensor]:
    """Scaled batches of a store in float32, and their scaled mean."""
    manifest = manifests.load(store)
    found = manifest.sites[site]
    with Stream(store, site, range(manifest.num_lanes), batch_rows, 65_536, seed=0, verify_shards=False) as stream:
        batches = [stream.next_batch().decode(torch.device("cpu"), torch.float32) * found.scale for _ in range(num_batches)]
    return batches, (found.mean * found.scale).float()


def ours(options: argparse.Namespace, mean: Tensor, total_steps: int, group: Group) -> tuple[Train, Encode]:
    """Gsae's step under its own schedule and choice between the dense and the sparse step."""
    config, schedule = TrainConfig(), ScheduleConfig()
    sae = build("gated", len(mean), options.features, seed=0)
    with torch.no_grad():
        sae.b_dec.copy_(mean)
    module = TrainingModule(sae, "gated")
    wrapped = group.wrap(module)
    optimizer = SAEOptimizer(sae, betas=config.adam_betas, eps=config.adam_eps, unit_norm=True)

    def train(step: int, x: Float[Tensor, "rows d_model"]) -> None:
        report = update(
            wrapped,
            optimizer,
            x,
            lambda_=options.lambda_ * lambda_multiplier(step, total_steps, schedule),
            learning_rate=options.learning_rate * learning_rate_multiplier(step, total_steps, schedule),
            micro_batch_rows=None,
        )
        if (step + 1) % CHOOSE_EVERY_STEPS == 0:
            module.choose(float(report.opened.sum()) / (len(x) * options.features), config.sparse_below_density)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        f = sae.encode(x)
        return f, sae.decode(f)

    return train, encode


def theirs(options: argparse.Namespace, mean: Tensor, total_steps: int) -> tuple[Train, Encode]:
    """dictionary_learning's trainer, its decoder bias at the mean too."""
    trainer = GatedSAETrainer(
        steps=total_steps,
        activation_dim=len(mean),
        dict_size=options.features,
        layer=0,
        lm_name="none",
        lr=options.learning_rate,
        l1_penalty=options.lambda_,
        warmup_steps=total_steps // 20,
        sparsity_warmup_steps=total_steps // 10,
        decay_start=total_steps * 4 // 5,
        seed=0,
        device="cpu",
    )
    with torch.no_grad():
        trainer.ae.decoder_bias.copy_(mean)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        f = trainer.ae.encode(x)
        return f, trainer.ae.decode(f)

    return trainer.update, encode


@torch.no_grad()
def quality(encode: Encode, batches: Sequence[Tensor]) -> dict[str, float]:
    """L0 and FVU on some batches."""
    x = torch.cat(list(batches))
    found = [encode(batch) for batch in batches]
    l0 = sum(int((f > 0).sum()) for f, _ in found) / len(x)
    error = torch.cat([x_hat for _, x_hat in found]) - x
    return {"l0": round(l0, 1), "fvu": round(float(error.square().sum() / (x - x.mean(dim=0)).square().sum()), 4)}


def compare(options: argparse.Namespace, group: Group) -> Iterator[dict[str, Any]]:
    """The line."""
    total_steps = -(-options.rows // options.batch_rows)
    batches, mean = read_batches(options.store, options.site, options.batch_rows, total_steps)
    trained = {"": ours(options, mean, total_steps, group), "rival_": theirs(options, mean, total_steps)}
    seconds = dict.fromkeys(trained, 0.0)
    tenth = -(-total_steps // 10)
    for first in range(0, total_steps, tenth):
        steps = range(first, min(first + tenth, total_steps))
        for name, (train, _) in trained.items():
            begin = time.perf_counter()
            for step in steps:
                train(step, batches[step])
            seconds[name] += time.perf_counter() - begin
    line: dict[str, Any] = {"features": options.features, "d_model": len(mean), "rows": total_steps * options.batch_rows}
    for name, (_, encode) in trained.items():
        found = quality(encode, batches[-tenth:])
        line |= {f"{name}seconds": round(seconds[name], 1), **{f"{name}{key}": value for key, value in found.items()}}
    rates = {"rows_per_second": round(line["rows"] / seconds[""]), "rival_rows_per_second": round(line["rows"] / seconds["rival_"])}
    ratio = round(seconds["rival_"] / seconds[""], 2)
    yield {**line, "rival": "dictionary_learning", **rates, "ratio": ratio, "threads": torch.get_num_threads()}


def main() -> None:
    """The case that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--site", default="resid.15")
    parser.add_argument("--features", type=int, default=9216)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--batch-rows", type=int, default=2048)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.18)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()
    with start("cpu") as world:
        for line in compare(options, world.group):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
