"""Waiting for what must come: the bound is for a fault, and a busy machine is none."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable

BOUND = 600.0  # seconds, below pytest's own limit; it costs nothing where the event comes


async def until(condition: Callable[[], bool]) -> None:
    """Poll until it holds."""
    async with asyncio.timeout(BOUND):
        while not condition():
            await asyncio.sleep(0.01)


def wait_for(
    what: str, condition: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes] | None = None
) -> None:
    """Poll until it holds; a process that ends before is at fault."""
    end = time.monotonic() + BOUND
    while not condition():
        assert process is None or process.poll() is None or condition(), f"the process ended before {what}"
        assert time.monotonic() < end, f"{what} did not happen within {BOUND:.0f} s"
        time.sleep(0.02)
