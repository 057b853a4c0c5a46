"""A user without privileges, also where the tests are root's, who may read and write everywhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

NOBODY = 65534


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """This process acts as `NOBODY` where it is root's."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def give_away(path: Path) -> None:
    """Make it `NOBODY`'s where the tests are root's; it is this user's own elsewhere."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
