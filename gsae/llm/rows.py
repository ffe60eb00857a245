"""Which rows count. In: tokens, positions and activations of some contexts. Out: one mask a site, the same in every stage.

Out are the first row of every segment (position 0, whatever its token), BOS, EOS, padding, and rows whose norm exceeds a
multiple of the site's median norm. Attention sinks are position-0 rows mostly; at early layers they pass a rule on norms
alone, so position 0 is out always.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Rows that may be kept at every site, before norms are looked at."""

    rows: Bool[Tensor, "contexts length"]
    """Neither first of a segment, nor a special token, nor padding."""
    first: Bool[Tensor, "contexts length"]
    """First rows of segments."""
    special: Bool[Tensor, "contexts length"]
    """BOS or EOS elsewhere than first."""


def special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of BOS, EOS and padding, as far as the tokenizer has them."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tuple(sorted({int(i) for i in ids if i is not None}))


def candidates(
    tokens: Int[Tensor, "contexts length"],
    positions: Int[Tensor, "contexts length"],
    documents: Int[Tensor, "contexts length"],
    special: tuple[int, ...],
) -> Candidates:
    """Rows that may be kept, and why the others are out. `documents` is -1 on padding."""
    text = documents >= 0
    first = text & (positions == 0)
    is_special = text & ~first & torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype, device=tokens.device))
    return Candidates(text & ~first & ~is_special, first, is_special)


def within_norm(x: Float[Tensor, "... d_model"], max_norm: float) -> Bool[Tensor, "..."]:
    """Rows whose Euclidean norm, taken in float32, is at most `max_norm`. A NaN is not: it is dropped as an outlier."""
    norms: Tensor = torch.linalg.vector_norm(x.float(), dim=-1)
    return norms <= max_norm
