"""Finding an SAE. In: what a user calls it. Out: the SAE as it is stored, or some of its features, with all that is known of it.

A path may be a run directory (its newest checkpoint), a checkpoint, a directory that `gsae export` or `gsae import` made, or
`owner/name[@revision]` on the Hugging Face hub.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gsae.errors import CheckpointError
from gsae.exchange import hub
from gsae.exchange.provenance import provenance
from gsae.exchange.streamed import Stored, read_part, stored_tensors
from gsae.sae.contents import require_weights
from gsae.sae.folded import FOLDED_KEY, folded
from gsae.sae.foreign import FILES
from gsae.sae.formats import DESCRIPTION_FILE, PARTS_KEY, WEIGHTS_FILE, check_sae, weight_files
from gsae.sae.objective import SAE, SAE_CLASS
from gsae.store.runs import RUN_FILE, checkpoints, find_runs

OF_THE_FILE = ("format", "sha256", PARTS_KEY)
"""Keys of sae.json that speak of the file, not of the SAE."""
PART_FILES = "sae-*-of-*.safetensors"
"""The weights of a checkpoint in parts."""
SLICE_BYTES = 2**26
"""Of the weights of a slice of features in float64. Folding and converting one takes about four times as much."""


@dataclass(frozen=True)
class WeightFile:
    """A file of weights."""

    path: Path
    features: range
    """Those that it holds."""
    tensors: Mapping[str, Stored]


@dataclass(frozen=True, eq=False)
class Source:
    """A stored SAE. Its files were compared with their hashes."""

    parts: tuple[WeightFile, ...]
    """Its files, in the order of their features."""
    description: dict[str, Any]
    """What its sae.json says; for a checkpoint also what its run knows (see `gsae.exchange.provenance`)."""
    run: Path | None
    """The run directory it belongs to."""
    outline: SAE
    """One like it, without storage."""

    @property
    def dtype(self) -> torch.dtype:
        """The type it is stored in."""
        return self.outline.b_dec.dtype

    def read(self, features: range | None = None) -> SAE:
        """The SAE as it is stored, onto the CPU: the scale is not folded in unless the description says so.

        Args:
            features: those to read; None reads all.

        Raises:
            CheckpointError: a file cannot be read, or a weight is NaN or infinite.
        """
        wanted = range(self.outline.num_features) if features is None else features
        sae = self.blank(len(wanted))
        for part in self.parts:
            low, high = max(wanted.start, part.features.start), min(wanted.stop, part.features.stop)
            if low < high:
                try:
                    _read_into(sae, part, wanted.start, range(low, high))
                except OSError as error:
                    raise CheckpointError(f"{part.path}: {error.strerror or error}; use another checkpoint") from error
        require_weights(sae.state_dict(), str(self.parts[0].path.parent))
        return sae

    def blank(self, num_features: int) -> SAE:
        """One like it of so many features, all zeros."""
        return type(self.outline)(self.outline.d_model, num_features, self.dtype)

    def slices(self) -> Iterator[range]:
        """All features, so many at a time that their weights in float64 are SLICE_BYTES."""
        count = max(1, SLICE_BYTES // (2 * self.outline.d_model * torch.float64.itemsize))
        for start in range(0, self.outline.num_features, count):
            yield range(start, min(start + count, self.outline.num_features))

    def folded(self, features: range) -> SAE:
        """Some features in float64, on raw activations (see `gsae.sae.folded.folded`).

        Raises:
            CheckpointError: as for `read`.
        """
        return folded(self.read(features), self.description)


def _read_into(sae: SAE, part: WeightFile, first: int, features: range) -> None:
    """Read features of a file into an SAE whose first feature is number `first`."""
    own = range(features.start - part.features.start, features.stop - part.features.start)
    place = slice(features.start - first, features.stop - first)
    file = os.open(part.path, os.O_RDONLY)
    try:
        for name, value in sae.state_dict().items():
            axis = sae.FEATURE_AXIS.get(name)
            target = value if axis is None else value[(slice(None),) * axis + (place,)]
            target.copy_(read_part(file, part.tensors[name], axis, own))
    finally:
        os.close(file)


def find_sae(path: str | Path) -> Source:
    """Find the SAE that `path` names; its weights are not read yet.

    Raises:
        CheckpointError: there is none, it is damaged, or it is another library's.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _read(local)
    if local.exists():
        raise CheckpointError(f"{path} is a file; give the directory with {WEIGHTS_FILE} and {DESCRIPTION_FILE}")
    name, _, revision = str(path).partition("@")
    if not is_on_hub(path):
        raise CheckpointError(
            f"{path}: no such directory; give a run, a checkpoint, a directory that gsae export made, or OWNER/NAME[@REVISION] on the hub"
        )
    directory = hub.download(name, revision or None, (WEIGHTS_FILE, PART_FILES, DESCRIPTION_FILE))
    if not (directory / DESCRIPTION_FILE).exists():
        raise CheckpointError(f"{path} on the hub holds no {DESCRIPTION_FILE}; fetch it with `hf download {name}` and use gsae import")
    return _read(directory)


