"""Loading the LLM. In: the config's `llm` section. Out: what the LLM is (`LLMInfo`), or the LLM itself with its tokenizer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from gsae.config import LLMConfig
from gsae.errors import ConfigError, ModelError
from gsae.llm.files import (
    DESCRIPTION_FILES,
    WEIGHT_FILES,
    first_line,
    hashes,
    local_directory,
    read_config,
    snapshot,
    tokenizer_files,
    weight_files,
    wrong_weights,
)
from gsae.llm.random import VOCAB_SIZE, byte_tokenizer, random_llama
from gsae.llm.sharded import Skeleton, fill_and_split, plan_split, weights_in, weights_of
from gsae.world import Group, Zero3


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
    zero3: Zero3 | None = None
    """What gathers the parameters where they are split over ranks: then a forward is a collective of all ranks."""


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
        local = local_directory(config)
        directory = local or snapshot(config.model, config.revision, DESCRIPTION_FILES)
        llama = read_config(directory)
    identity = {"name": config.model, "revision": directory.name} if local is None else {"name": local.name, **hashes(local)}
    return LLMInfo(llama.num_hidden_layers, llama.hidden_size, llama.vocab_size, identity)


def load(config: LLMConfig, device: torch.device, last_layer: int | None = None, group: Group | None = None) -> LLM:
    """The LLM on `device`, whole, or for reading activations only.

    Args:
        config: which LLM, in which type, with which attention, and how ranks hold it.
        device: where it computes.
        last_layer: the highest layer whose output is wanted; layers above it and the LM head are left out.
        group: all ranks of the world. With `llm.sharding: zero3` they all call this, and fail together; it then needs `last_layer`.

    Raises:
        ConfigError: the LLM has no layer `last_layer`, or `llm.model` is empty.
        ModelError: the files are not there, cannot be fetched, are not a Llama's, or are damaged; or the attention or DeepSpeed cannot
            be used here.
    """
    if config.sharding == "replicate":
        with _quiet():
            source = _find(config, device, last_layer)
            model = _read_model(config, source, device)
        if last_layer is not None:
            del model.lm_head
        module: nn.Module = model
        module.eval().requires_grad_(False)
        return LLM(model, source.tokenizer, source.info)
    assert group is not None
    assert last_layer is not None
    with _quiet():
        with group.together():
            source = _find(config, device, last_layer)
            skeleton = _plan_split(config, source, group)
        return LLM(fill_and_split(skeleton, group), source.tokenizer, source.info, skeleton.zero3)


@dataclass(frozen=True)
class _Source:
    """What is known of an LLM before its weights are read."""

    info: LLMInfo
    num_layers: int
    """Decoder layers to load."""
    directory: Path | None
    """Where the weights are; None: they are random."""
    tokenizer: PreTrainedTokenizerBase


def _find(config: LLMConfig, device: torch.device, last_layer: int | None) -> _Source:
    info = describe(config)
    num_layers = info.num_layers if last_layer is None else last_layer + 1
    if not 1 <= num_layers <= info.num_layers:
        raise ConfigError(f"layer {last_layer} is not in {config.model!r}; its layers are 0 to {info.num_layers - 1}")
    _require_attention(config, device)
    if config.model == "random":
        return _Source(info, num_layers, None, byte_tokenizer())
    directory = local_directory(config) or snapshot(config.model, info.identity["revision"], DESCRIPTION_FILES + WEIGHT_FILES)
    weight_files(directory)
    return _Source(info, num_layers, directory, _read_tokenizer(directory))


def _require_attention(config: LLMConfig, device: torch.device) -> None:
    """Transformers would fetch flash attention from the hub where it is missing, and warn where it cannot work."""
    if config.attention != "flash_attention_2":
        return
    missing = []
    if device.type != "cuda":
        missing.append(f"a GPU (the device is {device.type})")
    elif not is_flash_attn_2_available():
        missing.append("the package flash-attn (pip install flash-attn --no-build-isolation)")
    if config.dtype not in ("bfloat16", "float16"):
        missing.append(f"llm.dtype bfloat16 or float16 (it is {config.dtype})")
    if missing:
        raise ModelError(f"llm.attention 'flash_attention_2' needs {' and '.join(missing)}; or set llm.attention: sdpa")


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer alone.

    Raises:
        ConfigError: `llm.model` is empty.
        ModelError: the files are not there, cannot be fetched, or are damaged.
    """
    if config.model == "random":
        return byte_tokenizer()
    with _quiet():
        return _read_tokenizer(local_directory(config) or snapshot(config.model, config.revision, DESCRIPTION_FILES))


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


def _read_model(config: LLMConfig, source: _Source, device: torch.device) -> LlamaForCausalLM:
    """The first layers of a Llama, put straight onto the device."""
    if source.directory is None:
        return _random_model(config, source.num_layers, device)
    llama_class: Any = LlamaForCausalLM  # its annotations do not know of output_loading_info
    loaded: tuple[LlamaForCausalLM, dict[str, Any]] = llama_class.from_pretrained(
        source.directory,
        config=_truncated(source.directory, source.num_layers),
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
        raise wrong_weights(source.directory, wrong)
    return model


def _plan_split(config: LLMConfig, source: _Source, group: Group) -> Skeleton:
    if source.directory is None:
        model = _random_model(config, source.num_layers, torch.device("cpu"))
        return plan_split(config, model.config, weights_of(model), group)
    weights = weights_in(source.directory, weight_files(source.directory))
    return plan_split(config, _truncated(source.directory, source.num_layers), weights, group)


def _truncated(directory: Path, num_layers: int) -> LlamaConfig:
    llama = read_config(directory)
    llama.num_hidden_layers = num_layers
    return llama


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer_files(directory)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ModelError(f"the tokenizer in {directory} cannot be read ({first_line(error)}); fetch or save it again") from error
    return tokenizer


def _random_model(config: LLMConfig, num_layers: int, device: torch.device) -> LlamaForCausalLM:
    model = random_llama(config.random)
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    model.set_attn_implementation(config.attention)
    for weight in model.parameters():  # not the buffers: the rotary frequencies stay in float32, as in a loaded Llama
        weight.data = weight.data.to(getattr(torch, config.dtype))
    module: nn.Module = model
    module.to(device)
    return model
