"""Training steps on a GPU: rates, memory, and what of the card each kernel takes. In: shapes. Out: one JSON file and one table.

    bash benchmarks/gpu.sh                                # everything that a GPU is to show, tests included
    python benchmarks/gpu.py --features 32768             # this part alone

Rows are Gaussian, directions random: speed does not depend on what they mean, only on how many gates are open, which one bias for all
sets. Steps take turns; `rows_per_second` is the median over rounds. A step is forward, backward and update, without DDP. `peak_bytes`
is the most that its weights, gradients, Adam's state and all else take together. The rivals run under bfloat16 autocast, if they are
installed. `floor` is one encode product in bfloat16, as measured, and 28 bytes a parameter at the measured rate of a copy.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gsae.config import ProductsName
from gsae.sae.objective import build
from gsae.train.optim import SAEOptimizer
from gsae.train.step import TrainingModule, update

LAMBDA, LEARNING_RATE = 0.18, 1e-9  # so small that the number of open gates stays what it is
ADAM_BYTES = 28
Step = Callable[[], None]


@dataclass(frozen=True)
class Card:
    """What the device does at most, measured."""

    name: str
    copy_bytes_per_second: float
    """Bytes read and written by a copy within its memory."""
    bfloat16_operations_per_second: float
    """Of the library's product at the shape of an encode."""


@dataclass(frozen=True)
class Case:
    """What is trained on."""

    x: Float[Tensor, "rows d_model"]
    num_features: int
    gate_bias: float
    l0: int


class Timer:
    """Seconds on the device; on a CPU those of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, step: Step) -> float:
        """Those of one call."""
        if self._device.type != "cuda":
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000


def measure_card(device: torch.device, rows: int, d_model: int, num_features: int) -> Card:
    """Rates of a copy and of a product, medians of ten."""
    timer = Timer(device)
    size = 1 << (30 if device.type == "cuda" else 20)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(rows, d_model, device=device).bfloat16()
    right = torch.randn(num_features, d_model, device=device).bfloat16()
    for warm_up in (lambda: target.copy_(source), lambda: left @ right.T):
        timer(warm_up)
    copy = median(timer(lambda: target.copy_(source)) for _ in range(10))
    product = median(timer(lambda: left @ right.T) for _ in range(10))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Card(name, 2 * size / copy, 2 * rows * d_model * num_features / product)


def make_case(device: torch.device, rows: int, d_model: int, num_features: int, l0: int) -> Case:
    """Rows of variance 1 in all, and the bias at which `l0` gates are open on a row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d_model, generator=generator).to(device) * d_model**-0.5
    directions = build("gated", d_model, num_features, seed=0).W_dec.detach().to(device)
    sample = x[: min(rows, 256)] @ directions.T
    kept = sample.flatten().topk(l0 * len(sample) + 1).values[-1]
    return Case(x, num_features, -float(kept), l0)


def our_step(case: Case, products: ProductsName, *, is_sparse: bool, kernels: bool = True) -> Step:
    """The update that gsae's training loop makes."""
    device = case.x.device
    sae = build("gated", case.x.shape[1], case.num_features, seed=0).to(device)
    with torch.no_grad():
        sae.b_gate.fill_(case.gate_bias)
    module = TrainingModule(sae, "gated", products=products, kernels=kernels)
    if kernels and device.type == "cuda" and module.why_no_kernels is not None:
        raise SystemExit(f"gpu: no kernels: {module.why_no_kernels}")
    module.is_sparse = is_sparse
    optimizer = SAEOptimizer(sae, betas=(0.0, 0.999), eps=1e-8, unit_norm=True, on_kernels=module.why_no_kernels is None)

    def step() -> None:
        update(module, optimizer, case.x, lambda_=LAMBDA, learning_rate=LEARNING_RATE, micro_batch_rows=None)

    return step


