"""Stage 1: run the LLM over contexts and store activations."""
