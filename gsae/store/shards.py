"""The shard format: one tar of one lane's activations at one site. In: the kept rows of some contexts. Out: the tar, and views into it.

A context is a pair of members, `<key>.json` and `<key>.rows.safetensors` (x, token, position, document, of int8 rows row_scale), key
`<lane>-<shard>-<context>`: what any WebDataset client reads as one sample. Equal rows make equal bytes.
"""

import hashlib
import json
import mmap
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int, Int32, Shaped
from torch import Tensor
from webdataset.writer import TarWriter

from gsae.errors import StoreError
from gsae.store.durable import write_aside
from gsae.store.encoding import STORAGE_TYPES, Encoded
from gsae.store.mirror import forget, open_stored

HARVEST_AGAIN = "run gsae harvest again with the same config to rebuild it"
"""The cure for most of what can be wrong with a store."""
ROWS_MEMBER = "rows.safetensors"


@dataclass(frozen=True)
class ContextRows:
    """The kept rows of one context at one site."""

    x: Shaped[Tensor, "rows d_model"]
    """Activations, in the storage type."""
    token: Int[Tensor, " rows"]
    """Token ids."""
    position: Int[Tensor, " rows"]
    """Positions in their segment."""
    document: Int[Tensor, " rows"]
    """Index of the document, among those of the training split."""
    row_scale: Float[Tensor, " rows"] | None = None
    """Float32, of int8 rows only: the activations are x |x| row_scale."""

    def __post_init__(self) -> None:
        lengths = [len(self.x), len(self.token), len(self.position), len(self.document)]
        if len(set(lengths)) != 1:
            raise ValueError(f"x, token, position, document have {lengths} rows; give them as many")
        if (None if self.row_scale is None else len(self.row_scale)) != (len(self.x) if self.x.dtype == torch.int8 else None):
            raise ValueError("row_scale is for int8 rows, one number a row")

    @property
    def encoded(self) -> Encoded:
        """The activations as they are stored."""
        return Encoded(self.x, self.row_scale)


@dataclass(frozen=True)
class TarRecord:
    """What the progress log says of one tar."""

    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    """Where each context's x begins, in bytes from the start of the tar."""
    context_rows: tuple[int, ...]
    """Rows of each context."""
    scale_offsets: tuple[int, ...] = ()
    """Where each context's row_scale begins; empty unless the rows are int8."""

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(self.context_rows)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; without `scale_offsets` where there are none."""
        scales = {"scale_offsets": list(self.scale_offsets)} if self.scale_offsets else {}
        rows = {"offsets": list(self.offsets), "context_rows": list(self.context_rows)}
        return {"bytes": self.bytes, "sha256": self.sha256, **rows, **scales}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TarRecord":
        """The record that `to_json` wrote; other keys are let be."""
        scale_offsets = tuple(value.get("scale_offsets", ()))
        return cls(value["bytes"], value["sha256"], tuple(value["offsets"]), tuple(value["context_rows"]), scale_offsets)


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


class TarWriting:
    """A tar in the making: `add` its contexts in order; `record` is there once the block of `open_tar` has ended."""

    def __init__(self, writer: TarWriter, lane: int, shard: int) -> None:
        self._writer = writer
        self._lane = lane
        self._shard = shard
        self._context_rows: list[int] = []
        self._inside: list[dict[str, int]] = []
        self._record: TarRecord | None = None

    def add(self, context: ContextRows) -> None:
        """Write the next context."""
        payload, index = _pack(context), len(self._context_rows)
        described = {"context": index, "lane": self._lane, "rows": len(context.x), "shard": self._shard}
        key = context_key(self._lane, self._shard, index)
        self._writer.write({"__key__": key, "json": json.dumps(described).encode(), ROWS_MEMBER: payload})
        self._context_rows.append(len(context.x))
        self._inside.append(_tensor_offsets(payload))

    @property
    def record(self) -> TarRecord:
        """What the progress log says of the tar.

        Raises:
            ValueError: the tar is still being written.
        """
        if self._record is None:
            raise ValueError("the tar is not whole before the end of its block")
        return self._record

    def close(self, path: Path, size: int, sha256: str) -> None:
        """Note where the rows are in the finished file."""
        with tarfile.open(path) as written:
            members = [member.offset_data for member in written if member.name.endswith(ROWS_MEMBER)]
        offsets = {
            name: tuple(member + inside[name] for member, inside in zip(members, self._inside, strict=True) if name in inside)
            for name in ("x", "row_scale")
        }
        self._record = TarRecord(size, sha256, offsets["x"], tuple(self._context_rows), offsets["row_scale"])


@contextmanager
def open_tar(path: Path, lane: int, shard: int) -> Iterator[TarWriting]:
    """One shard of one site to write, context by context, whole or not at all: when the block raises, there is no file."""
    with write_aside(path) as file:
        tar = _HashingFile(file)
        with TarWriter(tar, user="", group="", mtime=0) as writer:
            writing = TarWriting(writer, lane, shard)
            yield writing
    writing.close(path, tar.bytes, tar.sha256())


def _pack(context: ContextRows) -> bytes:
    # safetensors refuses tensors that share memory, so each is a copy.
    integers = {name: getattr(context, name).to("cpu", torch.int32, copy=True) for name in ("token", "position", "document")}
    scale = {} if context.row_scale is None else {"row_scale": context.row_scale.to("cpu", torch.float32, copy=True)}
    packed: bytes = safetensors.torch.save({"x": context.x.detach().cpu().contiguous(), **integers, **scale})
    return packed


def _tensor_offsets(payload: bytes) -> dict[str, int]:
    """Where each tensor of a safetensors file begins: 8 bytes with the header's length, the header, then the tensors at its offsets."""
    header_bytes = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + header_bytes])
    return {name: 8 + header_bytes + tensor["data_offsets"][0] for name, tensor in header.items()}


