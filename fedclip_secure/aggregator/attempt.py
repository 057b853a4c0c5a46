"""The present attempt: its session, fed from the store, and the one way for a message into both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.aggregator.store import AttemptRow, Store
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Asked, Phase
from fedclip_secure.secagg.keys import upload_info
from fedclip_secure.secagg.opening_checks import Opening, reopen
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.sealing import BodyOpener, SealKey
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.transport.messages import SharesRequest, parse

_TRIES = 2  # attempts for silos that agreed to names before, ahead of others who could go on without them


@dataclass(frozen=True, slots=True)
class LiveAttempt:
    """An attempt that is going on. Every message is in the store before `accept` returns."""

    row: AttemptRow
    opening: Opening
    session: AggregatorSession
    store: Store

    @classmethod
    def restore(cls, terms: Terms, store: Store, row: AttemptRow) -> LiveAttempt:
        """Feed a session with what the store holds of the attempt: nothing, just after it was opened."""
        opening = reopen(terms, row.opening)
        asked = Asked(store.asked(row.round), patient=store.tries_since_asked(row.round) < _TRIES)
        session = AggregatorSession(terms, opening, SealKey(row.seal_private), asked)
        live = cls(row, opening, session, store)
        for phase in (Phase.JOIN, Phase.SHARE, Phase.UPLOAD, Phase.AGREE, Phase.UNMASK):
            for silo, body in store.messages(row.number, phase):
                live._receive(phase, silo, body)
            if row.closed > phase:
                live.session.close()
        return live

    def restore_results(self) -> None:
        """Feed the session the results it had, once it knows what they must say."""
        for silo, body in self.store.messages(self.row.number, Phase.RESULT):
            self._receive(Phase.RESULT, silo, body)

    def accept(self, phase: Phase, silo: str, body: bytes) -> None:
        """Check and keep a message of `silo`; a repeat is accepted and changes nothing.

        Raises:
            ProtocolError: what the session or the store says; the message is not kept.
        """
        received = hashlib.sha256(body).digest()
        if self.store.known(self.row.number, phase, silo, received):
            return
        kept = self.session.open_unmask(silo, body) if phase is Phase.UNMASK else body
        with self._received(phase, silo, kept):
            self.store.add_message(self.row.number, phase, silo, kept, received)

    def open_upload(self, silo: str, words: int) -> BodyOpener:
        """What opens the sealed vector of `silo`: also a repeat of it, after the stage has closed."""
        if silo not in self.session.uploads:
            return self.session.open_upload(silo)
        return BodyOpener(SealKey(self.row.seal_private), 4 * words, *upload_info(self.session.transcript2, silo))

    def accept_upload(self, silo: str, header: bytes, vector: bytes, arrived: Path) -> None:
        """Check and keep an upload whose words lie at `arrived`, synced, with SHA-256 `vector`."""
        body = vector + header
        received = hashlib.sha256(body).digest()
        if self.store.known(self.row.number, Phase.UPLOAD, silo, received):
            return
        with self._received(Phase.UPLOAD, silo, body):
            arrived.replace(self.store.blobs.vector_path(vector))
            self.store.blobs.sync_vectors()
            self.store.add_message(self.row.number, Phase.UPLOAD, silo, body, received)

    def close_phase(self) -> None:
        """End the present phase, in the session and in the store.

        Raises:
            ProtocolError: `floor`.
        """
        phase = self.session.phase
        self.session.close()
        try:
            self.store.close_phase(self.row.number)
        except BaseException:
            self.session.phase = phase  # nobody may see a list that a restarted server would not know
            raise

    def vectors(self) -> Iterator[Words]:
        """The survivors' masked vectors, one at a time."""
        for message in self.session.uploads.values():
            yield self.store.blobs.vector(message.body.vector)

    @contextmanager
    def _received(self, phase: Phase, silo: str, body: bytes) -> Iterator[None]:
        """Hand a message to the session; take it back if the disk refuses it.

        Else the phase could close over a message that a restarted server would not know.
        """
        self._receive(phase, silo, body)
        try:
            yield
        except BaseException:
            self.session.take_back(phase, silo)
            raise

    def _receive(self, phase: Phase, silo: str, body: bytes) -> None:
        session = self.session
        if phase is Phase.SHARE:
            request = parse(SharesRequest, body)
            ciphertexts = {peer: (pair[0], pair[1]) for peer, pair in request.ciphertexts.items()}
            session.receive_bundles(silo, request.bundles, ciphertexts)
        elif phase is Phase.UPLOAD:
            session.receive_upload(silo, body[32:], body[:32])
        else:
            receive = {
                Phase.JOIN: session.receive_key_ad,
                Phase.AGREE: session.receive_agree,
                Phase.UNMASK: session.receive_unmask,
                Phase.RESULT: session.receive_result,
            }
            receive[phase](silo, body)


def inbox_of(session: AggregatorSession, silo: str) -> dict[str, list[bytes]]:
    """The ciphertexts for `silo` as they travel."""
    return {sender: list(pair) for sender, pair in session.inbox(silo).items()}
