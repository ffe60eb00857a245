"""A harvest, a training and an evaluation on many ranks, simulated. In: what a step costs, what goes wrong. Out: hours, and what binds.

    .venv/bin/python benchmarks/simulate.py                 # Llama-2-70B, 10 sites, M 1,048,576, on 64, 256 and 1,024 GPUs: tables
    .venv/bin/python benchmarks/simulate.py --json          # the same as one JSON line
    .venv/bin/python benchmarks/small_runs.py               # real runs on CPU ranks against this simulation: one JSON line

A stage is a queue of tasks (sites) that groups of ranks take, each of many equal units (steps, LLM batches, rounds). A unit takes
    max(compute, what all groups that work read or write / the disk's rate) + communication + a share of the checkpoints
where compute is that of the slowest rank: of R ranks whose times spread normally the mean of the largest is taken. A rank that fails or is
preempted stops the whole job: every group falls back to its last checkpoint, and all begin anew after the start-up time. Failures come at
exponential intervals, or at given moments.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import LlamaConfig

from gsae.config import Config, LLMConfig
from gsae.plan.communication import communication
from gsae.plan.disk import checkpoint_bytes, row_bytes
from gsae.plan.grid import Grid, find_grids
from gsae.plan.llm import llm_needs, read_shape
from gsae.plan.memory import part_parameters
from gsae.settings import read_config
from gsae.train.chores import checkpoint_interval
from gsae.train.plan import BankSpec, StoreOutline, plan_banks

GB, GIB, HOUR = 1e9, 2**30, 3600
DRAWS = 20
"""Simulations of each stage, with failures at other moments; their mean is given, and the worst."""


@dataclass(frozen=True)
class Stage:
    """What is to be done, and what it costs when nothing goes wrong."""

    tasks: int
    groups: int
    units: int
    """Of a task."""
    compute_seconds: float
    """Of a unit, on a rank."""
    ranks_per_group: int = 1
    spread: float = 0.0
    """Standard deviation of a rank's compute time, as a share of it; the ranks of a group wait for each other."""
    slow_seconds: float = 0.0
    """By which one rank of each group is slower in each unit."""
    told_seconds: float = 0.0
    """Communication of a unit that nothing hides."""
    hidden_seconds: float = 0.0
    """Communication of a unit beside the computation; the longer of both counts."""
    disk_bytes: float = 0.0
    """That a group reads or writes in a unit."""
    disk_rate: float = float("inf")
    """Bytes a second, of all groups together."""
    saved_every: int = 1
    """Units between two checkpoints."""
    save_seconds: float = 0.0
    """For which a checkpoint holds up the ranks."""
    start_seconds: float = 0.0
    """From the start of the job to its first unit, and again after a failure."""
    task_seconds: float = 0.0
    """From a task's turn to its first unit."""


@dataclass
class Outcome:
    """What came of a stage."""

    seconds: float
    failures: int = 0
    lost_seconds: float = 0.0
    """Of all groups together: units done twice."""
    idle_seconds: float = 0.0
    """Of all groups together: with no task left."""
    seconds_of: dict[str, float] = field(default_factory=dict)
    """Of all groups together: the time by what it went for most."""

    @property
    def binds(self) -> str:
        """What bound for longest."""
        return max(self.seconds_of, key=self.seconds_of.__getitem__)


@cache
def largest_of(ranks: int) -> float:
    """The mean of the largest of so many standard normal numbers, from draws."""
    generator = torch.Generator().manual_seed(0)
    return 0.0 if ranks == 1 else float(torch.randn(4096, ranks, generator=generator).amax(1).mean())


def unit_seconds(stage: Stage, working: int) -> tuple[float, str]:
    """A unit while so many groups work, and what takes longest in it."""
    compute = stage.compute_seconds * (1 + stage.spread * largest_of(stage.ranks_per_group)) + stage.slow_seconds
    parts = {
        "compute": compute,
        "disk": stage.disk_bytes * working / stage.disk_rate,
        "network": stage.hidden_seconds,
    }
    longest = max(parts, key=parts.__getitem__)
    seconds = parts[longest] + stage.told_seconds
    return seconds + stage.save_seconds / stage.saved_every, "network" if stage.told_seconds > seconds / 2 else longest


