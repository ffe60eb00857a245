"""Files of an LLM. In: the config's `llm` section. Out: the directory that holds them, the hub's or a local one, and what they tell.

Files come from a directory or from the hub (through its cache on this machine). Weights are read from safetensors only.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import LlamaConfig

from gsae.config import LLMConfig
from gsae.errors import ConfigError, ModelError

ARCHITECTURE = "LlamaForCausalLM"
DESCRIPTION_FILES = ("*.json", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors",)
HUB_TIMEOUT_SECONDS = 10
SAMPLE_BYTES = 4096
"""Bytes of each tensor that go into the identity of a directory's weights."""

log = logging.getLogger(__name__)


def local_directory(config: LLMConfig) -> Path | None:
    """The directory that `llm.model` names, or None where it is a name on the hub.

    Raises:
        ConfigError: `llm.model` is empty.
        ModelError: it names a file.
    """
    if not config.model:
        raise ConfigError("llm.model is empty; give a name on the Hugging Face hub, a directory that holds a Llama, or 'random'")
    path = Path(config.model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ModelError(f"llm.model {config.model!r} is a file; give the directory with config.json, *.safetensors and the tokenizer")
    return None


def snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory, named by the commit, that holds a hub repository's files; fetched where they are not in the cache.

    The hub is asked once, without the client's minutes of retries; when it refuses for whatever reason, the cache may do.

    Raises:
        ModelError: the hub refuses, and the cache does not hold them.
    """
    refusal: Exception | None = None
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        log.info("reading %s from the hub, or from its cache", name)
    except Exception as error:  # besides its own errors the client raises those of the HTTP library it uses
        refusal = error
    try:
        files = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*", local_files_only=refusal is not None
        )
    except (OSError, HFValidationError) as error:
        raise _hub_error(name, revision, refusal or error) from None
    return Path(files)


def _hub_error(name: str, revision: str | None, error: Exception) -> ModelError:
    cure = "or set llm.model to a local directory that holds the model"
    page = f"https://huggingface.co/{name}"
    if isinstance(error, HFValidationError):
        return ModelError(f"llm.model {name!r}: no such directory; check the path, or give a name on the Hugging Face hub")
    if isinstance(error, GatedRepoError):
        return ModelError(f"llm.model {name!r} is gated: accept its licence at {page}, log in with `hf auth login` or set HF_TOKEN, {cure}")
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"llm.model {name!r} is no directory here and no public repository on the hub: "
            f"check the spelling, log in with `hf auth login` if it is private, {cure}"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"llm.revision {revision!r} is not a branch, tag or commit of {page}: check it, or set it to null")
    return ModelError(
        f"llm.model {name!r} is no directory here, is not whole in the hub's cache, and could not be fetched "
        f"({type(error).__name__}: {first_line(error)}): run it once on a machine that reaches {page}, {cure}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}; point llm.model to a directory made by save_pretrained") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({first_line(error)}); fetch it again") from None
    return values


def read_config(directory: Path) -> LlamaConfig:
    """The shape of a directory's Llama.

    Raises:
        ModelError: there is no config.json, or it is not that of a Llama in floating point.
    """
    path = directory / "config.json"
    values = _read_json(path)
    architectures = values.get("architectures") or []
    if ARCHITECTURE not in architectures:
        raise ModelError(
            f"{path}: architecture {', '.join(architectures) or 'not named'} is not supported; "
            f"llm.model must be a {ARCHITECTURE} (Llama layers at model.layers, an LM head at lm_head)"
        )
    if "quantization_config" in values:
        raise ModelError(f"{path}: the weights are quantised; give the model in bfloat16, float16 or float32")
    llama: LlamaConfig = LlamaConfig.from_pretrained(directory)
    return llama


def weight_files(directory: Path) -> list[Path]:
    """The files of a directory's weights.

    Raises:
        ModelError: one is missing.
    """
    index = directory / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (directory / name).is_file():
            raise ModelError(f"{directory} holds no {name}; fetch or save all the weights there, as safetensors")
    return [directory / name for name in names]


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory's tokenizer.

    Raises:
        ModelError: there is none.
    """
    files = [path for name in ("tokenizer.json", "tokenizer.model") if (path := directory / name).is_file()]
    if not files:
        raise ModelError(f"{directory} holds no tokenizer.json or tokenizer.model; save the model's tokenizer there with save_pretrained")
    return files


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the config, of the tokenizer, and of the weights: every file's table of tensors and each tensor's first bytes."""
    weights = hashlib.sha256()
    for path in weight_files(directory):
        _hash_sample(path, weights)
    tokenizer = hashlib.sha256(b"".join(path.read_bytes() for path in tokenizer_files(directory)))
    return {
        "config_sha256": hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
        "tokenizer_sha256": tokenizer.hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def _hash_sample(path: Path, digest: "hashlib._Hash") -> None:
    """Add a safetensors file's header (a little-endian length of 8 bytes, then JSON) and the start of each tensor to `digest`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = file.read(first - 8) if first <= size else b""
            spans = [value["data_offsets"] for name, value in json.loads(header).items() if name != "__metadata__"]
        except ValueError:
            raise ModelError(f"{path} is no whole safetensors file (a Git LFS pointer, perhaps); fetch it again") from None
        announced = first + max((end for _, end in spans), default=0)
        if announced != size:
            raise ModelError(f"{path} has {size} bytes, its header announces {announced}; fetch it again")
        digest.update(header)
        for begin, end in spans:
            file.seek(first + begin)
            digest.update(file.read(min(SAMPLE_BYTES, end - begin)))


def wrong_weights(place: Path | str, names: Sequence[str]) -> ModelError:
    """The error of weights that a directory should hold and does not."""
    return ModelError(
        f"{place}: {len(names)} weights are missing or not of the shape that config.json tells, "
        f"the first is {names[0]}; fetch or save the model again"
    )


def first_line(error: Exception) -> str:
    """What a library's error says, without the rest of its story."""
    return str(error).strip().partition("\n")[0]
