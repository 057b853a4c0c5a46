from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.silo.desk import OPENED


@pytest.fixture(autouse=True)
def _journals_closed() -> Iterator[None]:
    """Those that a test left open, as a process that is killed does."""
    yield
    while OPENED:
        OPENED.pop().close()
