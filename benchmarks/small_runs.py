"""Real runs on two CPU ranks against the simulation. In: nothing. Out: one JSON line: what was measured, foretold, and took place.

    .venv/bin/python benchmarks/small_runs.py

A random Llama of four layers reads this repository's sources; three sites are harvested, one gated SAE of 1,024 features is trained at
each, and all are evaluated, each stage by its command line under `accelerate launch`. What simulate.py is given is measured on the way:
- start-up, from jobs of one or two steps;
- a unit (a step, or a second's tokens) on one rank and its spread, from two jobs of one rank each that run at once, as the ranks of a job
  do; for ranks that share rows or features, from jobs of half the rows or half the features;
- sums over two ranks, from sums of 1 KiB and 4 MiB; and what a sum takes longer after work, when who waits must wake up. Ranks that
  share rows meet once in a step, for the gradients; those that share features three times.
Scenarios: sites queued over two groups; rows shared; features shared; a rank slowed down by a sleep in each step; a disk slowed down to
half of what training would read; SIGKILL of all ranks and a second job; a harvest; an evaluation. `ratio` is the time that took place over
the time foretold, start-up included.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml
from simulate import Stage, largest_of, simulate

STEPS, FEW_STEPS, D_MODEL, NUM_FEATURES, BATCH_ROWS, SITES = 400, 2, 64, 1024, 512, 3
SLEEP_SECONDS = 0.02
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "1"))
"""Of each scenario of training; the median counts."""


def config(folder: Path, name: str, **train: Any) -> Path:
    """A config of its own output, over one store."""
    sweep = {"objective": "gated", "expansions": [train.pop("features", NUM_FEATURES) / D_MODEL], "lambdas": {"*": [0.1]}}
    rows, steps = train.pop("batch_rows", BATCH_ROWS), train.pop("steps", STEPS)
    settings = {
        "output": str(folder / name),
        "device": "cpu",
        "corpus": {"format": "text", "path": str(folder / "text/**/*.py"), "max_document_characters": 4000,
                   "piece_characters": 300, "num_lanes": 8, "held_out_fraction": 0.25},
        "llm": {"model": "random", "dtype": "float32", "random": {"num_layers": SITES + 1, "d_model": D_MODEL, "num_heads": 2}},
        "harvest": {"sites": list(range(SITES)), "context_length": 64, "batch_contexts": 8, "contexts_per_shard": 16,
                    "calibration_contexts": 16, "store": str(train.pop("store", folder / "store"))},
        "train": {"total_rows": steps * rows, "batch_rows": rows, "window_rows": 8192, "learning_rate": 5e-3, "log_every_steps": 20,
                  "sparse_below_density": 0.0, "sweeps": [sweep], **train},
        "evaluate": {"max_tokens": 40_000, "max_document_tokens": 4_000, "min_documents": 2, "bootstrap_draws": 50},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def launch(ranks: int, *program: str) -> "subprocess.Popen[str]":
    """So many ranks of a program."""
    port = 20_000 + (os.getpid() * 7 + time.monotonic_ns() // 10**6) % 20_000
    how = ["--config_file", "launch/accelerate/cpu.yaml", "--num_processes", str(ranks), "--main_process_port", str(port)]
    launcher = ["-m", "accelerate.commands.launch", *how] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, *launcher, *program], subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True)


def start(ranks: int, *words: str | Path, **slowed: float | Path) -> "subprocess.Popen[str]":
    """A job, as users start it; `slowed` are the options of `be_rank`."""
    options = [word for name, value in slowed.items() for word in (f"--{name}", str(value))]
    return launch(ranks, *([str(Path(__file__)), *options, "--rank"] if slowed else ["-m", "gsae"]), *map(str, words))


def timed(*jobs: "subprocess.Popen[str]", begun: float) -> float:
    """Wait for jobs; the seconds since they were begun."""
    for job in jobs:
        output, _ = job.communicate()
        if job.returncode:
            raise SystemExit(f"{' '.join(map(str, job.args))} ended with {job.returncode}:\n{output[-3000:]}")
    return time.monotonic() - begun


def run(ranks: int, *words: str | Path, **slowed: float | Path) -> float:
    """The seconds of a job from its start to its end."""
    begun = time.monotonic()
    return timed(start(ranks, *words, **slowed), begun=begun)


def step_seconds(folder: Path, name: str, **train: Any) -> tuple[float, float]:
    """Of one rank beside another: the mean of two jobs that run at once, all that a training does included; and its spread.

    The spread is such that the mean of the longer of two normal steps is that of the longer of the jobs' own, taken in pairs.
    """
    configs = [config(folder, f"{name}-{number}", sites=[0], steps=STEPS // 2, **train) for number in range(2)]
    times = [folder / f"{name}-{number}.json" for number in range(2)]
    begun = time.monotonic()
    timed(*(start(1, "train", each, times=path) for each, path in zip(configs, times, strict=True)), begun=begun)
    moments = [json.loads(path.read_text()) for path in times]
    steps = [[later - sooner for sooner, later in pairwise(of_job)] for of_job in moments]
    longer = mean(max(pair) for pair in zip(*steps, strict=True))
    alone = mean(map(mean, steps))
    return alone, (longer / alone - 1) / largest_of(2)


def link() -> tuple[float, float, float]:
    """Seconds of a small sum over two ranks that are both there, what it takes longer after work, and bytes a second of a large one."""
    output, _ = launch(2, str(Path(__file__)), "--link").communicate()
    small, meeting, large = json.loads(next(line for line in output.splitlines() if line.startswith("[")))
    return small, meeting, 2**22 / (large - small)


def measure_link() -> None:
    """A rank of `link`: sums of 1 KiB, the same after products that take as long as a step, sums of 4 MiB."""
    import torch

    from gsae.world import start as join

    matrix = torch.randn(512, 512)
    with join("cpu") as world:

        def round_of(size: int, products: int) -> float:
            """What the sum takes, of the rank that was the last to be there."""
            values, begun = torch.zeros(size), time.perf_counter()
            for _ in range(products):
                matrix @ matrix
            worked = time.perf_counter() - begun
            world.everyone.reduce(values, "sum")
            whole = time.perf_counter() - begun
            return float(world.everyone.reduce(torch.tensor(whole - worked), "min"))

        times = [mean(round_of(size, products) for _ in range(100)) for size, products in ((2**8, 0), (2**8, 12), (2**20, 0))]
        if world.is_first:
            sys.stdout.write(json.dumps([times[0], times[1] - times[0], times[2]]) + "\n")


def be_rank(words: Sequence[str], sleep: float, read_rate: float, times: Path | None) -> None:
    """A rank of gsae; the last one sleeps in each step, reads pass at so many bytes a second, and the moments of steps are left."""
    from gsae.cli import main as gsae
    from gsae.store.windows import LaneReader
    from gsae.train import bank

    if times is not None:
        moments: list[float] = []
        timed_step = bank.train_step

        def note(*arguments: Any) -> None:
            timed_step(*arguments)
            moments.append(time.perf_counter())
            times.write_text(json.dumps(moments))

        bank.train_step = note  # type: ignore[assignment]

    if sleep and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        plain_step = bank.train_step

        def slow_step(*arguments: Any) -> None:
            time.sleep(sleep)
            plain_step(*arguments)

        bank.train_step = slow_step  # type: ignore[assignment]
    if read_rate:
        plain_load = LaneReader.load

        def slow_load(self: LaneReader, window: Any, begin: int, skip: int, *rest: Any) -> None:
            time.sleep((window.num_rows - skip) * 2 * D_MODEL / read_rate)
            plain_load(self, window, begin, skip, *rest)

        LaneReader.load = slow_load  # type: ignore[method-assign]
    gsae(list(words))


def killed_and_again(path: Path, after: float) -> float:
    """A job that is killed after so many seconds, and the same once more: the seconds of both."""
    begun = time.monotonic()
    job = start(2, "train", path)
    time.sleep(after)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    again = start(2, "train", path)
    return timed(again, begun=begun)


def main() -> None:
    """Measure, foretell, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sleep", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--read-rate", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.link:
        measure_link()
        return
    if options.rank is not None:
        be_rank(options.rank, options.sleep, options.read_rate, options.times)
        return
    with tempfile.TemporaryDirectory() as name:
        found = compare(Path(name))
    sys.stdout.write(json.dumps({"machine": f"{os.cpu_count()} cores, {platform.machine()}", **found}) + "\n")


