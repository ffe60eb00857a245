"""The shard format: one tar of one lane's activations at one site. In: the kept rows of some contexts. Out: the tar, and views into it.

A context is a pair of members, `<key>.json` and `<key>.rows.safetensors` (x, token, position, document), key
`<lane>-<shard>-<context>`: what any WebDataset client reads as one sample. Equal rows make equal bytes.
"""

import hashlib
import json
import mmap
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor
from webdataset.writer import TarWriter

from gsae.errors import StoreError
from gsae.store.durable import write_aside

HARVEST_AGAIN = "run gsae harvest again with the same config to rebuild it"
"""The cure for most of what can be wrong with a store."""
ROWS_MEMBER = "rows.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The storage types, by the names that config and manifest use."""


@dataclass(frozen=True)
class ContextRows:
    """The kept rows of one context at one site."""

    x: Float[Tensor, "rows d_model"]
    """Activations, in the storage type."""
    token: Int[Tensor, " rows"]
    """Token ids."""
    position: Int[Tensor, " rows"]
    """Positions in their segment."""
    document: Int[Tensor, " rows"]
    """Index of the document, among those of the training split."""

    def __post_init__(self) -> None:
        lengths = [len(self.x), len(self.token), len(self.position), len(self.document)]
        if len(set(lengths)) != 1:
            raise ValueError(f"x, token, position, document have {lengths} rows; give them as many")


@dataclass(frozen=True)
class TarRecord:
    """What the progress log says of one tar."""

    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    """Where each context's x begins, in bytes from the start of the tar."""
    context_rows: tuple[int, ...]
    """Rows of each context."""

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(self.context_rows)


@dataclass(frozen=True)
class Member:
    """One context as it stands in a tar."""

    key: str
    rows: ContextRows


def tar_path(store: Path, site: str, lane: int, shard: int) -> Path:
    """Where the tar of a shard is."""
    return store / site / f"{lane:04d}-{shard:06d}.tar"


def context_key(lane: int, shard: int, context: int) -> str:
    """The name that the members of a context share; it has no dot, since WebDataset ends a key at the first one."""
    return f"{lane:04d}-{shard:06d}-{context:05d}"


class _HashingFile:
    """The write end of a tar that takes the SHA-256 of all that passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, content: bytes) -> int:
        self._hash.update(content)
        self.bytes += len(content)
        return self._file.write(content)

    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_tar(path: Path, lane: int, shard: int, contexts: Sequence[ContextRows]) -> TarRecord:
    """Write one shard of one site, whole or not at all."""
    x_offsets = []
    with write_aside(path) as file:
        tar = _HashingFile(file)
        with TarWriter(tar, user="", group="", mtime=0) as writer:
            for index, context in enumerate(contexts):
                payload = _pack(context)
                described = {"context": index, "lane": lane, "rows": len(context.x), "shard": shard}
                key = context_key(lane, shard, index)
                writer.write({"__key__": key, "json": json.dumps(described).encode(), ROWS_MEMBER: payload})
                x_offsets.append(_x_offset(payload))
    with tarfile.open(path) as written:
        members = [member for member in written if member.name.endswith(ROWS_MEMBER)]
    offsets = tuple(member.offset_data + inside for member, inside in zip(members, x_offsets, strict=True))
    return TarRecord(tar.bytes, tar.sha256(), offsets, tuple(len(context.x) for context in contexts))


def _pack(context: ContextRows) -> bytes:
    # safetensors refuses tensors that share memory, so each is a copy.
    integers = {name: getattr(context, name).to("cpu", torch.int32, copy=True) for name in ("token", "position", "document")}
    packed: bytes = safetensors.torch.save({"x": context.x.detach().cpu().contiguous(), **integers})
    return packed


def _x_offset(payload: bytes) -> int:
    """Where x begins in a safetensors file: 8 bytes with the header's length, the header, then the tensors at the offsets it gives."""
    header_bytes = int.from_bytes(payload[:8], "little")
    begin: int = json.loads(payload[8 : 8 + header_bytes])["x"]["data_offsets"][0]
    return 8 + header_bytes + begin


def map_tar(path: Path, record: TarRecord, dtype: torch.dtype, d_model: int, verify: bool = False) -> list[Float[Tensor, "rows d_model"]]:
    """The x of each context, as views of the mapped file; writing to them does not change the file.

    Args:
        path: the tar.
        record: what the progress log says of it.
        dtype: storage type.
        d_model: width of a row.
        verify: whether to read all of it now and compare its SHA-256.

    Raises:
        StoreError: it is missing, or has another size or hash than the record.
    """
    require_size(path, record)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), record.bytes, access=mmap.ACCESS_COPY)
    if verify and hashlib.sha256(mapped).hexdigest() != record.sha256:
        raise StoreError(f"shard {short_name(path)}: its SHA-256 differs from the progress log's; delete it and {HARVEST_AGAIN}")
    views = []
    for rows, offset in zip(record.context_rows, record.offsets, strict=True):
        flat = torch.frombuffer(mapped, dtype=dtype, count=rows * d_model, offset=offset) if rows else torch.empty(0, dtype=dtype)
        views.append(flat.view(rows, d_model))
    return views


def require_size(path: Path, record: TarRecord) -> None:
    """Raise StoreError unless the tar is there in its full size; nothing of it is read."""
    if not path.is_file():
        raise StoreError(f"shard {short_name(path)} is missing in {path.parent.parent}; {HARVEST_AGAIN}")
    size = path.stat().st_size
    if size != record.bytes:
        raise StoreError(f"shard {short_name(path)} has {size} bytes, the progress log says {record.bytes}; {HARVEST_AGAIN}")


def short_name(path: Path) -> str:
    """`<site>/<lane>-<shard>.tar`, as messages name a shard."""
    return f"{path.parent.name}/{path.name}"


def read_tar(path: Path) -> Iterator[Member]:
    """The contexts of a tar, in order, unpacked."""
    with tarfile.open(path) as tar:
        for info in tar:
            if info.name.endswith(ROWS_MEMBER):
                content = tar.extractfile(info)
                assert content is not None
                rows = ContextRows(**safetensors.torch.load(content.read()))
                yield Member(info.name.removesuffix(f".{ROWS_MEMBER}"), rows)
