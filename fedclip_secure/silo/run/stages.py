"""One attempt as a silo goes through it: what arrives and what leaves is journalled between the two.

A restarted silo goes through the stages again with what it had received, and sends the bytes it had
sent: to its peers and to the aggregator it looks like one that was slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.privacy.ledger.receipts import open_receipt
from fedclip_secure.secagg.messages import Complaint, sign_message
from fedclip_secure.secagg.next_model import Outcome
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.sealing import SealedBody
from fedclip_secure.secagg.silo_session import MaskedUpload, Shares, SiloSession, Stage
from fedclip_secure.silo.run.journal import Journal, Step
from fedclip_secure.silo.run.link import LeftOutError, Link
from fedclip_secure.silo.run.party import Party
from fedclip_secure.transport.messages import SharesAnswer, SharesRequest, WireList, parse

Receive = Callable[[], Awaitable[bytes]]
Make = Callable[[bytes, bytes | None], bytes]  # from what arrived, and what was sent before a restart: what to send
Send = Callable[[bytes], Awaitable[None]]


class Stages:
    """Takes `session` through attempt `number`; `saved` are the steps that were taken before a restart."""

    def __init__(
        self,
        party: Party,
        session: SiloSession,
        link: Link,
        journal: Journal,
        *,
        number: int,
        saved: Mapping[Stage, Step],
    ) -> None:
        self._party, self._session, self._link, self._journal = party, session, link, journal
        self._number, self._saved = number, saved
        self._last = max(saved, default=Stage.OPENED)
        self._masked: tuple[MaskedUpload, SealedBody] | None = None

    async def run(self, old: AdapterState) -> Outcome:
        """Stages 0 to 5, from the model `old`. From `agree` on others can finish without this silo.

        Raises:
            LeftOutError: the attempt goes on, or ended, without this silo.
            ProtocolError: the server broke a rule.
        """
        await self._go(Stage.JOINED, _nothing, self._join, self._sender("key-ads"))
        await self._go(Stage.SHARED, self._receiver("key-ads"), self._share, self._sender("bundles"))
        try:
            await self._go(Stage.UPLOADED, self._receiver("bundles"), self._upload, self._send_upload)
        except ProtocolError as error:
            await self._complain(error)
            raise
        self._masked = None
        await self._go(Stage.AGREED, self._receiver("uploads"), self._agree, self._sender_in_time("agrees"))
        await self._go(Stage.RELEASED, self._receiver("agrees"), self._unmask, self._sender_in_time("unmasks"))
        total = await self._sum()
        wire, outcome = await asyncio.to_thread(self._session.result, total, old)
        self._journal.step(Stage.DONE, Step(b"", wire))
        await self._link.send_if_in_time(self._number, "results", wire)
        return outcome

    async def _go(self, stage: Stage, receive: Receive, make: Make, send: Send) -> None:
        step = self._saved.get(stage)
        if step is None:
            received = await receive()
            step = Step(received, await asyncio.to_thread(make, received, None))
            self._journal.step(stage, step, self._session.agreed if stage is Stage.AGREED else ())
        else:
            await asyncio.to_thread(make, step.received, step.sent)
        if stage >= self._last:  # what was sent earlier has arrived: the aggregator answered it
            await send(step.sent)

    def _join(self, received: bytes, sent: bytes | None) -> bytes:
        del received, sent
        return self._session.join()

    def _share(self, received: bytes, sent: bytes | None) -> bytes:
        drawn = None if sent is None else _shares(parse(SharesRequest, sent))
        shares = self._session.share(parse(WireList, received).messages, drawn)
        ciphertexts = {peer: list(pair) for peer, pair in shares.ciphertexts.items()}
        return SharesRequest(bundles=shares.bundles, ciphertexts=ciphertexts).encode()

    def _upload(self, received: bytes, sent: bytes | None) -> bytes:
        answer = parse(SharesAnswer, received)
        inbox = {peer: (pair[0], pair[1]) for peer, pair in answer.inbox.items()}
        masked = self._session.upload(answer.bundles, inbox)
        if sent is None:
            sealed = self._session.seal_upload(masked)
            sent = canonical.encode([masked.header, sealed.head, sealed.key])
        header, head, key = canonical.decode(sent)
        if header != masked.header:  # sealing another vector under this key would repeat its nonces
            raise LeftOutError("the vector in this silo's journal is not the one that it sent")
        self._masked = masked, SealedBody(head, key)
        return sent

    def _agree(self, received: bytes, sent: bytes | None) -> bytes:
        del sent
        return self._session.agree(parse(WireList, received).messages)

    def _unmask(self, received: bytes, sent: bytes | None) -> bytes:
        del sent
        return self._session.unmask(parse(WireList, received).messages)

    async def _sum(self) -> Words:
        link, number, terms = self._link, self._number, self._party.terms
        if not terms.verify_sum:
            return await link.sum(number, terms)
        check = self._session.check_sum(await link.sum_proof(number))
        for name in check.survivors:
            check.add(name, await link.vector(number, name, terms))
        return await asyncio.to_thread(check.total)

    def _receiver(self, stage: str) -> Receive:
        return lambda: self._link.receive(self._number, stage)

    def _sender(self, stage: str) -> Send:
        return lambda body: self._link.send(self._number, stage, body)

    def _sender_in_time(self, stage: str) -> Send:
        return lambda body: self._link.send_if_in_time(self._number, stage, body)

    async def _send_upload(self, sent: bytes) -> None:
        del sent  # how the body was sealed; the body is too large for the journal
        assert self._masked is not None  # noqa: S101 - set by _upload
        masked, sealed = self._masked
        receipt = await self._link.send_upload(
            self._number, lambda: sealed.pieces(masked.body), sealed.length(masked.body)
        )
        if self._party.terms.private:
            self._keep(receipt)

    def _keep(self, wire: bytes) -> None:
        """Without a receipt for what was spent a stranger could not tell this silo's account from a shortened one."""
        terms = self._party.terms
        receipt = open_receipt(wire, dict(terms.roster.members)[AGGREGATOR])
        told = (receipt.plan, receipt.roster, receipt.silo, receipt.attempt, receipt.head)
        ours = (terms.plan, terms.roster.digest, self._party.identity.name, self._number, self._session.ledger)
        if told != ours or receipt.round != self._session.round:
            raise ProtocolError("receipt", "the server's receipt is for another upload than this silo's")
        self._journal.add_receipt(receipt, wire)

    async def _complain(self, error: ProtocolError) -> None:
        """A peer's fault is told to the server, and the next attempt is waited for; any other fault is the server's."""
        if error.code != "bundle" or error.silo is None:
            return
        identity, federation = self._party.identity, self._party.terms.federation
        complaint = Complaint(transcript=self._session.transcript, accused=error.silo, code=error.code)
        wire = sign_message(complaint, federation, identity.name, identity.sign)
        await self._link.send(self._number, "complaints", wire)
        raise LeftOutError(f"complained to the coordinator: {error}") from error


async def _nothing() -> bytes:
    return b""


def _shares(request: SharesRequest) -> Shares:
    return Shares(request.bundles, {peer: (pair[0], pair[1]) for peer, pair in request.ciphertexts.items()})
