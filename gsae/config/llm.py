"""Settings of the LLM. Out: `LLMConfig`."""

from dataclasses import dataclass, field
from typing import Literal

from gsae.config.rules import require


@dataclass(frozen=True)
class RandomLlamaConfig:
    """Shape of the Llama that `llm.model: random` builds, with byte tokens: to try a machine or a config without weights."""

    num_layers: int = 2
    """Number of decoder layers."""
    d_model: int = 64
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of attention heads; must divide d_model."""
    seed: int = 0
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        require(self.num_layers >= 1, f"llm.random.num_layers is {self.num_layers}; give a positive number")
        require(
            self.num_heads >= 1 and self.d_model % (2 * self.num_heads) == 0,
            f"llm.random.d_model is {self.d_model}; it must be a multiple of 2 x llm.random.num_heads ({self.num_heads})",
        )


@dataclass(frozen=True)
class LLMConfig:
    """The Llama whose activations are read."""

    model: str = ""
    """Hugging Face name (`meta-llama/Llama-2-7b-hf`), a directory that holds the weights and the tokenizer, or `random`."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the default branch."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    """Type of weights and computation."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation. Before the harvest a small batch shows that it keeps packed segments apart, or it is refused."""
    sharding: Literal["replicate", "zero3"] = "replicate"
    """How ranks hold the LLM: a copy each, or (DeepSpeed ZeRO-3) its parameters split over all ranks, for one that does not fit."""
    offload: bool = False
    """With `sharding: zero3`: whether a rank's share of the parameters stays in host memory between forwards."""
    random: RandomLlamaConfig = field(default_factory=RandomLlamaConfig)
    """Used only by `model: random`."""

    def __post_init__(self) -> None:
        require(
            not self.offload or self.sharding == "zero3",
            "llm.offload does not go with llm.sharding 'replicate'; leave it out, or set llm.sharding: zero3",
        )
