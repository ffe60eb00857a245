"""The config: a tree of frozen dataclasses. In: a YAML file and `--section.field value` overrides. Out: one `Config` of plain data.

Rules that need only the config are checked here, at construction; rules that need the LLM, the store or the number of
ranks are checked by the stage that knows them.
"""

from dataclasses import dataclass, field
from typing import Literal

from gsae.config.corpus import CorpusConfig, DataSetConfig
from gsae.config.evaluate import EvaluateConfig
from gsae.config.harvest import HarvestConfig
from gsae.config.llm import LLMConfig, RandomLlamaConfig
from gsae.config.rules import require
from gsae.config.train import (
    ObjectiveName,
    PilotConfig,
    ProductsName,
    ResamplingConfig,
    ScheduleConfig,
    ScheduleName,
    SweepConfig,
    TrackerName,
    TrainConfig,
)
from gsae.errors import ConfigError

__all__ = [
    "Config",
    "CorpusConfig",
    "DataSetConfig",
    "EvaluateConfig",
    "HarvestConfig",
    "LLMConfig",
    "ObjectiveName",
    "PilotConfig",
    "ProductsName",
    "RandomLlamaConfig",
    "ResamplingConfig",
    "ScheduleConfig",
    "ScheduleName",
    "SweepConfig",
    "TrackerName",
    "TrainConfig",
]


@dataclass(frozen=True)
class Config:
    """All that a pipeline needs; every stage reads the same file and takes the sections it needs."""

    output: str = "runs/default"
    """Directory of the runs, their report and (unless harvest.store says otherwise) the store."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""
    stall_timeout_seconds: float = 600.0
    """A rank that has got no further for so long ends the job, and is named; so does one that died."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """The LLM."""
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    """The harvest stage."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training stage."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The evaluation stage."""

    def __post_init__(self) -> None:
        require(bool(self.output), "output is empty; give a directory for the runs")
        timeout = self.stall_timeout_seconds
        require(timeout > 0, f"stall_timeout_seconds is {timeout}; give a positive number of seconds")
        rows, lanes = self.train.batch_rows, self.corpus.num_lanes
        if rows % lanes:
            below = rows - rows % lanes
            nearest = f"{below} or {below + lanes}" if below else f"{lanes}"
            raise ConfigError(f"train.batch_rows ({rows}) is not a multiple of corpus.num_lanes ({lanes}); set it to {nearest}")

        for name in ("window_rows", "max_rows"):
            rows = getattr(self.train, name)
            require(rows is None or rows >= lanes, f"train.{name} ({rows}) is under one row a lane; set it to at least {lanes}")
        require(
            self.train.max_rows is None or self.corpus.parts == 1,
            f"train.max_rows ({self.train.max_rows}) goes with a corpus in one part; set it to null, or corpus.parts to 1",
        )
        require(
            self.corpus.parts == 1 or not any(sweep.warm_start for sweep in self.train.sweeps),
            "train.sweeps: warm_start reads the store again for each lambda, which goes with a corpus in one part; set warm_start: false, "
            "or corpus.parts to 1",
        )
        require(
            self.corpus.parts == 1 or not self.harvest.is_remote,
            f"corpus.parts is {self.corpus.parts}, and training removes a part from the store that it is through with, which it cannot do "
            f"at {self.harvest.store}; give harvest.store a directory, or set corpus.parts to 1",
        )

    @property
    def store_directory(self) -> str:
        """The store's directory, or its URL."""
        return self.harvest.store or f"{self.output}/store"
