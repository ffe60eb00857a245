"""`gsae plan`: the budget of a config before anything runs. In: a config. Out: rows, disk, memory and steps, and what will not fit.

Nothing heavy is loaded: the LLM is described from its config file, and the text is counted in one pass unless harvest.max_tokens
says how much of it is taken.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from gsae.config import Config
from gsae.corpus.size import expected_tokens
from gsae.llm.load import LLMInfo, describe, load_tokenizer
from gsae.llm.site import resolve_sites
from gsae.train.plan import BankSpec, StoreOutline, plan_banks

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
FEATURE_TENSORS = 7
"""Tensors of rows x features that a dense gated step holds at once."""
STATE_COPIES = 4
"""Weights, gradient, and Adam's two moments."""


@dataclass(frozen=True)
class Budget:
    """What a config will need."""

    tokens: int
    """Tokens the LLM computes in the harvest, about; rows of a site are a little fewer."""
    sites: tuple[str, ...]
    store_bytes: int
    free_bytes: int
    """On the disk that will hold the store."""
    num_runs: int
    steps_a_run: int
    rows_a_run: int
    passes: float
    """How often a run reads the store."""
    train_bytes: int
    """Memory of a rank for the largest bank: weights, gradients and optimizer state, one run's features, windows of rows."""


def budget(config: Config) -> Budget:
    """Work out the budget.

    Raises:
        ConfigError, CorpusError, ModelError: as the stages would.
    """
    info = describe(config.llm)
    sites = resolve_sites(config.harvest.sites, info.num_layers)
    tokens = expected_tokens(config, lambda: load_tokenizer(config.llm))
    row_bytes = info.d_model * BYTES[config.harvest.storage_dtype]
    layers = {site.name: site.layer for site in sites}
    banks = plan_banks(config, StoreOutline(info.num_layers, info.d_model, layers, dict.fromkeys(layers, 1.0)))
    store = Path(config.store_directory).absolute()
    existing = next(place for place in (store, *store.parents) if place.exists())
    return Budget(
        tokens=tokens,
        sites=tuple(site.name for site in sites),
        store_bytes=tokens * row_bytes * len(sites),
        free_bytes=shutil.disk_usage(existing).free,
        num_runs=sum(len(bank.runs) for bank in banks),
        steps_a_run=banks[0].total_steps,
        rows_a_run=banks[0].total_rows,
        passes=banks[0].total_rows / tokens,
        train_bytes=max(_bank_bytes(config, info, bank, tokens * row_bytes) for bank in banks),
    )


def _bank_bytes(config: Config, info: LLMInfo, bank: BankSpec, site_bytes: int) -> int:
    """Memory of a bank on one rank.

    Each run's state, the largest run's rows x features in the dense step that training begins with, and two windows for each of two
    streams: training's, and that of a resampling event.
    """
    number = BYTES[config.train.dtype]
    widths = [run.num_features for run in bank.runs]
    parameters = sum(2 * info.d_model * width + 3 * width + info.d_model for width in widths)
    rows = min(config.train.batch_rows, config.train.micro_batch_rows or config.train.batch_rows)
    features = FEATURE_TENSORS * rows * max(widths) * number
    window = min(config.train.window_rows * info.d_model * BYTES[config.harvest.storage_dtype], site_bytes)
    return STATE_COPIES * parameters * number + features + 4 * window


def run_plan(config: Config) -> None:
    """Print the budget, and what will not fit."""
    found = budget(config)
    lines = [
        f"harvest   about {found.tokens:,} tokens at {len(found.sites)} sites ({', '.join(found.sites)})",
        f"store     about {_gib(found.store_bytes)} at {config.store_directory}; {_gib(found.free_bytes)} free there",
        f"train     {found.num_runs} runs of {found.steps_a_run:,} steps of {config.train.batch_rows} rows = {found.rows_a_run:,} rows, "
        f"{found.passes:.2f} passes over the store",
        f"memory    about {_gib(found.train_bytes)} a rank in training, for the largest bank on one rank",
    ]
    if found.store_bytes > found.free_bytes:
        lines.append(
            "warning: the store will not fit; lower harvest.max_tokens, name fewer harvest.sites, or put harvest.store on a larger disk"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
