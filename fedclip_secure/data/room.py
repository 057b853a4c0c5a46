"""How many images are decoded at the same time: as many as the memory that may be used has room for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHARE = 0.25  # of the memory: the encoder and other programs need theirs
_CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may use (cgroup v2); `max` is no limit


class Room:
    """`size` bytes that threads share."""

    def __init__(self, size: int) -> None:
        self._size, self._taken = size, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, and hold them. What is larger than the whole room has it alone."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + size <= self._size)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


def memory() -> int:
    """Bytes that this machine has, or that the container may use."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(there, int(_CGROUP.read_text("ascii")))
    except (OSError, ValueError):
        return there


DECODING = Room(int(_SHARE * memory()))
