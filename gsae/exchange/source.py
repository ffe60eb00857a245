"""Finding an SAE. In: what a user calls it. Out: the SAE as it is stored, or some of its features, with all that is known of it.

A path may be a run directory (its newest checkpoint), a checkpoint, a directory that `gsae export` or `gsae import` made, or
`owner/name[@revision]` on the Hugging Face hub.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gsae.errors import CheckpointError
from gsae.exchange import hub
from gsae.exchange.provenance import provenance
from gsae.sae.contents import require_weights
from gsae.sae.folded import FOLDED_KEY
from gsae.sae.foreign import FILES
from gsae.sae.formats import DESCRIPTION_FILE, PARTS_KEY, WEIGHTS_FILE, check_sae, read_sae
from gsae.sae.objective import SAE
from gsae.store.runs import RUN_FILE, checkpoints, find_runs

OF_THE_FILE = ("format", "sha256", PARTS_KEY)
"""Keys of sae.json that speak of the file, not of the SAE."""


@dataclass(frozen=True, eq=False)
class Source:
    """A stored SAE. Its files were compared with their hashes."""

    directory: Path
    """Where its files are."""
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
            CheckpointError: a weight is NaN or infinite.
        """
        sae = read_sae(self.directory, features or range(self.outline.num_features)).sae
        require_weights(sae.state_dict(), str(self.directory))
        return sae


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
    directory = hub.download(name, revision or None, (WEIGHTS_FILE, DESCRIPTION_FILE))
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
    first = read_sae(directory, range(1)).sae
    with torch.device("meta"):
        outline = type(first)(first.d_model, saved["num_features"], first.b_dec.dtype)
    return Source(directory, {key: value for key, value in description.items() if key not in OF_THE_FILE}, run_of_it, outline)


def _what_it_is(directory: Path) -> str:
    for library, (weights, _) in FILES.items():
        if (directory / weights).exists():
            return f"it is {library}'s: make it ours with `gsae import {directory} OUTPUT`"
    runs = find_runs(directory)
    if runs:
        return f"it holds {len(runs)} runs: give one of them, such as {runs[0]}"
    return "give a run, a checkpoint, or a directory that gsae export made"
