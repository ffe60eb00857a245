"""The runs of one site while they train. In: a bank's specification, a stream, a group of ranks. Out: `Bank` and its `Run`s, stepped.

All runs of a bank see the same scaled rows; each has its own DDP module, so one that has stopped is skipped by all ranks alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gsae.config import TrainConfig
from gsae.sae.objective import SAE, UNIT_NORM, build
from gsae.sae.part import part_of
from gsae.store.stream import Batch, Stream
from gsae.train.averaging import WeightAverage
from gsae.train.clock import Clock
from gsae.train.feed import Feed
from gsae.train.firing import FiringCounter
from gsae.train.meter import Meter
from gsae.train.optim import SAEOptimizer
from gsae.train.plan import BankSpec, RunSpec
from gsae.train.schedule import lambda_multiplier, learning_rate_multiplier, recovery_multiplier
from gsae.train.step import TrainingModule, update
from gsae.world import Group, on_sum
from gsae.world.tracking import Tracking


@dataclass
class Run:
    """One SAE in training; where features are split, this rank's part of it."""

    spec: RunSpec
    directory: Path
    sae: SAE
    training: TrainingModule
    """The SAE with its loss."""
    module: nn.Module
    """The same under DDP."""
    optimizer: SAEOptimizer
    firing: FiringCounter
    meter: Meter
    average: WeightAverage | None = None
    """The moving average of the weights, where train.ema_decay asks for one."""
    event_step: int | None = None
    """Step of the last event that resampled features."""
    resampled: Int[Tensor, " resampled"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Features resampled at that event, until their outcome is reported; of a part numbered from its first."""
    low_l0_steps: int = 0
    """Steps for which L0 has been under 1 without a break."""
    high_fvu_steps: int = 0
    """Steps for which FVU has been over 1 without a break."""
    seconds: float = 0.0
    """Time spent training, over all sessions."""
    num_open: Int[Tensor, ""] = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Open gates of this rank's last batch."""
    stopped: str | None = None
    """Why the run ended before its time."""
    finished: bool = False

    @property
    def is_active(self) -> bool:
        """Whether it still trains."""
        return self.stopped is None and not self.finished


@dataclass(frozen=True)
class Position:
    """How far a bank is in a store in parts."""

    visit: int
    rows: int
    """Rows of the visit that it has taken, over all ranks."""


@dataclass(frozen=True)
class Stretch:
    """Steps that a bank takes from one stream: all, or those of one visit of a store in parts."""

    open_stream: Callable[[], Stream]
    """A stream of the site's rows, at its beginning."""
    first_step: int
    end_step: int
    """The step at which the stream is left; that of the run's end may come before."""
    visit: int = 0
    is_part: bool = False
    """Whether the store is in parts."""


@dataclass
class Bank:
    """The runs of one site, at a step."""

    spec: BankSpec
    config: TrainConfig
    group: Group
    stretch: Stretch
    """What training reads now."""
    runs: list[Run]
    variance: float
    """E|x - mean|^2 of the scaled rows: 1, unless train.scale_activations is off."""
    step: int = 0
    stopping: bool = False
    """Whether all ranks agreed to stop here."""
    tracking: Tracking = field(default_factory=Tracking)
    """Who gets the lines of the runs' metrics besides the files; on the group's first rank."""
    clock: Clock = field(init=False)
    """What this rank's time goes for."""
    feed: Feed | None = None
    """The rows of the stretch, while it is trained on."""

    def __post_init__(self) -> None:
        self.clock = Clock(self.group.device)
        if self.group.rows.size > 1:  # one rank alone sums no gradients
            for run in self.runs:
                on_sum(run.module, partial(self.clock.enter, "communicating"), partial(self.clock.enter, "computing"))
        for run in self.runs:
            if run.sae.part is not None:
                run.sae.part.waiting = partial(self.clock.within, "communicating")

    @property
    def active_runs(self) -> list[Run]:
        """The runs that still train."""
        return [run for run in self.runs if run.is_active]

    @property
    def unstopped_runs(self) -> list[Run]:
        """The runs that still train, or have just finished."""
        return [run for run in self.runs if run.stopped is None]

    @property
    def rows(self) -> int:
        """Rows taken, over all ranks."""
        return self.step * self.spec.batch_rows

    @property
    def stream_rows(self) -> int:
        """Those of them that came from the present stream."""
        return (self.step - self.stretch.first_step) * self.spec.batch_rows

    @property
    def until(self) -> int:
        """The last step for now: of the stretch, or of the run."""
        return min(self.stretch.end_step, self.spec.total_steps)

    @property
    def position(self) -> Position | None:
        """Where in the parts it stands; None in a store that is not in parts."""
        if not self.stretch.is_part:
            return None
        is_left = self.step == self.stretch.end_step
        return Position(self.stretch.visit + 1, 0) if is_left else Position(self.stretch.visit, self.stream_rows)

    def learning_rate(self, run: Run, step: int) -> float:
        """The step size of an update; the first is number 0."""
        total, config = self.spec.total_steps, self.config
        shape = learning_rate_multiplier(step, total, config.schedule)
        return run.spec.learning_rate * shape * recovery_multiplier(step, run.event_step, total, config.resampling)

    def lambda_(self, run: Run, step: int) -> float:
        """The sparsity coefficient of an update; the first is number 0."""
        assert run.spec.lambda_ is not None, "pilots find it before a bank is made"
        if run.spec.starts_from is not None:  # without a penalty the gates that its neighbour closed would open again
            return run.spec.lambda_
        return run.spec.lambda_ * lambda_multiplier(step, self.spec.total_steps, self.config.schedule)

    def feed_from(self, stream: Stream) -> Feed:
        """The scaled rows of a stream from where the bank stands."""
        dtype = torch_dtype(self.config)
        return Feed(
            stream,
            self.stream_rows,
            batch_rows=self.spec.batch_rows,
            scale=self.spec.scale,
            device=self.group.device,
            dtype=dtype,
            clock=self.clock,
        )


class Chore(Protocol):
    """Something the loop does every so many steps; all ranks of the group do it at the same step."""

    def is_due(self, bank: Bank) -> bool:
        """Whether to run after the step just made."""

    def run(self, bank: Bank) -> None:
        """Do it."""


def train(bank: Bank, chores: Sequence[Chore]) -> None:
    """Step all runs through a stretch, until none is left, or until the ranks agreed to stop. Chores run in list order after each step."""
    bank.clock.enter("waiting")
    with bank.group.together():
        stream = bank.stretch.open_stream()
    with stream, bank.feed_from(stream) as bank.feed:
        while bank.step < bank.until and bank.active_runs and not bank.stopping:
            x = bank.feed.next()
            bank.clock.enter("computing")
            for run in bank.active_runs:
                train_step(bank, run, x)
            bank.step += 1
            if bank.step < bank.until:
                bank.feed.look_ahead()
            bank.clock.enter("chores")
            for chore in chores:
                if chore.is_due(bank):
                    chore.run(bank)


def train_step(bank: Bank, run: Run, x: Float[Tensor, "rows d_model"]) -> None:
    """One optimizer update of one run, and what it measured added to the run's counters."""
    report = update(
        run.module,
        run.optimizer,
        x,
        lambda_=bank.lambda_(run, bank.step),
        learning_rate=bank.learning_rate(run, bank.step),
        micro_batch_rows=bank.config.micro_batch_rows,
    )
    if run.average is not None:
        run.average.update(run.sae, bank.step)
    run.firing.update(report.fired, report.opened, bank.spec.batch_rows)
    run.meter.update(report, bank.step)
    run.num_open = report.opened.sum()


def torch_dtype(config: TrainConfig) -> torch.dtype:
    """The type of weights."""
    return torch.float64 if config.dtype == "float64" else torch.float32


def make_run(spec: RunSpec, directory: Path, config: TrainConfig, mean: Float[Tensor, " d_model"], group: Group) -> Run:
    """A run at its initial values, the same on all ranks that hold the same features; `mean` is that of the scaled rows."""
    part = part_of(spec.num_features, group.features)
    sae = build(spec.objective, spec.d_model, spec.num_features, spec.seed, torch_dtype(config), part).to(group.device)
    if config.decoder_bias == "mean":
        with torch.no_grad():
            sae.b_dec.copy_(mean)
    make_module = partial(TrainingModule, sae, spec.objective, spec.pre_activation_loss, config.products)
    training = make_module(kernels=config.kernels)
    has_kernels = training.why_no_kernels is None
    if group.any(not has_kernels) and has_kernels:  # ranks that round differently would drift apart
        training = make_module(kernels=False)
        training.why_no_kernels = "another rank of the group cannot run them"
    optimizer = SAEOptimizer(
        sae,
        betas=config.adam_betas,
        eps=config.adam_eps,
        unit_norm=spec.objective in UNIT_NORM,
        clip_gradient_norm=config.clip_gradient_norm,
        on_kernels=training.why_no_kernels is None,
    )
    firing, meter = FiringCounter(sae.num_features, group.device), Meter(group.device)
    decay, unit_norm = config.ema_decay, spec.objective in UNIT_NORM
    average = None if decay is None else WeightAverage(sae, decay, unit_norm=unit_norm)
    return Run(spec, directory, sae, training, group.rows.wrap(training), optimizer, firing, meter, average)


def fresh_rows(bank: Bank, num_rows: int) -> Iterator[Batch]:
    """Scaled local batches of at least `num_rows` rows over all ranks: those that training will see next.

    Where a part ends before there are enough, they go on with rows of that part from its beginning.
    """
    assert bank.feed is not None
    return bank.feed.upcoming(-(-num_rows // bank.spec.batch_rows))
