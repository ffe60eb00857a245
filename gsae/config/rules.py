"""How a config's rules are checked. In: a condition. Out: nothing, or a `ConfigError`."""

from gsae.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message, which says what to set instead, unless the condition holds."""
    if not condition:
        raise ConfigError(message)
