import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.store import scatter
from gsae.store.scatter import read_scattered

CONTENT = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scatter") / "rows"
    path.write_bytes(CONTENT.tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def read(file, offset, sizes, order):
    """Each piece to a place of its own, in the given order; what lies there afterwards, piece by piece."""
    memory = np.zeros(sum(sizes), dtype=np.uint8)
    places = np.zeros(len(sizes), dtype=np.int64)
    end = 0
    for piece in order:
        places[piece] = end
        end += sizes[piece]
    read_scattered(file, offset, memory.ctypes.data + places, np.array(sizes, dtype=np.int64))
    return [memory[place : place + size] for place, size in zip(places, sizes, strict=True)]


def pieces_of(offset, sizes):
    ends = offset + np.cumsum([0, *sizes])
    return [CONTENT[begin:end] for begin, end in itertools.pairwise(ends)]


@settings(max_examples=30, deadline=None)
@given(offset=st.integers(0, 50), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_every_piece_comes_to_its_place(file, offset, sizes, seed):
    order = np.random.default_rng(seed).permutation(len(sizes))
    assert all(map(np.array_equal, read(file, offset, sizes, order), pieces_of(offset, sizes)))


def test_more_pieces_than_one_call_takes(file):
    sizes = [7] * (2 * scatter._MAX_PIECES + 5)
    order = np.arange(len(sizes))[::-1]
    assert all(map(np.array_equal, read(file, 3, sizes, order), pieces_of(3, sizes)))


@pytest.mark.parametrize("most", [1, 5, 9, 24])
def test_a_system_that_reads_less_than_it_was_asked_for_is_asked_again(file, monkeypatch, most):
    # Pieces of 9 bytes; a call brings at most `most`: parts of a piece, one of them, two and two thirds.
    real = scatter._preadv

    def short(file, pieces, count, offset):
        first = np.ctypeslib.as_array((scatter.ctypes.c_int64 * (2 * count)).from_address(pieces)).reshape(count, 2).copy()
        rest, some = most, []
        for address, size in first:
            if rest:
                some.append((address, min(size, rest)))
                rest -= some[-1][1]
        some = np.array(some, dtype=np.int64)
        return real(file, some.ctypes.data, len(some), offset)

    monkeypatch.setattr(scatter, "_preadv", short)
    sizes = [9] * 11
    assert all(map(np.array_equal, read(file, 1, sizes, np.arange(11)[::-1]), pieces_of(1, sizes)))


def test_the_end_of_the_file_and_trouble_are_told_apart(file, tmp_path):
    with pytest.raises(EOFError):
        read(file, len(CONTENT) - 5, [3, 3], [0, 1])
    with pytest.raises(IsADirectoryError):
        read(os.open(tmp_path, os.O_RDONLY), 0, [3], [0])


def test_nothing_to_read_is_nothing_done(file):
    read_scattered(file, 0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
