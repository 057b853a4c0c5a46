"""A coordinator's folder with enrolled silos, its real server over mutual TLS, and silos that run in the test's loop.

Steps and updates are powers of two, so that every integer is exact and the models can be foretold bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import shutil
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml

import fedclip_secure.aggregator.serve as server_module
from fedclip_secure.aggregator.enrolment import enrol
from fedclip_secure.aggregator.home import Home, freeze, init_home, invite
from fedclip_secure.aggregator.rounds import Rounds
from fedclip_secure.aggregator.serve import serve
from fedclip_secure.aggregator.status import RunStatus, read_status
from fedclip_secure.aggregator.store import Store
from fedclip_secure.config.lock import Contract, ExternalEncoder, FederationLock, Parameter, write_lock
from fedclip_secure.data.dataset import Counts
from fedclip_secure.errors import TransportError
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.pki.authority import load_authority
from fedclip_secure.pki.certificates import parse_certificate
from fedclip_secure.pki.identity import Enrolment, Identity, create_key, signing_request
from fedclip_secure.pki.invitation import Invitation
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.opening_checks import Position, check_opening
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.silo_session import MaskedUpload, ModelRecord, SiloSession
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.link import Link
from fedclip_secure.silo.run.party import Party
from fedclip_secure.silo.run.runner import Runner
from fedclip_secure.transport.client import Client, Patience
from fedclip_secure.transport.messages import EnrolRequest, OpeningAnswer, SharesAnswer, SharesRequest, WireList, parse
from tests.waiting import BOUND, until

NAMES = tuple(f"lab-{letter}" for letter in "abcdefghij")
QUICK = Patience(first_wait=0.02, longest_wait=0.1, silence=BOUND, connect=BOUND)
ONCE = Patience(tries=1, silence=BOUND, connect=BOUND)
_TICK = 0.05  # seconds between two looks at who is still at work
STEP = 2.0**-30
MAX_WEIGHT = 1024
PARAMETERS = 8
STAGES = ("key-ads", "bundles", "uploads", "agrees", "unmasks", "results")
Before = Callable[[int, str], Awaitable[None]]  # attempt, stage: called before a silo sends; may wait, or raise


class VanishedError(Exception):
    """A silo is gone for good."""


class PatientRounds(Rounds):
    """Its deadlines run only while none is missing who is still at work: no silo is dropped for a busy machine."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._site, self._driver = _SERVED.get(), asyncio.current_task()

    async def wait(self, until: Callable[[], bool], seconds: float | None) -> bool:
        """Of the run itself; whoever asks for a list is answered as ever."""
        if seconds is None or self.live is None or asyncio.current_task() is not self._driver:
            return await super().wait(until, seconds)
        joining, left = self.live.session.phase is Phase.JOIN, seconds
        # Else a round could open without a silo that starts a little later than the others.
        complete = (lambda: until() and not self._at_work()) if joining else until
        while not await super().wait(complete, _TICK):
            left = seconds if self._at_work() else left - _TICK
            if left <= 0 or self._stopping:
                return until()
        return True

    def _at_work(self) -> bool:
        """Whether an answer of this stage will come."""
        assert self.live is not None
        session = self.live.session
        joins = session.phase is Phase.JOIN
        missing = set(self.terms.roster.silos) - set(session.ads) - self.left_out() if joins else session.missing()
        return any(self._site.at_work(name, self.live.row.number) for name in missing)


_SERVED: ContextVar[Site] = ContextVar("the site whose server is starting")


