"""The Slurm jobs that a plan suggests. In: a config, its budget. Out: what each job asks for, as lines to type."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gsae.config import Config
from gsae.plan.budget import Budget

GPUS_PER_NODE = 8
CPUS_PER_RANK = 8
PROCESS_GIB = 4
"""Of each rank for Python, its libraries and the device's runtime, whatever it computes."""
MARGIN = 1.25
"""Of what is asked for over what was worked out."""
LONGEST_HOURS = 24
"""A job that needs longer is requeued and goes on."""


@dataclass(frozen=True)
class SlurmJob:
    """What one stage asks for."""

    stage: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    """0 where ranks compute on CPUs."""
    memory_gib: int
    """Of each node."""
    hours: float | None
    """None without a rate."""

    @property
    def time(self) -> str | None:
        """As Slurm takes it: with half as much again, in whole half hours, a day at most."""
        if self.hours is None:
            return None
        half_hours = min(math.ceil(2 * (1.5 * self.hours)) + 1, 2 * LONGEST_HOURS)
        return f"{half_hours // 2:02d}:{30 * (half_hours % 2):02d}:00"

    def settings(self) -> dict[str, str]:
        """As slurm/env.sh names them."""
        ranks = {"gpus_per_node": str(self.gpus_per_node)} if self.gpus_per_node else {"ranks_per_node": str(self.ranks_per_node)}
        time = {} if self.time is None else {"time": self.time}
        return {"nodes": str(self.nodes), **ranks, "cpus_per_rank": str(CPUS_PER_RANK), "mem": f"{self.memory_gib}G", **time}

    def options(self) -> list[str]:
        """As sbatch names them."""
        gpus = [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        time = [] if self.time is None else [f"--time={self.time}"]
        cpus = f"--cpus-per-task={self.ranks_per_node * CPUS_PER_RANK}"
        return [f"--nodes={self.nodes}", *gpus, cpus, f"--mem={self.memory_gib}G", *time]


def suggest(config: Config, found: Budget, ranks: int, gpus_per_node: int = GPUS_PER_NODE) -> list[SlurmJob]:
    """A job a stage, on as many nodes as the ranks need, all of them equally full.

    Args:
        config: the config.
        found: its budget for so many ranks.
        ranks: of the job.
        gpus_per_node: GPUs of a node; on CPUs, the ranks that a node is to hold.
    """
    ranks_per_node = max(number for number in range(1, min(ranks, gpus_per_node) + 1) if ranks % number == 0)
    is_on_gpus = config.device != "cpu"
    batches = -(-config.evaluate.max_tokens // (config.harvest.context_length * config.evaluate.batch_contexts))
    nodes = dict.fromkeys(("harvest", "train", "evaluate"), ranks // ranks_per_node)
    nodes["evaluate"] = min(nodes["evaluate"], -(-batches // ranks_per_node))  # more would have nothing to do
    llm, train = found.llm, found.train
    # Where ranks compute on GPUs, the host holds what is on its way, and what is offloaded.
    computing = {"harvest": llm.harvest_bytes_per_rank, "train": train.device_bytes_per_rank, "evaluate": llm.evaluation_bytes_per_rank}
    offloaded = llm.share_bytes_zero3 if config.llm.offload else 0
    staged = {"harvest": offloaded, "train": train.window_bytes_per_rank + train.snapshot_bytes_per_group, "evaluate": 0}
    hours = {"harvest": found.harvest.hours, "train": train.hours, "evaluate": None}
    jobs = []
    for stage in nodes:
        a_rank = staged[stage] + (0 if is_on_gpus else computing[stage])
        memory = math.ceil(MARGIN * ranks_per_node * (a_rank / 2**30 + PROCESS_GIB))
        gpus = ranks_per_node if is_on_gpus else 0
        jobs.append(SlurmJob(stage, nodes[stage], ranks_per_node, gpus, memory, hours[stage]))
    return jobs


def lines(jobs: Sequence[SlurmJob], words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What to type: all stages at once, or each by itself.

    Args:
        jobs: one a stage.
        words: CONFIG and its overrides.
    """
    config = shlex.join(words)
    yield "all stages", f"bash slurm/pipeline.sh {' '.join(pipeline_words(jobs))} {config}"
    for job in jobs:
        ranks = "" if job.gpus_per_node or job.ranks_per_node == 1 else f"ranks_per_node={job.ranks_per_node} "
        yield job.stage, f"sbatch {' '.join(job.options())} slurm/{job.stage}.sbatch {ranks}{config}"
    if any(job.time is None for job in jobs):
        yield "", "without a time, the partition's; give --tokens-per-second and --rows-per-second for the harvest's and the training's"


def pipeline_words(jobs: Sequence[SlurmJob]) -> list[str]:
    """The settings of all jobs: what they share once, what differs for each stage that has it."""
    words = []
    settings = {job.stage: job.settings() for job in jobs}
    for name in dict.fromkeys(name for of_stage in settings.values() for name in of_stage):
        values = {stage: of_stage[name] for stage, of_stage in settings.items() if name in of_stage}
        if len(values) == len(jobs) and len(set(values.values())) == 1:
            words.append(f"{name}={next(iter(values.values()))}")
        else:
            words += [f"{stage}.{name}={value}" for stage, value in values.items()]
    return words
