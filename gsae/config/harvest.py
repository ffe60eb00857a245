"""Settings of the harvest stage. Out: `HarvestConfig`."""

import os
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from gsae.config.location import is_remote
from gsae.config.rules import require


@dataclass(frozen=True)
class HarvestConfig:
    """Running the LLM over contexts and storing activations."""

    store: str = ""
    """Directory of the activation store; empty puts it at `<output>/store`. Training and evaluation also read one at a URL: s3://, gs://,
    https:// or http://."""
    cache: str = ""
    """Directory for the files of stores at a URL that were read; empty takes `gsae/stores` in the user's cache directory."""
    cache_gigabytes: float = 100.0
    """Disk that the shards of a store at a URL may take there, in units of 10^9 bytes; the least recently used go."""
    sites: list[int | str] = field(default_factory=lambda: [2, "middle", -2])
    """Layers whose output is read: an index (negative counts from the end), `middle`, or a name such as `resid.16`."""
    context_length: int = 1024
    """Tokens of a context, BOS included."""
    contexts_per_shard: int = 64
    """Contexts of one shard (tar); a whole number of LLM batches."""
    batch_contexts: int = 8
    """Contexts of one LLM forward."""
    max_tokens: int | None = None
    """Tokens to harvest over all lanes, and all parts, rounded up to whole shards of every lane; null harvests the whole training text."""
    outlier_multiple: float = 3.0
    """Rows whose norm exceeds this multiple of the site's median norm are dropped."""
    calibration_contexts: int = 64
    """Contexts of the fixed sample from which the median norms are taken."""
    storage_dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """Type of the stored activations; int8 has a scale a row, takes half the disk of bfloat16, and is not exact."""
    packed: bool = True
    """Whether a context holds the segments of several documents, one after another; false gives every segment a context of its own and
    pads the rest."""

    def __post_init__(self) -> None:
        for name in ("context_length", "contexts_per_shard", "batch_contexts", "calibration_contexts"):
            require(getattr(self, name) >= 1, f"harvest.{name} is {getattr(self, name)}; give a positive number")
        require(self.context_length >= 4, f"harvest.context_length is {self.context_length}; give at least 4 tokens")
        require(
            self.contexts_per_shard % self.batch_contexts == 0,
            f"harvest.contexts_per_shard ({self.contexts_per_shard}) is not a whole number of LLM batches; "
            f"set it to a multiple of harvest.batch_contexts ({self.batch_contexts})",
        )
        require(self.outlier_multiple > 1, f"harvest.outlier_multiple is {self.outlier_multiple}; give a multiple above 1")
        require(self.max_tokens is None or self.max_tokens >= 1, f"harvest.max_tokens is {self.max_tokens}; give a positive number or null")
        require(len(self.sites) > 0, "harvest.sites is empty; name at least one layer")
        require(not is_remote(self.cache, "harvest.cache"), f"harvest.cache is {self.cache}; give a directory of this machine")
        size = self.cache_gigabytes
        require(0 < size < inf, f"harvest.cache_gigabytes is {size}; give a positive number")
        is_remote(self.store, "harvest.store")

    @property
    def is_remote(self) -> bool:
        """Whether the store is at a URL."""
        return is_remote(self.store, "harvest.store")

    @property
    def cache_directory(self) -> Path:
        """Where the files of stores at a URL are kept."""
        home = os.environ.get("XDG_CACHE_HOME", "")
        return Path(self.cache) if self.cache else (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "gsae" / "stores"
