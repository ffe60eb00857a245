"""Which shards a store lacks, and the contexts they are made of. In: the lanes' logs, the training text. Out: shards, as the text is read.

A lane lacks its gaps (shards that were lost) and what comes after its last shard. Packing begins anew at every shard, so each of them is
made of its own part of the text, whatever else is missing.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from gsae.config import Config
from gsae.corpus.contexts import Context, Cursor, Packer
from gsae.corpus.documents import Piece
from gsae.corpus.size import cure_of_empty_lane
from gsae.errors import CorpusError
from gsae.store.progress import ProgressLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class PendingShard:
    """A shard before the LLM has seen its contexts."""

    log: ProgressLog
    index: int
    contexts: list[Context]
    last: bool
    """Whether the lane ends with it."""


@dataclass
class _Target:
    """What a lane packs at present."""

    index: int
    """Of the shard."""
    start: Cursor | None
    """Where its text begins; None at the start of the lane."""
    contexts: int | None
    """Its contexts, where they are known: it is a gap. Otherwise it and all shards after it are wanted."""
    last: bool = False
    """Whether the lane ends with this gap."""


class LaneShards:
    """Packs the missing shards of one lane, in order.

    A shard after the last one of the log is given only once it is known whether the lane ends with it.

    Args:
        log: the lane's.
        tokenizer: the LLM's.
        config: sizes of contexts and shards.
        limit: shards of the lane at most; None for all of its text.
    """

    def __init__(self, log: ProgressLog, tokenizer: "PreTrainedTokenizerBase", config: Config, limit: int | None) -> None:
        self._log, self._tokenizer, self._config, self._limit = log, tokenizer, config, limit
        self._targets = deque(_Target(gap.shard, gap.start, gap.contexts, gap.last) for gap in log.gaps)
        if not log.is_ended:
            self._targets.append(_Target(log.next_index, log.cursor, None))
        self._packer, self._waiting = self._new_packer(), list[Context]()

    @property
    def number(self) -> int:
        """The lane's."""
        return self._log.lane

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing any more."""
        return not self._targets

    @property
    def first_document(self) -> int:
        """Document.index from which the text is needed."""
        start = self._targets[0].start if self._targets else None
        return start.document if start else 0

    def push(self, piece: Piece) -> Iterator[PendingShard]:
        """The lane's next piece; gives the shards that it completes."""
        while self._targets:
            target = self._targets[0]
            self._waiting += self._packer.push(piece)
            yield from self._cut()
            if self._targets and self._targets[0] is target:
                return
            # A gap is filled: what is missing next may begin within the same piece.

    def finish(self) -> Iterator[PendingShard]:
        """The text is at its end; gives what is left.

        Raises:
            CorpusError: the lane has no text, or less than it had.
        """
        if not self._targets:
            return
        self._waiting += self._packer.finish()
        yield from self._cut()
        if not self._targets:
            return
        target = self._targets[0]
        if target.contexts is not None:
            raise CorpusError(
                f"the text of shard {self._log.lane:04d}-{target.index:06d} is not there any more; restore {self._config.corpus.path!r}"
            )
        if not self._waiting:
            raise CorpusError(f"lane {self._log.lane} has no text; {cure_of_empty_lane(self._config.corpus)}")
        yield PendingShard(self._log, target.index, self._waiting, last=True)
        self._targets.clear()

    def _cut(self) -> Iterator[PendingShard]:
        """The shards that are whole among the waiting contexts."""
        while self._targets:
            target, waiting = self._targets[0], len(self._waiting)
            size = target.contexts or self._config.harvest.contexts_per_shard
            last = target.last if target.contexts is not None else self._limit is not None and target.index + 1 >= self._limit
            if waiting < size or (waiting == size and target.contexts is None and not last):
                return
            shard, self._waiting = self._waiting[:size], self._waiting[size:]
            yield PendingShard(self._log, target.index, shard, last)
            if target.contexts is None and not last:
                target.index += 1
                continue
            self._targets.popleft()
            self._packer, self._waiting = self._new_packer(), []

    def _new_packer(self) -> Packer:
        """Packs from the start of the first target."""
        harvest = self._config.harvest
        start = self._targets[0].start if self._targets else None
        return Packer(self._tokenizer, harvest.context_length, start, harvest.packed)


def pending_shards(lanes: Sequence[LaneShards], pieces: Iterable[tuple[int, Piece]]) -> Iterator[PendingShard]:
    """The shards that the lanes lack, as the text is read.

    Args:
        lanes: those of this rank.
        pieces: place of the lane among them, and its next piece.
    """
    missing = sum(not lane.is_complete for lane in lanes)
    for place, piece in pieces:
        lane = lanes[place]
        if lane.is_complete:
            continue
        yield from lane.push(piece)
        missing -= lane.is_complete
        if not missing:
            return
    for lane in lanes:
        yield from lane.finish()


def read_ahead(items: Iterator[Item], thread: Executor) -> Iterator[Item]:
    """The same items; while one is used, the next one is made in the thread."""
    end = object()
    coming = thread.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = thread.submit(next, items, end)
        yield item  # type: ignore[misc]
