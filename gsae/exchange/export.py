"""`gsae export`. In: a run, or any path that `gsae.load_sae` takes. Out: a directory that another library, or anybody, can load.

Some features at a time go from the source's files to the export's (streamed.py): a dictionary may be larger than memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gsae.errors import ConfigError
from gsae.exchange import hub
from gsae.exchange.card import CARD_FILE, model_card
from gsae.exchange.published import describe_published, require_free, write_directory, write_json
from gsae.exchange.source import Source, find_sae, is_on_hub
from gsae.exchange.streamed import Slice, layouts, write_safetensors, write_state_dict
from gsae.sae.folded import folded, folded_description
from gsae.sae.foreign import FILES, dictionary_config, dictionary_tensors, saelens_architecture, saelens_config, saelens_tensors
from gsae.sae.formats import WEIGHTS_FILE, fold_scale
from gsae.sae.objective import SAE

SLICE_BYTES = 2**26
"""Of the weights of some features in float64, of which there are a few copies at once."""
NO_FEATURES: dict[str, int | None] = {"b_dec": None}
SAELENS_AXES: dict[str, int | None] = {"W_enc": 1, **NO_FEATURES}
DICTIONARY_AXES: dict[str, int | None] = {"decoder.weight": 1, "bias": None, "decoder_bias": None}
"""The axis of features of those tensors of a format of which it is not the first."""
Target = Literal["gsae", "saelens", "dictionary_learning", "jumprelu"]
"""A format; `jumprelu` is SAELens' architecture of that name, the others are the library's own form of the SAE."""


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    directory: Path
    page: str | None
    """Address of the hub repository that it was pushed to."""


def run_export(path: str, target: Target, *, output: Path | None = None, push: str | None = None, private: bool = False) -> Exported:
    """Write an SAE in another format, with a model card, and push it if asked.

    Args:
        path: what `gsae.load_sae` takes.
        target: the format.
        output: the directory to make; by default `exports/<target>` in the run directory.
        push: the hub repository `owner/name` that it goes to.
        private: whether a repository that is made is private.

    Raises:
        ConfigError: `output` is there and not empty, or cannot be guessed, or the push failed (the local export stays).
        CheckpointError: there is no SAE at `path`.
    """
    if push is not None and not hub.NAME.fullmatch(push):
        raise ConfigError(f"--push {push!r} is not a repository's name; give OWNER/NAME")
    if private and push is None:
        raise ConfigError("--private says how to make a repository; give its name too, --push OWNER/NAME")
    if output is not None:
        require_free(output)
    elif is_on_hub(path):
        raise ConfigError(f"{path} is no directory here, and an export of the hub's needs a place: say where with --output DIRECTORY")
    source = find_sae(path)
    directory = output or _default_output(source, target, path)
    write_directory(directory, partial(_write, source, target, push))
    page = None if push is None else hub.upload(directory, push, private=private)
    return Exported(directory, page)


def _default_output(source: Source, target: Target, path: str) -> Path:
    if source.run is None:
        raise ConfigError(f"{path} belongs to no run here; say where the export goes with --output DIRECTORY")
    return source.run / "exports" / target


def _write(source: Source, target: Target, push: str | None, directory: Path) -> None:
    description, outline = folded_description(source.description), source.outline
    if target == "gsae":
        _write_weights(
            directory / WEIGHTS_FILE, source, source.dtype, lambda sae: sae.state_dict(), {**outline.FEATURE_AXIS, **NO_FEATURES}
        )
        describe_published(directory, outline, description, push)
        return
    if target == "dictionary_learning":
        weights, config = FILES["dictionary_learning"]
        _write_weights(directory / weights, source, torch.float32, dictionary_tensors, DICTIONARY_AXES)
        write_json(directory / config, dictionary_config(outline, description))
    else:
        architecture = "jumprelu" if target == "jumprelu" else saelens_architecture(outline)
        weights, config = FILES["saelens"]
        _write_weights(directory / weights, source, torch.float32, partial(saelens_tensors, architecture=architecture), SAELENS_AXES)
        write_json(directory / config, saelens_config(outline, architecture, description))
    (directory / CARD_FILE).write_text(model_card(outline, description, target, push), encoding="utf-8")


def _write_weights(
    path: Path, source: Source, dtype: torch.dtype, convert: Callable[[SAE], Mapping[str, Tensor]], axes: Mapping[str, int | None]
) -> None:
    """Write the weights, on raw activations, in a form of `convert`'s, a slice of features after another."""
    total, width = source.outline.num_features, source.outline.d_model
    count = max(1, SLICE_BYTES // (2 * width * torch.float64.itemsize))

    def read(start: int) -> Slice:
        sae = folded(source.read(range(start, min(start + count, total))), source.description)
        return Slice(start, convert(fold_scale(sae, 1.0).to(dtype)))  # which gives an imported SAE's decoder rows norm 1 too

    write = write_state_dict if path.name == FILES["dictionary_learning"][0] else write_safetensors
    write(path, layouts(read(0).tensors, axes, total), map(read, range(0, total, count)))
