"""`gsae import`. In: a directory of SAELens or dictionary_learning. Out: the same SAE in our published format.

`ae.pt` is the one file that is read by torch.load, and only with weights_only: tensors and plain containers, no code is run.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gsae.errors import CheckpointError, ConfigError
from gsae.exchange.published import write_directory, write_published
from gsae.sae.folded import FOLDED_KEY
from gsae.sae.foreign import FILES, from_dictionary, from_saelens, saelens_metadata
from gsae.sae.formats import read_object
from gsae.sae.objective import SAE
from gsae.sae.relu import ReluSAE

ABSOLUTE_PATH = re.compile(r"(?<![\w./:~-])(file:|~?/\w|~[\\/]|[A-Za-z]:[\\/]\w|\\\\\w)")
"""Where a text names a place of somebody's machine: `/home/...`, `~/...`, `file:...`, a drive or a share of Windows."""
RESIDUAL_STREAM = re.compile(r"(?:resid_post_layer_|resid\.)(\d+)")
"""dictionary_learning's `submodule_name` where it is the output of a layer: as its own demo and we write it."""


@dataclass(frozen=True, eq=False)
class Foreign:
    """Another library's SAE, read."""

    sae: SAE
    """In float64."""
    dtype: torch.dtype
    """What it is to be stored in: its own type, and at least float32."""
    description: dict[str, Any]


def run_import(source: Path, output: Path, library: str | None) -> Path:
    """Import `source` to `output`, which is made.

    Args:
        source: the library's directory.
        output: where our directory goes; it must be empty or not there.
        library: a key of FILES; None takes the one whose files are there.

    Raises:
        ConfigError: `output` is there and not empty.
        CheckpointError: the files are not there, are damaged, or hold an SAE that cannot be represented exactly.
    """
    foreign = read_foreign(source, library or detect(source))
    write_directory(output, lambda aside: write_published(aside, foreign.sae.to(foreign.dtype), foreign.description, None))
    return output


def detect(source: Path) -> str:
    """The library whose files are in a directory.

    Raises:
        ConfigError: files of several are there.
        CheckpointError: there are none.
    """
    found = [library for library, (weights, _) in FILES.items() if (source / weights).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{source} holds files of {' and '.join(found)}; say which with --from")
    wanted = " or ".join(f"{weights} ({library})" for library, (weights, _) in FILES.items())
    raise CheckpointError(f"{source} holds no {wanted}; give the directory as one of these libraries saved it")


def read_foreign(source: Path, library: str) -> Foreign:
    """Read an SAE of another library.

    Raises:
        CheckpointError: its files are not there, are damaged, or hold an SAE that cannot be represented exactly.
    """
    weights, config_name = FILES[library]
    config = read_object(source / config_name, "give the directory as its library saved it")
    if library == "saelens":
        tensors = _read_safetensors(source / weights)
        sae, known = from_saelens(tensors, config, str(source)), _known_of_saelens(config)
    else:
        tensors = _read_state_dict(source / weights)
        sae, known = from_dictionary(tensors, config, str(source)), _known_of_dictionary(config)
    objective = "relu" if isinstance(sae, ReluSAE) else "gated"
    origin = {"library": library, "config": _publishable(config)}
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()), torch.float32)
    return Foreign(sae, dtype, {"objective": objective, **known, "scale": 1.0, FOLDED_KEY: True, "imported_from": origin})


def _known_of_saelens(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Our words for what its metadata say of the LLM."""
    metadata = saelens_metadata(cfg)
    layer = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", str(metadata.get("hook_name")))
    return _known(int(layer[1]) if layer else None, metadata.get("model_name"), metadata.get("context_size"))


def _known_of_dictionary(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer = config["trainer"]
    named = RESIDUAL_STREAM.fullmatch(trainer.get("submodule_name") or "")
    layer = int(named[1]) if named and int(named[1]) == trainer.get("layer") else None
    return _known(layer, trainer.get("lm_name"), (config.get("buffer") or {}).get("ctx_len"))


def _known(layer: int | None, llm: str | None, context_length: int | None) -> dict[str, Any]:
    """`module` is not among it: what the LLM calls its layers is not known."""
    place = {} if layer is None else {"site": f"resid.{layer}", "layer": layer}
    if llm and not _may_be_published(llm):
        llm = PureWindowsPath(llm).name
    own = {"llm": {"name": llm} if llm else None, "context_length": context_length}
    return {**place, **{key: value for key, value in own.items() if value is not None}}


def _publishable(value: Any) -> Any:
    """A JSON value without the texts that name an absolute path, and without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _publishable(part) for key, part in value.items() if _may_be_published(key) and _may_be_published(part)}
    if isinstance(value, list):
        return [_publishable(part) for part in value if _may_be_published(part)]
    return value


def _may_be_published(value: Any) -> bool:
    if isinstance(value, str):
        return not ABSOLUTE_PATH.search(value)
    return not isinstance(value, float) or isfinite(value)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}; fetch it again") from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give the directory as its library saved it") from error
    except Exception as error:  # torch raises whatever its zip and pickle readers do
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: not a plain state dict ({reason}); it is not read, as more could run code") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()):
        raise CheckpointError(f"{path}: not a state dict of tensors; save the SAE's state_dict()")
    return value
