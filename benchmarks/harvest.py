"""The speed and memory of a harvest. In: a config whose LLM and text are there. Out: one JSON line.

    .venv/bin/python benchmarks/harvest.py configs/demo.yaml [--section.field value ...]

Four things are timed in turn, in one process, over the same contexts; each `ratio` is the median of the rounds' own ratios:
- bare: LLM batches through the layers up to the last site, and nothing else;
- harvest: text read, contexts packed, the same batches harvested at all sites of the config, shards written and fsynced;
- harvest of layer 2 alone;
- whole forwards of the LLM, logits included.
Loading the LLM and the calibration are outside. `resident_mib` is the process's memory when a tenth, a half and all of the longest
harvest is on the disk. `zero3_held_fraction` is the share of the parameter bytes that the fuller of two ranks holds after forwards.

BENCH_TOKENS (8192) are harvested each time, BENCH_ROUNDS (5) times, and BENCH_LONG_TOKENS (131072) for the memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from gsae.config import Config
from gsae.harvest.lanes import harvest_lanes
from gsae.harvest.rows import HarvestedBatch, LLMBatch, RowHarvest, calibrate, llm_batches
from gsae.harvest.run import calibration_contexts, layout_of
from gsae.heartbeat import Heartbeat, heartbeat
from gsae.llm.load import LLM, describe, load
from gsae.llm.sharded import held_parameter_bytes
from gsae.llm.site import capture
from gsae.settings import read_config
from gsae.store.manifest import Layout
from gsae.store.progress import ProgressLog
from gsae.world import Group, World, start

LAYER = 2
"""The one that is harvested alone."""


def cut(config: Config, tokens: int, num_lanes: int = 2) -> Config:
    """The config for so many tokens, in a few lanes."""
    corpus = replace(config.corpus, num_lanes=num_lanes, max_document_characters=None)
    return replace(config, corpus=corpus, harvest=replace(config.harvest, max_tokens=tokens), train=replace(config.train, batch_rows=512))


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def resident_mib() -> float:
    """Memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Harvester:
    """What all harvests of a measurement share."""

    llm: LLM
    median_norms: dict[str, float]
    group: Group
    beats: Heartbeat

    def run(self, config: Config, layout: Layout) -> tuple[list[LLMBatch], list[float]]:
        """Harvest into a directory that is removed; the batches that went through the LLM, and the memory at each."""
        batches: list[LLMBatch] = []
        memory: list[float] = []
        rows = RowHarvest(config.harvest, self.llm, layout, self.median_norms)

        def note(batch: LLMBatch) -> HarvestedBatch:
            batches.append(batch)
            memory.append(resident_mib())
            return rows(batch)

        with tempfile.TemporaryDirectory(dir=".") as folder:
            logs = [ProgressLog.open(Path(folder), lane) for lane in range(config.corpus.num_lanes)]
            harvest_lanes(config, self.llm, note, Path(folder), layout, logs, self.group, self.beats, lambda: False)
        return batches, memory


def measure(config: Config, world: World) -> dict[str, object]:
    short = cut(config, int(os.environ.get("BENCH_TOKENS", "8192")))
    info = describe(config.llm)
    layout, lower_layout = layout_of(short, info), layout_of(replace(short, harvest=replace(short.harvest, sites=[LAYER])), info)
    truncated, whole = load(config.llm, world.device, last_layer=layout.sites[-1].layer), load(config.llm, world.device)
    median_norms = calibrate(calibration_contexts(short, truncated), short.harvest, truncated, layout.sites)

    with heartbeat(world, 600) as beats:
        harvester = Harvester(truncated, median_norms, world.everyone, beats)
        batches, _ = harvester.run(short, layout)

        def bare() -> None:
            for batch in batches:
                capture(truncated.model, layout.sites[-1:], batch.tokens.to(world.device), batch.positions.to(world.device))

        def full() -> None:
            for batch in batches:
                with torch.no_grad():
                    tokens, positions = batch.tokens.to(world.device), batch.positions.to(world.device)
                    whole.model(input_ids=tokens, position_ids=positions, use_cache=False)

        works: dict[str, Callable[[], object]] = {
            "bare": bare,
            "harvest": lambda: harvester.run(short, layout),
            "harvest_lower": lambda: harvester.run(short, lower_layout),
            "full": full,
        }
        rounds = [{name: timed(work) for name, work in works.items()} for _ in range(1 + int(os.environ.get("BENCH_ROUNDS", "5")))][1:]
        _, memory = harvester.run(cut(config, int(os.environ.get("BENCH_LONG_TOKENS", "131072"))), layout)
    tokens = sum(batch.tokens.numel() for batch in batches)
    rate = {name: tokens / median(each[name] for each in rounds) for name in works}
    return {
        "benchmark": "harvest",
        "sites": [site.name for site in layout.sites],
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(rate["harvest"], 1),
        "bare_tokens_per_second": round(rate["bare"], 1),
        "ratio": round(median(each["bare"] / each["harvest"] for each in rounds), 4),
        "layer_2_tokens_per_second": round(rate["harvest_lower"], 1),
        "full_tokens_per_second": round(rate["full"], 1),
        "layer_2_ratio": round(median(each["full"] / each["harvest_lower"] for each in rounds), 3),
        "resident_mib": [round(memory[int(share * (len(memory) - 1))], 1) for share in (0.1, 0.5, 1)],
    }


def zero3_held_fraction(words: list[str]) -> float:
    """On two CPU ranks, or two GPUs; the ranks are this script again."""
    kind = "ddp" if torch.cuda.device_count() > 1 else "cpu"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{kind}.yaml", "--num_processes", "2"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"BENCH_HELD": f"{folder}/held", "OMP_NUM_THREADS": "1"}
        subprocess.run([*launch, "--main_process_port", "0", __file__, *words], env=environment, check=True)
        return float(Path(f"{folder}/held").read_text())


def be_zero3_rank(config: Config, answer: Path) -> None:
    """Three forwards of the truncated LLM; the first rank writes the larger share."""
    with start(config.device) as world:
        group = world.everyone
        layout = layout_of(config, describe(config.llm))
        llm = load(replace(config.llm, sharding="zero3"), world.device, last_layer=layout.sites[-1].layer, group=group)
        for batch in llm_batches(calibration_contexts(config, llm)[:3], 1, llm):
            capture(llm.model, layout.sites, batch.tokens.to(world.device), batch.positions.to(world.device))
        held = float(group.reduce(torch.tensor(float(held_parameter_bytes(llm.model))), "max"))
        if group.is_first:
            whole = load(config.llm, torch.device("cpu"), last_layer=layout.sites[-1].layer)
            answer.write_text(str(held / held_parameter_bytes(whole.model)))


def main() -> None:
    """Measure, and write the line."""
    config = read_config("harvest", sys.argv[1:])
    if "BENCH_HELD" in os.environ:
        be_zero3_rank(cut(config, 1024), Path(os.environ["BENCH_HELD"]))
        return
    with start(config.device) as world:
        found = measure(config, world)
    if torch.cuda.device_count() != 1:  # two ranks need two GPUs, or none
        found["zero3_held_fraction"] = round(zero3_held_fraction(sys.argv[1:]), 4)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
