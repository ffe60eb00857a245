"""The LLM whose activations are read."""
