"""SAEs on disk, in the native format. In: an SAE and what it is for. Out: `sae.safetensors` + `sae.json`, and back.

The two files are all that is needed to use the SAE. `sae.json` holds the SHA-256 of the weights, so a damaged pair is found. A
dictionary that was split over ranks is in as many files, `sae-00001-of-00004.safetensors` and so on, each an SAE of some of the features
one after another, whose names and hashes `sae.json` lists. However it was cut, any part of it can be read.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gsae.errors import CheckpointError
from gsae.sae.contents import COUNT, FLAG, NUMBER, OBJECT, PAIR, POSITIVE, SIZE, TEXT, each, or_null, record, require_fields
from gsae.sae.objective import SAE, SAE_CLASS
from gsae.sae.relu import ReluSAE

FORMAT = 1
FORMAT_IN_PARTS = 2
WEIGHTS_FILE = "sae.safetensors"
DESCRIPTION_FILE = "sae.json"
PARTS_KEY = "parts"
"""In a description: the files, each with its features and its SHA-256; absent where there is one file of all features."""
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
    describe_sae(directory, sae, description)


def describe_sae(directory: Path, sae: SAE, description: Mapping[str, Any]) -> None:
    """Write the `sae.json` of an SAE whose weights are in their file already; `sae` may be without storage."""
    sha256 = _sha256(directory / WEIGHTS_FILE)
    own = {"format": FORMAT, "d_model": sae.d_model, "num_features": sae.num_features, "sha256": sha256}
    _write_description(directory, {**description, **own})


def part_file(name: str, number: int, count: int) -> str:
    """What a file is called that holds a part of the features, the first being number 0; where one holds all, its own name."""
    stem, _, suffix = name.partition(".")
    return name if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"


def describe_parts(directory: Path, sae: SAE, description: Mapping[str, Any], hashes: Sequence[str]) -> None:
    """Write the `sae.json` of a dictionary whose parts are in files of their own there.

    Args:
        directory: where the files are.
        sae: one of the parts, all of which have as many features.
        description: as for `save_sae`.
        hashes: the SHA-256 of each part's file, in order.
    """
    parts = [
        {"file": part_file(WEIGHTS_FILE, number, len(hashes)), "features": sae.num_features, "sha256": each}
        for number, each in enumerate(hashes)
    ]
    whole = hashlib.sha256("".join(hashes).encode()).hexdigest()
    own = {"format": FORMAT_IN_PARTS, "d_model": sae.d_model, "num_features": sae.total_features, "sha256": whole, PARTS_KEY: parts}
    _write_description(directory, {**description, **own})


def _write_description(directory: Path, description: Mapping[str, Any]) -> None:
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


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


def read_sae(directory: Path, features: range | None = None) -> SavedSAE:
    """Read an SAE onto the CPU.

    Args:
        directory: where it is.
        features: those to read; no other's weights are in memory, and no hash is compared. None reads all, and compares.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """
    description = _read_description(directory / DESCRIPTION_FILE)
    files = weight_files(directory, description)
    if features is None:
        _require_hashes(description, files)
    axes = SAE_CLASS[description["objective"]].FEATURE_AXIS
    count = description["num_features"] if features is None else len(features)
    try:
        tensors = read_features(files, axes.get, features)
        dtype = next((tensor.dtype for tensor in tensors.values()), torch.float32)
        sae = SAE_CLASS[description["objective"]](description["d_model"], count, dtype)
        sae.load_state_dict(tensors)
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: {error.strerror or error}; use another checkpoint") from error
    except (SafetensorError, RuntimeError, IndexError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(f"{files[0]} does not fit {DESCRIPTION_FILE}: {what}; use another checkpoint") from error
    return SavedSAE(sae, description)


def check_sae(directory: Path) -> dict[str, Any]:
    """The description of an SAE whose files are those that it names; no weights are in memory.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """
    description = _read_description(directory / DESCRIPTION_FILE)
    _require_hashes(description, weight_files(directory, description))
    return description


def weight_files(directory: Path, description: Mapping[str, Any]) -> list[Path]:
    """The files of an SAE's weights, in the order of their features."""
    parts = description.get(PARTS_KEY)
    return [directory / WEIGHTS_FILE] if parts is None else [directory / part["file"] for part in parts]


def _require_hashes(description: Mapping[str, Any], files: Sequence[Path]) -> None:
    parts = description.get(PARTS_KEY)
    hashes = [description["sha256"]] if parts is None else [part["sha256"] for part in parts]
    for path, wanted in zip(files, hashes, strict=True):
        try:
            found = _sha256(path)
        except OSError as error:
            names = f"{WEIGHTS_FILE} and {DESCRIPTION_FILE}" if parts is None else f"the files that {DESCRIPTION_FILE} names"
            raise CheckpointError(f"{path}: {error.strerror}; give a directory with both {names}") from error
        if found != wanted:
            raise CheckpointError(
                f"{path}: SHA-256 differs from {DESCRIPTION_FILE}, the file is damaged; use another checkpoint, or copy it again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_features(files: Sequence[Path], axis_of: Callable[[str], int | None], features: range | None) -> dict[str, Tensor]:
    """Tensors from files that hold some features each, one after another; what has no axis of features is the same in all.

    Args:
        files: in the order of their features.
        axis_of: the axis of features of a tensor, by its name.
        features: those to read; None reads all.

    Raises:
        OSError, SafetensorError: a file is missing or none of safetensors.
    """
    found: dict[str, list[Tensor]] = {}
    start = 0
    for path in files:
        with safe_open(path, "pt") as file:
            axes = {name: axis_of(name) for name in file.keys()}  # noqa: SIM118
            counts = {file.get_slice(name).get_shape()[axis] for name, axis in axes.items() if axis is not None}
            if len(counts) != 1:
                raise SafetensorError(f"{path.name} has tensors of {sorted(counts)} features")
            count = counts.pop()
            low, high = (0, count) if features is None else (max(0, features.start - start), min(count, features.stop - start))
            for name, axis in axes.items():
                if axis is None and name not in found:
                    found[name] = [file.get_tensor(name)]
                elif axis is not None and low < high:
                    whole, place = file.get_slice(name), slice(low, high)
                    found.setdefault(name, []).append(whole[place] if axis == 0 else whole[:, place])
            start += count
    return {name: _joined(name, parts, axis_of) for name, parts in found.items()}


def _joined(name: str, parts: list[Tensor], axis_of: Callable[[str], int | None]) -> Tensor:
    axis = axis_of(name)
    return parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)


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
    if description.get("format") not in (FORMAT, FORMAT_IN_PARTS):
        known = f"{FORMAT} and {FORMAT_IN_PARTS}"
        raise CheckpointError(f"{path}: format {description.get('format')!r}, this version reads {known}; use the gsae that wrote it")
    require_fields(description, NEEDED, OPTIONAL, str(path))
    _require_parts(description, path)
    if description["objective"] not in SAE_CLASS:
        raise CheckpointError(f"{path}: objective {description['objective']!r} is none of {', '.join(SAE_CLASS)}; {cure}")
    return description


def _require_parts(description: Mapping[str, Any], path: Path) -> None:
    parts = description.get(PARTS_KEY)
    if (parts is None) != (description["format"] == FORMAT):
        raise CheckpointError(f"{path}: format {description['format']} and {PARTS_KEY!r} do not go together; copy it again")
    if parts is None:
        return
    is_list = isinstance(parts, list) and bool(parts) and all(isinstance(part, dict) for part in parts)
    for number, part in enumerate(parts if is_list else ({},)):
        require_fields(part, {"file": TEXT, "features": SIZE, "sha256": TEXT}, {}, f"{path}: {PARTS_KEY}[{number}]")
        if Path(part["file"]).name != part["file"]:
            raise CheckpointError(f"{path}: {PARTS_KEY}[{number}] is at {part['file']!r}, not beside it; copy it again")
    if sum(part["features"] for part in parts) != description["num_features"]:
        raise CheckpointError(f"{path}: the features of its {PARTS_KEY} are not num_features, {description['num_features']}; copy it again")


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
