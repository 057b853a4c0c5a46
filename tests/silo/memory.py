"""A run in memory: real silo runners and a real aggregator's session, with a link of plain method calls between."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from fedclip_secure.data.dataset import Counts
from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Phase
from fedclip_secure.secagg.messages import ServerAd, base_hash, open_message
from fedclip_secure.secagg.opening import Opening
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.silo_session import Shares
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.journal import Journal
from fedclip_secure.silo.link import LeftOutError, Link
from fedclip_secure.silo.runner import Party, Runner
from fedclip_secure.transport.messages import OpeningAnswer, SharesAnswer
from tests.fakes import Federation

_TICK = 0.002  # seconds between two looks


@dataclass
class Person:
    """Who signs: what the runner needs of an identity."""

    federation: Federation
    name: str

    def sign(self, data: bytes) -> bytes:
        return self.federation.keys[self.name].sign(data)


@dataclass
class FixedTrainer:
    """Always makes the same update; counts how often it is asked."""

    parameters: int
    records: int = 10
    update: float = 0.05
    trained: list[bytes] = field(default_factory=list)  # digests of the models it started from
    validated: list[bytes] = field(default_factory=list)

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        self.trained.append(received.digest)
        return np.full(self.parameters, self.update)

    def validate(self, state: AdapterState) -> Counts:
        self.validated.append(state.digest)
        return Counts(len(self.validated), 7)


@dataclass
class Hub:
    """The server's part: opens attempts, closes a stage when all that it waits for have answered."""

    federation: Federation
    waits_for: dict[int, set[str]] = field(default_factory=dict)  # by round, at joining; default: all silos
    gone: set[str] = field(default_factory=set)  # in this round no stage waits for them
    models: dict[bytes, AdapterState] = field(default_factory=dict)
    results: dict[int, list[bytes]] = field(default_factory=dict)
    round: int = 0
    attempt: int = 0
    finished: bool = False
    sum_of: Words | None = None  # of the last finished round
    answer: OpeningAnswer | None = None  # in place of an honest one

    def __post_init__(self) -> None:
        self.model = self.federation.model
        self.models[self.model.digest] = self.model
        self.open(1)

    def open(self, round_number: int) -> None:
        """Open the next attempt, of this round."""
        self.round, self.attempt = round_number, self.attempt + 1
        self.wire, key = self.federation.opening(round_number, self.attempt, self.model.digest)
        terms = self.federation.terms
        ad = open_message(self.wire, ServerAd, terms.federation, terms.roster).body
        self.session = AggregatorSession(terms, Opening(ad, base_hash(ad)), key)
        self.vectors: dict[str, Words] = {}
        self.total: Words | None = None

    def advance(self) -> None:
        """Close the present stage if nobody is waited for."""
        session = self.session
        if session.phase is Phase.JOIN:
            missing = self.waits_for.get(self.round, set(self.federation.silos)) - set(session.ads) - self.gone
        else:
            missing = session.missing() - self.gone
        if missing or session.phase is Phase.DONE:
            return
        session.close()
        if session.phase is Phase.RESULT:
            self.total = session.unmask_sum(self.vectors[name] for name in session.uploads)
            self.model = session.compute_result(self.total, self.model).model
            self.models[self.model.digest] = self.model
        if session.phase > Phase.RESULT:  # `is` would be taken for impossible: close() moves on unseen
            self.results[self.round] = [session.results[name].wire for name in sorted(session.results)]
            self.finished = self.round == self.federation.terms.rounds
            self.sum_of = self.total
            self.gone.clear()
            if not self.finished:
                self.open(self.round + 1)


def _as_it_is(shares: Shares) -> Shares:
    return shares


def _let_be(inbox: dict[str, list[bytes]]) -> None:
    del inbox


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """As the real link does with the server's refusals."""
    try:
        yield
    except ProtocolError as error:
        if error.code in ("late", "early", "left-out"):
            raise LeftOutError(str(error)) from error
        raise


