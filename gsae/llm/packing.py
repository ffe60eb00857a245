"""Proof that segments of a context do not see each other. In: a loaded LLM. Out: nothing, or an error.

Whether attention stays within a segment hangs on how transformers, the attention implementation and the layout of the batch go
together, and where it fails nothing else shows it. So a small packed batch is compared with each of its segments alone.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gsae.errors import ModelError
from gsae.llm.load import LLM
from gsae.llm.site import Site, capture

SEGMENT_LENGTHS = ((5, 20, 9, 94), (64, 1, 63))
"""Of each context; shorter than a block of attention kernels, as long as one, and longer."""
TOLERANCES = {torch.bfloat16: 0.15, torch.float16: 0.03, torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest mean over a segment's rows of |x_packed - x_alone| / |x_alone|. Rounding gave up to 0.03, 0.006, 3e-6 and 1e-8 (the softmax
of eager attention is in float32) over 2 to 48 layers; attention across segments gives 0.3 after one layer of a real Llama, 1 later."""


def prove_packing(llm: LLM, site: Site, packed: bool) -> None:
    """Run a small batch packed and a segment at a time. Where parameters are split over ranks, all of them call this together.

    Args:
        llm: loaded at least up to the site.
        site: the last one that is read.
        packed: whether contexts hold several segments; otherwise only their first ones count, what follows being padding.

    Raises:
        ModelError: a segment's activations depend on what else is in the batch.
    """
    tokens, positions = _batch(llm)
    (x_packed,) = capture(llm.model, [site], tokens, positions).values()
    differences: list[Tensor] = []
    for context, lengths in enumerate(SEGMENT_LENGTHS):
        first = 0
        for length in lengths if packed else lengths[:1]:
            span = slice(first, first + length)
            (x_alone,) = capture(llm.model, [site], tokens[context, None, span], positions[context, None, span]).values()
            differences.append(_difference(x_packed[context, span], x_alone[0]))
            first += length
    largest, tolerance = float(torch.stack(differences).max()), TOLERANCES[llm.model.dtype]
    if not largest <= tolerance:  # NaN is refused too
        attention = llm.model.config._attn_implementation
        cure = "llm.attention: sdpa" if attention != "sdpa" else "llm.attention: eager" + ", or harvest.packed: false" * packed
        raise ModelError(
            f"llm.attention {attention!r} does not keep the segments of a context apart here: activations at {site.name} are off by "
            f"{largest:.2g} from those of a segment alone, where rounding explains {tolerance:g}; set {cure}"
        )


def _batch(llm: LLM) -> tuple[Int[Tensor, "contexts length"], Int[Tensor, "contexts length"]]:
    """Seeded tokens and their positions; every segment's begin at 0."""
    shape = (len(SEGMENT_LENGTHS), sum(SEGMENT_LENGTHS[0]))
    tokens = torch.randint(llm.info.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in SEGMENT_LENGTHS])
    return tokens.to(llm.model.device), positions.to(llm.model.device)


def _difference(x: Float[Tensor, "rows d_model"], reference: Float[Tensor, "rows d_model"]) -> Float[Tensor, ""]:
    norms = [torch.linalg.vector_norm(rows, dim=-1) for rows in (x.double() - reference.double(), reference.double())]
    return torch.mean(norms[0] / norms[1])
