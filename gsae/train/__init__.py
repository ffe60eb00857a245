"""Stage 2: train SAEs from an activation store."""
