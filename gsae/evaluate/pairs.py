"""Two runs on the same text. In: their sums a block. Out: the differences of their metrics with paired 95 % intervals.

Whether one SAE is better than another is a question about the difference on the same tokens: the intervals of two single runs overlap
long after their difference is certain, because a hard text is hard for both. Sums a block are kept beside results.json for that.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.evaluate.bootstrap import Interval, draw_blocks, interval
from gsae.evaluate.reconstruction import reconstruction_metrics
from gsae.evaluate.splice import splice_metrics
from gsae.evaluate.sums import RunSums, SiteSums
from gsae.store.durable import write_aside

BLOCKS_FILE = "blocks.safetensors"
CHANCE_SEED = 0x6A5E
COMPARED = ("loss_recovered", "delta_ce", "kl", "fvu", "l0", "cosine", "gamma")
"""Metrics whose differences are given."""


@dataclass(frozen=True)
class BlockSums:
    """What blocks.safetensors holds."""

    documents: Int[Tensor, " blocks"]
    """The document of each block."""
    site: SiteSums
    run: RunSums


@dataclass(frozen=True)
class Difference:
    """Of one metric: the second run's minus the first's."""

    first: float
    second: float
    difference: float
    interval: Interval | None
    """Over draws of documents and of their blocks, the same for both runs."""


def write_blocks(path: Path, site: SiteSums, run: RunSums, documents: Int[Tensor, " blocks"]) -> None:
    """Write a run's sums, in float64 but for the offsets, which are most of them and only correct FVU's mean."""
    tensors = {"documents": documents}
    for part, sums in (("site", site), ("run", run)):
        tensors |= {f"{part}.{field.name}": getattr(sums, field.name) for field in fields(sums)}
    tensors["site.offset"] = site.offset.float()
    with write_aside(path) as file:
        file.write(safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}))


def read_blocks(path: Path) -> BlockSums:
    """Read what `write_blocks` wrote.

    Raises:
        OSError, safetensors.SafetensorError, KeyError: the file is missing or not such a file.
    """
    tensors = safetensors.torch.load_file(path)

    def part(kind: type[Any], name: str) -> Any:
        return kind(**{field.name: tensors[f"{name}.{field.name}"].double() for field in fields(kind)})

    return BlockSums(tensors["documents"], part(SiteSums, "site"), part(RunSums, "run"))


def differences(first: BlockSums, second: BlockSums, scales: tuple[float, float], num_draws: int, seed: int) -> dict[str, Difference]:
    """The differences of the metrics of two runs of a site on the same text, by name.

    Args:
        first: of the run that is compared with.
        second: of the run that is compared.
        scales: of the two runs.
        num_draws: draws of the bootstrap.
        seed: its seed.

    Raises:
        ValueError: their blocks or kept rows are not the same.
    """
    if not (first.documents.equal(second.documents) and first.site.kept_rows.equal(second.site.kept_rows)):
        raise ValueError("the runs were not evaluated on the same rows")
    draws = draw_blocks(first.documents, num_draws, seed)
    (a, a_drawn), (b, b_drawn) = (_metrics(each, scale, draws) for each, scale in zip((first, second), scales, strict=True))
    return {
        name: Difference(a[name].item(), b[name].item(), (b[name] - a[name]).item(), interval(b_drawn[name] - a_drawn[name]))
        for name in COMPARED
    }


def _metrics(each: BlockSums, scale: float, draws: Float[Tensor, "draws blocks"]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In all, and a draw."""
    totals, drawn = (each.site.total(), each.run.total()), (each.site.drawn(draws), each.run.drawn(draws))
    whole, of_draws = ({**vars(reconstruction_metrics(*sums, scale)), **vars(splice_metrics(*sums))} for sums in (totals, drawn))
    return whole, of_draws


@dataclass(frozen=True)
class Match:
    """How much of one SAE's directions another has, over features that were on in the evaluation."""

    features: int
    """Compared."""
    mean: float
    """Of the largest cosine of each with any of the other's."""
    median: float
    p10: float
    share_above_0_9: float
    random_mean: float
    """The mean against as many random directions."""


@torch.no_grad()
def match(W_dec: Float[Tensor, "features d_model"], other: Float[Tensor, "others d_model"]) -> Match | None:
    """Match each direction with the nearest of the other SAE's; several may have the same. None without directions."""
    if not len(W_dec) or not len(other):
        return None
    cosines = _largest_cosines(W_dec, other)
    # Not by torch from a small seed: SAEs begin at such directions, and stay near them.
    random = np.random.default_rng(CHANCE_SEED).standard_normal(tuple(other.shape), dtype=np.float32)
    by_chance = _largest_cosines(W_dec, torch.from_numpy(random).to(other))
    return Match(
        features=len(W_dec),
        mean=cosines.mean().item(),
        median=cosines.median().item(),
        p10=cosines.quantile(0.1).item(),
        share_above_0_9=(cosines > 0.9).double().mean().item(),
        random_mean=by_chance.mean().item(),
    )


def _largest_cosines(W_dec: Tensor, other: Tensor) -> Float[Tensor, " features"]:
    normalize = torch.nn.functional.normalize
    ours, theirs = normalize(W_dec, dim=1), normalize(other, dim=1)
    return torch.cat([(part @ theirs.T).amax(1) for part in torch.split(ours, 1024)]).double()
