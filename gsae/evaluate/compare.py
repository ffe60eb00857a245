"""`gsae compare`. In: two run directories that were evaluated on the same text. Out: a table, or one JSON object."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from jaxtyping import Float
from rich.console import Console as RichConsole
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from gsae.errors import CheckpointError
from gsae.evaluate.pairs import BLOCKS_FILE, BlockSums, Difference, Match, differences, match, read_blocks
from gsae.evaluate.results import DENSITY_FILE, RESULTS_FORMAT
from gsae.sae.formats import DESCRIPTION_FILE, read_sae
from gsae.store.runs import RESULTS_FILE, checkpoints, read_run


@dataclass(frozen=True)
class Evaluated:
    """A run with what its evaluation left."""

    directory: Path
    description: dict[str, Any]
    """The object in run.json."""
    identity: dict[str, Any]
    """What was evaluated, on what, and how."""
    blocks: BlockSums
    directions: Float[Tensor, "seen d_model"]
    """Decoder rows of the features that were on."""


@dataclass(frozen=True)
class Comparison:
    """The second run against the first."""

    first: str
    second: str
    site: str
    metrics: dict[str, Difference]
    """By name."""
    has_same_start: bool
    """Whether both began at the same random directions, so that a match says less than between seeds."""
    first_in_second: Match | None
    """The first run's directions among the second's."""
    second_in_first: Match | None


def run_compare(first: Path, second: Path, *, as_json: bool) -> None:
    """Compare two runs and show it.

    Raises:
        CheckpointError: a run is not one, has no results of its newest form, or they are not on the same site, text and settings.
    """
    found = compare(read_evaluated(first), read_evaluated(second))
    if as_json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    else:
        _show(found, RichConsole(highlight=False))


def read_evaluated(directory: Path) -> Evaluated:
    """What evaluation left of a run.

    Raises:
        CheckpointError: something of it is missing or damaged.
    """
    description = read_run(directory)
    advice = "run gsae evaluate with the config that trained it"
    try:
        results = json.loads((directory / RESULTS_FILE).read_text())
        if results["format"] != RESULTS_FORMAT:
            raise CheckpointError(
                f"{directory / RESULTS_FILE}: format is {results['format']}, gsae compare reads {RESULTS_FORMAT}; {advice}"
            )
        identity = results["identity"]
        blocks = read_blocks(directory / BLOCKS_FILE)
        is_seen = safetensors.torch.load_file(directory / DENSITY_FILE)["firing_counts"] > 0
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: what gsae evaluate leaves is missing or damaged ({error}); {advice}") from error
    return Evaluated(directory, description, identity, blocks, _directions(directory, identity["checkpoint"])[is_seen])


def _directions(directory: Path, evaluated: dict[str, Any]) -> Float[Tensor, "features d_model"]:
    for checkpoint in checkpoints(directory):
        if json.loads((checkpoint.path / DESCRIPTION_FILE).read_text())["sha256"] == evaluated["sae_sha256"]:
            return read_sae(checkpoint.path).sae.W_dec.detach().cpu()
    raise CheckpointError(f"{directory}: the checkpoint of step {evaluated['step']} that was evaluated is gone; run gsae evaluate again")


def compare(first: Evaluated, second: Evaluated) -> Comparison:
    """The second run against the first.

    Raises:
        CheckpointError: they are not of the same site, text and settings.
    """
    sites = [each.description["site"] for each in (first, second)]
    if sites[0] != sites[1]:
        raise CheckpointError(f"{first.directory} is of {sites[0]}, {second.directory} of {sites[1]}; compare runs of one site")
    theirs, ours = first.identity, second.identity
    differing = [name for name in {**theirs, **ours} if name != "checkpoint" and theirs.get(name) != ours.get(name)]
    if differing:
        raise CheckpointError(
            f"{first.directory} and {second.directory} were evaluated with another {differing[0]} "
            f"({theirs.get(differing[0])!r} and {ours.get(differing[0])!r}); evaluate both with the same config"
        )
    settings = theirs["evaluate"]
    scales = first.description["scale"], second.description["scale"]
    try:
        found = differences(first.blocks, second.blocks, scales, settings["bootstrap_draws"], settings["seed"])
    except ValueError as error:
        raise CheckpointError(f"{first.directory} and {second.directory}: {error}; evaluate both with the same config") from error
    return Comparison(
        first=first.description["name"],
        second=second.description["name"],
        site=sites[0],
        metrics=found,
        has_same_start=_start_of(first) is not None and _start_of(first) == _start_of(second),
        first_in_second=match(first.directions, second.directions),
        second_in_first=match(second.directions, first.directions),
    )


def _start_of(each: Evaluated) -> tuple[int, int] | None:
    """What its random directions were drawn by; None where that is not known."""
    description = each.description
    return None if description.get("guest") else (description["seed"], description["num_features"])


def _show(found: Comparison, console: RichConsole) -> None:
    console.print(f"{found.site}\nfirst:  {found.first}\nsecond: {found.second}")
    table = Table("metric", "first", "second", "difference", "95 %, paired")
    for name, each in found.metrics.items():
        within = "none" if each.interval is None else f"{each.interval.low:+.4g} to {each.interval.high:+.4g}"
        table.add_row(name, f"{each.first:.4g}", f"{each.second:.4g}", f"{each.difference:+.4g}", within)
    console.print(table)
    console.print("largest cosine of each direction seen with any of the other's, and by chance")
    table = Table("of", "features", "mean", "median", "p10", "above 0.9", "chance")
    for name, matched in (("first", found.first_in_second), ("second", found.second_in_first)):
        if matched is not None:
            cosines = (f"{value:.3f}" for value in (matched.mean, matched.median, matched.p10))
            table.add_row(name, str(matched.features), *cosines, f"{matched.share_above_0_9:.1%}", f"{matched.random_mean:.3f}")
    console.print(table)
    if found.has_same_start:
        console.print("both began at the same random directions: compare runs of other seeds to learn which directions are found again")
