"""How long the heartbeat waits for what, in seconds. In: nothing. Out: constants, the same on all ranks."""

INTERVAL_SECONDS = 1.0
"""How often a rank looks at the board."""
NAP_SECONDS = 5.0
"""A rank that has not looked at the board for so long was asleep: it looks before it goes on, and holds its sleep against nobody."""
GONE_SECONDS = 10.0
"""A rank that has not looked at the board for so long is dead, stopped or out of reach, whatever its main thread was at."""
GRACE_SECONDS = 10.0
"""How long after a verdict a rank may take to leave the block before its process is ended."""
SPEAKING_SECONDS = 5.0
"""How long a process that is ended without a word waits for the rank that has the word."""
