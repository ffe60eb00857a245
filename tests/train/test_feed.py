"""Batches on their way to the step. The stream overwrites its memory whenever it is asked for more, as it is allowed to."""

import pytest
import torch

from gsae.store.encoding import Encoded
from gsae.store.stream import Batch
from gsae.train.clock import Clock
from gsae.train.feed import Feed

BATCH_ROWS = 8
SCALE = 0.3


class OneSlotStream:
    """Batch n holds the values of a generator seeded by n; there is one place in memory for all of them."""

    def __init__(self, storage: str = "float32", d_model: int = 5, pinned: bool = False) -> None:
        self._slot = Encoded.empty(BATCH_ROWS, d_model, storage)
        if pinned:
            self._slot = Encoded(self._slot.x.pin_memory(), self._slot.row_scale)
        self._row = torch.zeros(BATCH_ROWS, dtype=torch.int64)
        self._rows_taken = 0

    def stored(self, number: int) -> Encoded:
        generator = torch.Generator().manual_seed(number)
        x = torch.randint(-100, 100, self._slot.x.shape, generator=generator).to(self._slot.x.dtype)
        return Encoded(x, None if self._slot.row_scale is None else torch.rand(BATCH_ROWS, generator=generator))

    def seek(self, rows_taken: int) -> None:
        self._slot.x.fill_(77)
        self._rows_taken = rows_taken

    def next_batch(self) -> Batch:
        self._slot.copy_(self.stored(self._rows_taken // BATCH_ROWS))
        self._row.copy_(torch.arange(BATCH_ROWS) + self._rows_taken)
        self._rows_taken += BATCH_ROWS
        return Batch(self._slot.x, torch.zeros_like(self._row), self._row, self._slot.row_scale)


def feed_of(stream: OneSlotStream, rows_taken: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Feed:
    where = torch.device(device)
    return Feed(stream, rows_taken, batch_rows=BATCH_ROWS, scale=SCALE, device=where, dtype=dtype, clock=Clock(where))


def wanted(stream: OneSlotStream, number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return stream.stored(number).decode(dtype=dtype) * SCALE


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_are_the_streams_scaled_and_stay_when_it_goes_on(storage, dtype):
    stream = OneSlotStream(storage)
    with feed_of(stream, 3 * BATCH_ROWS, dtype=dtype) as feed:
        taken = []
        for _ in range(4):
            taken.append(feed.next())
            feed.look_ahead()
    for number, x in enumerate(taken, start=3):
        assert x.dtype == dtype
        assert torch.equal(x, wanted(stream, number, dtype))


def test_what_training_will_see_next_it_sees_all_the_same():
    stream = OneSlotStream("int8")
    with feed_of(stream) as feed:
        feed.next()
        for number, batch in enumerate(feed.upcoming(3), start=1):
            assert torch.equal(batch.x, wanted(stream, number))
            assert batch.row[0] == number * BATCH_ROWS
            assert batch.row_scale is None
        assert torch.equal(feed.next(), wanted(stream, 1))


def test_training_goes_on_where_it_was_when_candidates_are_given_up_midway():
    stream = OneSlotStream()
    with feed_of(stream) as feed:
        feed.next()
        candidates = feed.upcoming(3)
        next(candidates)
        candidates.close()
        assert torch.equal(feed.next(), wanted(stream, 1))


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])],
)
def test_a_batch_that_is_read_again_stays_and_training_goes_on_where_it_was(device):
    stream = OneSlotStream("int8", pinned=device == "cuda")
    with feed_of(stream, device=device) as feed:
        for _ in range(3):
            feed.next()
        feed.look_ahead()
        again = feed.read_again(BATCH_ROWS)
        torch.testing.assert_close(feed.next().cpu(), wanted(stream, 3))
        feed.look_ahead()
        torch.testing.assert_close(again.x.cpu(), wanted(stream, 1))
        assert again.row.tolist() == list(range(BATCH_ROWS, 2 * BATCH_ROWS))
        torch.testing.assert_close(feed.next().cpu(), wanted(stream, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_on_a_gpu_the_next_batch_travels_while_this_one_is_computed_on(storage):
    stream = OneSlotStream(storage, d_model=1 << 20, pinned=True)
    weight = torch.randn(4096, 4096, device="cuda")
    with feed_of(stream, device="cuda") as feed:
        taken = []
        for _ in range(12):  # the device's memory is given back and used again while copies are under way
            x = feed.next()
            product = weight @ weight
            taken.append(x.clone())
            del x, product
            feed.look_ahead()
    for number, x in enumerate(taken):
        torch.testing.assert_close(x.cpu(), wanted(stream, number))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_candidates_begin_with_the_batch_that_was_copied_ahead():
    stream = OneSlotStream("bfloat16", d_model=1 << 20, pinned=True)
    with feed_of(stream, device="cuda") as feed:
        feed.next()
        feed.look_ahead()
        candidates = [batch.x.cpu() for batch in feed.upcoming(2)]
        torch.testing.assert_close(candidates, [wanted(stream, 1), wanted(stream, 2)])
        torch.testing.assert_close(feed.next().cpu(), wanted(stream, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_looking_ahead_and_taking_a_batch_do_not_wait_for_the_computation():
    stream = OneSlotStream("bfloat16", d_model=1 << 20, pinned=True)
    with feed_of(stream, device="cuda") as feed:
        feed.next()
        done = torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)  # about a second
        done.record()
        feed.look_ahead()
        feed.next()
        assert not done.query()
