"""Settings of the training stage. Out: `TrainConfig`."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from gsae.config.rules import require

ObjectiveName = Literal["relu", "gated", "gated-no-aux", "gated-norm-weighted"]
ScheduleName = Literal["constant", "linear", "cosine", "cosine-restarts"]
ProductsName = Literal["float32", "tf32", "bfloat16"]
TrackerName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class SweepConfig:
    """Runs that share an objective: one run for each site x num_features x lambda x seed."""

    objective: ObjectiveName = "gated"
    """Training objective; `relu` is the plain SAE, the baseline."""
    lambdas: dict[str | int, list[float]] = field(default_factory=dict)
    """Sparsity coefficients of each site, on scaled activations. Keys are sites as in harvest.sites, or `*` for all others;
    a site that has no key here is not trained by this sweep. Without any, train.target_l0 says which runs there are."""
    expansions: list[float] = field(default_factory=lambda: [8.0])
    """Numbers of features, in multiples of d_model."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the initial weights and of the resampling draws (the order of the data is train.seed's)."""
    resampling: bool = False
    """Whether dead features are resampled at the events of train.resampling."""
    pre_activation_loss: float = 0.0
    """Weight, in multiples of lambda, of a loss that pulls at the closed gates of dead features (Anthropic, January 2025): an
    alternative to resampling, e.g. 0.03; 0 leaves it out."""
    learning_rate: float | None = None
    """Adam's step size for these runs; null takes the site's (train.learning_rates) or train.learning_rate."""
    warm_start: bool = False
    """Whether runs start from the weights with which the run of the lambda before, in the order given, ended; they are then
    train.warm_start_fraction as long. The first lambda's starts from random weights and has the whole length."""

    def __post_init__(self) -> None:
        for site, values in self.lambdas.items():
            require(
                len(values) > 0 and all(0 <= v < inf for v in values),
                f"train.sweeps: lambdas of {site!r} are {values}; give numbers of at least 0",
            )
        require(
            all(e > 0 for e in self.expansions) and len(self.expansions) > 0,
            f"train.sweeps: expansions are {self.expansions}; give positive numbers",
        )
        require(len(self.seeds) > 0, "train.sweeps: seeds is empty; give at least one")
        rate = self.learning_rate
        require(rate is None or 0 < rate < inf, f"train.sweeps: learning_rate is {rate}; give a positive number, or null")
        require(
            0 <= self.pre_activation_loss < inf,
            f"train.sweeps: pre_activation_loss is {self.pre_activation_loss}; give a weight of at least 0",
        )
        require(
            not (self.resampling and self.objective == "gated-norm-weighted"),
            "train.sweeps: gated-norm-weighted has no unit-norm decoder to resample into; set resampling: false",
        )
        require(
            bool(self.lambdas) or not self.warm_start,
            "train.sweeps: warm_start goes from lambda to lambda, so give the sweep lambdas, or set warm_start: false",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate and lambda over the run, in fractions of it."""

    kind: ScheduleName = "linear"
    """Shape of the learning rate after warm-up: `constant`; `linear` (constant, then to 0 over the last decay_fraction);
    `cosine` (to 0 over the whole run); `cosine-restarts` (num_cycles cosines, each from the full rate)."""
    warmup_fraction: float = 0.05
    """Share of the run over which the learning rate rises linearly from 0."""
    max_warmup_steps: int = 1000
    """Upper bound of that warm-up, in steps."""
    decay_fraction: float = 0.2
    """Share of the run, at its end, over which `linear` falls to 0."""
    num_cycles: int = 4
    """Cycles of `cosine-restarts`."""
    lambda_warmup_fraction: float = 0.1
    """Share of the run over which lambda rises linearly from 0."""
    max_lambda_warmup_steps: int = 10_000
    """Upper bound of that warm-up, in steps."""

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "decay_fraction", "lambda_warmup_fraction"):
            require(0 <= getattr(self, name) <= 1, f"train.schedule.{name} is {getattr(self, name)}; give a share between 0 and 1")
        require(self.num_cycles >= 1, f"train.schedule.num_cycles is {self.num_cycles}; give at least 1")


@dataclass(frozen=True)
class ResamplingConfig:
    """New directions for dead features (Bricken et al. 2023, appendix), for the sweeps that ask for it."""

    event_fractions: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.4, 0.5])
    """When, in shares of the run; the last at most 0.5. An event before `dead_after_rows` rows were seen is refused."""
    dead_after_rows: int = 10_000_000
    """A feature is dead when it has not been on for so many rows over all ranks, capped at 20 % of the run, and at least
    half a firing interval."""
    min_interval_rows: int = 50_000
    """An event whose firing interval holds fewer rows is refused: rare features would count as dead."""
    max_candidate_rows: int = 819_200
    """Fresh rows to draw from, capped at 5 % of the run."""
    direction: Literal["activation", "residual"] = "activation"
    """New direction: the drawn row less b_dec, or its residual x - x_hat."""
    gate_bias: Literal["zero", "median-density"] = "zero"
    """New b_gate (b_enc for relu): `zero` opens on about half of all rows; `median-density` gives the alive features' median
    density on the candidates."""
    encoder_norm: float = 0.2
    """Norm of a new encoder direction, in multiples of the alive features' mean."""
    learning_rate_factor: float = 0.1
    """The learning rate right after an event, as a multiple; it returns over a cosine."""
    recovery_steps: int = 1000
    """Length of that return in steps, capped at 5 % of the run."""

    def __post_init__(self) -> None:
        fractions = self.event_fractions
        require(
            all(0 < f <= 0.5 for f in fractions) and list(fractions) == sorted(set(fractions)),
            f"train.resampling.event_fractions is {fractions}; give rising shares between 0 and 0.5",
        )
        factor = self.learning_rate_factor
        require(0 < factor <= 1, f"train.resampling.learning_rate_factor is {factor}; give a share in (0, 1]")
        require(self.encoder_norm > 0, f"train.resampling.encoder_norm is {self.encoder_norm}; give a positive number")
        require(self.dead_after_rows >= 1, f"train.resampling.dead_after_rows is {self.dead_after_rows}; give a positive number of rows")
        require(
            self.max_candidate_rows >= 1,
            f"train.resampling.max_candidate_rows is {self.max_candidate_rows}; give a positive number of rows",
        )


@dataclass(frozen=True)
class PilotConfig:
    """Short runs that find the lambda of each target L0."""

    fraction: float = 0.1
    """Length of a pilot, as a share of the run. Schedules and events keep their shares."""
    lambdas: list[float] = field(default_factory=lambda: [0.03, 0.05, 0.08, 0.13, 0.2, 0.32, 0.5])
    """Those of the first pilots, rising, on scaled activations. Where a target lies beyond the L0 they reach, a decade more is tried."""

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, f"train.pilot.fraction is {self.fraction}; give a share in (0, 1]")
        values = self.lambdas
        require(
            len(values) >= 2 and all(0 < v < inf for v in values) and values == sorted(set(values)),
            f"train.pilot.lambdas is {values}; give at least two rising positive numbers",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Training one SAE for each site x sweep x width x lambda x seed."""

    sweeps: list[SweepConfig] = field(default_factory=list)
    """The runs."""
    target_l0: dict[str | int, list[float]] = field(default_factory=dict)
    """L0 that the sweeps without lambdas aim at, keyed as lambdas are: a run each, with the lambda that short runs of the same
    objective, width and learning rate find."""
    pilot: PilotConfig = field(default_factory=PilotConfig)
    """Those short runs."""
    warm_start_fraction: float = 0.3
    """Length of a run that starts from another's weights, as a share of total_rows (sweeps with warm_start)."""
    sites: list[int | str] = field(default_factory=list)
    """Sites to train, out of the store's; empty trains all."""
    total_rows: int = 1_000_000_000
    """Rows of one run, over all ranks, rounded up to whole batches; the store is read again when it is shorter."""
    max_rows: int | None = None
    """Rows of a site to use at most: each lane gives an equal share of them, its first rows, or all where it has fewer. null uses all.
    Scale and mean stay those of the whole store."""
    batch_rows: int = 4096
    """Rows of one step, over all ranks of a group; a multiple of corpus.num_lanes."""
    window_rows: int = 1_048_576
    """Rows shuffled together in memory, over all lanes. All ranks of a group together hold twice that; `gsae inspect` says how well
    it mixes."""
    read_threads: int = 4
    """Lanes that a rank reads at once."""
    learning_rate: float = 3e-4
    """Adam's step size."""
    learning_rates: dict[str | int, float] = field(default_factory=dict)
    """Step size of single sites, keyed as lambdas are; others take learning_rate."""
    adam_betas: tuple[float, float] = (0.0, 0.999)
    """Adam's decay rates of the first and second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_gradient_norm: float | None = None
    """Bound on the gradient's norm; null does not clip."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate and lambda over the run."""
    resampling: ResamplingConfig = field(default_factory=ResamplingConfig)
    """What the sweeps with `resampling: true` do, and when."""
    decoder_bias: Literal["mean", "zero"] = "mean"
    """Initial b_dec: the site's mean, or zero."""
    scale_activations: bool = True
    """Whether rows are multiplied by the site's scale (unit variance in all); false trains on raw rows."""
    groups: int = 1
    """Number of groups of ranks; each trains one site at a time."""
    feature_ranks: int = 1
    """Ranks of a group that share the features of each dictionary: each of them holds that part of the features with their optimizer
    state, and sees the same rows. A group of R ranks is a grid of R / feature_ranks rows of ranks, which share the rows of a batch. For
    dictionaries that one rank cannot hold; evaluation splits them alike."""
    shared_reads: bool = True
    """Whether, of the ranks that see the same rows, one reads them and sends them to the others; false has each of them read."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights, losses, gradients and Adam's state, and of products unless `products` says otherwise."""
    products: ProductsName = "float32"
    """Type of the factors of the dense step's matrix products: `tf32` (on GPUs; elsewhere float32) and `bfloat16` are quicker where the
    device has instructions for it. Sums, and all else, are in float32. The sparse step is exact either way: bfloat16 there only
    proposes which gates may be open. On a GPU, with kernels, `bfloat16` rounds its factors too: half the bytes, which bind there."""
    kernels: bool = True
    """Whether Triton's kernels make the steps and the update where they can: on NVIDIA's GPUs, with float32 weights."""
    ema_decay: float | None = None
    """Decay d of an exponential moving average of the weights, which is then what a checkpoint's SAE is: after update t, with the first
    number 0, it is d_t times itself plus 1 - d_t times the weights, d_t = min(d, t / (t + 9)). null keeps the weights themselves."""
    seed: int = 0
    """Seed of the order of the data."""
    log_every_steps: int = 50
    """Steps between two lines of metrics.jsonl."""
    trackers: list[TrackerName] = field(default_factory=list)
    """Where these lines go besides: `tensorboard` writes event files in each run's directory, `wandb` makes a run of the project gsae."""
    evaluate_every_fraction: float | None = None
    """Share of the run between two small evaluations, written to metrics.jsonl; each rank then holds the whole LLM. null: none."""
    evaluate_tokens: int = 16_384
    """Held-out tokens of each, the same every time."""
    checkpoint_every_fraction: float = 0.1
    """Share of the run between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones."""
    keep_every: int | None = None
    """Besides those, every n-th checkpoint of the run is kept, e.g. 2 for every second one; null keeps no others."""
    verify_shards: bool = True
    """Whether a shard's SHA-256 is checked when it is first read. One that changes while training runs is checked anyway."""
    sparse_below_density: float = 0.1
    """Share of gates open, over all rows and features, below which a run takes the sparse step; it returns to the dense one at
    1.25 times that. 0 always takes the dense one. Both give the same losses and gradients. On a GPU, with kernels, the step is sparse
    below a lower density, if this one is not lower still: 0.04 with float32 products, 0.006 with others."""
    micro_batch_rows: int | None = None
    """Rows of a rank's part of the batch that are computed at once, which bounds the memory of rows x features; null takes all."""

    def __post_init__(self) -> None:
        for name in (
            "total_rows",
            "batch_rows",
            "window_rows",
            "read_threads",
            "groups",
            "feature_ranks",
            "log_every_steps",
            "keep_checkpoints",
            "evaluate_tokens",
        ):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; give a positive number")
        rates = {"learning_rate": self.learning_rate, **{f"learning_rates of {site}": rate for site, rate in self.learning_rates.items()}}
        for name, rate in rates.items():
            require(0 < rate < inf, f"train.{name} is {rate}; give a positive number")
        require(all(0 <= beta < 1 for beta in self.adam_betas), f"train.adam_betas is {self.adam_betas}; give two numbers in [0, 1)")
        names = self.trackers
        require(len(set(names)) == len(names), f"train.trackers is {names}; name each once")
        for site, targets in self.target_l0.items():
            require(
                len(targets) > 0 and all(1 <= target < inf for target in targets),
                f"train.target_l0 of {site!r} is {targets}; give numbers of at least 1",
            )
        for sweep in self.sweeps:
            require(
                len(sweep.lambdas or self.target_l0) > 0,
                f"train.sweeps: the sweep of {sweep.objective!r} has no lambdas; give e.g. lambdas: {{'*': [0.1]}}, "
                "or train.target_l0: {'*': [32]}",
            )
        require(self.adam_eps > 0, f"train.adam_eps is {self.adam_eps}; give a positive number")
        micro = self.micro_batch_rows
        require(micro is None or micro >= 1, f"train.micro_batch_rows is {micro}; give a positive number, or null")
        every = self.keep_every
        require(every is None or every >= 1, f"train.keep_every is {every}; give a positive number, or null to keep only the newest")
        often = self.evaluate_every_fraction
        require(often is None or 0 < often <= 1, f"train.evaluate_every_fraction is {often}; give a share in (0, 1], or null for none")
        density = self.sparse_below_density
        require(0 <= density <= 1, f"train.sparse_below_density is {density}; give a share between 0 and 1")
        require(
            not (self.products != "float32" and self.dtype == "float64"),
            f"train.products is {self.products} but train.dtype is float64; set train.dtype to float32, or train.products to float32",
        )
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, f"train.ema_decay is {decay}; give a share between 0 and 1, or null not to average")
        clip = self.clip_gradient_norm
        require(clip is None or clip > 0, f"train.clip_gradient_norm is {clip}; give a positive number, or null not to clip")
        require(
            0 < self.checkpoint_every_fraction <= 1,
            f"train.checkpoint_every_fraction is {self.checkpoint_every_fraction}; give a share in (0, 1]",
        )
        fraction = self.warm_start_fraction
        require(0 < fraction <= 1, f"train.warm_start_fraction is {fraction}; give a share in (0, 1]")