@dataclass
class _Group:
    """A group at work."""

    left: float
    """Units of its task."""
    since_saved: float = 0.0
    waits: float = 0.0
    """Seconds until its next unit begins."""


def simulate(stage: Stage, failures: Iterator[float] | None = None) -> Outcome:
    """One course of a stage; `failures` are the seconds from each failure, or the start, to the next."""
    left, clock, found = stage.tasks, 0.0, Outcome(0.0)
    failures = iter(()) if failures is None else failures
    next_failure = next(failures, float("inf"))
    groups: list[_Group | None] = [None] * stage.groups

    def take(waits: float) -> None:
        nonlocal left
        for place, group in enumerate(groups):
            if group is None and left:
                left -= 1
                groups[place] = _Group(stage.units, waits=waits + stage.task_seconds)

    take(stage.start_seconds)
    while any(groups):
        working = [group for group in groups if group is not None]
        seconds, longest = unit_seconds(stage, len(working))
        ends = min(group.waits + group.left * seconds for group in working)
        span = min(ends, next_failure - clock)
        for group in working:
            waited = min(span, group.waits)
            group.waits -= waited
            done = (span - waited) / seconds
            group.left -= done
            group.since_saved = (group.since_saved + done) % stage.saved_every
        clock += span
        found.seconds_of[longest] = found.seconds_of.get(longest, 0.0) + span * len(working)
        found.idle_seconds += span * (stage.groups - len(working))
        if clock >= next_failure:
            for group in working:
                found.lost_seconds += group.since_saved * seconds
                group.left += group.since_saved
                group.since_saved, group.waits = 0.0, stage.start_seconds + stage.task_seconds
            found.failures += 1
            next_failure = clock + next(failures, float("inf"))
        else:
            groups = [None if group is None or group.left * seconds + group.waits < 1e-9 * max(1.0, clock) else group for group in groups]
            take(0.0)
    found.seconds = clock
    return found


def intervals(mean_seconds: float, seed: int) -> Iterator[float]:
    """Exponential ones."""
    generator = random.Random(seed)
    while True:
        yield generator.expovariate(1 / mean_seconds)


# Llama-2-70B


@dataclass(frozen=True)
class Figure:
    """An input, and where it is from."""

    value: float
    unit: str
    source: str


LLAMA_3 = "Llama 3's training, arXiv 2407.21783"
INPUTS = {
    "memory": Figure(139 * GIB, "bytes of a GPU", "an H200 as CUDA reports it"),
    "copy rate": Figure(4.3e12, "bytes/s of a GPU's memory", "H200s seen to copy (docs/performance.md, On a GPU)"),
    "product rate": Figure(790e12, "operations/s, bfloat16 products", "H200s seen to multiply (docs/performance.md, On a GPU)"),
    "LLM utilisation": Figure(0.40, "of 989e12 operations/s", f"38 to 43 % in {LLAMA_3}, section 3.3; NVIDIA's H100 data sheet"),
    "link in a node": Figure(450 * GB, "bytes/s of a GPU, each way", "NVLink 4: 900 GB/s both ways, DGX SuperPOD H100 architecture"),
    "link between nodes": Figure(50 * GB, "bytes/s of a GPU, each way", "a 400 Gb/s port a GPU, DGX SuperPOD H100 architecture"),
    "disk": Figure(2e12 / 16_384, "bytes/s for each GPU of the job", f"2 TB/s sustained for 16,384 GPUs in {LLAMA_3}, section 3.3"),
    "failures": Figure(54 * 24 * HOUR * 16_384 / 419, "seconds between those of a GPU", f"419 in 54 days on 16,384 GPUs in {LLAMA_3}"),
    "preemptions": Figure(2.0 * HOUR, "seconds between those of the job", "assumed, to see what they cost"),
    "start-up": Figure(300.0, "seconds", "assumed: 138 GB of weights from that disk for 8 GPUs are 141 s, as much for Slurm and Python"),
    "spread": Figure(0.02, "of a rank's compute time", "assumed; the check measures that of CPU ranks"),
    "L0": Figure(64.0, "features on a row", "assumed"),
}
GPUS_PER_NODE = 8
SITES, ROWS, NUM_FEATURES, HELD_OUT_TOKENS = 10, 10**9, 2**20, 10**6
"""As in the config."""
LLAMA_2_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32_000,
    architectures=["LlamaForCausalLM"],
)
"""As its config.json says (Touvron et al. 2023, arXiv 2307.09288)."""


