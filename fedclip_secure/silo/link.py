"""The aggregator's routes as a silo calls them: typed answers, long-polls repeated, refusals told apart."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from fedclip_secure.config.lock import Contract
from fedclip_secure.errors import FedClipError, ModelError, ProtocolError, TransportError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.ring import WORD, Words
from fedclip_secure.secagg.silo_session import Shares
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.pins import Accepted
from fedclip_secure.transport.client import Client
from fedclip_secure.transport.messages import OpeningAnswer, SharesAnswer, SharesRequest, WireList, parse

_LEFT = ("late", "left-out", "ended", "early")  # the attempt goes on, or ended, without this silo
_PRESENCE = 5.0  # seconds between two signs of life
_MODEL_SLACK = 2**20  # bytes of safetensors header beside the values


class LeftOutError(Exception):
    """This attempt is over for this silo; another will come."""


@dataclass(frozen=True, slots=True)
class Link:
    """One silo's connection to its aggregator."""

    client: Client

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
        data = (await self.client.get(f"/v1/models/{digest.hex()}", limit=limit)).body
        state = AdapterState.from_safetensors(data, terms.layout, "the server's model")
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

    async def messages(self, attempt: int, stage: str) -> list[bytes]:
        """The list of a stage, once it is closed."""
        return parse(WireList, await self._poll(f"/v1/attempts/{attempt}/{stage}")).messages

    async def shares(self, attempt: int) -> SharesAnswer:
        """U2 and this silo's inbox, once sharing is closed."""
        return parse(SharesAnswer, await self._poll(f"/v1/attempts/{attempt}/bundles"))

    async def sum(self, attempt: int, terms: Terms) -> Words:
        """The unmasked sum, once it is there.

        Raises:
            ProtocolError: `length`.
        """
        body = await self._poll(f"/v1/attempts/{attempt}/sum", limit=4 * terms.vector.words)
        if len(body) != 4 * terms.vector.words:
            raise ProtocolError("length", f"the sum has {len(body)} bytes, the plan's vector {4 * terms.vector.words}")
        return np.frombuffer(body, dtype=WORD).astype(np.uint32, copy=False)

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

    async def send_shares(self, attempt: int, shares: Shares) -> None:
        """Stage 1."""
        ciphertexts = {peer: list(pair) for peer, pair in shares.ciphertexts.items()}
        request = SharesRequest(bundles=shares.bundles, ciphertexts=ciphertexts)
        await self.send(attempt, "bundles", request.encode())

    async def send_upload(self, attempt: int, pieces: Iterable[bytes]) -> None:
        """Stage 2: the sealed masked vector; a retry sends the same bytes."""
        kept = list(pieces)

        async def chunks() -> AsyncIterator[bytes]:
            for piece in kept:
                yield piece

        try:
            await self.client.put_stream(f"/v1/attempts/{attempt}/uploads", chunks, sum(map(len, kept)))
        except TransportError as error:
            raise _left(error) from error

    async def _poll(self, path: str, limit: int | None = None) -> bytes:
        """Repeat a long-poll until it answers."""
        while True:
            try:
                answer = await (self.client.get(path) if limit is None else self.client.get(path, limit=limit))
            except TransportError as error:
                raise _left(error) from error
            if answer.status == 200:
                return answer.body


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
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _left(error: TransportError) -> Exception:
    return LeftOutError(str(error)) if error.code in _LEFT else error