@dataclass
class Site:
    """A federation on this machine. `port` is the server's; `said` is what servers have told."""

    home: Home
    port: int
    identities: dict[str, Identity] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    silos: Silos | None = None  # that take part now
    hands: dict[str, Hand] = field(default_factory=dict)  # as here
    contract: Contract = field(init=False)
    terms: Terms = field(init=False)

    @classmethod
    def create(cls, folder: Path, silos: int = 4, parameters: int = PARAMETERS, **changes: object) -> Site:
        """Made and prepared; nobody is enrolled yet. `changes` are keys of the plan."""
        port = free_port()
        home = init_home(folder / "home", "lung-xray", ["127.0.0.1"], port)
        _write_plan(home, port, silos, changes)
        initial = AdapterState(Layout((("w", (parameters,)),)), np.linspace(-1, 1, parameters, dtype=np.float32))
        (home.folder / "prompts.safetensors").write_bytes(b"prompts")
        home.initial_path.write_bytes(initial.to_safetensors())
        lock = FederationLock(
            plan=home.plan().digest.hex(),
            encoder=ExternalEncoder(dim=4, text_features_sha256=hashlib.sha256(b"prompts").hexdigest(), logit_scale=1),
            layout=[Parameter(name="w", shape=[parameters])],
            initial_model=initial.digest.hex(),
            initial_file=hashlib.sha256(initial.to_safetensors()).hexdigest(),
        )
        write_lock(home.lock_path, lock)
        return cls(home, port)

    @classmethod
    def frozen(cls, folder: Path, silos: int = 4, **changes: Any) -> Site:
        """All are enrolled, and the roster is frozen."""
        site = cls.create(folder, silos, **changes)
        for name in NAMES[:silos]:
            site.enrol(name)
        site.contract, _, site.terms = freeze(site.home)
        return site

    def token(self, name: str, valid: float = 3600) -> Invitation:
        return Invitation.decode(invite(self.home, name, valid).token)

    def enrol(self, name: str, folder: str = "") -> Identity:
        """As over the network, but without it."""
        path = self.home.folder.parent / (folder or name)
        key, authority = create_key(path), load_authority(self.home.authority_folder)
        request = EnrolRequest(token=self.token(name).secret, csr=signing_request(key, name))
        with self.store() as store:
            answer = enrol(store, authority, "lung-xray", request.encode(), time.time())
        certificate = parse_certificate(answer.certificate, "the answer")
        enrolment = Enrolment(name=name, server=self.url, federation="lung-xray")
        self.identities[name] = Identity(path, enrolment, key, certificate, authority.certificate)
        self.identities[name].save()
        return self.identities[name]

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def state(self) -> Path:
        return self.home.folder / "state"

    @contextlib.contextmanager
    def store(self) -> Iterator[Store]:
        store = self.home.store()
        try:
            yield store
        finally:
            store.close()

    def status(self) -> RunStatus:
        return read_status(self.home, time.time())

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Straight from the server's database."""
        sql = sqlite3.connect(self.state / "aggregator.sqlite", timeout=BOUND)
        try:
            return sql.execute(query, values).fetchall()
        finally:
            sql.close()

    def kept(self, stage: str) -> int:
        """How many messages of this stage the present attempt holds."""
        query = "SELECT count(*) FROM messages WHERE phase = ? AND attempt = (SELECT max(number) FROM attempts)"
        return int(self.rows(query, STAGES.index(stage))[0][0])

    @staticmethod
    def stage_of(messages: str) -> str:
        """What `status` calls the stage of these messages."""
        return ("join", "share", "upload", "agree", "unmask", "result")[STAGES.index(messages)]

    def reasons(self, silo: str | None) -> list[str]:
        return [event["reason"] for event in self.status().events if event["silo"] == silo]

    def at_work(self, name: str, attempt: int) -> bool:
        """Whether a silo still goes on with this attempt by itself: not ended, and not held by a test."""
        if name in self.hands:
            return not self.hands[name].gone
        return self.silos is not None and self.silos.at_work(name, attempt)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """The server, until the block ends; then stopped as by SIGTERM."""
        stop, before = asyncio.Event(), len(self.said)
        _SERVED.set(self)
        with mock.patch.object(server_module, "Rounds", PatientRounds):
            server = asyncio.create_task(serve(self.home, "127.0.0.1", self.port, self.said.append, stop))
            try:
                await until(lambda: server.done() or len(self.said) > before)
                yield
            finally:
                stop.set()
                await server

    @contextlib.asynccontextmanager
    async def client(self, name: str, patience: Patience = ONCE) -> AsyncIterator[Client]:
        async with Client.of(self.identities[name], lambda _reason, _seconds: None, patience) as client:
            yield client

    def record(self, name: str) -> ModelRecord:
        """What this silo adds to the first model."""
        trainer = SteadyTrainer.of(name, self.terms.layout.size)
        integers = trainer.integers.view(np.uint32)
        vector = self.terms.vector.pack(integers, trainer.records, 3, 5)
        return ModelRecord(self.terms.initial_model, lambda: vector)

    def foretold(self, rounds: Iterable[Iterable[str]]) -> str:
        """The digest after `rounds`, each given by the silos that it averaged."""
        layout = self.terms.layout
        vector = np.linspace(-1, 1, layout.size, dtype=np.float32)
        for silos in rounds:
            trainers = [SteadyTrainer.of(name, layout.size) for name in silos]
            total = sum(t.integers.astype(np.int64) for t in trainers)
            mean = (STEP * np.asarray(total, dtype=np.float64)) * MAX_WEIGHT / sum(t.records for t in trainers)
            vector = (vector.astype(np.float64) + mean).astype(np.float32)
        return AdapterState(layout, vector).digest.hex()


