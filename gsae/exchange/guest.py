"""SAEs that were trained elsewhere, as runs. In: what a user calls an SAE. Out: a run directory that evaluation and report read like ours.

A guest has one checkpoint, of step 0, with its scale folded in, and no training: run.json says where it comes from.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gsae.config import Config
from gsae.errors import ConfigError
from gsae.exchange.importing import detect, read_foreign
from gsae.exchange.source import find_sae
from gsae.sae.folded import folded, folded_description
from gsae.sae.foreign import FILES
from gsae.sae.formats import save_sae
from gsae.sae.objective import SAE
from gsae.store.durable import write_json_atomically
from gsae.store.manifest import Manifest, load
from gsae.store.opening import store_of
from gsae.store.runs import RUN_FILE, find_difference, newest_checkpoint, read_run, write_checkpoint

RUN_FORMAT = 1


def add_guests(config: Config, paths: Sequence[str], site: str | None) -> None:
    """Write SAEs as runs below the config's output, for its store (see `add_guest`). One rank calls this.

    Raises:
        StoreError: the store is not whole.
    """
    manifest = load(store_of(config))
    for path in paths:
        add_guest(path, site, Path(config.output), manifest)


def add_guest(path: str, site: str | None, output: Path, manifest: Manifest) -> Path:
    """Write the SAE at `path` as a run at `<output>/<site>/<name>`; one that is there already stays as it is.

    Args:
        path: a directory of SAELens or dictionary_learning, or anything that `gsae.load_sae` reads.
        site: the site it belongs to; None takes what its own files say.
        output: where runs are.
        manifest: of the store whose sites and masks it is evaluated with.

    Raises:
        CheckpointError: there is no SAE, it is damaged, or it cannot be represented exactly.
        ConfigError: it says no site, the store does not have it, its width is another, or another guest has its name.
    """
    sae, description = _read(path)
    site = site or description.get("site")
    if site is None:
        raise ConfigError(f"{path} does not say which layer it belongs to; give --site, one of {', '.join(manifest.sites)}")
    if site not in manifest.sites:
        raise ConfigError(
            f"{path} belongs to {site}, the config's store has {', '.join(manifest.sites)}; harvest that site, or give --site"
        )
    if sae.d_model != manifest.d_model:
        raise ConfigError(f"{path} has d_model {sae.d_model}, the LLM of the config {manifest.d_model}; it was trained on another LLM")
    described = _run_of(path, site, sae, description, manifest)
    directory: Path = output / site / described["name"]
    if (directory / RUN_FILE).exists():
        if find_difference(read_run(directory), described) is not None:
            raise ConfigError(f"{directory} holds another SAE; give this one another name, or remove that directory")
        newest_checkpoint(directory)
        return directory
    write_checkpoint(directory, 0, lambda aside: save_sae(aside, sae, {**description, "site": site}))
    write_json_atomically(directory / RUN_FILE, described)
    return directory


def _read(path: str) -> tuple[SAE, dict[str, Any]]:
    """The SAE for raw activations in the type it is stored in, at least float32, and its description."""
    local = Path(path).expanduser()
    if any((local / weights).is_file() for weights, _ in FILES.values()):
        foreign = read_foreign(local, detect(local))
        return foreign.sae.to(foreign.dtype), foreign.description
    source = find_sae(path)
    dtype = torch.promote_types(source.dtype, torch.float32)
    return folded(source.read(), source.description).to(dtype), folded_description(source.description)


def _run_of(path: str, site: str, sae: SAE, description: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Its run.json. What its training is not known to have been is null."""
    library = (description.get("imported_from") or {}).get("library", "gsae")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-.") or "sae"
    described = manifest.sites[site]
    return {
        "format": RUN_FORMAT,
        "name": f"{library}-{name}",
        "site": site,
        "layer": described.layer,
        "objective": description["objective"],
        "resampling": bool(description.get("resampling")),
        "num_features": sae.num_features,
        "d_model": sae.d_model,
        "lambda": description.get("lambda"),
        "seed": 0,
        "total_steps": 0,
        "batch_rows": 0,
        "store_fingerprint": None,
        "scale": 1.0,
        "guest": {"library": library, "sha256": _sha256(sae)},
    }


def _sha256(sae: SAE) -> str:
    found = hashlib.sha256()
    for name, value in sorted(sae.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()
