"""Distributed training of gated sparse autoencoders on the activations of Llama models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsae.exchange.load import load_sae as load_sae

__version__ = "0.1.0"
__all__ = ["__version__", "load_sae"]


def __getattr__(name: str) -> Any:
    """`load_sae`, imported when it is first asked for: torch takes seconds, `gsae --help` should not."""
    if name == "load_sae":
        from gsae.exchange.load import load_sae

        return load_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