def _write_plan(home: Home, port: int, silos: int, changes: dict[str, object]) -> None:
    plan: dict[str, Any] = {
        "federation": "lung-xray",
        "server": f"https://127.0.0.1:{port}",
        "model": {"name": "external", "dim": 4, "text_features": "prompts.safetensors"},
        "classes": {"normal": "normal", "ill": "ill"},
        "templates": ["{}"],
        "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "method": {"name": "fedclip"},
        "training": {"rounds": 1, "batch_size": 8, "optimizer": {"name": "adam", "lr": 0.001}},
        "secure_aggregation": {
            "coordinate_clip": ((2**29 - 1) // silos) * STEP,
            "max_weight": MAX_WEIGHT,
        },
        "deadlines": dict.fromkeys(("join", "share", "upload", "agree", "unmask"), int(BOUND)),
    }
    for key, value in changes.items():
        plan[key] = {**plan.get(key, {}), **value} if isinstance(value, dict) else value
    home.plan_path.write_text(yaml.safe_dump(plan, sort_keys=False))


@dataclass
class SteadyTrainer:
    """The same update in every round; its integers are exact at its weight."""

    records: int
    integers: np.ndarray[Any, np.dtype[np.int32]]  # weight times update, on the grid
    correct: int = 3  # of 5

    @classmethod
    def of(cls, name: str, parameters: int = PARAMETERS) -> SteadyTrainer:
        index = NAMES.index(name)
        integers = (np.arange(parameters, dtype=np.int32) % 1000 + 1) * (101 + index) * (-1) ** index
        return cls(2 ** (index % 4 + 3), integers)

    def check(self, received: AdapterState) -> None:
        """Nothing is refused."""

    def train(self, received: AdapterState) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self.integers.astype(np.float64) * STEP * MAX_WEIGHT / self.records

    def validate(self, state: AdapterState) -> Counts:
        return Counts(self.correct, 5)


@dataclass(frozen=True)
class HookedLink(Link):
    """Asks `before` each time it is about to send, and before it asks for the list of a stage."""

    before: Before = field(kw_only=True)
    done_with: Callable[[int], None] = field(default=lambda _: None, kw_only=True)  # an attempt is over for this silo

    async def opening(self, after: int, *, idle: bool) -> OpeningAnswer:
        self.done_with(10**9 if idle else after)
        return await super().opening(after, idle=idle)

    async def receive(self, attempt: int, stage: str) -> bytes:
        await self.before(attempt, f"list of {stage}")
        return await super().receive(attempt, stage)

    async def send(self, attempt: int, stage: str, body: bytes) -> None:
        await self.before(attempt, stage)
        await super().send(attempt, stage, body)

    async def send_if_in_time(self, attempt: int, stage: str, body: bytes) -> None:
        await self.before(attempt, stage)
        await super().send_if_in_time(attempt, stage, body)

    async def send_upload(self, attempt: int, pieces: Callable[[], Iterable[bytes]], length: int) -> bytes:
        await self.before(attempt, "uploads")
        return await super().send_upload(attempt, pieces, length)


async def nothing(attempt: int, stage: str) -> None:
    """Goes on."""


@dataclass
class Silos:
    """Silos of a site that take part, as tasks; `heard` is what each was told."""

    site: Site
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    heard: dict[str, list[str]] = field(default_factory=dict)
    done_with: dict[str, int] = field(default_factory=dict)  # the last attempt that is over for each
    held: set[str] = field(default_factory=set)
    trainer_of: Callable[[str, int], SteadyTrainer] = field(default=SteadyTrainer.of)

    def at_work(self, name: str, attempt: int) -> bool:
        """As `Site.at_work`."""
        running = name in self.tasks and not self.tasks[name].done()
        return running and name not in self.held and self.done_with.get(name, 0) < attempt

    def start(self, *names: str, before: Before = nothing, runner: type[Runner] = Runner) -> None:
        for name in names:
            self.heard.setdefault(name, [])
            self.held.discard(name)
            self.done_with.pop(name, None)
            self.tasks[name] = asyncio.create_task(self._take_part(name, before, runner))

    async def done(self, *names: str) -> None:
        """Until these silos (all) have ended as they should."""
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*(self.tasks[name] for name in names or self.tasks))

    async def _take_part(self, name: str, before: Before, runner: type[Runner]) -> None:
        site, identity = self.site, self.site.identities[name]
        trainer = self.trainer_of(name, site.terms.layout.size)
        journal = Journal(identity.folder / "work", identity.epoch_path)
        waiting = lambda reason, _seconds: self.heard[name].append(reason)  # noqa: E731

        async def held(attempt: int, stage: str) -> None:
            self.held.add(name)
            await before(attempt, stage)
            self.held.discard(name)

        try:
            async with Client.of(identity, waiting, QUICK) as client:
                link = HookedLink(
                    client, identity.folder, before=held, done_with=functools.partial(self.done_with.__setitem__, name)
                )
                party = Party(identity, site.terms)
                await runner(party, trainer, link, journal, self.heard[name].append).run()
        finally:
            journal.close()

    async def stop(self) -> None:
        """All at once, wherever they are."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@contextlib.asynccontextmanager
async def silos_of(site: Site) -> AsyncIterator[Silos]:
    """Silos that are stopped when the block ends."""
    silos = site.silos = Silos(site)
    try:
        yield silos
    finally:
        await silos.stop()
        site.silos = None


@dataclass
class Hand:
    """A silo that a test moves stage by stage, in one attempt."""

    site: Site
    name: str
    client: Client
    session: SiloSession
    attempt: int = 1
    gone: bool = False  # sends nothing more: the others' deadlines run

    @property
    def link(self) -> Link:
        return Link(self.client, self.site.identities[self.name].folder)

    async def make(self, stage: str) -> bytes:
        """The body that is next for this stage, made once."""
        session = self.session
        match stage:
            case "key-ads":
                return session.join()
            case "bundles":
                shares = session.share(await self._list("key-ads"))
                ciphertexts = {peer: list(pair) for peer, pair in shares.ciphertexts.items()}
                return SharesRequest(bundles=shares.bundles, ciphertexts=ciphertexts).encode()
            case "uploads":
                return self.sealed(await self.upload())
            case "agrees":
                return session.agree(await self._list("uploads"))
            case "unmasks":
                return session.unmask(await self._list("agrees"))
            case _:
                old = await self.link.model(self.site.terms.initial_model, self.site.terms)
                return session.result(await self._sum(), old)[0]

    async def upload(self) -> MaskedUpload:
        """Masked, and not sealed yet."""
        answer = parse(SharesAnswer, await self.link.receive(self.attempt, "bundles"))
        inbox = {peer: (pair[0], pair[1]) for peer, pair in answer.inbox.items()}
        return self.session.upload(answer.bundles, inbox)

    def sealed(self, upload: MaskedUpload) -> bytes:
        return b"".join(self.session.seal_upload(upload).pieces(upload.body))

    async def _sum(self) -> Words:
        """Added up again, as a silo does before it signs the result."""
        check = self.session.check_sum(await self.link.sum_proof(self.attempt))
        for name in check.survivors:
            check.add(name, await self.link.vector(self.attempt, name, self.site.terms))
        return check.total()

    async def _list(self, stage: str) -> list[bytes]:
        return parse(WireList, await self.link.receive(self.attempt, stage)).messages

    async def put(self, stage: str, body: bytes) -> None:
        """Send it once. Raises TransportError with the problem's status and code."""
        path = f"/v1/attempts/{self.attempt}/{stage}"
        if stage != "uploads":
            await self.client.post(path, body)
            return

        async def chunks() -> AsyncIterator[bytes]:
            yield body

        await self.client.put_stream(path, chunks, len(body))

    async def refused(self, stage: str, body: bytes) -> tuple[int | None, str | None]:
        """Status and code of the problem that answers `body`."""
        with pytest.raises(TransportError) as refusal:
            await self.put(stage, body)
        return refusal.value.status, refusal.value.code


