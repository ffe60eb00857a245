"""Directories for others. In: an SAE on raw activations and its description. Out: a whole directory, with a model card, or none."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gsae.errors import ConfigError
from gsae.exchange.card import CARD_FILE, model_card
from gsae.sae.formats import WEIGHTS_FILE, describe_sae, write_tensors
from gsae.sae.objective import SAE
from gsae.store.durable import PARTIAL_SUFFIX, fsync_directory, fsync_file, make_directory


def require_free(output: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        ConfigError: it is a file, or a directory that is not empty or cannot be read.
    """
    with _as_config_error(output):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ConfigError(f"{output} is there already; give another directory, or delete it first")


def write_directory(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory aside, under a name that nobody has, then fsync and rename it to `output`, which is whole or absent.

    An empty directory that is there already stays, as somebody may be in it: the finished files are moved into it.

    Raises:
        ConfigError: `output` is there and not empty, or cannot be written.
    """
    require_free(output)
    with _as_config_error(output):
        final = Path(os.path.realpath(output))
        is_there = final.is_dir()
        if not is_there:
            make_directory(final.parent)
        with TemporaryDirectory(PARTIAL_SUFFIX, f"{final.name}.", final if is_there else final.parent) as scratch:
            aside = Path(scratch) / "whole"  # with the permissions of any new directory, which the scratch directory has not
            aside.mkdir()
            write(aside)
            for path in aside.iterdir():
                fsync_file(path)
            fsync_directory(aside)
            if is_there:
                for path in aside.iterdir():
                    path.rename(final / path.name)
            else:
                aside.rename(final)
        fsync_directory(final)
        fsync_directory(final.parent)


@contextmanager
def _as_config_error(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f", {error.filename}" if error.filename else ""
        raise ConfigError(f"{output} cannot be written ({error.strerror or error}{place}); give another directory") from error


def write_published(directory: Path, sae: SAE, description: Mapping[str, Any], address: str | None) -> None:
    """Our own published form: `sae.safetensors`, `sae.json` with scale 1, README.md.

    Args:
        directory: where the files go.
        sae: reads raw activations; its parameters are stored in their own type.
        description: of an SAE with the scale folded in (see `gsae.sae.folded.folded_description`).
        address: the hub repository that it goes to, if any.
    """
    write_tensors(directory / WEIGHTS_FILE, sae.state_dict())
    describe_published(directory, sae, description, address)


def describe_published(directory: Path, sae: SAE, description: Mapping[str, Any], address: str | None) -> None:
    """The files beside the weights, which are there; `sae` may be without storage."""
    describe_sae(directory, sae, description)
    (directory / CARD_FILE).write_text(model_card(sae, description, "gsae", address), encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
