"""Distributed training of gated sparse autoencoders on the activations of Llama models."""

__version__ = "0.1.0"
