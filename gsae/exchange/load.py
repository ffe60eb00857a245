"""`gsae.load_sae`. In: what a user calls an SAE. Out: a module that reads the LLM's own activations."""

from pathlib import Path

import torch

from gsae.exchange.source import Source, find_sae
from gsae.exchange.streamed import feature_axis, outline
from gsae.sae.folded import FoldedSAE, JumpReluWeights, folded_description, jumprelu_weights


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
    weights = _weights(source, dtype or source.dtype)
    return FoldedSAE(weights, folded_description(source.description)).to(device=device).eval()


def _weights(source: Source, dtype: torch.dtype) -> JumpReluWeights:
    """The weights in `dtype`, computed in float64, of which there is a slice of features at a time."""
    wanted = outline(lambda count: vars(jumprelu_weights(source.blank(count))), source.outline.num_features)
    whole = {name: torch.empty(value.shape, dtype=dtype) for name, value in wanted.items()}
    for features in source.slices():
        for name, values in vars(jumprelu_weights(source.folded(features))).items():
            axis = feature_axis(whole[name].shape, values.shape)
            place = () if axis is None else (slice(None),) * axis + (slice(features.start, features.stop),)
            whole[name][place].copy_(values)
    return JumpReluWeights(**whole)
