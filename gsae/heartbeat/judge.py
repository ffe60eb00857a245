"""What the first rank makes of all signs. In: the signs, look after look. Out: the verdict that ends the work, once it is to end."""

import time
from collections.abc import Sequence

from gsae.heartbeat import times
from gsae.heartbeat.signs import Sign, Verdict, describe_loss, describe_silence, fewest_turns, find_at_fault


class Stillness:
    """For how long a value has not changed, in seconds that this process was awake."""

    def __init__(self) -> None:
        self._value: object = None
        self._seconds = 0.0
        self._looked_at = time.monotonic()

    def seconds(self, value: object) -> float:
        """The value as it is now, and how long it has been that."""
        now = time.monotonic()
        self._seconds = self._seconds + min(now - self._looked_at, times.NAP_SECONDS) if value == self._value else 0.0
        self._value, self._looked_at = value, now
        return self._seconds


def gone_seconds(timeout_seconds: float) -> float:
    """After how long without a look at the board a rank counts as gone: before it counts as silent, and not between two looks."""
    return max(3 * times.INTERVAL_SECONDS, min(times.GONE_SECONDS, timeout_seconds / 2))


class Judge:
    """Holds how long each rank has been as it is.

    Args:
        size: number of ranks.
        group_size: ranks that meet in collectives: the first so many, the next so many.
        timeout_seconds: how long a rank may go without a beat.
        continues: what the work does when it is run again.
    """

    def __init__(self, size: int, group_size: int, timeout_seconds: float, continues: str) -> None:
        self._group_size, self._timeout_seconds, self._continues = group_size, timeout_seconds, continues
        self._beats = [Stillness() for _ in range(size)]
        self._signs = [Stillness() for _ in range(size)]
        self._cut_off = Stillness()
        self._is_cut_off = False

    def judge(self, signs: Sequence[Sign | None]) -> Verdict | None:
        """The verdict on these signs; None while the work goes on."""
        # Who waits for a slower one of its group is not silent: its time begins when the group's last turn is over.
        turns = fewest_turns(signs, self._group_size)
        beats = [
            still.seconds((sign and sign.beats, turns[rank // self._group_size]))
            for rank, (still, sign) in enumerate(zip(self._beats, signs, strict=True))
        ]
        changes = [still.seconds(sign) for still, sign in zip(self._signs, signs, strict=True)]
        gone = [rank for rank, seconds in enumerate(changes) if seconds >= gone_seconds(self._timeout_seconds)]
        for sign in signs:
            if sign is not None and sign.failure is not None and sign.state != "cut off":
                return sign.failure
        if all(sign is not None and sign.state == "done" for sign in signs):
            return Verdict(None)
        loss = self._explain_loss(signs, gone)
        if loss is not None or self._is_cut_off:
            return loss
        silent = [rank for rank, seconds in enumerate(beats) if seconds >= self._timeout_seconds]
        at_fault = find_at_fault(signs, silent, gone, self._group_size)
        if not at_fault:
            return None
        return Verdict(describe_silence(signs, at_fault, self._timeout_seconds, self._continues), 0, tuple(at_fault))

    def _explain_loss(self, signs: Sequence[Sign | None], gone: Sequence[int]) -> Verdict | None:
        """Who is missing where a collective broke; the break itself when nobody is found to be."""
        cut_off = [rank for rank, sign in enumerate(signs) if sign is not None and sign.state == "cut off"]
        self._is_cut_off = bool(cut_off)
        seconds = self._cut_off.seconds(self._is_cut_off)
        if not cut_off:
            return None
        groups = {rank // self._group_size for rank in cut_off}
        lost = [rank for rank in gone if rank // self._group_size in groups]
        if lost:
            return Verdict(describe_loss(signs, lost, self._continues), 0, tuple(lost))
        first = signs[cut_off[0]]
        assert first is not None
        return first.failure if seconds >= 2 * gone_seconds(self._timeout_seconds) else None
