"""Signs of life of a training. In: this rank's heartbeat, and what may take long. Out: a turn with each batch, patience where it is due.

All ranks of a group take a batch and then meet to sum its gradients: whoever has had fewer is the one that the others wait for.
"""

from dataclasses import replace

from gsae.heartbeat import Heartbeat
from gsae.store.origin import Origin
from gsae.store.stream import Batch, Stream
from gsae.train.bank import Stretch

CONTINUES = "the training continues from its last checkpoint"


def with_beats(stretch: Stretch, beats: Heartbeat) -> Stretch:
    """The stretch, of whose streams each batch is a turn."""
    return replace(stretch, open_stream=lambda: _BeatingStream(stretch, beats))


class _BeatingStream(Stream):
    """Another stream, with a beat for each batch. The first batch after a `seek` waits for whole windows, so it may take its time."""

    def __init__(self, stretch: Stretch, beats: Heartbeat) -> None:
        self._beats = beats
        self._is_loaded = False
        with beats.busy():
            self._stream = stretch.open_stream()

    @property
    def rows_taken(self) -> int:
        return self._stream.rows_taken

    def seek(self, rows_taken: int) -> None:
        self._stream.seek(rows_taken)
        self._is_loaded = False

    def next_batch(self) -> Batch:
        if self._is_loaded:
            batch = self._stream.next_batch()
        else:
            with self._beats.busy():
                batch = self._stream.next_batch()
            self._is_loaded = True
        self._beats.beat(turns=1, batches=1)
        return batch

    def origins(self, batch: Batch) -> list[Origin]:
        with self._beats.busy():
            return self._stream.origins(batch)

    def close(self) -> None:
        self._stream.close()
