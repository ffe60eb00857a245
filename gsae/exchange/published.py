"""Directories for others. In: an SAE on raw activations and its description. Out: a whole directory, with a model card, or none."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gsae.errors import ConfigError
from gsae.exchange.card import CARD_FILE, model_card
from gsae.sae.formats import save_sae
from gsae.sae.objective import SAE
from gsae.store.durable import PARTIAL_SUFFIX, fsync_directory, fsync_file, make_directory


def require_free(output: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        ConfigError: it is a file, or a directory that is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"{output} is there already; give another directory, or delete it first")


def write_directory(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory aside, then fsync and rename it to `output`, which is whole or absent.

    Raises:
        ConfigError: `output` is there and not empty.
    """
    require_free(output)
    make_directory(output.absolute().parent)
    aside = output.with_name(output.name + PARTIAL_SUFFIX)
    if aside.exists():
        shutil.rmtree(aside)
    try:
        aside.mkdir()
        write(aside)
        for path in aside.iterdir():
            fsync_file(path)
        fsync_directory(aside)
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_directory(output.absolute().parent)


def write_published(directory: Path, sae: SAE, description: Mapping[str, Any], address: str | None) -> None:
    """Our own published form: `sae.safetensors`, `sae.json` with scale 1, README.md.

    Args:
        directory: where the files go.
        sae: reads raw activations; its parameters are stored in their own type.
        description: of an SAE with the scale folded in (see `gsae.sae.folded.folded_description`).
        address: the hub repository that it goes to, if any.
    """
    save_sae(directory, sae, dict(description))
    (directory / CARD_FILE).write_text(model_card(sae, description, "gsae", address), encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
