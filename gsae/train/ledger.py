"""What pilots found, on the disk. In: `<output>/<site>/pilots.json`. Out: what each set of pilots found, whole or not at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsae.errors import CheckpointError
from gsae.store.durable import write_json_atomically
from gsae.train.grid import Pilot

PILOTS_FILE = "pilots.json"
PILOTS_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """What one set of pilots found."""

    fingerprint: str
    """Of all that it depends on, but for the seed."""
    seed: int
    """Of the pilots."""
    pilots: tuple[Pilot, ...] = ()
    answers: Mapping[float, float] = field(default_factory=dict)
    """Lambda by target L0."""


def read_entries(path: Path) -> dict[str, Entry]:
    """The entries by name; none where there is no file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != PILOTS_FORMAT:
            raise CheckpointError(
                f"{path}: format {content['format']}, this version reads {PILOTS_FORMAT}; delete it, and pilots run again"
            )
        return {name: _entry(value) for name, value in content["searches"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); delete it, and pilots run again") from error


def write_entries(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write all entries of a site."""
    write_json_atomically(path, {"format": PILOTS_FORMAT, "searches": {name: _plain(entry) for name, entry in entries.items()}})


def _entry(value: Mapping[str, Any]) -> Entry:
    pilots = tuple(Pilot(found["lambda"], found["l0"], found["fvu"], found["rows"]) for found in value["pilots"])
    answers = {answer["target_l0"]: answer["lambda"] for answer in value["answers"]}
    return Entry(value["fingerprint"], value["seed"], pilots, answers)


def _plain(entry: Entry) -> dict[str, Any]:
    pilots = [{"rows": found.rows, "lambda": found.lambda_, "l0": found.l0, "fvu": found.fvu} for found in entry.pilots]
    answers = [{"target_l0": target, "lambda": lambda_} for target, lambda_ in entry.answers.items()]
    return {"fingerprint": entry.fingerprint, "seed": entry.seed, "pilots": pilots, "answers": answers}
