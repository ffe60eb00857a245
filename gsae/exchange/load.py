"""`gsae.load_sae`. In: what a user calls an SAE. Out: a module that reads the LLM's own activations."""

from pathlib import Path

import torch

from gsae.exchange.source import find_sae
from gsae.sae.folded import FoldedSAE, folded, folded_description, jumprelu_weights


def load_sae(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> FoldedSAE:
    """An SAE, ready to use on raw activations: its training scale is folded into the weights.

    Args:
        path: a run directory (its newest checkpoint), a checkpoint, a directory made by `gsae export --to gsae` or `gsae import`, or
            `owner/name[@revision]` on the Hugging Face hub.
        device: where it computes.
        dtype: the type it computes in; by default the one it was stored in.

    Raises:
        CheckpointError: there is no SAE at `path`, it is damaged, is another library's, or the hub cannot be reached.
    """
    source = find_sae(path)
    weights = jumprelu_weights(folded(source.read(), source.description))
    description = folded_description(source.description)
    return FoldedSAE(weights, description).to(device=device, dtype=dtype or source.dtype).eval()
