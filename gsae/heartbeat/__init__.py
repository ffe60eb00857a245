"""Signs of life. In: the beats of this rank. Out: what all ranks have done, and an end on every rank when one fails or falls silent.

A rank of a harvest hardly meets the others, so each leaves its sign on a board: how often it has beaten, its counts, its failure. The
first rank alone reads all signs; its verdict ends the work on all ranks. The others read its sign and the verdict, and judge its
silence themselves. Nothing here is a collective, so it works beside any that the main thread is in.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gsae.errors import GsaeError
from gsae.heartbeat.signs import ADVICE, Sign, State, Verdict, describe_silence, failure_of, find_at_fault
from gsae.world import World

INTERVAL_SECONDS = 1.0
"""How often a rank looks at the board."""
LOOKS_A_SIGN = 5
"""After so many looks the first rank shows that it still looks."""
NAP_SECONDS = 5.0
"""A rank that has not looked at the board for so long was asleep: it looks before it goes on, and holds its sleep against nobody."""
GRACE_SECONDS = 10.0
"""How long after a verdict a rank may take to leave the block before its process is ended."""
SPEAKING_SECONDS = 5.0
"""How long a process that is ended without a word waits for the rank that has the word."""
_ADVICE_ON_FIRST = f"look at the first rank's log, {ADVICE}"
_VERDICT = "verdict"
_uses = itertools.count()
"""Every rank enters its heartbeats in the same order, so this is the same number on all of them."""


class _Stillness:
    """For how long a value has not changed, in seconds that this process was awake."""

    def __init__(self) -> None:
        self._value: object = None
        self._seconds = 0.0
        self._looked_at = time.monotonic()

    def seconds(self, value: object) -> float:
        now = time.monotonic()
        self._seconds = self._seconds + min(now - self._looked_at, NAP_SECONDS) if value == self._value else 0.0
        self._value, self._looked_at = value, now
        return self._seconds


class Heartbeat:
    """This rank's sign of life and its counts. Made by `heartbeat`."""

    def __init__(self, world: World, stall_timeout_seconds: float, on_totals: Callable[[dict[str, int]], None] | None) -> None:
        self._rank, self._size = world.everyone.rank, world.everyone.size
        self._board = world.board(f"heartbeat/{next(_uses)}")
        self._timeout_seconds, self._on_totals = stall_timeout_seconds, on_totals
        self._stillness = [_Stillness() for _ in range(self._size if self._rank == 0 else 1)]
        self._lock = threading.Lock()
        self._beats = 0
        self._done: dict[str, int] = {}
        self._state: State = "working"
        self._failure: Verdict | None = None
        self._verdict: Verdict | None = None
        self._crash: Exception | None = None
        self._published: Sign | None = None
        self._totals: dict[str, int] = {}
        self._num_looks = 0
        self._looked_at = time.monotonic()
        self._hurry, self._decided, self._settled, self._closed = (threading.Event() for _ in range(4))
        self._threads = [threading.Thread(target=work, daemon=True, name="heartbeat") for work in (self._talk, self._guard)]

    def beat(self, **done: int) -> None:
        """This rank got further: `done` is added to its counts. From any thread.

        Raises:
            GsaeError: the work is to end, because a rank failed or fell silent.
        """
        with self._lock:
            self._beats += 1
            for name, count in done.items():
                self._done[name] = self._done.get(name, 0) + count
        while self._verdict is None and time.monotonic() - self._looked_at > NAP_SECONDS:
            self._hurry.set()
            time.sleep(0.01)
        self._raise_verdict()

    def totals(self) -> dict[str, int]:
        """The counts of all ranks, as they last left them; only the first rank knows them."""
        return dict(self._totals)

    def start(self) -> None:
        """Begin to talk."""
        for thread in self._threads:
            thread.start()

    def wait_for_all(self) -> None:
        """Say that this rank is done and wait until all are, however long the slowest takes."""
        with self._lock:
            self._state = "done"
        self._hurry.set()
        while not self._decided.wait(self._timeout_seconds / 4):
            with self._lock:
                self._beats += 1  # it waits, and lives
        self._settled.wait(GRACE_SECONDS)
        self._raise_verdict()

    def give_up(self, error: BaseException) -> BaseException:
        """Let the others know that `error` ended the work of this rank, or the verdict did; what to raise."""
        with self._lock:
            self._state = "failed"
            if self._verdict is None and self._failure is None:
                self._failure = failure_of(self._rank, self._size, error)
        self._hurry.set()
        self._settled.wait(GRACE_SECONDS + SPEAKING_SECONDS)
        verdict = self._verdict
        is_mine = verdict == self._failure and verdict is not None and self._rank in verdict.failed
        if verdict is None or is_mine or not isinstance(error, Exception):
            return error
        if not isinstance(error, GsaeError):  # a collective that lost a rank, for one: it follows from the verdict
            return verdict.error()
        error.spoken_by = verdict.spoken_by
        return error

    def close(self) -> None:
        """Talk no more."""
        self._closed.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(2 * INTERVAL_SECONDS)  # one that waits for a board that does not answer is left behind

    def _raise_verdict(self) -> None:
        if self._crash is not None:
            raise self._crash
        if self._verdict is not None and self._verdict.message is not None:
            raise self._verdict.error()

    def _talk(self) -> None:
        """The thread that reads and writes the board; the only one that may have to wait for it."""
        while not self._closed.is_set():
            self._hurry.clear()
            try:
                self._exchange()
            except ConnectionError as error:
                self._decide(Verdict(f"the ranks' rendezvous is gone ({error}): its process or host has ended; {_ADVICE_ON_FIRST}"))
                self._settled.set()
                return
            self._hurry.wait(INTERVAL_SECONDS if self._verdict is None and self._state != "failed" else INTERVAL_SECONDS / 10)

    def _guard(self) -> None:
        """The thread that never waits for another: it notices a board that does not answer, and a main thread that does not leave."""
        answers, grace = _Stillness(), _Stillness()
        while not self._closed.wait(INTERVAL_SECONDS):
            if answers.seconds(self._looked_at) > self._timeout_seconds and self._verdict is None:
                silence = f"the ranks' rendezvous has not answered for {self._timeout_seconds:g} s: its host is stopped or out of reach"
                self._decide(Verdict(f"{silence}; {_ADVICE_ON_FIRST} (stall_timeout_seconds)"))
                self._settled.set()
            if grace.seconds(self._decided.is_set()) > GRACE_SECONDS and self._decided.is_set():
                self._end_process()

    def _exchange(self) -> None:
        began = time.monotonic()
        self._num_looks += 1
        self._publish()
        is_settled = self._look_at_all() if self._rank == 0 else self._look_at_first()
        self._publish()  # that this rank knows the verdict, if there is one
        self._looked_at = began
        if is_settled:
            self._settled.set()

    def _publish(self) -> None:
        with self._lock:
            is_known = self._verdict is not None
            looks = self._num_looks // LOOKS_A_SIGN if self._rank == 0 and self._size > 1 else 0
            sign = Sign(socket.gethostname(), self._beats, dict(self._done), self._state, self._failure, is_known, looks)
        if sign != self._published:
            self._board.write(str(self._rank), sign.text())
            self._published = sign

    def _look_at_all(self) -> bool:
        """The first rank's look at the board; whether it may leave: all others know the verdict."""
        texts = self._board.read([str(rank) for rank in range(self._size)])
        signs = [None if text is None else Sign.from_text(text) for text in texts]
        if self._verdict is None:
            self._show(signs)
            verdict = self._judge(signs)
            if verdict is None:
                return False
            self._board.write(_VERDICT, verdict.text())
            self._decide(verdict)
        assert self._verdict is not None
        gone = {0, *self._verdict.failed}
        return all(sign is not None and sign.knows_verdict for rank, sign in enumerate(signs) if rank not in gone)

    def _look_at_first(self) -> bool:
        """Another rank's look at the board; whether it may leave: the rank that shows the message does, if that is the first."""
        sign_text, verdict_text = self._board.read(["0", _VERDICT])
        first = None if sign_text is None else Sign.from_text(sign_text)
        if verdict_text is not None:
            self._decide(Verdict.from_json(json.loads(verdict_text)))
        elif (
            self._still([None if first is None else first.looks], self._timeout_seconds + 2 * LOOKS_A_SIGN * INTERVAL_SECONDS)
            and self._verdict is None
        ):
            # As long as the first rank looks at the board it judges, itself too. Who else lives is not known, so all speak.
            with self._lock:
                self._failure = Verdict(describe_silence([first], [0], self._timeout_seconds), None, (0,))
            self._decide(self._failure)
        if self._verdict is None:
            return False
        return self._verdict.spoken_by != 0 or (first is not None and first.state != "working")

    def _show(self, signs: Sequence[Sign | None]) -> None:
        totals: defaultdict[str, int] = defaultdict(int)
        for sign in signs:
            for name, count in sign.done.items() if sign else ():
                totals[name] += count
        self._totals = dict(totals)
        if self._on_totals is not None and self._crash is None:
            try:
                self._on_totals(self.totals())
            except Exception as error:
                self._crash = error
                with self._lock:
                    self._failure = self._failure or failure_of(self._rank, self._size, error)

    def _judge(self, signs: Sequence[Sign | None]) -> Verdict | None:
        silent = self._still([None if sign is None else sign.beats for sign in signs], self._timeout_seconds)
        for sign in signs:
            if sign is not None and sign.failure is not None:
                return sign.failure
        if all(sign is not None and sign.state == "done" for sign in signs):
            return Verdict(None)
        at_fault = find_at_fault(signs, silent)
        return Verdict(describe_silence(signs, at_fault, self._timeout_seconds), 0, tuple(at_fault)) if at_fault else None

    def _still(self, values: Sequence[int | None], timeout_seconds: float) -> list[int]:
        """Places of the values that have not changed for so long."""
        seconds = [still.seconds(value) for still, value in zip(self._stillness, values, strict=True)]
        return [rank for rank, still_for in enumerate(seconds) if still_for >= timeout_seconds]

    def _decide(self, verdict: Verdict) -> None:
        with self._lock:
            self._verdict = self._verdict or verdict
        self._decided.set()

    def _end_process(self) -> None:
        """End a process whose main thread is stuck."""
        with self._lock:  # the main thread takes it to leave: one of the two speaks
            if self._state != "working" or self._verdict is None:
                return
            if self._verdict.spoken_by in (None, self._rank):
                where = f"rank {self._rank}: " if self._rank else ""
                sys.stderr.write(f"gsae: {where}{' '.join(str(self._verdict.message).split())}\n")
            else:
                time.sleep(SPEAKING_SECONDS)
            sys.stderr.flush()
            os._exit(2)


@contextmanager
def heartbeat(world: World, stall_timeout_seconds: float, on_totals: Callable[[dict[str, int]], None] | None = None) -> Iterator[Heartbeat]:
    """A block of work that all ranks of the job finish together, or leave with one error: a failure of one is everybody's.

    A rank whose main thread does not leave a block that is to end, because it is stuck, is ended with exit code 2.

    Args:
        world: the job.
        stall_timeout_seconds: how long a rank may go without a beat.
        on_totals: called on the first rank, from a thread, with the counts of all ranks: every second or so, and at the end.

    Raises:
        GsaeError: a rank failed or fell silent; the message names it, `spoken_by` is the rank that shows it.
    """
    life = Heartbeat(world, stall_timeout_seconds, on_totals)
    life.start()
    try:
        try:
            yield life
            life.wait_for_all()
        except BaseException as error:
            cause = life.give_up(error)
            if cause is error:
                raise
            raise cause from error
    finally:
        life.close()
