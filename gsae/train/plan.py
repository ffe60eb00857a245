"""Which runs a config asks for. In: the config and what a store holds. Out: one bank of run specifications a site."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from gsae.config import Config, ObjectiveName, SweepConfig, TrainConfig
from gsae.errors import ConfigError
from gsae.llm.site import resolve_site
from gsae.store.manifest import Manifest, fingerprint

RUN_FORMAT = 2
T = TypeVar("T")
FREE_SETTINGS = (
    # What these mean for a run stands in its RunSpec, and in its number of steps.
    *("sweeps", "sites", "learning_rate", "learning_rates", "target_l0", "warm_start_fraction"),
    # These do not change the weights.
    *("groups", "feature_ranks", "shared_reads", "log_every_steps", "checkpoint_every_fraction", "keep_checkpoints", "keep_every"),
    *("verify_shards", "read_threads"),
    *("trackers", "evaluate_every_fraction", "evaluate_tokens"),
    # This changes them by no more than another device does.
    "kernels",
)
"""Fields of TrainConfig that a resumed run need not share."""
NEWER_SETTINGS = {"max_rows": None, "products": "float32", "ema_decay": None}
"""Fields of TrainConfig that runs were begun without, and their defaults, at which `run.json` leaves them out."""


@dataclass(frozen=True)
class RunSpec:
    """One SAE's training: all that sets it apart from the other runs of its bank."""

    name: str
    site: str
    layer: int
    objective: ObjectiveName
    resampling: bool
    pre_activation_loss: float
    """Weight of the pre-activation loss of dead features, in multiples of lambda; 0 leaves it out."""
    d_model: int
    num_features: int
    lambda_: float | None
    """Sparsity coefficient, on scaled activations; None until pilots found it."""
    seed: int
    learning_rate: float
    target_l0: float | None = None
    """The L0 that pilots looked for lambda by; None where the config gives lambda."""
    starts_from: str | None = None
    """The run of the same site from whose last weights it starts; None starts from random ones."""


@dataclass(frozen=True)
class BankSpec:
    """The runs of one site, trained together from one stream."""

    site: str
    runs: tuple[RunSpec, ...]
    scale: float
    """Rows are multiplied by it before they reach the SAEs."""
    batch_rows: int
    total_steps: int
    is_pilot: bool = False
    """Whether these are short runs that look for lambda."""

    @property
    def is_warm(self) -> bool:
        """Whether the runs start from the weights of others."""
        return self.runs[0].starts_from is not None

    @property
    def total_rows(self) -> int:
        """Rows of each run, over all ranks of the group."""
        return self.total_steps * self.batch_rows


@dataclass(frozen=True)
class StoreOutline:
    """What decides the runs, of a store that is there or that is planned."""

    num_layers: int
    """Of the LLM."""
    d_model: int
    layers: dict[str, int]
    """The layer of each site, by name."""
    scales: dict[str, float]
    """The scale of each site."""


def outline(manifest: Manifest) -> StoreOutline:
    """The outline of a whole store."""
    sites = manifest.sites.values()
    layers, scales = {site.name: site.layer for site in sites}, {site.name: site.scale for site in sites}
    return StoreOutline(int(manifest.identity["num_layers"]), manifest.d_model, layers, scales)


