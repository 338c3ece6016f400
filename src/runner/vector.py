"""Vectors as bytes, in half of their size where that loses nothing."""

from __future__ import annotations

import sys
from array import array


def pack(vector: list[float]) -> bytes:
    """A vector as ``f`` and its values in single precision where these are exact, or ``d`` and them in double.

    Little-endian. Most providers compute in single precision and write that out, so most vectors are exact.
    """
    single = array("f", vector)
    kept = single if single.tolist() == vector else array("d", vector)
    return kept.typecode.encode() + _little_endian(kept).tobytes()


def unpack(packed: bytes) -> list[float]:
    """The vector that `pack` made ``packed`` of."""
    values: array[float] = array("f" if packed[:1] == b"f" else "d")
    values.frombytes(packed[1:])
    return _little_endian(values).tolist()


def _little_endian(values: array[float]) -> array[float]:
    if sys.byteorder == "big":
        values.byteswap()
    return values
