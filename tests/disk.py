"""A disk that is full: the system refuses to let a file grow."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file that this process writes may have more than `size` bytes.

    Not a fixture: pytest must be able to write its own output, which may go to a file, before and after.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
