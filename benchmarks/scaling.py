"""What several ranks, several runs and the chores cost a training. In: a store of real activations. Out: one JSON line.

    .venv/bin/python benchmarks/scaling.py --store runs/demo/store --site resid.15
    .venv/bin/python benchmarks/scaling.py --parts chores --d-model 4096 --features 32768 --batch-rows 4096      # on a GPU

Gates are opened as far as `--l0` says, steps are the sparse ones, and the learning rate leaves them so. Parts:
- traffic: 1, 2 and 4 CPU ranks train two runs with all chores. `sent_bytes_per_step` is what TCP sent from a rank's own sockets (Linux),
  on average over ranks and steps, first without chores, then with them; `planned` is what `gsae plan` says of the same runs.
- ranks: steps of two CPU ranks on half batches in turn with steps of one of them on whole ones. Efficiency is the time of the one
  over twice the time of the two.
- bank: eight runs from one stream in turn with each of them from a stream of its own, and with each on rows in memory. `ratio` is the
  time of the eight together over the sum of their times alone, first as trainings of their own, then as steps and nothing else.
  `read_bytes` is what the process read (Linux), for the same number of batches.
- chores: a training of one run on made-up rows with logs, resampling, checkpoints and questions whether to stop, more of them a step
  than a real one has, in turn with bare updates on rows that are there. It is timed from its tenth step to its last.
Figures are medians of rounds, ratios the medians of the rounds' own ratios.
"""

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from gsae.config import Config, ResamplingConfig, SweepConfig, TrainConfig
from gsae.console import open_console
from gsae.heartbeat import heartbeat
from gsae.plan.communication import communication
from gsae.store import manifest as manifests
from gsae.store.durable import write_json_atomically
from gsae.store.runs import METRICS_FILE, RUN_FILE
from gsae.store.stopping import StopRequest
from gsae.store.stream import Batch, Stream
from gsae.train.bank import Bank, Chore, Stretch, make_run, train, train_step
from gsae.train.checkpoint import Keep
from gsae.train.chores import ChooseStep, Log, Resample, SaveCheckpoints
from gsae.train.parts import find_stretch
from gsae.train.plan import BankSpec, RunSpec, outline, plan_banks
from gsae.train.saving import Background, Saver
from gsae.train.step import update
from gsae.train.stop import StopOnRequest
from gsae.world import Group, World, cut_into_groups, start

LEARNING_RATE = 1e-9  # so small that the number of open gates stays what it is
WARM_UP_STEPS = 10
FEW_BYTES = 10_000
"""More than looking itself reads, less than any shard."""
QUIET_LOOKS = 4
"""In a row, after which nothing more is being read."""
BYTES_SENT_AT = 200
"""Where Linux's struct tcp_info has the bytes that a socket sent."""


def make_config(options: argparse.Namespace, folder: Path, num_runs: int, **settings: Any) -> Config:
    """Runs of a site of the store that differ in lambda."""
    manifest = manifests.load(options.store)
    lambdas = {options.site: [0.1 + 0.01 * number for number in range(num_runs)]}
    sweep = SweepConfig("gated", lambdas=lambdas, expansions=[options.features / manifest.d_model], resampling=True)
    sizes = {"batch_rows": options.batch_rows, "window_rows": options.window_rows, "total_rows": options.batch_rows * options.steps}
    chosen = {"learning_rate": LEARNING_RATE, "verify_shards": False, "sites": [options.site], "sweeps": [sweep], **sizes, **settings}
    config = Config()
    corpus, harvest = replace(config.corpus, num_lanes=manifest.num_lanes), replace(config.harvest, store=str(options.store))
    return replace(config, output=str(folder), corpus=corpus, harvest=harvest, train=TrainConfig(**chosen))


def make_bank(config: Config, spec: BankSpec, stretch: Stretch, group: Group) -> Bank:
    """A bank at its first step. Its runs count as pilots, which are not stopped for an FVU over 1."""
    spec = replace(spec, is_pilot=True)
    directories = {run.name: Path(config.output) / run.name for run in spec.runs}
    for directory in directories.values():
        if group.is_first:
            directory.mkdir(parents=True, exist_ok=True)
            write_json_atomically(directory / RUN_FILE, {"format": 2})
            (directory / METRICS_FILE).touch()
    runs = [make_run(run, directories[run.name], config.train, torch.zeros(run.d_model), group) for run in spec.runs]
    return Bank(spec, config.train, group, stretch, runs, variance=1.0)