def plan_banks(config: Config, store: StoreOutline) -> list[BankSpec]:
    """The banks in the order in which groups take them: the sites in layer order, the banks of a site one after another.

    Raises:
        ConfigError: a site is not in the store, a sweep names no site of it, or two runs would share a name.
    """
    wanted = {_site_name(spec, store) for spec in config.train.sites} or set(store.layers)
    rates = _by_site(config.train.learning_rates, store, "train.learning_rates")
    total_steps = -(-config.train.total_rows // config.train.batch_rows)
    banks = []
    for site in sorted(wanted, key=lambda name: store.layers[name]):
        rate = rates.get(site, config.train.learning_rates.get("*", config.train.learning_rate))
        runs = [run for sweep in config.train.sweeps for run in _runs_of_sweep(config, sweep, site, store, rate)]
        _require_unique(runs)
        if runs:
            scale = store.scales[site] if config.train.scale_activations else 1.0
            for generation, members in enumerate(_generations(runs)):
                steps = total_steps if generation == 0 else max(1, round(config.train.warm_start_fraction * total_steps))
                banks.append(BankSpec(site, members, scale, config.train.batch_rows, steps))
    if not banks:
        raise ConfigError(
            "train.sweeps asks for no run at any site of the store; give each sweep lambdas for a site, e.g. lambdas: {'*': [0.1]}, "
            "or train.target_l0"
        )
    return banks


def by_site(banks: Sequence[BankSpec]) -> list[list[BankSpec]]:
    """The banks of each site, in the order in which one group trains them."""
    return [list(of_site) for _, of_site in itertools.groupby(banks, key=lambda bank: bank.site)]


def _generations(runs: Sequence[RunSpec]) -> list[tuple[RunSpec, ...]]:
    """The runs that start from random weights, those that start from theirs, and so on."""
    generation: dict[str | None, int] = {None: -1}
    for run in runs:
        generation[run.name] = generation[run.starts_from] + 1
    return [tuple(run for run in runs if generation[run.name] == number) for number in range(max(generation.values()) + 1)]


def _site_name(spec: int | str, store: StoreOutline) -> str:
    site = resolve_site(spec, store.num_layers)
    if site.name not in store.layers:
        raise ConfigError(
            f"site {spec} ({site.name}) is not in the store, which has {', '.join(store.layers)}; harvest it, or leave it out"
        )
    return site.name


def _by_site(values: Mapping[str | int, T], store: StoreOutline, setting: str) -> dict[str, T]:
    """A mapping keyed by the sites' own names; `*` is left out."""
    named: dict[str, T] = {}
    for key, value in values.items():
        if str(key) != "*":
            name = _site_name(key, store)
            if name in named:
                raise ConfigError(f"{setting} names {name} twice, once as {key!r}; keep one")
            named[name] = value
    return named


def _runs_of_sweep(config: Config, sweep: SweepConfig, site: str, store: StoreOutline, learning_rate: float) -> Iterator[RunSpec]:
    kind = _kind(sweep.objective, sweep.resampling, sweep.pre_activation_loss) + ("-warm" if sweep.warm_start else "")
    rate_of_its_own = "" if sweep.learning_rate is None else f"-r{sweep.learning_rate:g}"
    for expansion in sweep.expansions:
        num_features = round(expansion * store.d_model)
        if num_features < 1:
            raise ConfigError(f"train.sweeps: expansion {expansion} of d_model {store.d_model} gives no feature; give a larger one")
        if num_features % config.train.feature_ranks:
            near = round(num_features / config.train.feature_ranks) * config.train.feature_ranks or config.train.feature_ranks
            raise ConfigError(
                f"train.sweeps: expansion {expansion:g} of d_model {store.d_model} gives {num_features} features, which "
                f"train.feature_ranks ({config.train.feature_ranks}) does not divide; give e.g. expansion {near / store.d_model:g}"
            )
        before: dict[int, str] = {}
        for point in _points(config, sweep, site, store):
            if point.target_l0 is not None and point.target_l0 >= num_features:
                raise ConfigError(f"train.target_l0 is {point.target_l0:g} at {site}, where runs have {num_features} features; lower it")
            for seed in sweep.seeds:
                name = f"{kind}-m{num_features}-{point.name}{rate_of_its_own}-s{seed}"
                starts_from = before.get(seed) if sweep.warm_start else None
                before[seed] = name
                yield RunSpec(
                    name=name,
                    site=site,
                    layer=store.layers[site],
                    objective=sweep.objective,
                    resampling=sweep.resampling,
                    pre_activation_loss=sweep.pre_activation_loss,
                    d_model=store.d_model,
                    num_features=num_features,
                    lambda_=point.lambda_,
                    seed=seed,
                    learning_rate=sweep.learning_rate or learning_rate,
                    target_l0=point.target_l0,
                    starts_from=starts_from,
                )


def search_name(run: RunSpec) -> str:
    """What runs share that differ in lambda, target and seed alone."""
    kind = _kind(run.objective, run.resampling, run.pre_activation_loss)
    return f"{kind}-m{run.num_features}-r{run.learning_rate:g}"


def pilot_lengths(train: TrainConfig, total_steps: int) -> list[int]:
    """Steps of the pilots for runs of so many, rising: two lengths, of which the shorter is half the longer."""
    longest = max(1, round(train.pilot.fraction * total_steps))
    return sorted({max(1, longest // 2), longest})


def _kind(objective: ObjectiveName, resampling: bool, pre_activation_loss: float) -> str:
    """How runs are trained, in the short form that their names begin with."""
    weight = f"-preact{pre_activation_loss:g}" if pre_activation_loss else ""
    return objective + ("-resampled" if resampling else "") + weight


@dataclass(frozen=True)
class _Point:
    """What sets the runs of a sweep apart at one width: lambda, or the L0 that it is to give."""

    name: str
    lambda_: float | None
    target_l0: float | None


def _points(config: Config, sweep: SweepConfig, site: str, store: StoreOutline) -> list[_Point]:
    if sweep.lambdas:
        own = _by_site(sweep.lambdas, store, "train.sweeps.lambdas")
        return [_Point(f"l{lambda_:g}", lambda_, None) for lambda_ in own.get(site, sweep.lambdas.get("*", []))]
    targets = _by_site(config.train.target_l0, store, "train.target_l0")
    return [_Point(f"t{target:g}", None, target) for target in targets.get(site, config.train.target_l0.get("*", []))]


def _require_unique(runs: list[RunSpec]) -> None:
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise ConfigError(f"train.sweeps asks twice for run {run.name} at {run.site}; remove one")
        seen.add(run.name)


def describe_run(spec: RunSpec, bank: BankSpec, config: Config, manifest: Manifest) -> dict[str, Any]:
    """The content of `run.json`: what is trained, and by which settings a resumed run must have been made."""
    train = asdict(config.train)
    settings = {key: value for key, value in train.items() if key not in FREE_SETTINGS}
    settings = {key: value for key, value in settings.items() if key not in NEWER_SETTINGS or value != NEWER_SETTINGS[key]}
    if not spec.resampling:
        # Without resampling only the pre-activation loss asks which features are dead.
        settings["resampling"] = {"dead_after_rows": config.train.resampling.dead_after_rows} if spec.pre_activation_loss else {}
    own = {("lambda" if key == "lambda_" else key): value for key, value in asdict(spec).items()}
    if spec.target_l0 is None:
        del own["target_l0"], settings["pilot"]
    if spec.starts_from is None:
        del own["starts_from"]
    shared = {"scale": bank.scale, "total_steps": bank.total_steps, "batch_rows": bank.batch_rows}
    described = {"format": RUN_FORMAT, **own, **shared, "store_fingerprint": manifest.fingerprint, "settings": settings}
    plain: dict[str, Any] = json.loads(json.dumps(described))  # as it will be read back: lists for tuples
    return {**plain, "train_fingerprint": fingerprint(plain)}


def with_all_settings(described: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `run.json` together with the settings that it leaves out at their defaults."""
    return {**described, "settings": NEWER_SETTINGS | described.get("settings", {})}
