"""The budget of a config. In: a config, and what is assumed of the ranks. Out: `Budget`, all figures together.

Nothing heavy is loaded unless a rate is to be measured: the LLM is described by its config.json, the text is read once.
"""

from dataclasses import dataclass
from pathlib import Path

from gsae.config import Config
from gsae.llm.load import load_tokenizer
from gsae.llm.site import Site, resolve_sites
from gsae.plan.disk import NUMBER_BYTES, StoreSize, checkpoint_bytes, free_bytes, on_one_disk, store_size
from gsae.plan.llm import LLMNeeds, Shape, llm_needs, read_shape
from gsae.plan.machine import Machine, this_machine
from gsae.plan.memory import part_parameters
from gsae.plan.rate import measure_tokens_per_second
from gsae.plan.text import TrainingText, read_text
from gsae.plan.training import TrainingNeeds, TrainingRates, training_needs
from gsae.train.plan import BankSpec, StoreOutline, plan_banks


@dataclass(frozen=True)
class Assumptions:
    """What a config does not tell."""

    ranks: int = 1
    """Ranks of the job."""
    tokens_per_second: float | None = None
    """Of the harvest, over all ranks."""
    rows_per_second: float | None = None
    """Of the stream that a group trains all runs of a site from, as `gsae train` shows it."""
    link_bytes_per_second: float | None = None
    """That a rank sends to another of its group."""
    disk_bytes_per_second: float | None = None
    """That the store's disk gives to all ranks together."""
    memory_bytes: int | None = None
    """That each rank has where it computes; None takes what is free here."""
    measure: bool = False
    """Whether to measure tokens_per_second here, on one rank, and take all ranks to be as fast."""


@dataclass(frozen=True)
class HarvestNeeds:
    """What the harvest computes."""

    documents: int
    pieces: int
    characters: int
    sampled_pieces: int
    characters_per_token: float
    contexts: int
    context_length: int
    computed_tokens: int
    """That the LLM computes for the text once: text, BOS and padding."""
    text_tokens: int
    bos_tokens: int
    padding_tokens: int
    empty_lanes: int
    """Lanes without text, which a harvest refuses."""
    tokens_per_second: float | None
    is_measured: bool
    hours: float | None


@dataclass(frozen=True)
class Disk:
    """Where it is written."""

    store_free_bytes: int
    """Of a store at a URL, where its files are kept."""
    output_free_bytes: int
    is_shared: bool
    """Whether these are the same bytes."""
    checkpoint_bytes: int
    """Of all runs, in the directory of the output."""


@dataclass(frozen=True)
class Budget:
    """What a config will need."""

    harvest: HarvestNeeds
    store: StoreSize
    disk: Disk
    llm: LLMNeeds
    train: TrainingNeeds
    machine: Machine
    free_bytes_per_rank: int
    """Where it computes: as assumed, or here."""
    is_assumed: bool
    """Whether that is as given, for other machines than this one."""
    evaluation_feature_ranks: int | None
    """The fewest ranks that must share the features so that an evaluation of all runs fits that; None where none do."""
    computes_on_gpus: bool
    text: TrainingText
    shape: Shape


def budget(config: Config, assumptions: Assumptions) -> Budget:
    """Work out the budget.

    Raises:
        ConfigError, CorpusError, ModelError: as the stages would.
    """
    shape = read_shape(config.llm)
    sites = resolve_sites(config.harvest.sites, shape.num_layers)
    layers = {site.name: site.layer for site in sites}
    banks = plan_banks(config, StoreOutline(shape.num_layers, shape.d_model, layers, dict.fromkeys(layers, 1.0)))
    text = read_text(config, load_tokenizer(config.llm))
    store = store_size(config, list(layers), shape.d_model, text)
    machine = this_machine(config)
    free = assumptions.memory_bytes or machine.free_bytes_per_rank(assumptions.ranks)
    links = assumptions.link_bytes_per_second, assumptions.disk_bytes_per_second
    rates = TrainingRates(assumptions.ranks, assumptions.rows_per_second, free, *links)
    sae_bytes = _sae_bytes(config, banks, config.train.feature_ranks)
    llm = llm_needs(config, shape, sites[-1].layer, len(sites), assumptions.ranks, sae_bytes)
    train = training_needs(config, banks, store, rates, llm.evaluation_bytes_per_rank - sae_bytes)
    return Budget(
        harvest=_harvest_needs(config, text, sites, assumptions, train.visits / store.parts if store.parts > 1 else 1.0),
        store=store,
        disk=_disk(config, banks),
        llm=llm,
        train=train,
        machine=machine,
        free_bytes_per_rank=free,
        evaluation_feature_ranks=_smallest_evaluation_split(
            config, banks, assumptions.ranks, free - llm.evaluation_bytes_per_rank + sae_bytes
        ),
        is_assumed=assumptions.memory_bytes is not None,
        computes_on_gpus=bool(machine.gpu_free_bytes) or (assumptions.memory_bytes is not None and config.device != "cpu"),
        text=text,
        shape=shape,
    )


def _harvest_needs(config: Config, text: TrainingText, sites: list[Site], assumptions: Assumptions, num_harvests: float) -> HarvestNeeds:
    """`num_harvests` is how often the text goes through the LLM: a corpus in parts is harvested anew in each pass of training."""
    computed = text.contexts * config.harvest.context_length
    bos = text.segments * text.prefix_tokens
    rate = assumptions.tokens_per_second
    if assumptions.measure:
        rate = measure_tokens_per_second(config, sites) * assumptions.ranks
    return HarvestNeeds(
        documents=text.documents,
        pieces=text.pieces,
        characters=text.characters,
        sampled_pieces=text.sampled_pieces,
        characters_per_token=text.characters_per_token,
        contexts=text.contexts,
        context_length=config.harvest.context_length,
        computed_tokens=computed,
        text_tokens=text.text_tokens,
        bos_tokens=bos,
        padding_tokens=computed - text.text_tokens - bos,
        empty_lanes=sum(lane.contexts == 0 for lane in text.lanes),
        tokens_per_second=rate,
        is_measured=assumptions.measure,
        hours=None if rate is None else num_harvests * computed / rate / 3600,
    )


def _disk(config: Config, banks: list[BankSpec]) -> Disk:
    store = config.harvest.cache_directory if config.harvest.is_remote else Path(config.store_directory)
    output = Path(config.output)
    return Disk(free_bytes(store), free_bytes(output), on_one_disk(store, output), checkpoint_bytes(config, banks))


def _smallest_evaluation_split(config: Config, banks: list[BankSpec], ranks: int, free_bytes: int) -> int | None:
    """The fewest ranks that must share the SAEs' features so that these fit so many bytes of each; None where none do."""
    for columns in range(1, ranks + 1):
        is_even = ranks % columns == 0 and all(run.num_features % columns == 0 for bank in banks for run in bank.runs)
        if is_even and _sae_bytes(config, banks, columns) <= free_bytes:
            return columns
    return None


def _sae_bytes(config: Config, banks: list[BankSpec], columns: int) -> int:
    """Bytes of the SAEs of all runs, which an evaluation holds together: of a rank's parts, where so many ranks share their features."""
    return NUMBER_BYTES[config.train.dtype] * sum(part_parameters(run, columns) for bank in banks for run in bank.runs)
