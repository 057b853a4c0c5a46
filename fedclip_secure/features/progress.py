"""How far an extraction is, and how fast. Loads no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_RECENT = 30.0  # seconds over which the speed is measured


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` images: `cached` of these had features already, `broken` ones could not be used.

    `images_per_second` is over the last half minute, and `seconds_left` follows from it; None until
    there is something to measure.
    """

    done: int
    total: int
    cached: int
    broken: int
    images_per_second: float | None
    seconds_left: float | None


ShowProgress = Callable[[Progress], None]


class Meter:
    """Counts images and tells `show` after every step. What was `cached` at the start says nothing about speed."""

    def __init__(
        self, total: int, cached: int, show: ShowProgress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._done, self._cached, self._broken = total, cached, cached, 0
        self._show, self._clock = show, clock
        self._recent = deque([(clock(), cached)])
        show(Progress(cached, total, cached, 0, None, None))

    def advance(self, images: int, *, cached: int = 0, broken: int = 0) -> None:
        """`images` more are done; the cache had `cached` of them, `broken` ones could not be used."""
        self._done += images
        self._cached += cached
        self._broken += broken
        now = self._clock()
        self._recent.append((now, self._done))
        while len(self._recent) > 2 and now - self._recent[1][0] >= _RECENT:
            self._recent.popleft()
        since, before = self._recent[0]
        speed = (self._done - before) / (now - since) if now > since else None
        left = (self._total - self._done) / speed if speed else None
        self._show(Progress(self._done, self._total, self._cached, self._broken, speed, left))
