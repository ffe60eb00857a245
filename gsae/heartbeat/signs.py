"""What ranks leave on the heartbeat's board. In: how a rank fares. Out: its sign, and the verdict that ends the work, as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gsae.errors import GsaeError

ADVICE = "then run the same again: the harvest continues where it is"
_NUM_NAMED = 3
TURNS = "turns"
"""A count of what all ranks do together, in step."""

State = Literal["working", "done", "failed"]
"""Whether a rank's main thread is in the block, or how it left."""


@dataclass(frozen=True)
class Verdict:
    """Why the work ends on all ranks."""

    message: str | None
    """None: every rank is done."""
    spoken_by: int | None = None
    """The rank that shows the message; None: every rank that knows it."""
    failed: tuple[int, ...] = ()
    """The ranks at fault."""

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Verdict":
        """From plain JSON values."""
        return cls(**{**plain, "failed": tuple(plain["failed"])})

    def text(self) -> str:
        """What to leave."""
        return json.dumps(asdict(self))

    def error(self) -> GsaeError:
        """As every rank raises it."""
        error = GsaeError(self.message)
        error.spoken_by = self.spoken_by
        return error


@dataclass(frozen=True)
class Sign:
    """What a rank leaves on the board."""

    host: str
    beats: int
    done: dict[str, int]
    state: State
    failure: Verdict | None
    """The verdict it wants."""
    knows_verdict: bool
    looks: int = 0
    """Grows as long as the rank looks at the board, whatever its main thread does; the first rank's alone."""

    @classmethod
    def from_text(cls, text: str) -> "Sign":
        """From what a rank left."""
        plain = json.loads(text)
        return cls(**{**plain, "failure": plain["failure"] and Verdict.from_json(plain["failure"])})

    def text(self) -> str:
        """What to leave."""
        return json.dumps(asdict(self))


def failure_of(rank: int, size: int, error: BaseException) -> Verdict:
    """The verdict on a rank that failed by itself. It shows its own error; beside a traceback another rank shows the line."""
    if not isinstance(error, GsaeError):
        speaker = rank if isinstance(error, OSError) or size == 1 else int(rank == 0)
        return Verdict(f"{f'{type(error).__name__} {error}'.strip()} (on rank {rank})", speaker, (rank,))
    if error.spoken_by is not None:  # the ranks have agreed on it already
        return Verdict(str(error), error.spoken_by, (rank,))
    return Verdict(f"{error} (on rank {rank})", rank, (rank,))


def find_at_fault(signs: Sequence[Sign | None], silent: Sequence[int]) -> list[int]:
    """The silent ranks, but for those that wait for another: where ranks take turns together, any that has had more than the fewest."""
    turns = [0 if sign is None else sign.done.get(TURNS, 0) for sign in signs]
    return [rank for rank in silent if turns[rank] == min(turns)]


def describe_silence(signs: Sequence[Sign | None], silent: Sequence[int], timeout_seconds: float) -> str:
    """What is said of silent ranks: `rank 3 on node7 has got no further for 600 s (last: 120,832 tokens); ...`."""
    names = [str(rank) if (sign := signs[rank]) is None else f"{rank} on {sign.host}" for rank in silent]
    if len(names) > _NUM_NAMED + 1:
        names[_NUM_NAMED:] = [f"{len(names) - _NUM_NAMED} others"]
    ranks = f"rank {names[0]} has" if len(silent) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]} have"
    sign = signs[silent[0]]
    counts = "" if sign is None else ", ".join(f"{count:,} {name}" for name, count in sign.done.items())
    whose, of_whom = ("its log", "") if len(silent) == 1 else ("their logs", f" of rank {silent[0]}")
    last = f" (last{of_whom}: {counts})" if counts else ""
    return f"{ranks} got no further for {timeout_seconds:g} s{last}; look at {whose}, {ADVICE} (stall_timeout_seconds)"
