"""`gsae export`. In: a run, or any path that `gsae.load_sae` takes. Out: a directory that another library, or anybody, can load."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors

from gsae.errors import ConfigError
from gsae.exchange import hub
from gsae.exchange.card import CARD_FILE, model_card
from gsae.exchange.published import require_free, write_directory, write_json, write_published
from gsae.exchange.source import Source, find_sae, is_on_hub
from gsae.sae.folded import folded, folded_description
from gsae.sae.foreign import FILES, dictionary_config, dictionary_tensors, saelens_architecture, saelens_config, saelens_tensors
from gsae.sae.formats import fold_scale
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
    sae = fold_scale(folded(source.sae, source.description), 1.0)  # which gives an imported SAE's decoder rows norm 1 too
    write_directory(directory, partial(_write, sae, source, target, push))
    page = None if push is None else hub.upload(directory, push, private=private)
    return Exported(directory, page)


def _default_output(source: Source, target: Target, path: str) -> Path:
    if source.run is None:
        raise ConfigError(f"{path} belongs to no run here; say where the export goes with --output DIRECTORY")
    return source.run / "exports" / target


def _write(sae: SAE, source: Source, target: Target, push: str | None, directory: Path) -> None:
    description = folded_description(source.description)
    if target == "gsae":
        write_published(directory, sae.to(source.dtype), description, push)
        return
    sae = sae.to(torch.float32)
    if target == "dictionary_learning":
        _write_dictionary(directory, sae, description)
    else:
        architecture = "jumprelu" if target == "jumprelu" else saelens_architecture(sae)
        _write_saelens(directory, sae, architecture, description)
    (directory / CARD_FILE).write_text(model_card(sae, description, target, push), encoding="utf-8")


def _write_saelens(directory: Path, sae: SAE, architecture: str, description: Mapping[str, Any]) -> None:
    tensors = {name: value.contiguous() for name, value in saelens_tensors(sae, architecture).items()}
    weights, config = FILES["saelens"]
    (directory / weights).write_bytes(save_tensors(tensors))
    write_json(directory / config, saelens_config(sae, architecture, description))


def _write_dictionary(directory: Path, sae: SAE, description: Mapping[str, Any]) -> None:
    # To a buffer, not to a path: torch puts the file's name into the archive.
    buffer = io.BytesIO()
    torch.save({name: value.contiguous().clone() for name, value in dictionary_tensors(sae).items()}, buffer)
    weights, config = FILES["dictionary_learning"]
    (directory / weights).write_bytes(buffer.getvalue())
    write_json(directory / config, dictionary_config(sae, description))