def bank_of_store(config: Config, group: Group, run: int | None = None) -> Bank:
    """All runs of the config, or one of them."""
    manifest = manifests.load(Path(config.store_directory))
    spec = plan_banks(config, outline(manifest))[0]
    if run is not None:
        spec = replace(spec, runs=spec.runs[run : run + 1])
    stretch = find_stretch(config, manifest, spec, group, visit=0, first_step=0)
    assert stretch is not None
    return make_bank(config, spec, stretch, group)


@torch.no_grad()
def open_gates(bank: Bank, x: Tensor, l0: int) -> None:
    """Give all gates of a run one bias, at which so many are open on average, and have it take the sparse step."""
    for run in bank.runs:
        gates = ((x - run.sae.b_dec) @ run.sae.encoder).flatten()
        bias = -bank.group.reduce(gates.topk(l0 * len(x) + 1).values[-1], "sum") / bank.group.size
        run.sae.get_parameter("b_gate").fill_(bias)
        run.training.is_sparse = True


@contextmanager
def fed(bank: Bank, options: argparse.Namespace) -> Iterator[Bank]:
    """A bank with its stream open, its gates opened by the first batch."""
    with bank.stretch.open_stream() as stream, bank.feed_from(stream) as bank.feed:
        open_gates(bank, bank.feed.next(), options.l0)
        yield bank


def take_steps(bank: Bank, count: int) -> float:
    """Seconds of steps as training makes them, without chores."""
    assert bank.feed is not None
    began = time.perf_counter()
    for _ in range(count):
        x = bank.feed.next()
        for run in bank.runs:
            train_step(bank, run, x)
        bank.step += 1
    return time.perf_counter() - began


