"""What the LLM needs. In: its config.json, no weights. Out: parameters, bytes a rank under each sharding, bytes of a batch."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gsae.config import Config, LLMConfig
from gsae.llm.files import DESCRIPTION_FILES, local_directory, read_config, snapshot
from gsae.llm.random import random_llama
from gsae.plan.disk import NUMBER_BYTES


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama."""

    num_layers: int
    d_model: int
    intermediate_size: int
    attention_width: int
    """Heads x the width of one."""
    num_heads: int
    vocab_size: int
    embedding_parameters: int
    layer_parameters: int
    """Of one decoder layer."""
    norm_parameters: int
    """Of the final norm, which stays when layers above the last site are left out."""
    head_parameters: int
    """Of the LM head; 0 where it is the embedding."""
    buffer_bytes: int
    """Rotary frequencies, float32 in every type."""

    def parameters_up_to(self, layer: int) -> int:
        """Parameters of the LLM that a harvest loads: the layers up to this one, and no LM head."""
        return self.embedding_parameters + (layer + 1) * self.layer_parameters + self.norm_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the whole LLM."""
        return self.parameters_up_to(self.num_layers - 1) + self.head_parameters


@dataclass(frozen=True)
class LLMNeeds:
    """What the LLM takes of a rank's memory, and of the network."""

    sharding: str
    dtype: str
    num_layers: int
    loaded_layers: int
    """Layers up to the last site: what a harvest loads."""
    parameters: int
    """Of the whole LLM, which an evaluation loads."""
    harvest_parameters: int
    ranks: int
    bytes_per_rank_replicate: int
    bytes_per_rank_zero3: int
    """Where it computes: its share, unless that is offloaded, and what is gathered: one layer, or the embedding if larger."""
    share_bytes_zero3: int
    """A rank's share, in host memory with llm.offload."""
    gathered_bytes_zero3: int
    """What is gathered."""
    bytes_received_per_forward_zero3: int
    """Of a rank, for each LLM batch."""
    activation_bytes: int
    """Of one LLM batch of the harvest, at its peak."""
    evaluation_bytes_per_rank: int
    """The whole LLM, one batch with the logits of two forwards, and the SAEs of all runs."""

    @property
    def harvest_bytes_per_rank(self) -> int:
        """What a rank needs for the harvest, under the config's sharding."""
        held = self.bytes_per_rank_zero3 if self.sharding == "zero3" else self.bytes_per_rank_replicate
        return held + self.activation_bytes


def read_shape(config: LLMConfig) -> Shape:
    """The shape of the config's LLM, counted on a Llama of it that has no storage.

    Raises:
        ConfigError: `llm.model` is empty.
        ModelError: config.json is not there, cannot be fetched, or is not a Llama's.
    """
    with torch.device("meta"):
        if config.model == "random":
            llama = random_llama(config.random)
            shape: LlamaConfig = llama.config
            num_layers = shape.num_hidden_layers
        else:
            directory = local_directory(config) or snapshot(config.model, config.revision, DESCRIPTION_FILES)
            shape = read_config(directory)
            num_layers, shape.num_hidden_layers = shape.num_hidden_layers, 1  # all layers are alike
            llama = LlamaForCausalLM(shape)
    layer = llama.model.layers[0]
    return Shape(
        num_layers=num_layers,
        d_model=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        attention_width=layer.self_attn.q_proj.out_features,
        num_heads=shape.num_attention_heads,
        vocab_size=shape.vocab_size,
        embedding_parameters=_count(llama.model.embed_tokens),
        layer_parameters=_count(layer),
        norm_parameters=_count(llama.model.norm),
        head_parameters=0 if shape.tie_word_embeddings else _count(llama.lm_head),
        buffer_bytes=sum(buffer.nbytes for buffer in llama.buffers()),
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def llm_needs(config: Config, shape: Shape, last_layer: int, num_sites: int, ranks: int, sae_bytes: int) -> LLMNeeds:
    """What the LLM needs, on so many ranks; `sae_bytes` are those of all runs' SAEs."""
    number = NUMBER_BYTES[config.llm.dtype]
    harvested = shape.parameters_up_to(last_layer)
    gathered = max(shape.layer_parameters, shape.embedding_parameters)
    held = -(-harvested // ranks)
    length, evaluated = config.harvest.context_length, config.evaluate.batch_contexts
    logits = 2 * evaluated * length * shape.vocab_size * number
    evaluation = activation_bytes(config, shape, num_sites, evaluated) + logits + sae_bytes
    return LLMNeeds(
        sharding=config.llm.sharding,
        dtype=config.llm.dtype,
        num_layers=shape.num_layers,
        loaded_layers=last_layer + 1,
        parameters=shape.parameters,
        harvest_parameters=harvested,
        ranks=ranks,
        bytes_per_rank_replicate=harvested * number + shape.buffer_bytes,
        bytes_per_rank_zero3=(gathered + (0 if config.llm.offload else held)) * number + shape.buffer_bytes,
        share_bytes_zero3=held * number,
        gathered_bytes_zero3=gathered * number,
        bytes_received_per_forward_zero3=(harvested - held) * number,
        activation_bytes=activation_bytes(config, shape, num_sites, config.harvest.batch_contexts),
        evaluation_bytes_per_rank=shape.parameters * number + shape.buffer_bytes + evaluation,
    )


def activation_bytes(config: Config, shape: Shape, num_sites: int, contexts: int) -> int:
    """Bytes of one LLM batch at its peak, in one layer.

    For each token the sites' rows so far, three vectors of d_model (the residual stream, its norm, a product), and the larger of three
    of intermediate_size (MLP) and six of heads x width (queries, keys and values before and after rotation). Beside them is the mask
    that keeps segments apart. Eager attention has the scores too: some copies and their softmax in float32, one of which stays.
    """
    number, length = NUMBER_BYTES[config.llm.dtype], config.harvest.context_length
    tokens, pairs = contexts * length, contexts * length**2
    mlp, attention = 3 * tokens * shape.intermediate_size * number, 6 * tokens * shape.attention_width * number
    mask = 0
    if config.llm.attention == "eager":
        mlp += pairs * shape.num_heads * number
        attention += pairs * shape.num_heads * max(10, 2 * number)
        mask = pairs * number
    elif config.llm.attention == "sdpa" and config.harvest.packed:
        mask = pairs
    return tokens * (num_sites + 3) * shape.d_model * number + max(mlp, attention) + mask