def value(name: str) -> float:
    """An input's value."""
    return INPUTS[name].value


CONFIG = Path(__file__).parents[1] / "configs/llama2_70b_million.yaml"
"""One gated run with resampling at each of ten sites, rows stored as int8."""


def bank_of(config: Config) -> BankSpec:
    """The run of one site."""
    return plan_banks(config, StoreOutline(LLAMA_2_70B.num_hidden_layers, LLAMA_2_70B.hidden_size, {"resid.42": 42}, {"resid.42": 1.0}))[0]


def step_seconds(rows: int, num_features: int) -> float:
    """The sparse step and update by counted bytes and operations (benchmarks/gpu.py --counted), factors in bfloat16."""
    d, entries = LLAMA_2_70B.hidden_size, rows * value("L0") * num_features / NUM_FEATURES
    proposal = max(
        (2 * d * (rows + num_features) + rows * num_features / 8) / value("copy rate"), 2 * rows * d * num_features / value("product rate")
    )
    gathered = (entries * d * 2 * 5 + rows * d * (3 * 4 + 3 * 2)) / value("copy rate")  # values, two decodes, to entries, two to weights
    of_weights = num_features * d * (2 * 4 + 3 * 4 + 2 * 28 + 14) / value("copy rate")  # gradients, norm, Adam, bfloat16 copies
    return proposal + gathered + of_weights


def stages(gpus: int) -> dict[str, Any]:
    """What `gsae plan`'s figures and the simulation say for so many GPUs."""
    config = read_config("plan", [str(CONFIG), "--corpus.num_lanes", str(max(64, gpus))])
    bank, failure = bank_of(config), 1 / (gpus / value("failures") + 1 / value("preemptions"))
    disk_rate = value("disk") * gpus
    groups, grid, training = best_training(config, bank, gpus, disk_rate)
    in_groups = replace(config, train=replace(config.train, groups=groups))
    harvest, bytes_written = harvest_stage(config, gpus, disk_rate)
    evaluation, columns, evaluation_bytes = evaluation_stage(config, bank, gpus)
    found: dict[str, Any] = {
        "gpus": gpus,
        "store_terabytes": SITES * ROWS * (row_bytes(LLAMA_2_70B.hidden_size, "int8") + 12) / 1e12,
        "checkpoint_terabytes": checkpoint_bytes(in_groups, [replace(bank, site=f"resid.{site}") for site in range(SITES)]) / 1e12,
        "training_gib_per_gpu": grid.device_bytes_per_rank / GIB,
        "training": f"{groups} groups of {grid.row_ranks} x {grid.feature_ranks}",
        "sent_gigabytes_per_step": grid.sent_bytes_per_step / GB,
        "evaluation_gib_per_gpu": evaluation_bytes / GIB,
        "evaluation": f"{gpus // columns} x {columns}" + ("" if evaluation_bytes <= value("memory") else ", does not fit"),
        "bytes_moved_terabytes": {
            "harvest": (bytes_written * gpus * harvest.units + harvest.hidden_seconds * harvest.units * value("link between nodes") * gpus)
            / 1e12,
            "training": SITES * bank.total_steps * grid.sent_bytes_per_step * gpus / groups / 1e12,
        },
    }
    for name, stage in {"harvest": harvest, "training": training, "evaluation": evaluation}.items():
        courses = [simulate(stage, intervals(failure, seed)) for seed in range(DRAWS)]
        undisturbed = simulate(stage)
        found[name + "_hours"] = {
            "undisturbed": undisturbed.seconds / HOUR,
            "mean": mean(course.seconds for course in courses) / HOUR,
            "worst": max(course.seconds for course in courses) / HOUR,
            "failures": mean(course.failures for course in courses),
            "lost_group_hours": mean(course.lost_seconds for course in courses) / HOUR,
            "idle_group_hours": undisturbed.idle_seconds / HOUR,
            "binds": undisturbed.binds,
        }
    return found


