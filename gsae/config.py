"""The config: a tree of frozen dataclasses. In: a YAML file and `--section.field value` overrides. Out: one `Config` of plain data.

Rules that need only the config are checked here, at construction; rules that need the LLM, the store or the number of
ranks are checked by the stage that knows them.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from gsae.errors import ConfigError

ObjectiveName = Literal["relu", "gated", "gated-no-aux", "gated-norm-weighted"]
ScheduleName = Literal["constant", "linear", "cosine", "cosine-restarts"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class DataSetConfig:
    """Which part of a data set of the library `datasets` is read; used only by `corpus.format: datasets`."""

    subset: str | None = None
    """Its subset (the library's config name), e.g. `20231101.en`; null takes the default one."""
    split: str = "train"
    """The library's split. A directory that was saved with one split alone is that one."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the default branch as it is. The commit is part of the corpus's identity."""
    streaming: bool = True
    """Whether it is read over the network as it is needed; false downloads it into the library's cache first. The documents are the
    same."""


@dataclass(frozen=True)
class CorpusConfig:
    """Where the text comes from, and which part of it is training text and which held out."""

    format: Literal["mediawiki", "fever", "jsonl", "text", "parquet", "datasets"] = "mediawiki"
    """Format of the text: a MediaWiki XML dump (.xml or .xml.bz2), FEVER wiki pages (wiki-pages.zip or its directory),
    .jsonl files (one object a line), plain text files (one document a file), .parquet files, or a data set of the library `datasets`."""
    path: str = ""
    """File, directory or glob pattern (`*`, `**`) of the text; of a data set, its name on the hub (`OWNER/NAME`) or a directory."""
    text_column: str = "text"
    """Column (key) of the text, a string in every row: jsonl, parquet and datasets only."""
    id_column: str | None = None
    """Column (key) of the documents' ids: jsonl, parquet and datasets only. Null takes `id` where there is one, and names a row without
    by its file and number."""
    dataset: DataSetConfig = field(default_factory=DataSetConfig)
    """Used only by `format: datasets`."""
    max_documents: int | None = None
    """Number of documents to take, chosen by a seeded hash of their ids over the whole corpus; null takes all."""
    max_document_characters: int | None = None
    """Characters to keep of each document, from its start; null keeps all."""
    held_out_fraction: float = 0.01
    """Share of documents (0..1) held out for evaluation, chosen by a seeded hash of their ids; never harvested."""
    piece_characters: int = 2000
    """Longest piece of a document, in characters; pieces are cut at whitespace and dealt to lanes."""
    num_lanes: int = 64
    """Number of lanes the corpus is dealt to; the number of ranks in a group must divide it."""
    detokenise: bool = False
    """FEVER only: undo Penn Treebank tokens (`-LRB-`, spaces before punctuation)."""
    seed: int = 0
    """Seed of the selection and of the training / held-out split."""

    def __post_init__(self) -> None:
        _require(0 < self.held_out_fraction < 1, f"corpus.held_out_fraction is {self.held_out_fraction}; give a share between 0 and 1")
        for name in ("piece_characters", "num_lanes"):
            _require(getattr(self, name) >= 1, f"corpus.{name} is {getattr(self, name)}; give a positive number")
        for name in ("max_documents", "max_document_characters"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"corpus.{name} is {value}; give a positive number, or null for no limit")
        _require(bool(self.text_column), "corpus.text_column is empty; name the column of the text")
        _require(self.id_column != "", "corpus.id_column is empty; name the column of the ids, or null for `id` where there is one")
        names_columns = self.text_column != "text" or self.id_column is not None
        _require(
            not names_columns or self.format in ("jsonl", "parquet", "datasets"),
            f"corpus.text_column and corpus.id_column do not go with corpus.format {self.format!r}; leave them out",
        )
        _require(
            self.format == "datasets" or self.dataset == DataSetConfig(),
            f"corpus.dataset does not go with corpus.format {self.format!r}; leave it out, or set corpus.format: datasets",
        )


@dataclass(frozen=True)
class RandomLlamaConfig:
    """Shape of the Llama that `llm.model: random` builds, with byte tokens: to try a machine or a config without weights."""

    num_layers: int = 2
    """Number of decoder layers."""
    d_model: int = 64
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of attention heads; must divide d_model."""
    seed: int = 0
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        _require(self.num_layers >= 1, f"llm.random.num_layers is {self.num_layers}; give a positive number")
        _require(
            self.num_heads >= 1 and self.d_model % (2 * self.num_heads) == 0,
            f"llm.random.d_model is {self.d_model}; it must be a multiple of 2 x llm.random.num_heads ({self.num_heads})",
        )


@dataclass(frozen=True)
class LLMConfig:
    """The Llama whose activations are read."""

    model: str = ""
    """Hugging Face name (`meta-llama/Llama-2-7b-hf`), a directory that holds the weights and the tokenizer, or `random`."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the default branch."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    """Type of weights and computation."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation; both keep packed segments apart."""
    random: RandomLlamaConfig = field(default_factory=RandomLlamaConfig)
    """Used only by `model: random`."""


@dataclass(frozen=True)
class HarvestConfig:
    """Running the LLM over contexts and storing activations."""

    store: str = ""
    """Directory of the activation store; empty puts it at `<output>/store`."""
    sites: list[int | str] = field(default_factory=lambda: [2, "middle", -2])
    """Layers whose output is read: an index (negative counts from the end), `middle`, or a name such as `resid.16`."""
    context_length: int = 1024
    """Tokens of a context, BOS included."""
    contexts_per_shard: int = 64
    """Contexts of one shard (tar); a whole number of LLM batches."""
    batch_contexts: int = 8
    """Contexts of one LLM forward."""
    max_tokens: int | None = None
    """Tokens to harvest over all lanes, rounded up to whole shards of every lane; null harvests the whole training text."""
    outlier_multiple: float = 3.0
    """Rows whose norm exceeds this multiple of the site's median norm are dropped."""
    calibration_contexts: int = 64
    """Contexts of the fixed sample from which the median norms are taken."""
    storage_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored activations."""

    def __post_init__(self) -> None:
        for name in ("context_length", "contexts_per_shard", "batch_contexts", "calibration_contexts"):
            _require(getattr(self, name) >= 1, f"harvest.{name} is {getattr(self, name)}; give a positive number")
        _require(self.context_length >= 4, f"harvest.context_length is {self.context_length}; give at least 4 tokens")
        _require(
            self.contexts_per_shard % self.batch_contexts == 0,
            f"harvest.contexts_per_shard ({self.contexts_per_shard}) is not a whole number of LLM batches; "
            f"set it to a multiple of harvest.batch_contexts ({self.batch_contexts})",
        )
        _require(self.outlier_multiple > 1, f"harvest.outlier_multiple is {self.outlier_multiple}; give a multiple above 1")
        _require(
            self.max_tokens is None or self.max_tokens >= 1, f"harvest.max_tokens is {self.max_tokens}; give a positive number or null"
        )
        _require(len(self.sites) > 0, "harvest.sites is empty; name at least one layer")


@dataclass(frozen=True)
class SweepConfig:
    """Runs that share an objective: one run for each site x num_features x lambda x seed."""

    objective: ObjectiveName = "gated"
    """Training objective; `relu` is the plain SAE, the baseline."""
    lambdas: dict[str | int, list[float]] = field(default_factory=dict)
    """Sparsity coefficients of each site, on scaled activations. Keys are sites as in harvest.sites, or `*` for all others;
    a site that has no key here is not trained by this sweep."""
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

    def __post_init__(self) -> None:
        _require(len(self.lambdas) > 0, f"train.sweeps: the sweep of {self.objective!r} has no lambdas; give e.g. lambdas: {{'*': [0.1]}}")
        for site, values in self.lambdas.items():
            _require(
                len(values) > 0 and all(0 <= v < inf for v in values),
                f"train.sweeps: lambdas of {site!r} are {values}; give numbers of at least 0",
            )
        _require(
            all(e > 0 for e in self.expansions) and len(self.expansions) > 0,
            f"train.sweeps: expansions are {self.expansions}; give positive numbers",
        )
        _require(len(self.seeds) > 0, "train.sweeps: seeds is empty; give at least one")
        rate = self.learning_rate
        _require(rate is None or 0 < rate < inf, f"train.sweeps: learning_rate is {rate}; give a positive number, or null")
        _require(
            0 <= self.pre_activation_loss < inf,
            f"train.sweeps: pre_activation_loss is {self.pre_activation_loss}; give a weight of at least 0",
        )
        _require(
            not (self.resampling and self.objective == "gated-norm-weighted"),
            "train.sweeps: gated-norm-weighted has no unit-norm decoder to resample into; set resampling: false",
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
            _require(0 <= getattr(self, name) <= 1, f"train.schedule.{name} is {getattr(self, name)}; give a share between 0 and 1")
        _require(self.num_cycles >= 1, f"train.schedule.num_cycles is {self.num_cycles}; give at least 1")


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
        _require(
            all(0 < f <= 0.5 for f in fractions) and list(fractions) == sorted(set(fractions)),
            f"train.resampling.event_fractions is {fractions}; give rising shares between 0 and 0.5",
        )
        factor = self.learning_rate_factor
        _require(0 < factor <= 1, f"train.resampling.learning_rate_factor is {factor}; give a share in (0, 1]")
        _require(self.encoder_norm > 0, f"train.resampling.encoder_norm is {self.encoder_norm}; give a positive number")
        _require(self.dead_after_rows >= 1, f"train.resampling.dead_after_rows is {self.dead_after_rows}; give a positive number of rows")
        _require(
            self.max_candidate_rows >= 1,
            f"train.resampling.max_candidate_rows is {self.max_candidate_rows}; give a positive number of rows",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Training one SAE for each site x sweep x width x lambda x seed."""

    sweeps: list[SweepConfig] = field(default_factory=list)
    """The runs."""
    sites: list[int | str] = field(default_factory=list)
    """Sites to train, out of the store's; empty trains all."""
    total_rows: int = 1_000_000_000
    """Rows of one run, over all ranks, rounded up to whole batches; the store is read again when it is shorter."""
    batch_rows: int = 4096
    """Rows of one step, over all ranks of a group; a multiple of corpus.num_lanes."""
    window_rows: int = 1_048_576
    """Rows shuffled together in memory, over all lanes."""
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
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights and products."""
    seed: int = 0
    """Seed of the order of the data."""
    log_every_steps: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every_fraction: float = 0.1
    """Share of the run between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones."""
    verify_shards: bool = True
    """Whether a shard's SHA-256 is checked when it is first read."""
    sparse_below_density: float = 0.1
    """Share of gates open, over all rows and features, below which a run takes the sparse step; it returns to the dense one at
    1.25 times that. 0 always takes the dense one. Both give the same losses and gradients."""
    micro_batch_rows: int | None = None
    """Rows of a rank's part of the batch that are computed at once, which bounds the memory of rows x features; null takes all."""

    def __post_init__(self) -> None:
        for name in ("total_rows", "batch_rows", "window_rows", "groups", "log_every_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; give a positive number")
        rates = {"learning_rate": self.learning_rate, **{f"learning_rates of {site}": rate for site, rate in self.learning_rates.items()}}
        for name, rate in rates.items():
            _require(0 < rate < inf, f"train.{name} is {rate}; give a positive number")
        _require(all(0 <= beta < 1 for beta in self.adam_betas), f"train.adam_betas is {self.adam_betas}; give two numbers in [0, 1)")
        _require(self.adam_eps > 0, f"train.adam_eps is {self.adam_eps}; give a positive number")
        micro = self.micro_batch_rows
        _require(micro is None or micro >= 1, f"train.micro_batch_rows is {micro}; give a positive number, or null")
        density = self.sparse_below_density
        _require(0 <= density <= 1, f"train.sparse_below_density is {density}; give a share between 0 and 1")
        clip = self.clip_gradient_norm
        _require(clip is None or clip > 0, f"train.clip_gradient_norm is {clip}; give a positive number, or null not to clip")
        _require(
            0 < self.checkpoint_every_fraction <= 1,
            f"train.checkpoint_every_fraction is {self.checkpoint_every_fraction}; give a share in (0, 1]",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out text through the LLM with each SAE spliced in."""

    max_tokens: int = 1_000_000
    """Held-out tokens to evaluate on."""
    max_document_tokens: int = 8192
    """Tokens taken of one document at most, so that long ones do not dominate."""
    batch_contexts: int = 8
    """Contexts of one evaluation batch; fixes the numbers' last bits, ranks take whole batches."""
    min_documents: int = 20
    """Held-out documents below which evaluation is refused."""
    bootstrap_draws: int = 1000
    """Draws over documents for the 95 % intervals."""
    seed: int = 0
    """Seed of the choice of contexts and of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_document_tokens", "batch_contexts", "min_documents", "bootstrap_draws"):
            _require(getattr(self, name) >= 1, f"evaluate.{name} is {getattr(self, name)}; give a positive number")


@dataclass(frozen=True)
class Config:
    """All that a pipeline needs; every stage reads the same file and takes the sections it needs."""

    output: str = "runs/default"
    """Directory of the runs, their report and (unless harvest.store says otherwise) the store."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""
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
        _require(bool(self.output), "output is empty; give a directory for the runs")
        rows, lanes = self.train.batch_rows, self.corpus.num_lanes
        if rows % lanes:
            below = rows - rows % lanes
            nearest = f"{below} or {below + lanes}" if below else f"{lanes}"
            raise ConfigError(f"train.batch_rows ({rows}) is not a multiple of corpus.num_lanes ({lanes}); set it to {nearest}")

    @property
    def store_directory(self) -> str:
        """The store's directory."""
        return self.harvest.store or f"{self.output}/store"
