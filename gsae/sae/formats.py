"""SAEs on disk, in the native format. In: an SAE and what it is for. Out: `sae.safetensors` + `sae.json`, and back.

The two files are all that is needed to use the SAE. `sae.json` holds the SHA-256 of the weights, so a damaged pair is found.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from gsae.errors import CheckpointError
from gsae.sae.contents import COUNT, FLAG, NUMBER, OBJECT, PAIR, POSITIVE, SIZE, TEXT, each, or_null, record, require_fields
from gsae.sae.objective import SAE, SAE_CLASS
from gsae.sae.relu import ReluSAE

FORMAT = 1
WEIGHTS_FILE = "sae.safetensors"
DESCRIPTION_FILE = "sae.json"
NEEDED = {"objective": TEXT, "d_model": SIZE, "num_features": SIZE, "sha256": TEXT}
OPTIONAL = {
    **{"scale": POSITIVE, "training_scale": POSITIVE, "folded": FLAG},
    **{"site": TEXT, "layer": COUNT, "module": TEXT, "llm": record({"name": TEXT})},
    **{"lambda": NUMBER, "pre_activation_loss": NUMBER, "resampling": FLAG, "rows": COUNT, "context_length": COUNT, "text": OBJECT},
    "mask": record({}, {"outlier_multiple": NUMBER, "max_norm": NUMBER}),
    "results": record(
        {
            "metrics": each(or_null(NUMBER)),
            "intervals": each(or_null(PAIR)),
            "counts": record({"kept_rows": COUNT, "documents": COUNT}),
            "definitions": each(TEXT),
        }
    ),
    "imported_from": record({"library": TEXT}),
}
"""The keys of a description that are read again, by loading or by a model card; others are free."""


class SavedSAE(NamedTuple):
    """An SAE read from disk."""

    sae: SAE
    description: dict[str, Any]
    """The whole object in `sae.json`."""


def save_sae(directory: Path, sae: SAE, description: dict[str, Any]) -> None:
    """Write the SAE into `directory`, made if need be. A caller that must not leave half a pair renames the directory afterwards.

    Args:
        directory: where the two files go.
        sae: its parameters are stored in their own type.
        description: plain data; `objective` is needed to read it back, the rest (site, scale, LLM, ...) is the user's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS_FILE, sae.state_dict())
    with (directory / WEIGHTS_FILE).open("rb") as weights:
        sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
    own = {"format": FORMAT, "d_model": sae.d_model, "num_features": sae.num_features, "sha256": sha256}
    (directory / DESCRIPTION_FILE).write_text(json.dumps({**description, **own}, indent=1) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device and layout as a safetensors file. Other threads run meanwhile.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:  # it has the system's number in its words only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_sae(directory: Path) -> SavedSAE:
    """Read an SAE onto the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """
    description = _read_description(directory / DESCRIPTION_FILE)
    path = directory / WEIGHTS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give a directory with both {WEIGHTS_FILE} and {DESCRIPTION_FILE}") from error
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise CheckpointError(
            f"{path}: SHA-256 differs from {DESCRIPTION_FILE}, the file is damaged; use another checkpoint, or copy it again"
        )
    try:
        tensors = load_tensors(data)
        dtype = next((tensor.dtype for tensor in tensors.values()), torch.float32)
        sae = SAE_CLASS[description["objective"]](description["d_model"], description["num_features"], dtype)
        sae.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {DESCRIPTION_FILE}: {' '.join(str(error).split())}; use another checkpoint") from error
    return SavedSAE(sae, description)


def read_object(path: Path, cure: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        cure: what to do where there is none, for messages.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {cure}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); {cure}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; {cure}")
    return value


def _read_description(path: Path) -> dict[str, Any]:
    cure = f"give a directory with {DESCRIPTION_FILE} written by gsae"
    description = read_object(path, cure)
    try:
        json.dumps(description, allow_nan=False)
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); {cure}") from error
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {description.get('format')!r}, this version reads {FORMAT}; use the gsae that wrote it")
    require_fields(description, NEEDED, OPTIONAL, str(path))
    if description["objective"] not in SAE_CLASS:
        raise CheckpointError(f"{path}: objective {description['objective']!r} is none of {', '.join(SAE_CLASS)}; {cure}")
    return description


@torch.no_grad()
def fold_scale(sae: SAE, scale: float) -> SAE:
    """The same function on raw activations: a new SAE whose x_hat is that of `sae` on `scale * x`, divided by `scale`.

    W_enc' = s n W_enc;  W_dec' = W_dec / (s n);  b_dec' = b_dec / s;  b_enc', b_gate', b_mag' = n b  with n = |W_dec row| / s,
    so decoder rows have norm 1 and r_mag stays. A decoder row of zeros keeps its norm.
    """
    folded = copy.deepcopy(sae)
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1) / scale
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    folded.encoder.mul_(scale * norms)
    folded.W_dec.div_((scale * norms)[:, None])
    folded.b_dec.div_(scale)
    for bias in (folded.b_enc,) if isinstance(folded, ReluSAE) else (folded.b_gate, folded.b_mag):
        bias.mul_(norms)
    return folded
