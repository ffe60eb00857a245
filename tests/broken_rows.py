"""Rows of a store that are not finite, in shards whose hashes are right: nothing but the values is wrong."""

import hashlib
import json
import math
from pathlib import Path

import torch

from gsae.store.encoding import STORAGE_TYPES
from gsae.store.manifest import MANIFEST_FILE, fingerprint, load
from gsae.store.origin import Origin
from gsae.store.progress import progress_path, progress_sha256, read_records
from gsae.store.stream import Stream


def row_of_step(store: Path, site: str, step: int, place: int, **order) -> Origin:
    """Where a row of a batch comes from, in the order of a training of that store."""
    manifest = load(store)
    with Stream(store, site, range(manifest.num_lanes), verify_shards=False, **order) as stream:
        stream.seek(step * order["batch_rows"])
        return stream.origins(stream.next_batch())[place]


def break_row(store: Path, site: str, origin: Origin, value: float = math.nan) -> None:
    """Give a value of a row, of an int8 row its scale, another value, and the tar, its log and the manifest the hashes that follow."""
    manifest = load(store)
    tar = read_records(store, origin.lane)[origin.shard].sites[site].tar
    dtype = STORAGE_TYPES[manifest.dtype]
    at = tar.offsets[origin.context] + (origin.row * manifest.d_model + 3) * dtype.itemsize
    if manifest.dtype == "int8":
        at, dtype = tar.scale_offsets[origin.context] + 4 * origin.row, torch.float32
    content = bytearray(origin.tar.read_bytes())
    content[at : at + dtype.itemsize] = bytes(torch.tensor([value], dtype=dtype).view(torch.uint8).tolist())
    origin.tar.write_bytes(content)

    log = progress_path(store, origin.lane)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[origin.shard]["sites"][site]["sha256"] = hashlib.sha256(content).hexdigest()
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    described = json.loads((store / MANIFEST_FILE).read_text())
    del described["digest"]
    described["lanes"][origin.lane]["progress_sha256"] = progress_sha256(store, origin.lane)
    (store / MANIFEST_FILE).write_text(json.dumps({**described, "digest": fingerprint(described)}))
