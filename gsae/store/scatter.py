"""One read for many places in memory. In: an open file. Out: pieces that stand together in it, each at an address of its own.

A window's rows are permuted by the very read that brings them: nothing is copied a second time. `preadv` of the C library is called
directly, since `os.preadv` wants an object a piece; here the pieces are arrays.
"""

import ctypes
import os

import numpy as np
from jaxtyping import Int64

_MAX_PIECES = os.sysconf("SC_IOV_MAX")
"""Of one call."""
_libc = ctypes.CDLL(None, use_errno=True)
_preadv = _libc.preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t


def read_scattered(file: int, offset: int, addresses: Int64[np.ndarray, " pieces"], sizes: Int64[np.ndarray, " pieces"]) -> None:
    """Read what stands from `offset` on in a file, piece by piece to the addresses. Other threads run meanwhile.

    Args:
        file: descriptor of the file.
        offset: where the first piece begins, in bytes.
        addresses: where each piece goes; the caller keeps that memory alive.
        sizes: bytes of each piece, at least one.

    Raises:
        EOFError: the file ends before the last piece.
        OSError: it cannot be read.
    """
    pieces = np.stack((addresses, sizes), axis=1)  # struct iovec: two words of 64 bits
    ends = np.cumsum(sizes)
    done, total = 0, int(ends[-1]) if len(ends) else 0
    while done < total:
        first = int(np.searchsorted(ends, done, side="right"))
        some = pieces[first : first + _MAX_PIECES]
        begun = done - int(ends[first]) + int(sizes[first])  # bytes of the first one that a shorter read has brought
        if begun:
            some = some.copy()
            some[0] += (begun, -begun)
        count = _preadv(file, some.ctypes.data, len(some), offset + done)
        if count < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if count == 0:
            raise EOFError
        done += count
