"""A run in memory: real silo runners and a real aggregator's session, with a link of plain method calls between."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from fedclip_secure.data.dataset import Counts
from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.epoch_file import Epoch
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Asked, Phase
from fedclip_secure.secagg.messages import SumProof
from fedclip_secure.secagg.opening_checks import reopen
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.link import LeftOutError, Link
from fedclip_secure.silo.run.party import Party
from fedclip_secure.silo.run.runner import Runner
from fedclip_secure.transport.messages import OpeningAnswer, SharesAnswer, SharesRequest, WireList, parse
from tests.fakes import Federation
from tests.silo.desk import OPENED
from tests.waiting import BOUND

_TICK = 0.002  # seconds between two looks
Hook = Callable[[int, str], Awaitable[None]]  # attempt, stage: may wait, or raise


@dataclass
class Person:
    """Who signs: what the runner needs of an identity."""

    federation: Federation
    name: str
    signed: list[bytes] = field(default_factory=list)

    def sign(self, data: bytes) -> bytes:
        self.signed.append(data)
        return self.federation.keys[self.name].sign(data)


@dataclass
class FixedTrainer:
    """Always makes the same update, of all coordinates alike; counts how often it is asked."""

    parameters: int
    records: int = 10
    update: float = 0.05
    trained: list[bytes] = field(default_factory=list)  # digests of the models it started from
    validated: list[bytes] = field(default_factory=list)

    def check(self, received: AdapterState) -> None:
        """Nothing is refused."""

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
    sits_out: dict[int, set[str]] = field(default_factory=dict)  # by attempt: joining waits until these have said so
    idle: set[str] = field(default_factory=set)  # who has, in this attempt
    models: dict[bytes, AdapterState] = field(default_factory=dict)
    results: dict[int, list[bytes]] = field(default_factory=dict)
    round: int = 0
    attempt: int = 0
    ends: bool = False  # whether no round follows this one, once its sum is known
    finished: bool = False
    sum_of: Words | None = None  # of the last finished round
    answer: OpeningAnswer | None = None  # in place of an honest one
    asked: dict[int, set[tuple[str, ...]]] = field(default_factory=dict)  # by round: names that it asked to agree to
    kept: dict[tuple[int, str, str], bytes] = field(default_factory=dict)  # by attempt, stage, silo: what arrived
    session_type: type[AggregatorSession] = AggregatorSession

    def __post_init__(self) -> None:
        self.model = self.federation.model
        self.models[self.model.digest] = self.model
        self.open(1)

    def open(self, round_number: int) -> None:
        """Open the next attempt, of this round."""
        self.round, self.attempt = round_number, self.attempt + 1
        self.wire, key = self.federation.opening(round_number, self.attempt, self.model.digest)
        terms = self.federation.terms
        asked = self.asked.setdefault(round_number, set())
        self.session = self.session_type(terms, reopen(terms, self.wire), key, Asked(asked))
        self.idle.clear()
        self.vectors: dict[str, Words] = {}
        self.total: Words | None = None

    def advance(self) -> None:
        """Close the present stage if nobody is waited for; the attempt, if the stage cannot be closed so."""
        session = self.session
        if self._missing() or session.phase is Phase.DONE:
            return
        try:
            session.close()
        except ProtocolError:
            if session.phase < Phase.UNMASK:  # later, shares may be out, and more answers are waited for
                self.open(self.round)
            return
        if session.phase is Phase.AGREE:
            self.asked[self.round].add(tuple(session.uploads))
        if session.phase is Phase.RESULT:
            self.total = session.unmask_sum(self.vectors[name] for name in session.uploads)
            before, self.model = self.model, session.compute_result(self.total, self.model).model
            self.ends = self.federation.terms.ends_with(self.round, before.digest, self.model.digest)
            self.models[self.model.digest] = self.model
        if session.phase > Phase.RESULT:  # `is` would be taken for impossible: close() moves on unseen
            self.results[self.round] = [session.results[name].wire for name in sorted(session.results)]
            self.finished = self.ends
            self.sum_of = self.total
            self.gone.clear()
            if not self.finished:
                self.open(self.round + 1)

    def known(self, attempt: int, stage: str, silo: str, body: bytes) -> bool:
        """Whether this very message arrived before; another one in its place is refused."""
        before = self.kept.get((attempt, stage, silo))
        if before not in (None, body):
            raise ProtocolError("differs", f"{silo} sent another message at this stage before", silo=silo)
        return before is not None

    def _missing(self) -> bool:
        session = self.session
        if session.phase is Phase.JOIN:
            waited_for = self.waits_for.get(self.round, set(self.federation.silos)) - self.gone
            complete = waited_for <= set(session.ads) and self.sits_out.get(self.attempt, set()) <= self.idle
            return not complete or len(session.joinable()) < self.federation.terms.floor
        return bool(session.missing() - self.gone)


def _as_it_is(body: bytes) -> bytes:
    return body


def _let_be(inbox: dict[str, list[bytes]]) -> None:
    del inbox


async def at_once(attempt: int, stage: str) -> None:
    del attempt, stage


@dataclass
class Hold:
    """A hook that keeps a silo at one stage of one attempt for ever."""

    attempt: int
    stage: str
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, attempt: int, stage: str) -> None:
        if (attempt, stage) == (self.attempt, self.stage):
            self.reached.set()
            await asyncio.Event().wait()


@dataclass(frozen=True)
class Leaves:
    """A hook by which a silo leaves an attempt at a stage, as if the server had said so."""

    attempt: int
    stage: str

    async def __call__(self, attempt: int, stage: str) -> None:
        if (attempt, stage) == (self.attempt, self.stage):
            raise LeftOutError("the server closed the stage")


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """As the real link does with the server's refusals."""
    try:
        yield
    except ProtocolError as error:
        if error.code in ("late", "left-out"):
            raise LeftOutError(str(error)) from error
        raise


