"""The two ways of a body: pieces that go out and are counted, pieces that come in and are written."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import BinaryIO

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError

Chunks = Callable[[], AsyncIterator[bytes]]  # called once for each try, so that a body can be sent again


@dataclass(frozen=True, slots=True)
class Heard:
    """Puts off the end of a try."""

    clock: asyncio.Timeout
    silence: float  # seconds

    def __call__(self) -> None:
        """To be called for each piece that goes either way."""
        with contextlib.suppress(RuntimeError):  # the time is up already
            self.clock.reschedule(asyncio.get_running_loop().time() + self.silence)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A body of exactly `length` bytes."""

    chunks: Chunks
    length: int

    async def pieces(self, heard: Heard) -> AsyncIterator[bytes]:
        """The chunks.

        Raises:
            DataError: they are more or fewer bytes than announced; else both ends would wait for the rest.
        """
        sent = 0
        async for chunk in self.chunks():
            heard()
            sent += len(chunk)
            yield chunk
        if sent != self.length:
            raise DataError(f"{sent} bytes were there to send, {self.length} were announced; start again")


@dataclass(frozen=True, slots=True)
class Sink:
    """Where the body of a good answer goes; `name` is for messages."""

    file: BinaryIO
    name: str

    def restart(self) -> None:
        """Forget what an earlier try wrote."""
        self.file.seek(0)
        self.file.truncate()

    def write(self, chunk: bytes) -> None:
        """Add a piece.

        Raises:
            DataError: the disk refuses. It must not pass for a fault of the network, which is tried again.
        """
        try:
            self.file.write(chunk)
        except OSError as error:
            raise DataError(refused(error, self.name, "be written", "start again")) from error


def in_one_piece(body: bytes) -> Outgoing:
    """A body that is in memory."""

    async def chunks() -> AsyncIterator[bytes]:
        yield body

    return Outgoing(chunks, len(body))