def harvest_stage(config: Config, gpus: int, disk_rate: float) -> tuple[Stage, float]:
    """All ranks in step, each with a batch of contexts; the layers' weights travel beside the computation."""
    needs = llm_needs(config, shape(), LLAMA_2_70B.num_hidden_layers - 2, SITES, gpus, 0)
    tokens = config.harvest.batch_contexts * config.harvest.context_length
    compute = 2 * needs.harvest_parameters * tokens / (value("LLM utilisation") * 989e12)
    written = SITES * tokens * (row_bytes(LLAMA_2_70B.hidden_size, "int8") + 12)
    stage = Stage(
        tasks=1, groups=1, units=-(-ROWS // (tokens * gpus)), compute_seconds=compute, ranks_per_group=gpus, spread=value("spread"),
        hidden_seconds=needs.bytes_received_per_forward_zero3 / value("link between nodes"), disk_bytes=written * gpus, disk_rate=disk_rate,
        saved_every=config.harvest.contexts_per_shard // config.harvest.batch_contexts, start_seconds=value("start-up"),
    )  # fmt: skip
    return stage, written


def best_training(config: Config, bank: BankSpec, gpus: int, disk_rate: float) -> tuple[int, Grid, Stage]:
    """The groups, and of the grids that `gsae plan` finds to fit the one, with which training is through first."""
    options = []
    for groups in (count for count in range(1, gpus + 1) if gpus % count == 0):
        ranks = gpus // groups
        grids = find_grids(config, [bank], ranks, round(value("memory") - 10 * GIB), None)
        if grids is None or not grids.chosen.fits:
            continue
        grid = min(
            (grid for grid in grids.possible if grid.fits),
            key=lambda grid: simulate(training_stage(config, bank, groups, grid, disk_rate)).seconds,
        )
        stage = training_stage(config, bank, groups, grid, disk_rate)
        options.append((simulate(stage).seconds, groups, grid, stage))
    _, groups, grid, stage = min(options, key=lambda option: option[0])
    return groups, grid, stage


def training_stage(config: Config, bank: BankSpec, groups: int, grid: Grid, disk_rate: float) -> Stage:
    """Feature ranks are neighbours in a node as far as they fit one; row ranks are in several."""
    split = replace(config, train=replace(config.train, feature_ranks=grid.feature_ranks))
    told = communication(split, bank, grid.row_ranks * grid.feature_ranks, None)
    columns, rows = grid.feature_ranks, grid.row_ranks
    across = value("link in a node" if columns <= GPUS_PER_NODE else "link between nodes")
    features = (2 * (columns - 1) / columns * told.feature_bytes_per_step + told.row_bytes_per_step) / across
    gradients = (
        2
        * (rows - 1)
        / rows
        * told.gradient_bytes_per_step
        / value("link between nodes" if rows * columns > GPUS_PER_NODE else "link in a node")
    )
    state = 3 * 4 * part_parameters(bank.runs[0], columns)
    return Stage(
        tasks=SITES, groups=groups, units=bank.total_steps, compute_seconds=step_seconds(bank.batch_rows // rows, NUM_FEATURES // columns),
        ranks_per_group=rows * columns, spread=value("spread"), told_seconds=features + gradients,
        disk_bytes=bank.batch_rows * row_bytes(LLAMA_2_70B.hidden_size, "int8"), disk_rate=disk_rate,
        saved_every=checkpoint_interval(bank.total_steps, config.train), save_seconds=state / (50 * GB),  # copied to the host over PCIe 5
        start_seconds=value("start-up"),
    )  # fmt: skip


def evaluation_stage(config: Config, bank: BankSpec, gpus: int) -> tuple[Stage, int, int]:
    """The LLM whole on each rank, all sites' dictionaries split over as few as hold them; three ways through the layers above each site."""
    columns = 1
    while True:
        sae_bytes = SITES * 4 * part_parameters(bank.runs[0], columns)
        needs = llm_needs(config, shape(), 78, SITES, gpus, sae_bytes)
        if needs.evaluation_bytes_per_rank <= value("memory") or columns * 2 > gpus:
            break
        columns *= 2
    tokens = config.evaluate.batch_contexts * config.harvest.context_length
    ways = 1 + 3 * SITES / 2  # sites stand half-way up on average
    compute = 2 * needs.parameters * tokens * ways / (value("LLM utilisation") * 989e12)
    compute += SITES * 4 * tokens * LLAMA_2_70B.hidden_size * NUM_FEATURES / columns / value("product rate")
    across = value("link between nodes" if columns > GPUS_PER_NODE else "link in a node")
    told = SITES * 2 * tokens * LLAMA_2_70B.hidden_size * 4 / across
    units = -(-HELD_OUT_TOKENS // (tokens * (gpus // columns)))
    stage = Stage(
        1,
        1,
        units,
        compute,
        gpus,
        value("spread"),
        told_seconds=told,
        saved_every=max(1, int(300 / compute)),
        start_seconds=value("start-up"),
    )
    return stage, columns, needs.evaluation_bytes_per_rank


@cache
def shape() -> Any:
    """Of Llama-2-70B."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        LLAMA_2_70B.save_pretrained(folder)
        return read_shape(LLMConfig(model=folder))


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Rows of a table, a column a number of GPUs."""

    def line(label: str, *cells: str) -> str:
        return "| " + " | ".join([label, *cells]) + " |"

    yield line("GPUs", *(f"{each['gpus']:,}" for each in found))
    yield "|---|" + "--:|" * len(found)
    yield line("store, TB", *(f"{each['store_terabytes']:.1f}" for each in found))
    yield line("checkpoints, TB", *(f"{each['checkpoint_terabytes']:.1f}" for each in found))
    yield line("training", *(each["training"] for each in found))
    yield line("GiB a GPU, training", *(f"{each['training_gib_per_gpu']:.0f}" for each in found))
    yield line("GB that a GPU sends a step", *(f"{each['sent_gigabytes_per_step']:.2f}" for each in found))
    yield line("evaluation, rows x features", *(each["evaluation"] for each in found))
    yield line("GiB a GPU, evaluation", *(f"{each['evaluation_gib_per_gpu']:.1f}" for each in found))
    for stage in ("harvest", "training", "evaluation"):
        hours = [each[f"{stage}_hours"] for each in found]
        yield line(f"{stage}, hours", *(f"{each['undisturbed']:.2f}" for each in hours))
        yield line("... with failures and preemptions, mean (worst)", *(f"{each['mean']:.2f} ({each['worst']:.2f})" for each in hours))
        yield line("... what binds", *(each["binds"] for each in hours))
        yield line("... how many of them", *(f"{each['failures']:.2f}" for each in hours))
        if stage != "evaluation":
            yield line("... moved, TB", *(f"{each['bytes_moved_terabytes'][stage]:,.0f}" for each in found))
    yield line("idle group-hours of training", *(f"{each['training_hours']['idle_group_hours']:.1f}" for each in found))


def main() -> None:
    """Print the tables, or the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [stages(gpus) for gpus in options.gpus]
    if options.json:
        sys.stdout.write(json.dumps({"inputs": {name: asdict(each) for name, each in INPUTS.items()}, "found": found}) + "\n")
        return
    inputs = "\n".join(f"| {name} | {each.value:.4g} {each.unit} | {each.source} |" for name, each in INPUTS.items())
    sys.stdout.write(f"| input | value | source |\n|---|---|---|\n{inputs}\n\n" + "\n".join(table(found)) + "\n")


if __name__ == "__main__":
    main()
