"""An LLM split over all ranks (ZeRO-3). In: a Llama's shape and where its weights are. Out: its first layers, a share on each rank.

The layers are made, filled by the first rank and split one after another, so that no rank ever holds more than its share and one of
them (or the embedding); weights above the last layer, and the LM head's, are never read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gsae.config import LLMConfig
from gsae.errors import ConfigError, ModelError
from gsae.llm.files import first_line, wrong_weights
from gsae.world import Group, Zero3


@dataclass(frozen=True)
class Weights:
    """The weights of a Llama, read one by one."""

    place: str
    """Where they are, for errors."""
    shapes: Mapping[str, Sequence[int]]
    """Of each, by its name in a LlamaForCausalLM."""
    read: Callable[[str], Tensor]
    """One of them, on the CPU."""


def weights_in(directory: Path, files: Sequence[Path]) -> Weights:
    """The weights in safetensors files; only their tables of tensors are read at once.

    Raises:
        ModelError: a file is damaged.
    """
    holders: dict[str, Any] = {}
    for path in files:
        try:
            opened: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is no whole safetensors file ({first_line(error)}); fetch it again") from None
        holders |= dict.fromkeys(opened.keys(), opened)
    shapes = {name: opened.get_slice(name).get_shape() for name, opened in holders.items()}
    return Weights(str(directory), shapes, lambda name: holders[name].get_tensor(name))


def weights_of(model: LlamaForCausalLM) -> Weights:
    """The weights of a Llama that every rank has built."""
    state = dict(model.state_dict())
    return Weights("a random Llama", {name: weight.shape for name, weight in state.items()}, state.__getitem__)


@dataclass(frozen=True)
class Skeleton:
    """The first layers of a Llama, without values, and what is to fill them. Making it needs no other rank."""

    model: LlamaForCausalLM
    """On the meta device; without LM head."""
    weights: Weights
    zero3: Zero3


def plan_split(config: LLMConfig, llama: LlamaConfig, weights: Weights, group: Group) -> Skeleton:
    """Check all that can be checked before ranks depend on each other.

    Args:
        config: the type, the attention, and whether to offload.
        llama: the shape, with as many layers as are wanted.
        weights: of at least these layers.
        group: all ranks of the world.

    Raises:
        ConfigError: `llm.offload` on CPU ranks.
        ModelError: weights are missing or of another shape, or DeepSpeed does not work.
    """
    if config.offload and group.device.type == "cpu":
        raise ConfigError("llm.offload is for GPUs: CPU ranks hold their shares in host memory as it is; set llm.offload: false")
    class_: Any = LlamaForCausalLM
    with torch.device("meta"):
        model: LlamaForCausalLM = class_._from_config(llama, attn_implementation=config.attention, dtype=getattr(torch, config.dtype))
    del model.lm_head
    wanted = {name: weight.shape for name, weight in model.named_parameters()}
    missing = sorted(name for name in wanted if name not in weights.shapes)
    mismatched = sorted(name for name in wanted if name not in missing and tuple(wanted[name]) != tuple(weights.shapes[name]))
    if missing or mismatched:
        raise wrong_weights(weights.place, missing + mismatched)
    layer_elements = sum(weight.numel() for weight in model.model.layers[0].parameters())
    return Skeleton(model, weights, Zero3(group, config.offload, layer_elements, llama.hidden_size))


def fill_and_split(skeleton: Skeleton, group: Group) -> LlamaForCausalLM:
    """The model, ready to run on all ranks together. All ranks call this."""
    model, weights = skeleton.model, skeleton.weights
    # Its frequencies are computed, not read, and stay in float32.
    model.model.rotary_emb = LlamaRotaryEmbedding(config=model.config).to(group.device)
    module: nn.Module = model
    module.eval().requires_grad_(False)
    for path, part in _parts(model):
        with group.together():
            part.to_empty(device=group.device)
            if group.is_first:
                for name, weight in part.named_parameters():
                    weight.copy_(weights.read(f"{path}.{name}"))
        skeleton.zero3.split(part)
    skeleton.zero3.gather_when_run(model.model)
    return model


def _parts(model: LlamaForCausalLM) -> Iterator[tuple[str, nn.Module]]:
    yield "model.embed_tokens", model.model.embed_tokens
    for number, layer in enumerate(model.model.layers):
        yield f"model.layers.{number}", layer
    yield "model.norm", model.model.norm


def held_parameter_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds: all of them where they are not split, else its shares and what is gathered now."""
    held = [tensor for weight in model.parameters() for tensor in (weight, getattr(weight, "ds_tensor", None)) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
