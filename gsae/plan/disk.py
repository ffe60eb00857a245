"""What a harvest and a training write. In: the contexts of the lanes, the shape of a row, the runs. Out: bytes on disk, shards, visits."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsae.config import Config, TrainConfig
from gsae.corpus.size import PARTS_AT_ONCE
from gsae.plan.text import TrainingText
from gsae.train.chores import checkpoint_interval
from gsae.train.plan import BankSpec, RunSpec, by_site

NUMBER_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
COLUMNS = ("document", "position", "token")
"""Besides x: int32, one a row."""
SAFETENSORS_TYPES = {"int8": "I8", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
TAR_BLOCK, TAR_RECORD = 512, 10_240
CHECKPOINT_COPIES = 3
"""Weights and Adam's two moments."""
AVERAGE_COPIES = 2
"""With a moving average: the SAE made of it, and the average itself."""


@dataclass(frozen=True)
class StoreSize:
    """An activation store on disk, all of its parts together unless it says otherwise."""

    directory: str
    sites: tuple[str, ...]
    storage_dtype: str
    rows_per_site: int
    """About: the outliers, which will be dropped, are not known."""
    bytes_per_row: int
    """Of x and its scale and columns; the rest is the tars' own."""
    shards_per_site: int
    shards: int
    bytes_per_shard: int
    """Of one with harvest.contexts_per_shard contexts."""
    bytes_per_site: int
    bytes: int
    parts: int
    bytes_per_part: int
    bytes_at_once: int
    """The most that stands on the disk: the whole store, or two parts of it."""
    bytes_present: int
    """Of these, what is in the directory already."""

    @property
    def bytes_missing(self) -> int:
        """What the disk must still take."""
        return max(0, self.bytes_at_once - self.bytes_present)


