"""95 % intervals over documents. In: documents, or their blocks. Out: draws of them, and the interval of a metric over the draws.

Tokens of one document are alike, so documents are drawn, not tokens: an interval says how far the number would move with
other documents of the same kind. A draw weights the sums of every document by how often it was drawn. Two runs are compared on the
same draws, of documents and of blocks of 512 tokens within them.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

COVERAGE = 0.95
"""Share of the draws inside an interval."""


@dataclass(frozen=True)
class Interval:
    """The central 95 % of the draws."""

    low: float
    high: float


def draw_documents(num_documents: int, num_draws: int, seed: int) -> Float[Tensor, "draws documents"]:
    """How often each document occurs when `num_documents` are drawn with replacement, `num_draws` times."""
    generator = _generator(f"bootstrap over documents/{num_documents}/{num_draws}/{seed}")
    counts = generator.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=num_draws)
    return torch.from_numpy(counts.astype(np.float64))


def draw_blocks(documents: Int[Tensor, " blocks"], num_draws: int, seed: int) -> Float[Tensor, "draws blocks"]:
    """How often each block counts when documents are drawn with replacement, and for each of them as many of its blocks as it has.

    Args:
        documents: the document of each block, all of 0, 1, 2, ... occurring.
        num_draws: the number of draws.
        seed: seed of the draws.
    """
    drawn = draw_documents(int(documents.max()) + 1, num_draws, seed).numpy().astype(np.int64)
    generator = _generator(f"bootstrap over blocks/{num_draws}/{seed}")
    counts = np.empty((num_draws, len(documents)))
    for document, times in enumerate(drawn.T):
        places = (documents == document).nonzero()[:, 0].numpy()
        counts[:, places] = generator.multinomial(times * len(places), np.full(len(places), 1 / len(places)))
    return torch.from_numpy(counts)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def interval(values: Float[Tensor, " draws"]) -> Interval | None:
    """The quantiles that leave out (1 - 0.95) / 2 of the draws on either side; None when a draw has no finite value."""
    if not values.isfinite().all():
        return None
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return Interval(low, high)
