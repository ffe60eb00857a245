"""What ranks leave on the heartbeat's board. In: how a rank fares. Out: its sign, and the verdict that ends the work, as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gsae.errors import GsaeError

_NUM_NAMED = 3
TURNS = "turns"
"""A count of what the ranks of a group do together, in step."""
_COLLECTIVES = ("/gloo/", "nccl")
"""What the errors of broken collectives say: gloo's are of no class of their own, and name its source files."""

State = Literal["working", "done", "failed", "cut off"]
"""Whether a rank's main thread is in the block, or how it left; cut off: by a collective in which another rank was missing."""


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
    """Grows as long as the rank looks at the board, whatever its main thread does."""

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


def is_cut_off(error: BaseException) -> bool:
    """Whether a collective says that another rank was missing; why, its words do not tell."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _COLLECTIVES)


def advice(continues: str) -> str:
    """What to do; `continues` says what the work does then."""
    return f"then run the same again: {continues}"


def find_at_fault(signs: Sequence[Sign | None], silent: Sequence[int], gone: Sequence[int], group_size: int) -> list[int]:
    """The silent ranks, but for those that wait for another of their group.

    Where some of a group are gone, the others wait for them. Where a group takes turns, it waits for those that have had the fewest;
    as long as one of these is at work, none is at fault.
    """
    at_fault = []
    for first in range(0, len(signs), group_size):
        members = range(first, first + group_size)
        suspects = [rank for rank in members if rank in gone]
        if not suspects:
            suspects = _behind(signs, members)
            if not all(rank in silent for rank in suspects):
                continue
        at_fault += [rank for rank in suspects or members if rank in silent]
    return at_fault


def fewest_turns(signs: Sequence[Sign | None], group_size: int) -> list[int | None]:
    """Of each group, how many turns those have had that have had the fewest; None of a group that takes no turns, or is done."""
    turns = [_turns(signs, range(first, first + group_size)) for first in range(0, len(signs), group_size)]
    return [min(counts.values(), default=None) for counts in turns]


def _behind(signs: Sequence[Sign | None], members: Sequence[int]) -> list[int]:
    """The members that have had the fewest turns, of those that are not done; none in a group that takes no turns."""
    turns = _turns(signs, members)
    return [rank for rank, count in turns.items() if count == min(turns.values())]


def _turns(signs: Sequence[Sign | None], members: Sequence[int]) -> dict[int, int]:
    """How many turns each member has had that is not done; nothing in a group that takes no turns."""
    if not any(sign is not None and TURNS in sign.done for sign in (signs[rank] for rank in members)):
        return {}
    at_work = [(rank, sign) for rank in members if (sign := signs[rank]) is None or sign.state == "working"]
    return {rank: 0 if sign is None else sign.done.get(TURNS, 0) for rank, sign in at_work}


def describe_silence(signs: Sequence[Sign | None], silent: Sequence[int], timeout_seconds: float, continues: str) -> str:
    """What is said of silent ranks: `rank 3 on node7 has got no further for 600 s (last: 120,832 tokens); ...`."""
    return f"{_describe(signs, silent, f'got no further for {timeout_seconds:g} s', continues)} (stall_timeout_seconds)"


def describe_loss(signs: Sequence[Sign | None], lost: Sequence[int], continues: str) -> str:
    """What is said of ranks that are gone: `rank 3 on node7 has died or is out of reach (last: 120,832 tokens); ...`."""
    return _describe(signs, lost, f"died or {'is' if len(lost) == 1 else 'are'} out of reach", continues)


def _describe(signs: Sequence[Sign | None], ranks: Sequence[int], what: str, continues: str) -> str:
    names = [str(rank) if (sign := signs[rank]) is None else f"{rank} on {sign.host}" for rank in ranks]
    if len(names) > _NUM_NAMED + 1:
        names[_NUM_NAMED:] = [f"{len(names) - _NUM_NAMED} others"]
    who = f"rank {names[0]} has" if len(ranks) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]} have"
    sign = signs[ranks[0]]
    counts = "" if sign is None else ", ".join(f"{count:,} {name}" for name, count in sign.done.items() if name != TURNS)
    whose, of_whom = ("its log", "") if len(ranks) == 1 else ("their logs", f" of rank {ranks[0]}")
    last = f" (last{of_whom}: {counts})" if counts else ""
    return f"{who} {what}{last}; look at {whose}, {advice(continues)}"
