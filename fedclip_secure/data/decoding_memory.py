"""How many images are decoded at the same time: as many as the memory that may be used has room for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SHARE = 0.25  # of the memory: the encoder and other programs need theirs
_CGROUPS = Path("/sys/fs/cgroup")


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
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> Iterator[int]:
    """Those of the groups that this process is in (cgroup v2); `max` is none."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        for folder in (_CGROUPS / own, *(_CGROUPS / own).parents):
            with suppress(OSError, ValueError):
                yield int((folder / "memory.max").read_text("ascii"))


DECODING = Room(int(_SHARE * memory()))