def map_tar(path: Path, record: TarRecord, storage: str, d_model: int, verify: bool = False) -> list[Encoded]:
    """The rows of each context, as views of the mapped file; writing to them does not change the file.

    Args:
        path: the tar.
        record: what the progress log says of it.
        storage: name of the storage type.
        d_model: width of a row.
        verify: whether to read all of it now and compare its SHA-256.

    Raises:
        StoreError: it is missing, or has another size or hash than the record.
    """
    with open_whole(path, record) as file:
        if verify:
            require_sha256(path, file, record)
        mapped = mmap.mmap(file.fileno(), record.bytes, access=mmap.ACCESS_COPY)
    views = [
        _view(mapped, STORAGE_TYPES[storage], offset, rows * d_model).view(rows, d_model)
        for rows, offset in zip(record.context_rows, record.offsets, strict=True)
    ]
    if storage != "int8":
        return [Encoded(x) for x in views]
    scales = [_view(mapped, torch.float32, offset, rows) for rows, offset in zip(record.context_rows, record.scale_offsets, strict=True)]
    return [Encoded(x, scale) for x, scale in zip(views, scales, strict=True)]


def _view(mapped: mmap.mmap, dtype: torch.dtype, offset: int, count: int) -> Shaped[Tensor, " count"]:
    # frombuffer refuses to make a view of nothing.
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)


def require_size(path: Path, record: TarRecord) -> None:
    """Raise StoreError unless the tar is there in its full size; nothing of it is read."""
    if not path.is_file():
        raise StoreError(f"shard {short_name(path)} is missing in {path.parent.parent}; {HARVEST_AGAIN}")
    _require_bytes(path, path.stat().st_size, record)


def _require_bytes(path: Path, size: int, record: TarRecord) -> None:
    if size != record.bytes:
        forget(path)
        raise StoreError(f"shard {short_name(path)} has {size} bytes, the progress log says {record.bytes}; {HARVEST_AGAIN}")


def require_sha256(path: Path, file: BinaryIO, record: TarRecord) -> None:
    """Raise StoreError unless the tar, open in `file`, has the content of its record; all of it is read."""
    with open(file.fileno(), "rb", closefd=False) as content:
        content.seek(0)
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != record.sha256:
        forget(path)
        raise StoreError(f"shard {short_name(path)}: its SHA-256 differs from the progress log's; delete it and {HARVEST_AGAIN}")


def open_whole(path: Path, record: TarRecord) -> BinaryIO:
    """The tar to read, brought first where the store is a mirror; StoreError unless it is there in its full size."""
    try:
        file = open_stored(path)
    except (FileNotFoundError, IsADirectoryError):
        raise StoreError(f"shard {short_name(path)} is missing in {path.parent.parent}; {HARVEST_AGAIN}") from None
    try:
        _require_bytes(path, os.fstat(file.fileno()).st_size, record)
    except StoreError:
        file.close()
        raise
    return file


def short_name(path: Path) -> str:
    """`<site>/<lane>-<shard>.tar`, as messages name a shard."""
    return f"{path.parent.name}/{path.name}"


def read_tar(path: Path) -> Iterator[Member]:
    """The contexts of a tar, in order, unpacked.

    Raises:
        StoreError: a member is none of a store's; what webdataset would unpickle is such a one, and nothing of it is read.
    """
    with open_stored(path) as file, tarfile.open(fileobj=file) as tar:
        for info in tar:
            kind = info.name.partition(".")[2]
            if kind not in (ROWS_MEMBER, "json"):
                raise StoreError(f"shard {short_name(path)}: has a member {info.name}, which no store has; delete it and {HARVEST_AGAIN}")
            if kind == ROWS_MEMBER:
                content = tar.extractfile(info)
                assert content is not None
                rows = ContextRows(**safetensors.torch.load(content.read()))
                yield Member(info.name.removesuffix(f".{ROWS_MEMBER}"), rows)


def read_documents(path: Path, record: TarRecord, first_row: int, num_rows: int) -> Int32[np.ndarray, " rows"]:
    """The document of each of some rows that stand one after another in a shard; of the others, and of x, nothing is read.

    Raises:
        StoreError: the tar is missing, has another size than the record, or its members cannot be read.
    """
    documents: list[Int32[np.ndarray, " rows"]] = []
    begin, end = 0, first_row + num_rows  # begin: of the context, counted over the rows of the shard
    try:
        with open_whole(path, record) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = (member for member in tar if member.name.endswith(ROWS_MEMBER))
            for rows in record.context_rows:
                if begin >= end:
                    break
                member = next(members)
                if begin + rows > first_row:
                    documents.append(_read_document(file, member, rows)[max(0, first_row - begin) : end - begin])
                begin += rows
    except (tarfile.TarError, ValueError, LookupError, StopIteration) as error:
        raise StoreError(f"shard {short_name(path)} is damaged; run gsae verify {path.parent.parent} --repair") from error
    return np.concatenate([np.empty(0, np.int32), *documents])


def _read_document(file: BinaryIO, member: tarfile.TarInfo, rows: int) -> Int32[np.ndarray, " rows"]:
    file.seek(member.offset_data)
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), member.size))
    file.seek(member.offset_data + _tensor_offsets(head)["document"])
    return np.frombuffer(file.read(4 * rows), "<i4", rows)