@dataclass
class MemoryLink:
    """A silo's link. `late` raises LeftOutError at the first message of a stage; `alter` may change shares.

    `before` and `after` are asked around each message that leaves, and before the sum ("sum") is asked for.
    `sent` holds also what never arrived, because `before` or `late` kept it from that.
    """

    hub: Hub
    silo: str
    late: set[tuple[int, str]] = field(default_factory=set)  # (attempt, stage)
    alter: Callable[[bytes], bytes] = _as_it_is  # a SharesRequest
    alter_inbox: Callable[[dict[str, list[bytes]]], None] = _let_be
    before: Hook = at_once
    after: Hook = at_once
    sent: list[tuple[int, str, bytes]] = field(default_factory=list)
    idle: list[bool] = field(default_factory=list)

    async def opening(self, after: int, *, idle: bool) -> OpeningAnswer:
        self.idle.append(idle)
        hub = self.hub
        if idle:
            hub.idle.add(self.silo)
            hub.advance()
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
        await self.before(attempt, stage)
        session = self._session(attempt, stage)
        if not self.hub.known(attempt, stage, self.silo, body):
            with _told_apart():
                self._deliver(session, stage, body)
            self.hub.kept[attempt, stage, self.silo] = body
            self.hub.advance()
        await self.after(attempt, stage)

    async def send_if_in_time(self, attempt: int, stage: str, body: bytes) -> None:
        with contextlib.suppress(LeftOutError):
            await self.send(attempt, stage, body)

    async def send_upload(self, attempt: int, pieces: Callable[[], Iterable[bytes]], length: int) -> None:
        body = b"".join(pieces())
        assert len(body) == length
        self.sent.append((attempt, "uploads", body))
        await self.before(attempt, "uploads")
        session = self._session(attempt, "uploads")
        if not self.hub.known(attempt, "uploads", self.silo, body):
            with _told_apart():
                self._deliver_upload(session, pieces())
            self.hub.kept[attempt, "uploads", self.silo] = body
            self.hub.advance()
        await self.after(attempt, "uploads")

    def _deliver(self, session: AggregatorSession, stage: str, body: bytes) -> None:
        if stage == "key-ads":
            session.receive_key_ad(self.silo, body)
        elif stage == "bundles":
            request = parse(SharesRequest, self.alter(body))
            pairs = {peer: (pair[0], pair[1]) for peer, pair in request.ciphertexts.items()}
            session.receive_bundles(self.silo, request.bundles, pairs)
        elif stage == "complaints":
            session.receive_complaint(self.silo, body)
            self.hub.gone.add(self.silo)
        elif stage == "agrees":
            session.receive_agree(self.silo, body)
        elif stage == "unmasks":
            session.receive_unmask(self.silo, session.open_unmask(self.silo, body))
        else:
            session.receive_result(self.silo, body)

    def _deliver_upload(self, session: AggregatorSession, pieces: Iterable[bytes]) -> None:
        opener, words = session.open_upload(self.silo), b""
        for piece in pieces:
            words += b"".join(opener.feed(piece))
        opener.finish()
        assert opener.header is not None
        session.receive_upload(self.silo, opener.header, hashlib.sha256(words).digest())
        self.hub.vectors[self.silo] = np.frombuffer(words, dtype=np.uint32)

    async def receive(self, attempt: int, stage: str) -> bytes:
        phase, kind, members = {
            "key-ads": (Phase.SHARE, "ads", "ads"),
            "bundles": (Phase.UPLOAD, "bundles", "bundles"),
            "uploads": (Phase.AGREE, "uploads", "uploads"),
            "agrees": (Phase.UNMASK, "agrees", "uploads"),
        }[stage]
        session = await self._closed(attempt, stage, phase)
        if self.silo not in getattr(session, members):
            raise LeftOutError(f"stage {stage!r} closed without {self.silo}")
        listed = getattr(session, kind)
        wires = [listed[name].wire for name in sorted(listed)]
        if stage != "bundles":
            return WireList(messages=wires).encode()
        inbox = {sender: list(pair) for sender, pair in session.inbox(self.silo).items()}
        self.alter_inbox(inbox)
        return SharesAnswer(bundles=wires, inbox=inbox).encode()

    async def sum(self, attempt: int, terms: Terms) -> Words:
        await self.before(attempt, "sum")
        await self._closed(attempt, "sum", Phase.RESULT)
        assert self.hub.total is not None
        return self.hub.total

    async def sum_proof(self, attempt: int) -> SumProof:
        await self.before(attempt, "sum")
        return (await self._closed(attempt, "sum-proof", Phase.RESULT)).sum_proof()

    async def vector(self, attempt: int, silo: str, terms: Terms) -> Words:
        await self._closed(attempt, "sum-proof", Phase.RESULT)
        return self.hub.vectors[silo]

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
    person: Person = field(init=False)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trainer = FixedTrainer(self.hub.federation.parameters)
        self.link = MemoryLink(self.hub, self.name)
        self.person = Person(self.hub.federation, self.name)
        if not self.workdir.exists():
            Epoch().save(self.epoch)  # as `enroll` does
        self.journal = self.open_journal()

    @property
    def workdir(self) -> Path:
        return self.folder / self.name

    @property
    def epoch(self) -> Path:
        return self.folder / f"{self.name}.epoch"

    def open_journal(self, *, recovering: bool = False) -> Journal:
        OPENED.append(Journal(self.workdir, self.epoch, recovering=recovering))
        return OPENED[-1]

    def restart(self) -> None:
        """What the process knew is gone; what is on the disk is read again."""
        self.journal.close()
        self.journal = self.open_journal()

    def runner(self) -> Runner:
        """As a process starts: what it knows is the journal's."""
        party = Party(cast(Identity, self.person), self.hub.federation.terms)
        return Runner(party, self.trainer, cast(Link, self.link), self.journal, self.said.append)

    def sent(self, stage: str, attempt: int) -> list[bytes]:
        """What it sent at this stage of this attempt."""
        return [body for number, name, body in self.link.sent if (number, name) == (attempt, stage)]


