"""Signs of life. In: the beats of this rank. Out: what all ranks have done, and an end on every rank when one fails or falls silent.

A rank that waits in a collective cannot ask why nobody comes, and one of a harvest hardly meets the others. So each leaves its sign on
a board: how often it has beaten, its counts, its failure. The first rank alone reads all signs; its verdict ends the work on all ranks.
The others read its sign and the verdict, and judge its silence themselves. Nothing here is a collective, so it works beside any that
the main thread is in.
"""

import itertools
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gsae.console import complain
from gsae.errors import GsaeError
from gsae.heartbeat import times
from gsae.heartbeat.judge import Judge, Stillness, gone_seconds
from gsae.heartbeat.signs import Sign, State, Verdict, advice, describe_loss, describe_silence, failure_of, is_cut_off
from gsae.world import World, host_name

_VERDICT = "verdict"
_uses = itertools.count()
"""Every rank enters its heartbeats in the same order, so this is the same number on all of them."""


class Heartbeat:
    """This rank's sign of life and its counts. Made by `heartbeat`."""

    def __init__(
        self, world: World, stall_timeout_seconds: float, on_totals: Callable[[dict[str, int]], None] | None, continues: str
    ) -> None:
        self._rank, self._size = world.everyone.rank, world.everyone.size
        self._board = world.board(f"heartbeat/{next(_uses)}")
        self._timeout_seconds, self._on_totals, self._continues = stall_timeout_seconds, on_totals, continues
        self._judge = Judge(self._size, world.group.size, stall_timeout_seconds, continues)
        self._first_looks = Stillness()
        self._lock = threading.Lock()
        self._beats = self._num_busy = 0
        self._done: dict[str, int] = {}
        self._state: State = "working"
        self._failure: Verdict | None = None
        self._verdict: Verdict | None = None
        self._crash: Exception | None = None
        self._published: Sign | None = None
        self._totals: dict[str, int] = {}
        self._num_looks = 0
        self._looked_at = self._done_at = time.monotonic()
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
        while self._verdict is None and time.monotonic() - self._looked_at > times.NAP_SECONDS:
            self._hurry.set()
            time.sleep(0.01)
        self._raise_verdict()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A block of work that ends by itself but may take longer than the time-out: meanwhile this rank beats without its main thread.

        A rank that dies or is stopped in it is noticed, one that hangs in it is not.
        """
        with self._lock:
            self._num_busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_busy -= 1
                self._beats += 1

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
            self._state, self._done_at = "done", time.monotonic()
        self._hurry.set()
        with self.busy():
            self._decided.wait()
        self._settled.wait(times.GRACE_SECONDS)
        self._raise_verdict()

    def give_up(self, error: BaseException) -> BaseException:
        """Let the others know that `error` ended the work of this rank, or the verdict did; what to raise."""
        with self._lock:
            self._state = "cut off" if is_cut_off(error) else "failed"
            if self._verdict is None and self._failure is None:
                self._failure = failure_of(self._rank, self._size, error)
        self._hurry.set()
        to_judge = 3 * gone_seconds(self._timeout_seconds) if self._state == "cut off" else 0.0
        self._settled.wait(to_judge + times.GRACE_SECONDS + times.SPEAKING_SECONDS)
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
            thread.join(2 * times.INTERVAL_SECONDS)  # one that waits for a board that does not answer is left behind

    @property
    def _advice_on_first(self) -> str:
        return f"look at the first rank's log, {advice(self._continues)}"

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
                self._decide(Verdict(f"the ranks' rendezvous is gone ({error}): its process or host has ended; {self._advice_on_first}"))
                self._settled.set()
                return
            self._hurry.wait(self._pause_seconds())

    def _pause_seconds(self) -> float:
        """Until the next look: an interval, or a tenth of it near the end; whoever waits for others looks less often as time goes by."""
        if self._verdict is None and self._state == "working":
            return times.INTERVAL_SECONDS
        soon = times.INTERVAL_SECONDS / 10
        if self._verdict is None and self._state == "done":
            return min(times.INTERVAL_SECONDS, max(soon, (time.monotonic() - self._done_at) / 10))
        return soon

    def _guard(self) -> None:
        """The thread that never waits for another: it notices a board that does not answer, and a main thread that does not leave."""
        answers, grace = Stillness(), Stillness()
        while not self._closed.wait(times.INTERVAL_SECONDS):
            if answers.seconds(self._looked_at) > self._timeout_seconds and self._verdict is None:
                silence = f"the ranks' rendezvous has not answered for {self._timeout_seconds:g} s: its host is stopped or out of reach"
                self._decide(Verdict(f"{silence}; {self._advice_on_first} (stall_timeout_seconds)"))
                self._settled.set()
            if grace.seconds(self._decided.is_set()) > times.GRACE_SECONDS and self._decided.is_set():
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
            self._beats += self._num_busy > 0
            is_known = self._verdict is not None
            looks = self._num_looks if self._size > 1 else 0
            sign = Sign(host_name(), self._beats, dict(self._done), self._state, self._failure, is_known, looks)
        if sign != self._published:
            self._board.write(str(self._rank), sign.text())
            self._published = sign

    def _look_at_all(self) -> bool:
        """The first rank's look at the board; whether it may leave: all others know the verdict."""
        texts = self._board.read([str(rank) for rank in range(self._size)])
        signs = [None if text is None else Sign.from_text(text) for text in texts]
        if self._verdict is None:
            self._show(signs)
            verdict = self._judge.judge(signs)
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
        elif self._verdict is None:
            self._judge_first(first)
        if self._verdict is None:
            return False
        return self._verdict.spoken_by != 0 or (first is not None and first.state != "working")

    def _judge_first(self, first: Sign | None) -> None:
        """End the work when the first rank looks at the board no more: as long as it looks it judges, itself too."""
        seconds, gone = self._first_looks.seconds(first and first.looks), gone_seconds(self._timeout_seconds)
        if self._state == "cut off" and seconds >= gone:
            message = describe_loss([first], [0], self._continues)
        elif seconds >= self._timeout_seconds + gone:
            message = describe_silence([first], [0], self._timeout_seconds, self._continues)
        else:
            return
        with self._lock:  # who else lives is not known, so all speak
            self._failure = Verdict(message, None, (0,))
        self._decide(self._failure)

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
                complain(str(self._verdict.message))
            else:
                time.sleep(times.SPEAKING_SECONDS)
            os._exit(2)


@contextmanager
def heartbeat(
    world: World,
    stall_timeout_seconds: float,
    on_totals: Callable[[dict[str, int]], None] | None = None,
    continues: str = "it continues where it was",
) -> Iterator[Heartbeat]:
    """A block of work that all ranks of the job finish together, or leave with one error: a failure of one is everybody's.

    A rank whose main thread does not leave a block that is to end, because it is stuck, is ended with exit code 2.

    Args:
        world: the job.
        stall_timeout_seconds: how long a rank may go without a beat.
        on_totals: called on the first rank, from a thread, with the counts of all ranks: every second or so, and at the end.
        continues: what the work does when it is run again, for the messages.

    Raises:
        GsaeError: a rank failed or fell silent; the message names it, `spoken_by` is the rank that shows it.
    """
    life = Heartbeat(world, stall_timeout_seconds, on_totals, continues)
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