def compare(folder: Path) -> dict[str, Any]:
    """All scenarios."""
    shutil.copytree("gsae", folder / "text", ignore=shutil.ignore_patterns("__pycache__"))
    harvest, harvest_seconds = measure_harvest(folder)
    small, meeting, rate = link()
    whole, whole_spread = step_seconds(folder, "whole")
    half_rows, rows_spread = step_seconds(folder, "rows", batch_rows=BATCH_ROWS // 2)
    half_features, features_spread = step_seconds(folder, "features", features=NUM_FEATURES // 2)
    begin = {
        groups: run(2, "train", config(folder, f"begin-{groups}", groups=groups, steps=FEW_STEPS, sites=[0, 1][:groups]))
        for groups in (1, 2)
    }
    three = run(2, "train", config(folder, "three", groups=1, steps=FEW_STEPS))
    task = max(0.0, (three - begin[1]) / (SITES - 1))
    every = STEPS // 10
    base = Stage(SITES, 2, STEPS, whole, start_seconds=begin[2], task_seconds=0.0, saved_every=every)
    base = replace(base, task_seconds=task, start_seconds=begin[2] - task)
    alone = replace(base, tasks=1, groups=1, ranks_per_group=2, start_seconds=begin[1] - task)
    gradients, features = 4 * (2 * D_MODEL * NUM_FEATURES + 3 * NUM_FEATURES + D_MODEL), 4 * D_MODEL * (2 * BATCH_ROWS + 1)
    rows_told, features_told = 2 * small + meeting + gradients / rate, 6 * small + 3 * meeting + features / rate
    read = BATCH_ROWS * 2 * D_MODEL
    shared = replace(alone, compute_seconds=half_rows, spread=rows_spread, told_seconds=rows_told)
    slow_rate = read / (2 * (half_rows + rows_told))
    stages = {
        "queue": base,
        "rows": shared,
        "features": replace(alone, compute_seconds=half_features, spread=features_spread, told_seconds=features_told),
        "slow rank": replace(shared, slow_seconds=SLEEP_SECONDS),
        "slow disk": replace(shared, disk_bytes=read, disk_rate=slow_rate),
    }
    foretold = {name: simulate(stage).seconds for name, stage in stages.items()}
    killed_after = begin[2] + 0.6 * SITES / 2 * STEPS * whole
    foretold["killed"] = simulate(base, iter([killed_after])).seconds
    foretold["harvest"] = harvest
    slow_reads = {"read-rate": slow_rate / 2}
    jobs: dict[str, Callable[[int], float]] = {
        "queue": lambda n: run(2, "train", config(folder, f"queue-{n}", groups=2)),
        "rows": lambda n: run(2, "train", config(folder, f"shared-rows-{n}", sites=[0])),
        "features": lambda n: run(2, "train", config(folder, f"shared-features-{n}", sites=[0], feature_ranks=2)),
        "slow rank": lambda n: run(2, "train", config(folder, f"slow-rank-{n}", sites=[0]), sleep=SLEEP_SECONDS),
        "slow disk": lambda n: run(2, "train", config(folder, f"slow-disk-{n}", sites=[0], read_threads=1), **slow_reads),
        "killed": lambda n: killed_and_again(config(folder, f"killed-{n}", groups=2), killed_after),
    }
    took = {name: median(job(n) for n in range(ROUNDS)) for name, job in jobs.items()} | {"harvest": harvest_seconds}
    foretold["evaluation"], took["evaluation"] = measure_evaluation(folder)
    spreads = {"spread": whole_spread, "spread of half the rows": rows_spread, "spread of half the features": features_spread}
    inputs = {
        **spreads,
        "step": whole,
        "step of half the rows": half_rows,
        "step of half the features": half_features,
        "start-up": begin[2],
        "task": task,
    }
    return {
        "inputs": {**inputs, "small sum": small, "meeting": meeting, "sum bytes/s": rate},
        "foretold": foretold,
        "took": took,
        "ratio": {name: took[name] / foretold[name] for name in took},
    }


def measure_harvest(folder: Path) -> tuple[float, float]:
    """A harvest on two ranks: seconds foretold, and taken. From a short one, and one rank's whole one beside another's."""
    short = config(folder, "short", store=folder / "short-store")
    begin = run(2, "harvest", short, "--harvest.max_tokens", "16384", "--corpus.num_lanes", "8")
    alone = [config(folder, f"alone-{number}", store=folder / f"store-{number}") for number in range(2)]
    begun = time.monotonic()
    both = timed(*(start(1, "harvest", each) for each in alone), begun=begun)
    once = [config(folder, f"once-{number}", store=folder / f"once-store-{number}") for number in range(2)]
    begun = time.monotonic()
    first = timed(*(start(1, "harvest", each, "--harvest.max_tokens", "16384") for each in once), begun=begun)
    stage = Stage(1, 1, 100, (both - first) / 100 / 2, ranks_per_group=2, start_seconds=begin)
    took = run(2, "harvest", config(folder, "store-of-all"))
    return simulate(stage).seconds, took


def measure_evaluation(folder: Path) -> tuple[float, float]:
    """An evaluation of the three sites on two ranks, likewise."""
    outputs = [config(folder, f"evaluated-{number}", steps=FEW_STEPS) for number in range(5)]
    for path in outputs:
        run(1, "train", path)
    few = ("--evaluate.max_tokens", "4000")
    begin = run(2, "evaluate", outputs[0], *few)
    begun = time.monotonic()
    first = timed(*(start(1, "evaluate", path, *few) for path in outputs[1:3]), begun=begun)
    for path in outputs[1:3]:
        for results in Path(yaml.safe_load(path.read_text())["output"]).rglob("results.json"):
            results.unlink()
    begun = time.monotonic()
    both = timed(*(start(1, "evaluate", path) for path in outputs[1:3]), begun=begun)
    stage = Stage(1, 1, 100, (both - first) / 100 / 2, ranks_per_group=2, start_seconds=begin)
    return simulate(stage).seconds, run(2, "evaluate", outputs[3])


if __name__ == "__main__":
    main()