@dataclass
class MemoryLink:
    """A silo's link. `late` raises LeftOutError at the first message of a stage; `alter` may change shares."""

    hub: Hub
    silo: str
    late: set[tuple[int, str]] = field(default_factory=set)  # (attempt, stage)
    alter: Callable[[Shares], Shares] = _as_it_is
    alter_inbox: Callable[[dict[str, list[bytes]]], None] = _let_be
    sent: list[tuple[int, str, bytes]] = field(default_factory=list)
    idle: list[bool] = field(default_factory=list)

    async def opening(self, after: int, *, idle: bool) -> OpeningAnswer:
        self.idle.append(idle)
        hub = self.hub
        while True:
            if hub.answer is not None:
                return hub.answer
            if hub.finished:
                return OpeningAnswer(state="finished")
            if hub.attempt > after and hub.session.phase is Phase.JOIN:
                before = hub.results.get(hub.round - 1, [])
                return OpeningAnswer(state="open", opening=hub.wire, attempt=hub.attempt, results=before)
            await asyncio.sleep(_TICK)

    async def model(self, digest: bytes, terms: Terms) -> AdapterState:
        return self.hub.models[digest]

    async def results(self, round_number: int) -> list[bytes]:
        return self.hub.results[round_number]

    async def send(self, attempt: int, stage: str, body: bytes) -> None:
        self.sent.append((attempt, stage, body))
        session = self._session(attempt, stage)
        with _told_apart():
            if stage == "key-ads":
                session.receive_key_ad(self.silo, body)
            elif stage == "complaints":
                session.receive_complaint(self.silo, body)
                self.hub.gone.add(self.silo)
            elif stage == "agrees":
                session.receive_agree(self.silo, body)
            elif stage == "unmasks":
                session.receive_unmask(self.silo, session.open_unmask(self.silo, body))
            else:
                session.receive_result(self.silo, body)
        self.hub.advance()

    async def send_if_in_time(self, attempt: int, stage: str, body: bytes) -> None:
        await self.send(attempt, stage, body)

    async def send_shares(self, attempt: int, shares: Shares) -> None:
        shares = self.alter(shares)
        self.sent.append((attempt, "bundles", shares.bundles))
        session = self._session(attempt, "bundles")
        with _told_apart():
            session.receive_bundles(self.silo, shares.bundles, shares.ciphertexts)
        self.hub.advance()

    async def send_upload(self, attempt: int, pieces: Iterable[bytes]) -> None:
        session = self._session(attempt, "uploads")
        with _told_apart():
            opener, words = session.open_upload(self.silo), b""
        for piece in pieces:
            self.sent.append((attempt, "uploads", piece))
            words += b"".join(opener.feed(piece))
        opener.finish()
        assert opener.header is not None
        session.receive_upload(self.silo, opener.header, hashlib.sha256(words).digest())
        self.hub.vectors[self.silo] = np.frombuffer(words, dtype=np.uint32)
        self.hub.advance()

    async def messages(self, attempt: int, stage: str) -> list[bytes]:
        kinds = {
            "key-ads": (Phase.SHARE, "ads"),
            "uploads": (Phase.AGREE, "uploads"),
            "agrees": (Phase.UNMASK, "agrees"),
        }
        phase, kind = kinds[stage]
        session = await self._closed(attempt, stage, phase)
        listed = getattr(session, kind)
        return [listed[name].wire for name in sorted(listed)]

    async def shares(self, attempt: int) -> SharesAnswer:
        session = await self._closed(attempt, "shares", Phase.UPLOAD)
        inbox = {sender: list(pair) for sender, pair in session.inbox(self.silo).items()}
        self.alter_inbox(inbox)
        return SharesAnswer(bundles=[session.bundles[name].wire for name in sorted(session.bundles)], inbox=inbox)

    async def sum(self, attempt: int, terms: Terms) -> Words:
        await self._closed(attempt, "sum", Phase.RESULT)
        assert self.hub.total is not None
        return self.hub.total

    def _session(self, attempt: int, stage: str) -> AggregatorSession:
        if attempt != self.hub.attempt or (attempt, stage) in self.late:
            raise LeftOutError(f"attempt {attempt} has ended")
        return self.hub.session

    async def _closed(self, attempt: int, stage: str, phase: Phase) -> AggregatorSession:
        session = self._session(attempt, stage)
        while session.phase < phase:
            await asyncio.sleep(_TICK)
            self._session(attempt, stage)
        return session


@dataclass
class Silo:
    """One runner with all that it needs."""

    hub: Hub
    name: str
    folder: Path
    trainer: FixedTrainer = field(init=False)
    link: MemoryLink = field(init=False)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trainer = FixedTrainer(self.hub.federation.parameters)
        self.link = MemoryLink(self.hub, self.name)
        self.journal = Journal(self.folder / self.name / "journal.sqlite")

    def runner(self) -> Runner:
        """As a process starts: what it knows is the journal's."""
        person = cast(Identity, Person(self.hub.federation, self.name))
        party = Party(person, self.hub.federation.terms)
        return Runner(party, self.trainer, cast(Link, self.link), self.journal, self.said.append)


def silos(hub: Hub, folder: Path) -> dict[str, Silo]:
    """One for each name in the roster."""
    return {name: Silo(hub, name, folder) for name in hub.federation.silos}


def run_all(parties: Iterable[Silo], seconds: float = 20) -> None:
    """Run them side by side until all are done."""

    async def main() -> None:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(party.runner().run() for party in parties))

    asyncio.run(main())
