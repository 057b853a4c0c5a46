"""The aggregator's routes as a silo calls them: typed answers, long-polls repeated, refusals told apart."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import numpy as np

from fedclip_secure.config.lock import Contract
from fedclip_secure.disk import telling
from fedclip_secure.errors import FedClipError, ModelError, ProtocolError, TransportError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.messages import SumProof, decode_body
from fedclip_secure.secagg.ring import WORD, Words
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted
from fedclip_secure.transport.client import Client
from fedclip_secure.transport.messages import OpeningAnswer, WireList, parse

_LEFT = ("late", "left-out", "ended")  # the attempt goes on, or ended, without this silo
_PRESENCE = 5.0  # seconds between two signs of life
_MODEL_SLACK = 2**20  # bytes of safetensors header beside the values


class LeftOutError(Exception):
    """This attempt is over for this silo; another will come."""


@dataclass(frozen=True, slots=True)
class Link:
    """One silo's connection to its aggregator.

    What has the size of the model comes through a file in `folder`, one at a time. That is the workdir: it has room
    for adapters and belongs to this process alone, while a system's folder for temporary files often lies in memory.
    """

    client: Client
    folder: Path

    async def offer(self, source: str) -> Accepted:
        """Contract and roster as the server has them."""
        contract = await self.client.get("/v1/contract")
        roster = await self.client.get("/v1/roster")
        return Accepted(Contract.decode(contract.body, source), Roster.decode(roster.body))

    async def file(self, sha256: str) -> bytes:
        """A file that the lock names.

        Raises:
            TrustError: the server sent another.
        """
        data = (await self.client.get(f"/v1/files/{sha256}")).body
        if hashlib.sha256(data).hexdigest() != sha256:
            raise TrustError(f"the server sent another file than the lock's sha256 {sha256}; tell the coordinator")
        return data

    async def model(self, digest: bytes, terms: Terms) -> AdapterState:
        """The model of this digest.

        Raises:
            ModelError: the server sent another.
        """
        limit = 4 * terms.layout.size + _MODEL_SLACK
        async with self._arrived(f"/v1/models/{digest.hex()}", limit) as file:
            state = AdapterState.from_file(file, terms.layout, "the server's model")
        if state.digest != digest:
            raise ModelError(f"the server sent another model than {digest.hex()}; tell the coordinator")
        return state

    async def opening(self, after: int, *, idle: bool) -> OpeningAnswer:
        """What to do after attempt `after`; takes up to a long-poll."""
        answer = await self.client.get("/v1/opening", params={"after": str(after), "idle": str(int(idle))})
        return parse(OpeningAnswer, answer.body)

    async def results(self, round_number: int) -> list[bytes]:
        """The signed results of a finished round."""
        return parse(WireList, (await self.client.get(f"/v1/rounds/{round_number}/results")).body).messages

    async def receive(self, attempt: int, stage: str) -> bytes:
        """The list of a stage, once it is closed: a `WireList`, or of stage `bundles` a `SharesAnswer`."""
        return await self._poll(f"/v1/attempts/{attempt}/{stage}")

    async def sum_proof(self, attempt: int) -> SumProof:
        """With `verify_sum`: what the aggregator took off the sum, once it has."""
        return decode_body(SumProof, await self._poll(f"/v1/attempts/{attempt}/sum-proof"))

    async def vector(self, attempt: int, silo: str, terms: Terms) -> Words:
        """With `verify_sum`: the masked vector of a survivor.

        Raises:
            ProtocolError: `length`.
        """
        return await self._words(f"/v1/attempts/{attempt}/vectors/{silo}", f"the vector of {silo}", terms)

    async def sum(self, attempt: int, terms: Terms) -> Words:
        """The unmasked sum, once it is there.

        Raises:
            ProtocolError: `length`.
        """
        return await self._words(f"/v1/attempts/{attempt}/sum", "the sum", terms)

    async def send(self, attempt: int, stage: str, body: bytes) -> None:
        """Hand in one message of a stage."""
        try:
            await self.client.post(f"/v1/attempts/{attempt}/{stage}", body)
        except TransportError as error:
            raise _left(error) from error

    async def send_if_in_time(self, attempt: int, stage: str, body: bytes) -> None:
        """Hand in a message without which the others go on: too late is no harm."""
        try:
            await self.client.post(f"/v1/attempts/{attempt}/{stage}", body)
        except TransportError as error:
            if error.code not in ("late", "ended"):
                raise _left(error) from error

    async def receipt(self) -> bytes | None:
        """With privacy: the newest receipt that the server has for an upload of this silo."""
        return (await self.client.get("/v1/receipt")).body or None

    async def send_upload(self, attempt: int, pieces: Callable[[], Iterable[bytes]], length: int) -> bytes:
        """Stage 2: the sealed masked vector, `length` bytes; each try asks for the `pieces` anew.

        Returns the receipt, where the plan has privacy.
        """

        async def chunks() -> AsyncIterator[bytes]:
            for piece in pieces():
                yield piece

        try:
            return (await self.client.put_stream(f"/v1/attempts/{attempt}/uploads", chunks, length)).body
        except TransportError as error:
            raise _left(error) from error

    async def _poll(self, path: str) -> bytes:
        """Repeat a long-poll until it answers."""
        while True:
            try:
                answer = await self.client.get(path)
            except TransportError as error:
                raise _left(error) from error
            if answer.status == 200:
                return answer.body

    async def _words(self, path: str, name: str, terms: Terms) -> Words:
        """Words (terms.vector.words,) that a long-poll answers with, read-only, mapped from a file without a name."""
        length = 4 * terms.vector.words
        try:
            async with self._arrived(path, length) as file:
                if file.stat().st_size != length:
                    raise ProtocolError("length", f"{name} has {file.stat().st_size} bytes, the plan's vector {length}")
                with telling(file):
                    return np.asarray(np.memmap(file, dtype=WORD, mode="r"), dtype=np.uint32)
        except TransportError as error:
            if error.status == HTTPStatus.NOT_FOUND:  # t others were faster, and it was removed
                raise LeftOutError(f"{name} is not there any more") from error
            raise _left(error) from error

    @asynccontextmanager
    async def _arrived(self, path: str, limit: int) -> AsyncIterator[Path]:
        """What the server answers with, once it does, in a file that is removed when the block ends."""
        file = self.folder / "arrived"
        try:
            while not await self.client.download(path, file, limit):
                pass
            yield file
        finally:
            with telling(file, "be removed"):
                file.unlink(missing_ok=True)


@asynccontextmanager
async def present(link: Link, after: int) -> AsyncIterator[None]:
    """Show signs of life while something else takes long, so that a joining round waits for this silo."""

    async def signs() -> None:
        while True:
            with contextlib.suppress(FedClipError):  # what is wrong shows when that something is done
                await link.opening(after, idle=False)
            await asyncio.sleep(_PRESENCE)

    task = asyncio.create_task(signs())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])  # and not `await task`: its cancellation could not be told from this task's own


def _left(error: TransportError) -> Exception:
    if error.code == "early":  # this silo has seen the stage before it closed
        return TrustError(f"{error}: the coordinator's state was restored from an older backup; tell the coordinator")
    return LeftOutError(str(error)) if error.code in _LEFT else error
