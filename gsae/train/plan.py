"""Which runs a config asks for. In: the config and what a store holds. Out: one bank of run specifications a site."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from gsae.config import Config, ObjectiveName, SweepConfig
from gsae.errors import ConfigError
from gsae.llm.site import resolve_site
from gsae.store.manifest import Manifest, fingerprint

RUN_FORMAT = 2
T = TypeVar("T")
FREE_SETTINGS = (
    *("sweeps", "sites", "learning_rate", "learning_rates"),  # what they mean for a run stands in its RunSpec
    # These do not change the weights.
    *("groups", "log_every_steps", "checkpoint_every_fraction", "keep_checkpoints", "verify_shards", "read_threads"),
)
"""Fields of TrainConfig that a resumed run need not share."""


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
    lambda_: float
    """Sparsity coefficient, on scaled activations."""
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class BankSpec:
    """The runs of one site, trained together from one stream."""

    site: str
    runs: tuple[RunSpec, ...]
    scale: float
    """Rows are multiplied by it before they reach the SAEs."""
    batch_rows: int
    total_steps: int

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
    """The banks in the order in which groups take them: the sites in layer order.

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
            banks.append(BankSpec(site, tuple(runs), scale, config.train.batch_rows, total_steps))
    if not banks:
        raise ConfigError(
            "train.sweeps asks for no run at any site of the store; give each sweep lambdas for a site, e.g. lambdas: {'*': [0.1]}"
        )
    return banks


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
    own = _by_site(sweep.lambdas, store, "train.sweeps.lambdas")
    weight = f"-preact{sweep.pre_activation_loss:g}" if sweep.pre_activation_loss else ""
    kind = sweep.objective + ("-resampled" if sweep.resampling else "") + weight
    rate_of_its_own = "" if sweep.learning_rate is None else f"-r{sweep.learning_rate:g}"
    for expansion in sweep.expansions:
        num_features = round(expansion * store.d_model)
        if num_features < 1:
            raise ConfigError(f"train.sweeps: expansion {expansion} of d_model {store.d_model} gives no feature; give a larger one")
        for lambda_ in own.get(site, sweep.lambdas.get("*", [])):
            for seed in sweep.seeds:
                yield RunSpec(
                    name=f"{kind}-m{num_features}-l{lambda_:g}{rate_of_its_own}-s{seed}",
                    site=site,
                    layer=store.layers[site],
                    objective=sweep.objective,
                    resampling=sweep.resampling,
                    pre_activation_loss=sweep.pre_activation_loss,
                    d_model=store.d_model,
                    num_features=num_features,
                    lambda_=lambda_,
                    seed=seed,
                    learning_rate=sweep.learning_rate or learning_rate,
                )


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
    if config.train.max_rows is None:
        del settings["max_rows"]  # as in runs that were begun before there was such a setting
    if not spec.resampling:
        # Without resampling only the pre-activation loss asks which features are dead.
        settings["resampling"] = {"dead_after_rows": config.train.resampling.dead_after_rows} if spec.pre_activation_loss else {}
    own = {("lambda" if key == "lambda_" else key): value for key, value in asdict(spec).items()}
    shared = {"scale": bank.scale, "total_steps": bank.total_steps, "batch_rows": bank.batch_rows}
    described = {"format": RUN_FORMAT, **own, **shared, "store_fingerprint": manifest.fingerprint, "settings": settings}
    plain: dict[str, Any] = json.loads(json.dumps(described))  # as it will be read back: lists for tuples
    return {**plain, "train_fingerprint": fingerprint(plain)}
