"""An object in a process of its own, so that its time and memory are not those of the other parties."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

_PROCESSES = multiprocessing.get_context("spawn")


class Remote:
    """A process that serves one object: what `make` made, and then its methods by their names."""

    def __enter__(self) -> Remote:
        self._here, there = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()  # the process has it now, and its end is the end of what is heard
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._here.close()
        self._process.join()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._ask(name, *arguments)

    def _ask(self, name: str, *arguments: object) -> Any:
        self._here.send((name, arguments))
        return self._here.recv()


def _serve(connection: Connection) -> None:
    served, began = None, peak()
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        if name == "make":
            kind, *rest = arguments
            served = kind(*rest)
            connection.send(None)
        elif name == "memory":
            connection.send(peak() - began)
        else:
            connection.send(getattr(served, name)(*arguments))


def peak() -> int:
    """The most bytes that this process ever held, pages of mapped files that it touched included.

    Not `ru_maxrss`: a process that a large one started begins with that one's peak.
    """
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
