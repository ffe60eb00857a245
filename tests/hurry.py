"""Ranks whose heartbeats wait a fraction of what they usually wait, and what they told the user."""

from ranks import Ranks

from gsae import cli
from gsae.heartbeat import times


def hurry() -> None:
    """Make every wait of this process a fraction of the real one."""
    times.INTERVAL_SECONDS, times.NAP_SECONDS, times.GONE_SECONDS = 0.1, 0.5, 1.0
    times.GRACE_SECONDS, times.SPEAKING_SECONDS, cli.SPEAKING_SECONDS = 2.0, 0.3, 0.3


def complaints(started: Ranks) -> list[str]:
    """The lines that the ranks told the user."""
    outputs = [started.output(rank) for rank in range(len(started.processes))]
    return [line for output in outputs for line in output.splitlines() if "gsae: " in line]
