"""How far an extraction is, and how fast. Loads no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_RECENT = 30.0  # seconds over which the speed is measured


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` images, `broken` of which could not be used.

    `images_per_second` is over the last half minute, and `seconds_left` follows from it; None until
    there is something to measure.
    """

    done: int
    total: int
    broken: int
    images_per_second: float | None
    seconds_left: float | None


ShowProgress = Callable[[Progress], None]


class Meter:
    """Counts images and tells `show` after every step. What was `done` at the start says nothing about speed."""

    def __init__(self, total: int, done: int, show: ShowProgress, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._done, self._broken = total, done, 0
        self._show, self._clock = show, clock
        self._recent = deque([(clock(), done)])
        show(Progress(done, total, 0, None, None))

    def advance(self, images: int, broken: int) -> None:
        """`images` more are done, `broken` of them could not be used."""
        self._done += images
        self._broken += broken
        now = self._clock()
        self._recent.append((now, self._done))
        while len(self._recent) > 2 and now - self._recent[1][0] >= _RECENT:
            self._recent.popleft()
        since, before = self._recent[0]
        speed = (self._done - before) / (now - since) if now > since else None
        left = (self._total - self._done) / speed if speed else None
        self._show(Progress(self._done, self._total, self._broken, speed, left))
