"""The most memory that a piece of work needs at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SLACK = 6 * 2**20  # bytes: buffers, and what the interpreter takes for itself


def peak(work: Callable[..., object], *arguments: object) -> int:
    """Bytes that `work(*arguments)` adds to the resident memory of a fresh process, at the highest."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, work, *arguments).result(60)


def highest(process: int | str = "self") -> int:
    """Bytes of resident memory, mapped files included, that a process has had at the highest."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _measured(work: Callable[..., object], *arguments: object) -> int:
    before = highest()
    work(*arguments)
    return highest() - before
