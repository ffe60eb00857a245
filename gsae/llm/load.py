"""Loading the LLM. In: the config's `llm` section. Out: what the LLM is (`LLMInfo`), or the LLM itself with its tokenizer.

Files come from a directory or from the hub (through its cache on this machine). Weights are read from safetensors only.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gsae.config import LLMConfig
from gsae.errors import ConfigError, ModelError
from gsae.llm.random import VOCAB_SIZE, byte_tokenizer, random_llama

ARCHITECTURE = "LlamaForCausalLM"
DESCRIPTION_FILES = ("*.json", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors",)
HUB_TIMEOUT_SECONDS = 10
SAMPLE_BYTES = 4096
"""Bytes of each tensor that go into the identity of a directory's weights."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LLMInfo:
    """What an LLM is, known without its weights."""

    num_layers: int
    """Decoder layers of the whole LLM, however many of them are loaded."""
    d_model: int
    """Width of the residual stream."""
    vocab_size: int
    """Number of tokens that the LM head tells apart."""
    identity: dict[str, Any]
    """Plain data that differs between different LLMs: a name with the hub's commit, hashes of a directory's files, or a random
    Llama's shape and seed. No absolute path; type and attention of the computation are not part of it."""


@dataclass(frozen=True)
class LLM:
    """An LLM that is ready to run."""

    model: PreTrainedModel
    """A LlamaForCausalLM in evaluation mode, without gradients, on its device."""
    tokenizer: PreTrainedTokenizerBase
    info: LLMInfo


def describe(config: LLMConfig) -> LLMInfo:
    """What the LLM is, without loading it: of the weights a few kilobytes are read from a directory, and none fetched from the hub.

    Raises:
        ConfigError: `llm.model` is empty.
        ModelError: the files are not there, cannot be fetched, or are not a Llama's.
    """
    if config.model == "random":
        shape = config.random
        return LLMInfo(shape.num_layers, shape.d_model, VOCAB_SIZE, {"name": "random", **asdict(shape)})
    with _quiet():
        local = _local_directory(config)
        directory = local or _snapshot(config.model, config.revision, DESCRIPTION_FILES)
        llama = _read_config(directory)
    identity = {"name": config.model, "revision": directory.name} if local is None else {"name": local.name, **_hashes(local)}
    return LLMInfo(llama.num_hidden_layers, llama.hidden_size, llama.vocab_size, identity)


def load(config: LLMConfig, device: torch.device, last_layer: int | None = None) -> LLM:
    """The LLM on `device`, whole, or for reading activations only.

    Args:
        config: which LLM, in which type, with which attention.
        device: where it computes.
        last_layer: the highest layer whose output is wanted; layers above it and the LM head are left out.

    Raises:
        ConfigError: the LLM has no layer `last_layer`, or `llm.model` is empty.
        ModelError: the files are not there, cannot be fetched, are not a Llama's, or are damaged.
    """
    info = describe(config)
    num_layers = info.num_layers if last_layer is None else last_layer + 1
    if not 1 <= num_layers <= info.num_layers:
        raise ConfigError(f"layer {last_layer} is not in {config.model!r}; its layers are 0 to {info.num_layers - 1}")
    tokenizer: PreTrainedTokenizerBase
    with _quiet():
        if config.model == "random":
            model, tokenizer = _random_model(config, device, num_layers), byte_tokenizer()
        else:
            directory = _local_directory(config) or _snapshot(config.model, info.identity["revision"], DESCRIPTION_FILES + WEIGHT_FILES)
            model, tokenizer = _read_model(config, directory, device, num_layers), _read_tokenizer(directory)
    if last_layer is not None:
        del model.lm_head
    module: nn.Module = model
    module.eval().requires_grad_(False)
    return LLM(model, tokenizer, info)


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer alone.

    Raises:
        ConfigError: `llm.model` is empty.
        ModelError: the files are not there, cannot be fetched, or are damaged.
    """
    if config.model == "random":
        return byte_tokenizer()
    with _quiet():
        return _read_tokenizer(_local_directory(config) or _snapshot(config.model, config.revision, DESCRIPTION_FILES))


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which transformers and huggingface_hub show no progress bars and report errors only."""
    libraries = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [library.level for library in libraries]
    progress_bars: Any = transformers_logging
    had_progress_bars = progress_bars.is_progress_bar_enabled()
    try:
        progress_bars.disable_progress_bar()
        for library in libraries:
            library.setLevel(logging.ERROR)
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.setLevel(level)
        if had_progress_bars:
            progress_bars.enable_progress_bar()


def _local_directory(config: LLMConfig) -> Path | None:
    """The directory that `llm.model` names, or None where it is a name on the hub."""
    if not config.model:
        raise ConfigError("llm.model is empty; give a name on the Hugging Face hub, a directory that holds a Llama, or 'random'")
    path = Path(config.model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ModelError(f"llm.model {config.model!r} is a file; give the directory with config.json, *.safetensors and the tokenizer")
    return None


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory, named by the commit, that holds a hub repository's files; fetched where they are not in the cache.

    The hub is asked once, without the client's minutes of retries; when it refuses for whatever reason, the cache may do.
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
        f"({type(error).__name__}: {_first_line(error)}): run it once on a machine that reaches {page}, {cure}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}; point llm.model to a directory made by save_pretrained") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({_first_line(error)}); fetch it again") from None
    return values


def _read_config(directory: Path) -> LlamaConfig:
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


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (directory / name).is_file():
            raise ModelError(f"{directory} holds no {name}; fetch or save all the weights there, as safetensors")
    return [directory / name for name in names]


def _tokenizer_files(directory: Path) -> list[Path]:
    files = [path for name in ("tokenizer.json", "tokenizer.model") if (path := directory / name).is_file()]
    if not files:
        raise ModelError(f"{directory} holds no tokenizer.json or tokenizer.model; save the model's tokenizer there with save_pretrained")
    return files


def _hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the config, of the tokenizer, and of the weights: every file's table of tensors and each tensor's first bytes."""
    weights = hashlib.sha256()
    for path in _weight_files(directory):
        _hash_sample(path, weights)
    tokenizer = hashlib.sha256(b"".join(path.read_bytes() for path in _tokenizer_files(directory)))
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


def _read_model(config: LLMConfig, directory: Path, device: torch.device, num_layers: int) -> LlamaForCausalLM:
    """The first layers of a directory's Llama, put straight onto the device."""
    _weight_files(directory)
    llama = _read_config(directory)
    llama.num_hidden_layers = num_layers
    llama_class: Any = LlamaForCausalLM  # its annotations do not know of output_loading_info
    loaded: tuple[LlamaForCausalLM, dict[str, Any]] = llama_class.from_pretrained(
        directory,
        config=llama,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attention,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"{directory}: {len(wrong)} weights are missing or not of the shape that config.json tells, "
            f"the first is {wrong[0]}; fetch or save the model again"
        )
    return model


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    _tokenizer_files(directory)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ModelError(f"the tokenizer in {directory} cannot be read ({_first_line(error)}); fetch or save it again") from error
    return tokenizer


def _random_model(config: LLMConfig, device: torch.device, num_layers: int) -> LlamaForCausalLM:
    model = random_llama(config.random)
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    model.set_attn_implementation(config.attention)
    for weight in model.parameters():  # not the buffers: the rotary frequencies stay in float32, as in a loaded Llama
        weight.data = weight.data.to(getattr(torch, config.dtype))
    module: nn.Module = model
    module.to(device)
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
