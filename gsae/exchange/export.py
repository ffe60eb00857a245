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
from gsae.exchange.streamed import Slice, outline, write_safetensors, write_state_dict
from gsae.sae.folded import folded_description
from gsae.sae.foreign import FILES, dictionary_config, dictionary_tensors, saelens_architecture, saelens_config, saelens_tensors
from gsae.sae.formats import WEIGHTS_FILE, fold_scale
from gsae.sae.objective import SAE

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
    description, sae = folded_description(source.description), source.outline
    if target == "gsae":
        _write_weights(directory / WEIGHTS_FILE, source, source.dtype, lambda sae: sae.state_dict())
        describe_published(directory, sae, description, push)
        return
    if target == "dictionary_learning":
        weights, config = FILES["dictionary_learning"]
        _write_weights(directory / weights, source, torch.float32, dictionary_tensors)
        write_json(directory / config, dictionary_config(sae, description))
    else:
        architecture = "jumprelu" if target == "jumprelu" else saelens_architecture(sae)
        weights, config = FILES["saelens"]
        _write_weights(directory / weights, source, torch.float32, partial(saelens_tensors, architecture=architecture))
        write_json(directory / config, saelens_config(sae, architecture, description))
    (directory / CARD_FILE).write_text(model_card(sae, description, target, push), encoding="utf-8")


def _write_weights(path: Path, source: Source, dtype: torch.dtype, convert: Callable[[SAE], Mapping[str, Tensor]]) -> None:
    """Write the weights, on raw activations, in a form of `convert`'s, a slice of features after another."""

    def read(features: range) -> Slice:
        sae = fold_scale(source.folded(features), 1.0)  # which gives an imported SAE's decoder rows norm 1 too
        return Slice(features.start, convert(sae.to(dtype)))

    write = write_state_dict if path.name == FILES["dictionary_learning"][0] else write_safetensors
    write(path, outline(lambda count: convert(source.blank(count).to(dtype)), source.outline.num_features), map(read, source.slices()))
