from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.vector import pack, unpack

FLOATS = st.floats(allow_nan=False)


@given(st.lists(FLOATS, max_size=20) | st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_every_value_comes_back(vector: list[float]) -> None:
    assert unpack(pack(vector)) == vector


@pytest.mark.parametrize(("value", "size"), [(0.5, 4), (struct.unpack("<f", b"\xcd\xcc\xcc=")[0], 4), (0.1, 8)])
def test_single_precision_is_kept_where_it_is_exact(value: float, size: int) -> None:
    assert len(pack([value] * 100)) == 1 + 100 * size


def test_the_bytes_are_the_same_on_every_machine() -> None:
    assert pack([1.0]) == b"f\x00\x00\x80?"
    assert pack([0.1]) == b"d\x9a\x99\x99\x99\x99\x99\xb9?"


def test_what_is_no_number_stays_so() -> None:
    [value] = unpack(pack([math.nan]))

    assert math.isnan(value)