def is_on_hub(path: str | Path) -> bool:
    """Whether `path` is nothing here, and can be a repository on the hub."""
    return not Path(path).expanduser().exists() and hub.NAME.fullmatch(str(path).partition("@")[0]) is not None


def _read(directory: Path) -> Source:
    if (directory / RUN_FILE).exists():
        found = checkpoints(directory)
        if not found:
            raise CheckpointError(f"run {directory} has no checkpoint yet; run gsae train with its config first")
        directory = found[-1].path
    elif not (directory / DESCRIPTION_FILE).exists():
        raise CheckpointError(f"{directory} holds no {DESCRIPTION_FILE}; {_what_it_is(directory)}")
    saved = check_sae(directory)
    run = directory.resolve().parent.parent
    run_of_it = run if (run / RUN_FILE).exists() and directory.resolve().parent.name == "checkpoints" else None
    description = dict(saved)
    if run_of_it is not None and not description.get(FOLDED_KEY):
        description |= provenance(run_of_it, saved)
    parts = _parts(directory, saved)
    with torch.device("meta"):
        outline = SAE_CLASS[saved["objective"]](saved["d_model"], saved["num_features"], parts[0].tensors["W_dec"].dtype)
    return Source(parts, {key: value for key, value in description.items() if key not in OF_THE_FILE}, run_of_it, outline)


def _parts(directory: Path, saved: Mapping[str, Any]) -> tuple[WeightFile, ...]:
    """The files of the weights.

    Raises:
        CheckpointError: one does not hold what `saved`, the description, says.
    """
    found: list[WeightFile] = []
    counts = [part["features"] for part in saved.get(PARTS_KEY, ({"features": saved["num_features"]},))]
    for path, count in zip(weight_files(directory, saved), counts, strict=True):
        start = found[-1].features.stop if found else 0
        try:
            tensors = stored_tensors(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; use another checkpoint") from error
        except SafetensorError as error:
            raise _misfit(path, str(error)) from error
        part = WeightFile(path, range(start, start + count), tensors)
        _require_tensors(part, found[0] if found else part, saved)
        found.append(part)
    return tuple(found)


def _require_tensors(part: WeightFile, first: WeightFile, saved: Mapping[str, Any]) -> None:
    """Refuse a file whose tensors are not those of the objective, or of other types than those of the first one."""
    axes, d_model = SAE_CLASS[saved["objective"]].FEATURE_AXIS, saved["d_model"]
    shapes: dict[str, tuple[int, ...]] = {name: (len(part.features),) for name in axes}
    shapes |= {"W_dec": (len(part.features), d_model), "b_dec": (d_model,)}
    shapes |= {name: (d_model, len(part.features)) for name, axis in axes.items() if axis == 1}
    for name in sorted(part.tensors.keys() | shapes.keys()):
        found, wanted = part.tensors[name].shape if name in part.tensors else "missing", shapes.get(name, "none of that name")
        if found != wanted:
            raise _misfit(part.path, f"tensor {name} is {found}, not {wanted}")
        if part.tensors[name].dtype != first.tensors[name].dtype:
            raise _misfit(part.path, f"tensor {name} is {part.tensors[name].dtype}, in {first.path.name} {first.tensors[name].dtype}")


def _misfit(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} does not fit {DESCRIPTION_FILE}: {what}; use another checkpoint")


def _what_it_is(directory: Path) -> str:
    for library, (weights, _) in FILES.items():
        if (directory / weights).exists():
            return f"it is {library}'s: make it ours with `gsae import {directory} OUTPUT`"
    runs = find_runs(directory)
    if runs:
        return f"it holds {len(runs)} runs: give one of them, such as {runs[0]}"
    return "give a run, a checkpoint, or a directory that gsae export made"
