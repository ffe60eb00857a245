"""Settings of the evaluation stage. Out: `EvaluateConfig`."""

from dataclasses import dataclass

from gsae.config.rules import require


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out text through the LLM with each SAE spliced in."""

    max_tokens: int = 1_000_000
    """Held-out tokens to evaluate on."""
    max_document_tokens: int = 8192
    """Tokens taken of one document at most, so that long ones do not dominate."""
    batch_contexts: int = 8
    """Contexts of one evaluation batch; fixes the numbers' last bits, ranks take whole batches."""
    min_documents: int = 20
    """Held-out documents below which evaluation is refused."""
    bootstrap_draws: int = 1000
    """Draws over documents for the 95 % intervals."""
    seed: int = 0
    """Seed of the choice of contexts and of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_document_tokens", "batch_contexts", "min_documents", "bootstrap_draws"):
            require(getattr(self, name) >= 1, f"evaluate.{name} is {getattr(self, name)}; give a positive number")