def silos(hub: Hub, folder: Path) -> dict[str, Silo]:
    """One for each name in the roster."""
    return {name: Silo(hub, name, folder) for name in hub.federation.silos}


def run_all(parties: Iterable[Silo]) -> None:
    """Run them side by side until all are done."""

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*(party.runner().run() for party in parties))

    asyncio.run(main())


Kill = tuple[Hold, str]  # and its hook: "before" or "after"


def run_with_kills(
    parties: Iterable[Silo], victim: Silo, kills: Iterable[Kill], meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Run them all; `victim` is killed whenever it reaches a hold, and restarted after `meanwhile`."""

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            tasks = [asyncio.create_task(party.runner().run()) for party in parties if party is not victim]
            for hold, when in kills:
                await run_until_killed(victim, hold, when)
                meanwhile()
                victim.restart()
            await asyncio.gather(victim.runner().run(), *tasks)

    asyncio.run(main())


async def run_until_killed(victim: Silo, hold: Hold, when: str) -> None:
    """Run one silo until it reaches the hold, and kill it."""
    setattr(victim.link, when, hold)
    running, reached = asyncio.create_task(victim.runner().run()), asyncio.create_task(hold.reached.wait())
    try:
        await asyncio.wait([running, reached], return_when=asyncio.FIRST_COMPLETED)
        assert not running.done(), running
    finally:
        running.cancel()
        reached.cancel()
        await asyncio.gather(running, reached, return_exceptions=True)
    setattr(victim.link, when, at_once)


def leave_at(parties: Iterable[Silo], victim: Silo, kill: Kill) -> None:
    """Run them until `victim` is killed; then all are, and their journals are closed."""

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            tasks = [asyncio.create_task(party.runner().run()) for party in parties if party is not victim]
            await run_until_killed(victim, *kill)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    for party in parties:
        party.journal.close()
