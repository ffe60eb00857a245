"""Reading and replacing activations. In: a Llama, sites, tokens with packed positions. Out: activations, or logits.

The only module that registers forward hooks. `positions` restarts at 0 with every segment and no attention mask is given:
transformers then lets a token attend only to its own segment. Under sdpa and eager attention it does so at any batch size, under
flash attention in a batch of one context only, so that the contexts of a batch are laid end to end into one there.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from gsae.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaModel, PreTrainedModel

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """A place in the LLM where activations are read: the output of one decoder layer."""

    name: str
    """What users and files call it: `resid.15`."""
    layer: int
    """Index of the decoder layer, from 0."""
    module: str
    """Path of the layer in the LLM: `model.layers.15`."""


def resolve_site(spec: int | str, num_layers: int) -> Site:
    """The site that a config names.

    Args:
        spec: a layer's index (`15` or `"15"`; negative ones count from the end), `middle` (layer num_layers // 2), or `resid.15`.
        num_layers: number of decoder layers of the whole LLM.

    Raises:
        ConfigError: the LLM has no such layer, or `spec` has none of these forms.
    """
    match = re.fullmatch(r"(-?\d+)|resid\.(\d+)|middle", str(spec))
    if match is not None:
        index, name_index = match.groups()
        layer = int(index or name_index or num_layers // 2)
        layer += num_layers if layer < 0 else 0
        if 0 <= layer < num_layers:
            return Site(name=f"resid.{layer}", layer=layer, module=f"model.layers.{layer}")
    raise ConfigError(
        f"site {spec!r} is not in this LLM of {num_layers} layers; "
        f"give an index from {-num_layers} to {num_layers - 1}, 'middle', or 'resid.0' to 'resid.{num_layers - 1}'"
    )


def resolve_sites(specs: Sequence[int | str], num_layers: int) -> list[Site]:
    """The sites that a config names, each once, in layer order (see `resolve_site`)."""
    return sorted({resolve_site(spec, num_layers) for spec in specs}, key=lambda site: site.layer)


def capture(
    model: "PreTrainedModel", sites: Sequence[Site], tokens: Int[Tensor, "contexts length"], positions: Int[Tensor, "contexts length"]
) -> dict[str, Float[Tensor, "contexts length d_model"]]:
    """Activations at each site, by the site's name, in the LLM's own type.

    One forward through the layers up to the last site; neither the layers above it nor the LM head run.
    """
    activations: dict[str, Tensor] = {}
    shape = tokens.shape

    def keep_as(name: str) -> Hook:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            activations[name] = output.reshape(*shape, -1)

        return keep

    lower = _with_layers(model, slice(max(site.layer for site in sites) + 1))
    with torch.no_grad(), _hooked(model, {site: keep_as(site.name) for site in sites}):
        lower(input_ids=_laid_out(model, tokens), position_ids=_laid_out(model, positions), use_cache=False)
    return activations


class Tail:
    """The part of an LLM above a site: its layers, the final norm and the LM head, sharing the LLM's weights.

    On the site's own activations it gives exactly the LLM's logits, so that a spliced forward need not run the layers below.
    """

    def __init__(self, model: "PreTrainedModel", site: Site) -> None:
        self._model = model
        self._upper = _with_layers(model, slice(site.layer + 1, None))
        self._lm_head = model.get_submodule("lm_head")
        self._dtype = model.dtype

    def logits(
        self, hidden: Float[Tensor, "contexts length d_model"], positions: Int[Tensor, "contexts length"]
    ) -> Float[Tensor, "contexts length vocab_size"]:
        """The logits that follow from `hidden` at the site; `hidden` is converted to the LLM's type first."""
        inputs = _laid_out(self._model, hidden.to(self._dtype))
        with torch.no_grad():
            output = self._upper(inputs_embeds=inputs, position_ids=_laid_out(self._model, positions), use_cache=False)
            logits: Tensor = self._lm_head(output.last_hidden_state)
        return logits.reshape(*hidden.shape[:2], -1)


def substitute(
    model: "PreTrainedModel",
    site: Site,
    tokens: Int[Tensor, "contexts length"],
    positions: Int[Tensor, "contexts length"],
    replacement: Callable[[Float[Tensor, "contexts length d_model"]], Float[Tensor, "contexts length d_model"]],
) -> Float[Tensor, "contexts length vocab_size"]:
    """Logits of a whole forward in which `replacement(x)`, converted to the LLM's type, stands in place of the site's output x."""

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return replacement(output.reshape(*tokens.shape, -1)).to(output.dtype).reshape(output.shape)

    with torch.no_grad(), _hooked(model, {site: replace}):
        logits: Tensor = model(input_ids=_laid_out(model, tokens), position_ids=_laid_out(model, positions), use_cache=False).logits
    return logits.reshape(*tokens.shape, -1)


def _laid_out(model: "PreTrainedModel", values: Shaped[Tensor, "contexts length ..."]) -> Shaped[Tensor, "rows columns ..."]:
    """A batch as the model's attention needs it: as it is, or the contexts end to end."""
    return values.reshape(1, -1, *values.shape[2:]) if _attends_in_one_row(model) else values


def _attends_in_one_row(model: "PreTrainedModel") -> bool:
    return str(model.config._attn_implementation).startswith("flash")


@contextmanager
def _hooked(model: "PreTrainedModel", hooks: Mapping[Site, Hook]) -> Iterator[None]:
    """A block in which `hooks` hang on their sites' modules; they are gone after it, also when it raises."""
    with ExitStack() as handles:
        for site, hook in hooks.items():
            handle = model.get_submodule(site.module).register_forward_hook(hook)
            handles.callback(handle.remove)
        yield


def _with_layers(model: "PreTrainedModel", layers: slice) -> "LlamaModel":
    """The inner model with only these decoder layers: a shallow copy whose table of submodules is its own, its weights shared.

    Where these are all its layers it is the inner model itself: DeepSpeed gathers parameters ahead in modules that it knows.
    """
    inner = cast("LlamaModel", model.get_submodule("model"))
    if len(inner.layers[layers]) == len(inner.layers):
        return inner
    part = copy.copy(inner)
    part._modules = dict(inner._modules)
    part.layers = inner.layers[layers]
    return part
