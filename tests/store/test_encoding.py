import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsae.store.encoding import STORAGE_TYPES, Encoded, encode

FLOATS = [name for name in STORAGE_TYPES if name != "int8"]


@pytest.mark.parametrize("storage", FLOATS)
def test_a_float_type_stores_the_rounded_value_and_gives_it_back(storage):
    x = torch.randn(3, 5, 4)
    stored = encode(x, storage)
    assert stored.row_scale is None
    assert torch.equal(stored.x, x.to(STORAGE_TYPES[storage]))
    assert stored.decode() is stored.x
    assert torch.equal(stored.decode(torch.device("cpu"), torch.float64), x.to(STORAGE_TYPES[storage]).double())


def test_int8_by_hand():
    # max|x| = 2 x 127^2: the values are 2 x 0, 1, 4, 9, ... 16129. 9.9 / 2 is nearer to 4 than to 9, -13.1 / 2 nearer to -9 than to -4.
    stored = encode(torch.tensor([[32258.0, 9.9, -13.1, 0.9], [-161.29, 0.0, 0.0, 0.04]]), "int8")
    assert stored.x.tolist() == [[127, 2, -3, 0], [-127, 0, 0, 2]]
    assert stored.row_scale.tolist() == pytest.approx([2.0, 0.01], rel=1e-7)
    assert stored.decode().dtype == torch.float32
    assert stored.decode().tolist()[0] == [32258.0, 8.0, -18.0, 0.0]


values = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(rows=st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=4))
def test_an_int8_value_is_the_nearest_that_there_is_and_never_below_minus_127(rows):
    x = torch.tensor(rows)
    stored = encode(x, "int8")
    q = torch.arange(-127, 128).double()
    levels = q * q.abs() * x.abs().amax(dim=1).double()[:, None] / 127**2
    nearest = (levels[:, None] - x.double()[:, :, None]).abs().amin(dim=2)
    assert bool(((stored.decode().double() - x.double()).abs() <= 1.0001 * nearest + 1e-6 * x.abs().amax().double() + 1e-40).all())
    assert int(stored.x.min()) >= -127


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [1.0, -math.inf], [3.0, 4.0], [1e-45, 0.0]])
    decoded = encode(x.view(1, 5, 2), "int8").decode()[0]
    assert decoded[0].tolist() == [0, 0]
    assert not torch.isfinite(decoded[1:3]).any()
    assert decoded[3].tolist() == pytest.approx([3, 4], rel=0.005)
    assert decoded[4].tolist() == [0, 0]


def test_rows_are_the_same_whatever_type_and_batch_they_come_in():
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = encode(x, "int8")
    assert encode(x.double(), "int8").has_same_bytes(whole)
    assert encode(x[1], "int8").has_same_bytes(Encoded(whole.x[1], whole.row_scale[1]))


def test_int8_is_multiplied_out_in_the_type_of_training():
    stored = encode(torch.randn(5, 3), "int8")
    q = stored.x.double()
    assert torch.equal(stored.decode(dtype=torch.float64), q * q.abs() * stored.row_scale.double()[:, None])


@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_rows_are_copied_and_taken_with_their_scales(storage):
    stored = encode(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), storage)
    room = Encoded.empty(5, 3, storage)
    room[1:3].copy_(stored[4:6])
    room[3:5].take_(stored, torch.tensor([2, 0]))
    room[0:1].copy_(stored[1:2])
    assert torch.equal(room.decode(), stored.decode()[[1, 4, 5, 2, 0]])


def test_other_bytes_other_scales_and_other_types_are_told_apart():
    stored = encode(torch.tensor([[1.0, -2.0], [math.nan, 0.5]]), "int8")
    assert stored.has_same_bytes(Encoded(stored.x.clone(), stored.row_scale.clone()))
    assert not stored.has_same_bytes(Encoded(stored.x + 1, stored.row_scale))
    assert not stored.has_same_bytes(Encoded(stored.x, stored.row_scale * 2))
    assert not stored.has_same_bytes(Encoded(stored.x))
    assert not stored.has_same_bytes(Encoded(stored.x.view(torch.uint8), stored.row_scale))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_rows_are_stored_on_the_gpu_as_on_the_cpu_without_waiting_for_it(storage):
    x = torch.randn(4, 300, 64)
    x[0, 0], x[1, 5] = 0.0, math.nan
    on_device = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stored = encode(on_device, storage)
        decoded = stored.decode()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = encode(x, storage)
    assert torch.equal(stored.x.cpu().nan_to_num(), wanted.x.nan_to_num())
    assert torch.equal(decoded.cpu().nan_to_num(), wanted.decode().nan_to_num())
