"""Statistics of made-up rows, as a harvest takes them of a batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gsae.store.statistics import SiteStatistics, measure_rows, site_statistics


def spell(ids: list[int]) -> list[str]:
    """Tokens 7 and 8 are spelled alike."""
    return [f"<{min(token, 7)}>" for token in ids]


def statistics_of(
    x: Tensor, kept: Tensor, median_norm: float, dropped: Mapping[str, int], tokens: Tensor | None = None, original: Tensor | None = None
) -> SiteStatistics:
    """Statistics of one context: the candidate rows `x`, then so many rows of ones that are no candidates, by reason, then padding."""
    counts = [len(x), *dropped.values(), 3]
    reason_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    others = torch.ones(sum(counts[1:]), x.shape[1], dtype=x.dtype)
    is_kept = torch.cat((kept, torch.zeros(len(others), dtype=torch.bool)))[None]
    measures = measure_rows(torch.cat((x, others))[None], is_kept, None if original is None else torch.cat((original, others))[None])
    ids = torch.zeros(len(reason_of_row), dtype=torch.int64)
    if tokens is not None:
        ids[: len(tokens)] = tokens
    masks = {reason: (reason_of_row == number)[None] for number, reason in enumerate(dropped, start=1)}
    return site_statistics(measures, is_kept, (reason_of_row == 0)[None], masks, ids[None], spell, median_norm)
