"""The errors a user can meet. In: what is wrong, where, what to do. Out: one line on the console and exit code 2."""


class GsaeError(Exception):
    """Base of all errors whose message is meant for the user: shown in one line, without a traceback, exit code 2."""

    spoken_by: int | None = None
    """Where several ranks raise the same error, the one that shows it; None: the rank that raises it."""


class ConfigError(GsaeError):
    """A setting is unknown, has an impossible value, or contradicts another setting or what is on disk."""


class CorpusError(GsaeError):
    """The text is missing, unreadable, or empty after selection."""


class ModelError(GsaeError):
    """The LLM's weights, config or tokenizer are missing, gated or unusable."""


class StoreError(GsaeError):
    """An activation store is missing, not whole, damaged, or made by other settings."""


class CheckpointError(GsaeError):
    """A run directory or checkpoint is missing, not whole, damaged, or made by other settings."""


class NonFiniteError(GsaeError):
    """A loss or gradient is NaN or infinite."""


class RankMismatchError(GsaeError):
    """The ranks that started are not the ranks that the launcher or the config asked for."""
