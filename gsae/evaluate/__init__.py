"""The evaluate stage: held-out text through the LLM with each SAE spliced in."""