def dictionary_learning_step(case: Case) -> Step:
    """dictionary_learning's `GatedSAETrainer.update`."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    d_model, device = case.x.shape[1], str(case.x.device)
    schedule = {"steps": 10**6, "warmup_steps": 10, "sparsity_warmup_steps": 10}
    shape = {"activation_dim": d_model, "dict_size": case.num_features, "layer": 0, "lm_name": "none"}
    trainer = GatedSAETrainer(**shape, **schedule, lr=LEARNING_RATE, l1_penalty=LAMBDA, seed=0, device=device)
    with torch.no_grad():
        trainer.ae.gate_bias.fill_(case.gate_bias)

    def step() -> None:
        with torch.autocast(case.x.device.type, torch.bfloat16):
            trainer.update(1000, case.x)

    return step


def saelens_step(case: Case) -> Step:
    """SAELens' forward pass of training, backward, and the Adam that its trainer makes."""
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    d_model, device = case.x.shape[1], str(case.x.device)
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=d_model, d_sae=case.num_features, l1_coefficient=LAMBDA, device=device)).to(device)
    with torch.no_grad():
        sae.b_gate.fill_(case.gate_bias)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.999))
    given = TrainStepInput(sae_in=case.x, coefficients={"l1": LAMBDA}, dead_neuron_mask=None, n_training_steps=1000, is_logging_step=False)

    def step() -> None:
        with torch.autocast(case.x.device.type, torch.bfloat16):
            loss = sae.training_forward_pass(given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


STEPS: dict[str, Callable[[Case], Step]] = {
    "gsae, sparse, bfloat16": lambda case: our_step(case, "bfloat16", is_sparse=True),
    "gsae, sparse, float32": lambda case: our_step(case, "float32", is_sparse=True),
    "gsae, dense, bfloat16": lambda case: our_step(case, "bfloat16", is_sparse=False),
    "gsae, dense, tf32": lambda case: our_step(case, "tf32", is_sparse=False),
    "gsae, sparse, without kernels": lambda case: our_step(case, "float32", is_sparse=True, kernels=False),
    "gsae, dense, bfloat16, without kernels": lambda case: our_step(case, "bfloat16", is_sparse=False, kernels=False),
    "dictionary_learning, autocast": dictionary_learning_step,
    "sae_lens, autocast": saelens_step,
}


def measure_steps(case: Case, names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """A line a step. Each has the card to itself, so that its memory is its own; those of one case follow one another."""
    device = case.x.device
    timer = Timer(device)
    for name in names:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        line: dict[str, Any] = {"step": name, "d_model": case.x.shape[1], "features": case.num_features, "rows": len(case.x), "l0": case.l0}
        try:
            step = STEPS[name](case)
            for _ in range(3):
                step()
            seconds = median(timer(step) for _ in range(rounds))
        except ImportError as error:
            yield {**line, "skipped": f"{error.name} is not installed"}
            continue
        except torch.cuda.OutOfMemoryError:
            yield {**line, "skipped": "does not fit into the card's memory"}
            continue
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        yield {**line, "milliseconds": seconds * 1000, "rows_per_second": len(case.x) / seconds, "peak_bytes": peak}
        del step


def traffic(case: Case, num_bytes: int) -> dict[str, tuple[float, float]]:
    """Bytes and operations of each kernel of the sparse step, counted: `num_bytes` a number of what is gathered.

    What is gathered counts once an entry, as if no cache held it; lists, counters and vectors of features are left out.
    """
    rows, d, m = len(case.x), case.x.shape[1], case.num_features
    entries = rows * case.l0
    return {
        "_propose": (2 * d * (rows + m) + rows * m / 8, 2 * rows * d * m),
        "_count": (rows * m / 8, 0),
        "_list": (rows * m / 8 + 8 * entries, 0),
        "_products_at": ((entries + rows) * d * num_bytes, 2 * entries * d),
        "_decode": (entries * d * num_bytes + 3 * 4 * rows * d, 4 * entries * d),
        "_to_entries": (entries * d * num_bytes + 2 * num_bytes * rows * d, 4 * entries * d),
        "_to_weights": (2 * entries * d * num_bytes + 2 * 4 * m * d, 4 * entries * d),
        "_measure": (3 * 4 * m * d, 7 * m * d),
        "_move": (2 * ADAM_BYTES * m * d, 30 * m * d),
    }


def counted(case: Case, card: Card) -> Iterator[str]:
    """What the sparse step takes by these counts alone, on a card of these rates: no measurement."""
    yield f"| kernel | GB, bfloat16 | ms at {card.copy_bytes_per_second / 1e12:.1f} TB/s | GB, float32 | ms |"
    yield "|---|--:|--:|--:|--:|"
    rows, d, m = len(case.x), case.x.shape[1], case.num_features
    columns = []
    for num_bytes in (2, 4):
        # Copies in bfloat16: of the encoder always, of the decoder where it is read so.
        found = traffic(case, num_bytes) | {"copies": ((6 + 2) * d * m + (6 * d * m if num_bytes == 2 else 0), 0)}
        by_bytes = {name: total / card.copy_bytes_per_second for name, (total, _) in found.items()}
        product = {"_propose": found["_propose"][1] / card.bfloat16_operations_per_second}
        seconds = {name: max(each, product.get(name, 0)) for name, each in by_bytes.items()}
        found["all"], seconds["all"] = (sum(total for total, _ in found.values()), 0), sum(seconds.values())
        columns.append({name: (total / 1e9, 1000 * seconds[name]) for name, (total, _) in found.items()})
    for name in columns[0]:
        yield "| " + " | ".join([name, *(f"{gigabytes:.2f} | {ms:.2f}" for gigabytes, ms in (column[name] for column in columns))]) + " |"
    rates = ", ".join(f"{rows / (column['all'][1] / 1000):,.0f}" for column in columns)
    yield f"\nrows/s that these counts allow, with factors in bfloat16 and in float32: {rates}"


def breakdown(case: Case, card: Card, products: ProductsName) -> list[dict[str, Any]]:
    """The kernels of the sparse step, the longest first, with the shares of the card's rates that they reach."""
    step = our_step(case, products, is_sparse=True)
    for _ in range(3):
        step()
    counted = traffic(case, 2 if products == "bfloat16" else 4)
    rounds = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            step()
        torch.cuda.synchronize()
    lines = []
    for event in sorted(profile.key_averages(), key=lambda event: -event.device_time_total):
        seconds = event.device_time_total / 1e6 / rounds
        num_bytes, operations = counted.get(event.key, (0.0, 0.0))
        shares = {
            "of_copy_rate": num_bytes / seconds / card.copy_bytes_per_second,
            "of_product_rate": operations / seconds / card.bfloat16_operations_per_second if event.key == "_propose" else 0.0,
        }
        binds = max(shares, key=lambda name: shares[name]) if num_bytes else None
        lines.append(
            {"kernel": event.key[:60], "products": products, "milliseconds": seconds * 1000, "bytes": num_bytes, **shares, "binds": binds}
        )
    return lines[:20]


def table(found: dict[str, Any]) -> Iterator[str]:
    """What docs/performance.md takes over."""
    card = found["card"]
    copy, product = card["copy_bytes_per_second"] / 1e12, card["bfloat16_operations_per_second"] / 1e12
    rates = f"copy {copy:.2f} TB/s, bfloat16 product {product:.0f} TFLOP/s"
    yield f"{card['name']}: {rates}; torch {found['torch']}, triton {found['triton']}, {found['date']}"
    yield ""
    yield "| step | d_model | features | L0 | rows/s | of the floor's rate | peak GB |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for line in found["steps"]:
        shape = f"| {line['step']} | {line['d_model']} | {line['features']} | {line['l0']} |"
        if "skipped" in line:
            yield f"{shape} {line['skipped']} | | |"
        else:
            peak = "" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e9:.1f}"
            yield f"{shape} {line['rows_per_second']:,.0f} | {line['of_floor']:.2f} | {peak} |"
    for part in found["breakdowns"]:
        yield ""
        yield "| kernel | products | ms | GB | of the copy's rate | of the product's rate |"
        yield "|---|---|--:|--:|--:|--:|"
        for line in part:
            shares = f"{line['of_copy_rate']:.2f} | {line['of_product_rate']:.2f}" if line["bytes"] else "|"
            yield f"| {line['kernel']} | {line['products']} | {line['milliseconds']:.3f} | {line['bytes'] / 1e9:.2f} | {shares} |"


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--features", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument(
        "--l0",
        type=int,
        nargs="+",
        default=[64, 16, 256],
        help="the first one is for all steps, the others for ours, with the first number of features",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--counted", action="store_true", help="no measurement: bytes and operations at an H200's rates")
    parser.add_argument("--out", type=Path, help="a folder for gpu.json and gpu.md")
    options = parser.parse_args()
    if options.counted:
        h200 = Card("NVIDIA H200", 4.3e12, 790e12)
        for num_features in options.features:
            case = Case(torch.empty(options.rows, options.d_model, device="meta"), num_features, 0.0, options.l0[0])
            sys.stdout.write(f"\n{num_features} features\n\n" + "\n".join(counted(case, h200)) + "\n")
        return
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("gpu: torch sees no CUDA device here; give --device cpu to try the script\n")
        raise SystemExit(2)
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%d %B %Y")}
    found |= {"steps": [], "breakdowns": []}
    for num_features in options.features:
        card = measure_card(device, options.rows, options.d_model, num_features)
        found.setdefault("card", asdict(card))
        parameters = 2 * options.d_model * num_features
        encode = 2 * options.rows * options.d_model * num_features / card.bfloat16_operations_per_second
        floor = encode + ADAM_BYTES * parameters / card.copy_bytes_per_second
        for l0 in options.l0 if num_features == options.features[0] else options.l0[:1]:
            case = make_case(device, options.rows, options.d_model, num_features, l0)
            names = list(STEPS) if l0 == options.l0[0] else [name for name in STEPS if "bfloat16" in name and "without" not in name]
            for line in measure_steps(case, names, options.rounds):
                if "skipped" not in line:
                    line["of_floor"] = floor / (line["milliseconds"] / 1000)
                found["steps"].append(line)
                sys.stderr.write(json.dumps(line) + "\n")
        if device.type == "cuda":
            case = make_case(device, options.rows, options.d_model, num_features, options.l0[0])
            found["breakdowns"] += [breakdown(case, card, products) for products in ("bfloat16", "float32")]
    shown = "\n".join(table(found)) + "\n"
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "gpu.md").write_text(shown)
    sys.stdout.write(shown + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