async def move(hands: Iterable[Hand], *stages: str) -> None:
    """All make and send their messages of these stages."""
    for stage in stages:
        for hand in hands:
            await hand.put(stage, await hand.make(stage))


@contextlib.asynccontextmanager
async def hands_of(
    site: Site, session: type[SiloSession] = SiloSession, records: dict[str, ModelRecord] | None = None
) -> AsyncIterator[list[Hand]]:
    """One hand for each silo, all present in the first attempt."""
    async with contextlib.AsyncExitStack() as stack:
        hands = []
        for name in site.terms.roster.silos:
            client = await stack.enter_async_context(site.client(name))
            answer = await Link(client, site.identities[name].folder).opening(0, idle=False)
            opening = check_opening(site.terms, Position(), answer.opening or b"", answer.results)
            record = (records or {}).get(name) or site.record(name)
            made = session(site.terms, name, site.identities[name].sign, opening, record)
            hands.append(Hand(site, name, client, made))
        site.hands = {hand.name: hand for hand in hands}
        yield hands
        site.hands = {}


@dataclass
class Gate:
    """Holds silos at one stage of one attempt until it is opened."""

    stage: str
    attempt: int = 1
    held: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, attempt: int, stage: str) -> None:
        if (attempt, stage) == (self.attempt, self.stage):
            self.held += 1
            await self.opened.wait()


def each(*hooks: Before) -> Before:
    """One after the other."""

    async def before(attempt: int, stage: str) -> None:
        for hook in hooks:
            await hook(attempt, stage)

    return before


def vanishing(stage: str, attempt: int = 1) -> Before:
    """Is gone for good before it sends at this stage."""

    async def before(number: int, name: str) -> None:
        if (number, name) == (attempt, stage):
            raise VanishedError

    return before


async def set_back(site: Site, silos: Silos, first: Gate, second: Gate) -> None:
    """Four silos go from `first` to `second`; then the server's state is restored as it was at `first`."""
    backup = site.state.with_name("backup")
    async with site.serving():
        silos.start(*NAMES[:4], before=each(first, second))
        await until(lambda: first.held == 4)
    shutil.copytree(site.state, backup)
    async with site.serving():
        first.opened.set()
        await until(lambda: second.held == 4)
    shutil.rmtree(site.state)
    backup.rename(site.state)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