def store_size(config: Config, sites: Sequence[str], d_model: int, text: TrainingText) -> StoreSize:
    """The size of the config's store."""
    storage, parts, whole = config.harvest.storage_dtype, config.corpus.parts, config.harvest.contexts_per_shard
    store, rows_a_context = Path(config.store_directory), _rows_a_context(text)
    shards = parts * sum(-(-contexts // whole) for contexts in _part_contexts(text, parts))
    part_bytes = _part_bytes(config, parts, len(sites), d_model, text)
    at_once = part_bytes * min(parts, PARTS_AT_ONCE)
    return StoreSize(
        directory=config.store_directory if config.harvest.is_remote else str(store),
        sites=tuple(sites),
        storage_dtype=storage,
        rows_per_site=text.rows,
        bytes_per_row=row_bytes(d_model, storage) + 4 * len(COLUMNS),
        shards_per_site=shards,
        shards=shards * len(sites),
        bytes_per_shard=tar_bytes(whole, rows_a_context, d_model, storage),
        bytes_per_site=part_bytes * parts // len(sites),
        bytes=part_bytes * parts,
        parts=parts,
        bytes_per_part=part_bytes,
        bytes_at_once=at_once,
        bytes_present=at_once if config.harvest.is_remote else sum(tar.stat().st_size for tar in store.rglob("*.tar")),
    )


def smallest_parts(config: Config, num_sites: int, d_model: int, text: TrainingText, room_bytes: int) -> int | None:
    """The least corpus.parts of whose stores two take no more than `room_bytes`; None where no number that leaves each lane text does."""
    if room_bytes <= 0:
        return None
    whole = _part_bytes(config, 1, num_sites, d_model, text)
    least, most = max(PARTS_AT_ONCE + 1, PARTS_AT_ONCE * whole // room_bytes), min(lane.contexts for lane in text.lanes)
    fitting = (n for n in range(least, most + 1) if PARTS_AT_ONCE * _part_bytes(config, n, num_sites, d_model, text) <= room_bytes)
    return next(fitting, None)


def _part_bytes(config: Config, parts: int, num_sites: int, d_model: int, text: TrainingText) -> int:
    """Bytes of the store of one of so many parts."""
    whole, storage, rows = config.harvest.contexts_per_shard, config.harvest.storage_dtype, _rows_a_context(text)
    return num_sites * sum(_lane_bytes(contexts, whole, rows, d_model, storage) for contexts in _part_contexts(text, parts))


def _part_contexts(text: TrainingText, parts: int) -> list[int]:
    """Contexts of each lane of a part: parts share the documents of a lane fairly."""
    return [-(-lane.contexts // parts) for lane in text.lanes]


def _rows_a_context(text: TrainingText) -> int:
    return round(text.rows / max(1, text.contexts))


def row_bytes(d_model: int, storage: str) -> int:
    """Bytes of a row of x as it is stored, the float32 scale of an int8 row included."""
    return d_model * NUMBER_BYTES[storage] + (4 if storage == "int8" else 0)


def tar_bytes(contexts: int, rows: int, d_model: int, storage: str) -> int:
    """Bytes of a tar of so many contexts, each of so many rows."""
    described = len(json.dumps({"context": 0, "lane": 0, "rows": rows, "shard": 0}))
    members = (described, rows_member_bytes(rows, d_model, storage))
    context = sum(TAR_BLOCK + _align(size, TAR_BLOCK) for size in members)
    return _align(contexts * context + 2 * TAR_BLOCK, TAR_RECORD)


def rows_member_bytes(rows: int, d_model: int, storage: str) -> int:
    """Bytes of a safetensors file of a context's rows: the header's length in 8 bytes, the header in whole 8 bytes, the tensors."""
    shapes = [(name, "I32", [rows], 4 * rows) for name in COLUMNS]
    if storage == "int8":
        shapes.append(("row_scale", "F32", [rows], 4 * rows))
    shapes.append(("x", SAFETENSORS_TYPES[storage], [rows, d_model], rows * d_model * NUMBER_BYTES[storage]))
    shapes.sort(key=lambda shape: shape[1] != "F32")  # safetensors puts these before int32, and all narrower types after it
    header, begin = {}, 0
    for name, dtype, shape, size in shapes:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    return 8 + _align(len(json.dumps(header, separators=(",", ":"))), 8) + begin


def _lane_bytes(contexts: int, contexts_a_shard: int, rows: int, d_model: int, storage: str) -> int:
    whole, rest = divmod(contexts, contexts_a_shard)
    last = tar_bytes(rest, rows, d_model, storage) if rest else 0
    return whole * tar_bytes(contexts_a_shard, rows, d_model, storage) + last


def _align(size: int, block: int) -> int:
    return -(-size // block) * block


def num_parameters(run: RunSpec) -> int:
    """Parameters of a run's SAE."""
    biases = 1 if run.objective == "relu" else 3
    return 2 * run.d_model * run.num_features + biases * run.num_features + run.d_model


def checkpoint_bytes(config: Config, banks: Sequence[BankSpec]) -> int:
    """Bytes of the checkpoints that all runs keep, and of the one more that a bank in training writes before it deletes the oldest."""
    copies = CHECKPOINT_COPIES + (0 if config.train.ema_decay is None else AVERAGE_COPIES)
    sizes = [copies * NUMBER_BYTES[config.train.dtype] * sum(map(num_parameters, bank.runs)) for bank in banks]
    return _kept_checkpoints(config.train, banks[0].total_steps) * sum(sizes) + min(config.train.groups, len(by_site(banks))) * max(sizes)


def _kept_checkpoints(train: TrainConfig, total_steps: int) -> int:
    """How many checkpoints a run has at its end."""
    interval = checkpoint_interval(total_steps, train)
    steps = [*range(interval, total_steps, interval), total_steps]
    for_good = [step for step in steps[: -train.keep_checkpoints] if train.keep_every and step % (train.keep_every * interval) == 0]
    return min(len(steps), train.keep_checkpoints) + len(for_good)


def free_bytes(directory: Path) -> int:
    """Bytes free where a directory is or will be."""
    return shutil.disk_usage(_existing(directory)).free


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether two directories share their free bytes."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(directory: Path) -> Path:
    directory = directory.absolute()
    return next(place for place in (directory, *directory.parents) if place.exists())
