"""The server or one silo as a process that can be killed at any durable write, and that records what it does.

For tests alone: the package has no switch for it. Whatever makes something durable goes through SQLite or through a
function of `os`; these are wrapped, so that a new write in the package is a new point without a word here.
`python -m tests.federation.failpoints server|silo FOLDER PORT RECORD [POINT]`
"""

from __future__ import annotations

import asyncio
import faulthandler
import hashlib
import inspect
import itertools
import json
import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.serve import serve, stop_on_signals
from fedclip_secure.data.dataset import Counts
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.silo_session import SiloSession
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run import runner
from fedclip_secure.silo.run.final_models import fetch_course, save_adapters
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.link import Link
from fedclip_secure.silo.run.party import Party
from fedclip_secure.silo.run.runner import Runner
from fedclip_secure.transport.client import Client, Patience
from tests.waiting import BOUND

STEP = 2.0**-30  # so that every update lies on the grid
MAX_WEIGHT = 1024
LIFETIME = 2 * int(BOUND)  # seconds; after a test that was itself killed nothing stays behind
QUICK = Patience(first_wait=0.02, longest_wait=0.1, silence=BOUND, connect=BOUND)
_PACKAGE = str(Path(runner.__file__).parents[2])
_HARMLESS = ("SELECT", "PRAGMA", "BEGIN", "ROLLBACK", "--")
T = TypeVar("T")


class Record:
    """Lines of JSON, in one file over all restarts; what is written outlives SIGKILL."""

    def __init__(self) -> None:
        self._file = -1

    def open(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, kind: str, **values: object) -> None:
        os.write(self._file, f"{json.dumps({'kind': kind, 'at': time.time(), **values})}\n".encode())


class Points:
    """Every moment just before and just after something becomes durable, by name; at `kill_at` the process dies."""

    def __init__(self) -> None:
        self.kill_at: str | None = None
        self._times: Counter[str] = Counter()

    def enter(self, operation: str) -> str | None:
        """The name of a write that is about to happen; None if it is not the package that writes."""
        where = _where()
        if where is None:
            return None
        name = f"{where}: {operation}"
        self._times[name] += 1
        name = f"{name} ({self._times[name]})"
        self._pass(f"{name}: before")
        return name

    def leave(self, name: str | None) -> None:
        if name is not None:
            self._pass(f"{name}: after")

    @contextmanager
    def around(self, operation: str) -> Iterator[None]:
        name = self.enter(operation)
        yield
        self.leave(name)

    def _pass(self, name: str) -> None:
        RECORD.add("point", name=name)
        if name == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


RECORD, POINTS = Record(), Points()


def _where() -> str | None:
    """The package's functions on the stack, up to the task's own, and the stage and the silo that they are about."""
    frames = [frame for frame in _frames(sys._getframe()) if frame.f_code.co_filename.startswith(_PACKAGE)]
    if not frames:
        return None
    inner = list(itertools.takewhile(lambda frame: not frame.f_code.co_flags & inspect.CO_COROUTINE, frames))
    chain = [frame.f_code.co_qualname for frame in [*inner, *frames[len(inner) : len(inner) + 1]]]
    public = [name for name in reversed(chain) if not name.split(".")[-1].startswith("_")] or chain[::-1]
    found = [_local(frames, key) for key in ("trains", "stage", "phase", "silo")]
    return " ".join([*public[:2], *public[2:][-1:], *(value for value in found if value is not None)])


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _local(frames: list[FrameType], key: str) -> str | None:
    """What the innermost function that knows it means by `key`."""
    for frame in frames:
        value = frame.f_locals.get(key)
        if isinstance(value, bool):
            return key if value else None
        if isinstance(value, Enum | str):
            return value.name if isinstance(value, Enum) else value
    return None


