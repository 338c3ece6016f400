"""The wall: how many requests a provider lets in at once, as its refusals tell."""

from __future__ import annotations

import math

_SAME = 0.9
_SMALL = 10
"""A refusal below so much of a wall refutes it. Just below may be a matter of who counts, unless the wall is small."""

_HELD_S, _LONGER, _MOST_HELD_S = 5.0, 3.0, 120.0
"""How long a wall is not tried again: at first, by which factor longer each time it is still there, and at most."""

_REFUTED_S = 60.0
"""How long refusals are not taken for a wall after one was refuted."""


class Wall:
    """Remembers at which number in flight refusals came, and for how long that is not worth another try."""

    def __init__(self) -> None:
        self._level = math.inf
        self._held_s = 0.0
        self._held_until = -math.inf
        self._refuted_until = -math.inf

    @property
    def is_known(self) -> bool:
        return self._level < math.inf

    def holds(self, level: float) -> bool:
        """Whether it is the wall that keeps the window at ``level``."""
        return level >= _SAME * self._level

    def top(self, now: float) -> float:
        """The most that may be in flight at ``now``; infinite where nothing is known, or it is time to try again."""
        return self._level if now < self._held_until else math.inf

    def stands(self, in_flight: int, now: float) -> bool:
        """A refusal came with so many in flight: whether that is a matter of their number, and so a wall."""
        is_held = now < self._held_until
        if is_held and in_flight <= max(1, self._level if self._level < _SMALL else _SAME * self._level):
            self._level, self._held_until = math.inf, -math.inf
            self._refuted_until = now + _REFUTED_S
        if now < self._refuted_until:
            return False
        is_same = self.is_known and self.holds(in_flight)
        self._held_s = min(_LONGER * self._held_s, _MOST_HELD_S) if is_same else _HELD_S
        self._level = max(1.0, in_flight - 1)
        self._held_until = now + self._held_s
        return True

    def reconsider(self) -> None:
        """There are so many refusals that it may be a wall after all."""
        self._refuted_until = -math.inf