def bare_steps(bank: Bank, x: Tensor, count: int) -> float:
    """Seconds of updates of the first run on the same rows."""
    run = bank.runs[0]
    lambda_ = bank.lambda_(run, bank.spec.total_steps - 1)
    _synchronise(x.device)
    began = time.perf_counter()
    for _ in range(count):
        update(run.module, run.optimizer, x, lambda_=lambda_, learning_rate=LEARNING_RATE, micro_batch_rows=bank.config.micro_batch_rows)
    _synchronise(x.device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def all_chores(bank: Bank, world: World) -> Iterator[list[Chore]]:
    """Those of a training, in its order."""
    folder, names = bank.runs[0].directory.parent, [run.spec.name for run in bank.runs]
    with (
        StopRequest("train", folder).listening() as request,
        Background() as background,
        heartbeat(world, 600) as beats,
        open_console(False).training(bank.spec.site, names, bank.spec.total_rows, False) as view,
    ):
        saver = Saver(background, Keep(bank.config.keep_checkpoints, None), beats)
        log = Log(view, saver)
        yield [log, ChooseStep(), Resample(bank, view), SaveCheckpoints(saver), StopOnRequest(request, log, saver)]
        saver.finish(bank.group)


def sent_bytes() -> int:
    """What TCP has sent from this process's sockets, those to the launcher's store left out."""
    launcher, total = int(os.environ.get("MASTER_PORT", "0")), 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            is_socket = str(link.readlink()).startswith("socket:")
        except FileNotFoundError:  # the directory's own
            continue
        if is_socket:
            with socket.socket(fileno=os.dup(int(link.name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and launcher not in _ports(found):
                    information = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", information, BYTES_SENT_AT)[0] if len(information) >= BYTES_SENT_AT + 8 else 0
    return total


def _ports(found: socket.socket) -> set[int]:
    try:
        return {found.getsockname()[1], found.getpeername()[1]}
    except OSError:  # it listens
        return {found.getsockname()[1]}


def read_bytes() -> int:
    """What this process has read, from whatever."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def measure_traffic(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """On as many ranks as there are."""
    settings = {"checkpoint_every_fraction": 0.5, "resampling": ResamplingConfig(event_fractions=[0.25, 0.5], min_interval_rows=1)}
    config = make_config(options, folder, num_runs=2, **settings)
    group, found = world.group, []
    bank = bank_of_store(config, group)
    with fed(bank, options):
        for count in (1, options.steps):  # the first step finds out whom to talk to
            group.barrier()
            before = sent_bytes()
            take_steps(bank, count)
        group.barrier()
        found.append((sent_bytes() - before) / options.steps)
        bank.step = 0
        with all_chores(bank, world) as chores:
            before = sent_bytes()
            train(bank, chores)
            group.barrier()
            found.append((sent_bytes() - before) / options.steps)
    assert bank.step == options.steps
    bare, all_of_it = (mean(values) for values in zip(*group.gather_objects(found), strict=True))
    planned = communication(config, bank.spec, group.size, None)
    share = 2 * (group.size - 1) / group.size
    return {
        "ranks": group.size,
        "sent_bytes_per_step": round(bare),
        "planned": round(share * planned.gradient_bytes_per_step),
        "ratio": round(bare / (share * planned.gradient_bytes_per_step), 5) if share else None,
        "with_chores": round(all_of_it),
        "planned_with_chores": round(planned.sent_bytes_per_step),
    }


def measure_ranks(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """On two ranks."""
    both, alone = world.group, cut_into_groups(world.device, world.everyone.size).group
    config = make_config(options, folder, num_runs=1)
    rounds = []
    with ExitStack() as open_banks:
        pair = open_banks.enter_context(fed(bank_of_store(config, both), options))
        single = None
        if both.is_first:
            single = open_banks.enter_context(fed(bank_of_store(config, alone), options))
        for _ in range(1 + options.rounds):
            both.barrier()
            one = 0.0 if single is None else take_steps(single, options.round_steps)
            both.barrier()
            rounds.append((one, take_steps(pair, options.round_steps)))
        both.barrier()
    ones, twos = zip(*rounds[1:], strict=True)
    return {
        "step_seconds": round(median(ones) / options.round_steps, 4),
        "two_ranks_step_seconds": round(median(twos) / options.round_steps, 4),
        "efficiency": round(median(one / (2 * two) for one, two in rounds[1:]), 3),
    }


def measure_bank(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """On one rank."""
    config, count = make_config(options, folder, options.runs), options.round_steps
    ratios: list[tuple[float, float]] = []
    with ExitStack() as open_banks:
        bank = open_banks.enter_context(fed(bank_of_store(config, world.group), options))
        singles = [open_banks.enter_context(fed(bank_of_store(config, world.group, run), options)) for run in range(options.runs)]
        assert bank.feed is not None
        x = bank.feed.next().clone()
        for _ in range(1 + options.rounds):
            together = take_steps(bank, count)
            alone = sum(take_steps(single, count) for single in singles)
            bare = sum(bare_steps(single, x, count) for single in singles)
            ratios.append((together / alone, together / bare))
    of_trainings, of_steps = zip(*ratios[1:], strict=True)
    return {
        "runs": options.runs,
        "ratio": round(median(of_trainings), 3),
        "ratio_to_bare_steps": round(median(of_steps), 3),
        **_count_reads(config, world.group, options),
    }


def _count_reads(config: Config, group: Group, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that the bank reads for some windows of batches, and all of its runs alone together."""
    count = 4 * options.window_rows // options.batch_rows

    def read(run: int | None) -> int:
        before = read_bytes()  # of the first windows too, which are under way once the gates are open
        with fed(bank_of_store(config, group, run), options) as bank:
            take_steps(bank, count)
            after, quiet_looks = read_bytes(), 0
            while quiet_looks < QUIET_LOOKS:  # windows are read ahead
                time.sleep(0.5)
                last, after = after, read_bytes()
                quiet_looks = quiet_looks + 1 if after - last < FEW_BYTES else 0
            return after - before

    read(None)  # imports what it needs
    together, alone = read(None), [read(run) for run in range(options.runs)]
    of_rows = manifests.load(options.store).d_model * 2 * count * options.batch_rows
    return {"read_bytes": together, "read_bytes_of_rows": of_rows, "read_bytes_of_runs_alone": sum(alone)}


class MadeUpStream(Stream):
    """Some batches of random rows in memory, again and again."""

    def __init__(self, d_model: int, batch_rows: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, batch_rows, d_model, generator=generator).div_(d_model**0.5).bfloat16()
        self._x = x.pin_memory() if device.type == "cuda" else x
        self._rows = torch.arange(batch_rows)
        self._taken = 0

    def seek(self, rows_taken: int) -> None:
        """Go on after so many rows."""
        self._taken = rows_taken

    def next_batch(self) -> Batch:
        """The next one."""
        number = self._taken // len(self._rows)
        self._taken += len(self._rows)
        return Batch(self._x[number % len(self._x)], torch.zeros_like(self._rows), self._rows + number * len(self._rows))

    def close(self) -> None:
        """Nothing is open."""


class Stopwatch:
    """A chore that notes when the step after the warm-up begins, and when the last one is through."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.times = device, dict[int, float]()

    def is_due(self, bank: Bank) -> bool:
        """After these two steps."""
        return bank.step in (WARM_UP_STEPS, bank.spec.total_steps)

    def run(self, bank: Bank) -> None:
        """Wait for the device."""
        _synchronise(self._device)
        self.times[bank.step] = time.perf_counter()


def measure_chores(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """On one rank, where it computes."""
    run = RunSpec("run", "made up", 0, "gated", True, 0.0, options.d_model, options.features, 0.1, 0, LEARNING_RATE)
    spec = BankSpec("made up", (run,), 1.0, options.batch_rows, WARM_UP_STEPS + options.chore_steps)
    events = ResamplingConfig(event_fractions=[0.3], min_interval_rows=1, gate_bias="median-density")
    config = replace(
        Config(), output=str(folder), train=TrainConfig(resampling=events, checkpoint_every_fraction=0.5, batch_rows=options.batch_rows)
    )
    open_stream: Callable[[], Stream] = lambda: MadeUpStream(options.d_model, options.batch_rows, world.device)  # noqa: E731
    bank = make_bank(config, spec, Stretch(open_stream, 0, spec.total_steps), world.group)
    x = open_stream().next_batch().decode(world.device, torch.float32)
    rounds = []
    for _ in range(1 + options.rounds):
        open_gates(bank, x, options.l0)
        before = bare_steps(bank, x, options.round_steps)
        bank.step, bank.runs[0].finished = 0, False
        stopwatch = Stopwatch(world.device)
        with all_chores(bank, world) as chores:
            train(bank, [*chores, stopwatch])
        assert bank.runs[0].stopped is None
        after = bare_steps(bank, x, options.round_steps)
        step = (stopwatch.times[spec.total_steps] - stopwatch.times[WARM_UP_STEPS]) / options.chore_steps
        rounds.append((step, (before + after) / (2 * options.round_steps)))
    steps, bares = zip(*rounds[1:], strict=True)
    return {
        "device": str(world.device),
        "d_model": options.d_model,
        "features": options.features,
        "rows": options.batch_rows,
        "step_seconds": round(median(steps), 5),
        "bare_step_seconds": round(median(bares), 5),
        "ratio": round(median(step / bare for step, bare in rounds[1:]), 3),
    }


RANKS = {"traffic": (1, 2, 4), "ranks": (2,), "bank": (1,), "chores": (1,)}
PARTS = {"traffic": measure_traffic, "ranks": measure_ranks, "bank": measure_bank, "chores": measure_chores}


def be_rank(options: argparse.Namespace, part: str, answer: Path) -> None:
    """Measure; the first rank writes the answer."""
    with start("auto" if part == "chores" else "cpu") as world:
        found = PARTS[part](options, world, answer.parent / "runs")
        if world.is_first:
            answer.write_text(json.dumps(found))


def launch(part: str, ranks: int) -> dict[str, Any]:
    """This script again, on so many ranks of one thread."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml", "--num_processes", str(ranks)]
        launcher += ["--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = os.environ | {"BENCH_PART": part, "BENCH_ANSWER": str(answer), "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment, check=True, stdout=sys.stderr)
        return dict(json.loads(answer.read_text()))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["traffic", "ranks", "bank"])
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    parser.add_argument("--site", default="resid.15")
    parser.add_argument("--d-model", type=int, default=576, help="of made-up rows")
    parser.add_argument("--features", type=int, default=2304)
    parser.add_argument("--batch-rows", type=int, default=512)
    parser.add_argument("--window-rows", type=int, default=8192)
    parser.add_argument("--l0", type=int, default=40)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="whose bytes are counted")
    parser.add_argument("--round-steps", type=int, default=20)
    parser.add_argument("--chore-steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    """The line."""
    options = read_options()
    if "BENCH_PART" in os.environ:
        be_rank(options, os.environ["BENCH_PART"], Path(os.environ["BENCH_ANSWER"]))
        return
    found: dict[str, Any] = {part: [launch(part, ranks) for ranks in RANKS[part]] for part in options.parts}
    found = {part: each if len(RANKS[part]) > 1 else each[0] for part, each in found.items()}
    setting = {"features": options.features, "rows": options.batch_rows, "l0": options.l0, "rounds": options.rounds}
    sys.stdout.write(json.dumps({"benchmark": "scaling", **setting, **found, "cpus": os.cpu_count()}) + "\n")


if __name__ == "__main__":
    main()