class TracedConnection(sqlite3.Connection):
    """SQLite says of each statement that it begins; what it had to say of the last one is over when a call returns."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._open: list[str | None] = []
        self.set_trace_callback(self._begins)

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        return self._over(super().execute(*arguments))

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        return self._over(super().executemany(*arguments))

    def executescript(self, *arguments: Any) -> sqlite3.Cursor:
        return self._over(super().executescript(*arguments))

    def commit(self) -> None:
        self._over(super().commit())

    def _begins(self, statement: str) -> None:
        self._over(None)
        word = statement.split(maxsplit=1)[0].rstrip(";").upper()
        ends = word in ("COMMIT", "END")
        made_before = "IF NOT EXISTS" in statement  # by whoever froze the roster
        if ends or not (self.in_transaction or word.startswith(_HARMLESS) or made_before):
            self._open.append(POINTS.enter(word))

    def _over(self, result: T) -> T:
        while self._open:
            POINTS.leave(self._open.pop())
        return result


def watch_writes() -> None:
    """From now on each durable write of this process is a point."""
    connect: Any = sqlite3.connect
    vars(sqlite3)["connect"] = lambda *arguments, **options: connect(*arguments, **options, factory=TracedConnection)
    for name in ("fsync", "fdatasync", "replace", "rename", "unlink", "remove", "mkdir"):
        vars(os)[name] = _watched(name, getattr(os, name))


def _watched(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*arguments: Any, **options: Any) -> Any:
        gone = name in ("unlink", "remove") and not os.path.lexists(arguments[0])
        there = name == "mkdir" and os.path.lexists(arguments[0])
        if gone or there:
            return write(*arguments, **options)
        with POINTS.around(name):
            return write(*arguments, **options)

    return watched


class RecordedSession(SiloSession):
    """Writes down what it signs: over an `Agree` the names, over an `Upload` the integers under the mask."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sign_silently, self._sign = self._sign, self._sign_and_tell

    def _sign_and_tell(self, data: bytes) -> bytes:
        label = data.split(b"\0", 1)[0].decode().removeprefix("fedclip/v1/")
        ad = self._opening.ad
        integers = self._record.open_vector().tolist() if label == "upload" else None
        names = list(self._uploads) if label == "agree" else None
        RECORD.add("signed", type=label, model=ad.model.hex(), round=ad.round, names=names, integers=integers)
        return self._sign_silently(data)


class RecordedLink(Link):
    """Writes down what it is about to send."""

    async def send(self, attempt: int, stage: str, body: bytes) -> None:
        self._tell(attempt, stage, [body])
        await super().send(attempt, stage, body)

    async def send_if_in_time(self, attempt: int, stage: str, body: bytes) -> None:
        self._tell(attempt, stage, [body])
        await super().send_if_in_time(attempt, stage, body)

    async def send_upload(self, attempt: int, pieces: Callable[[], Iterable[bytes]], length: int) -> bytes:
        self._tell(attempt, "uploads", pieces())
        return await super().send_upload(attempt, pieces, length)

    def _tell(self, attempt: int, stage: str, pieces: Iterable[bytes]) -> None:
        RECORD.add("sent", attempt=attempt, stage=stage, sha256=hashlib.sha256(b"".join(pieces)).hexdigest())


class MoodyTrainer:
    """Another update, and other counts, each time it is asked: a vector that was drawn twice gives itself away."""

    def __init__(self, parameters: int) -> None:
        self._parameters, self._random = parameters, np.random.default_rng()
        self.records = 2 ** int(self._random.integers(3, 10))  # a power of two, so that the update is exact

    def check(self, received: AdapterState) -> None:
        """Nothing is refused."""

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        integers = self._random.integers(-1000, 1000, self._parameters)
        update: npt.NDArray[np.float64] = integers * (STEP * MAX_WEIGHT / self.records)
        return update

    def validate(self, state: AdapterState) -> Counts:
        return Counts(int(self._random.integers(0, 1001)), 1000)


async def run_silo(folder: Path) -> None:
    """As `fedclip-silo train`, with this trainer."""
    identity = Identity.load(folder)
    journal = Journal(folder / "work", identity.epoch_path)
    try:
        async with Client.of(identity, lambda reason, _seconds: _say(reason), QUICK) as client:
            link = RecordedLink(client, folder / "work")
            offer = await link.offer(identity.server)
            terms = Terms.of(offer.contract, offer.roster)
            party, trainer = Party(identity, terms), MoodyTrainer(terms.layout.size)
            await Runner(party, trainer, link, journal, _say).run()
            await save_adapters(link, await fetch_course(link, terms), offer.contract, terms, folder / "work")
    finally:
        journal.close()


async def run_server(folder: Path, port: int) -> None:
    """As `fedclip-agg serve`."""
    stop = asyncio.Event()
    stop_on_signals(stop)
    await serve(Home(folder), "127.0.0.1", port, _say, stop)


def _say(text: str) -> None:
    RECORD.add("said", text=text)


def main(role: str, folder: str, port: str, record: str, *kill_at: str) -> None:
    RECORD.open(Path(record))
    RECORD.add("started")
    POINTS.kill_at = next(iter(kill_at), None)
    signal.alarm(LIFETIME)
    faulthandler.register(signal.SIGUSR1)  # tells on standard error where a process hangs
    vars(runner).update(SiloSession=RecordedSession)
    watch_writes()
    asyncio.run(run_server(Path(folder), int(port)) if role == "server" else run_silo(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
