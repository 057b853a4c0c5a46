"""A server that shows each silo what it likes, played to whole silos: runners with their journals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Phase
from fedclip_secure.secagg.messages import SumProof
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.link import LeftOutError
from fedclip_secure.transport.messages import OpeningAnswer, SharesAnswer, WireList, parse
from tests.fakes import Federation
from tests.secagg.lies import LyingServer
from tests.silo.memory import Hub, MemoryLink, Silo, run_all
from tests.waiting import BOUND

VICTIM, PEER, COLLUDER = "silo-000", "silo-001", "silo-004"
ALL = [f"silo-{i:03d}" for i in range(5)]  # n = 5, c = 1: t and floor are 4
FOUR = ALL[:4]
MINTED = Federation(5)  # a second key for every name

Alter = Callable[[list[bytes]], list[bytes]]
STAGES = ("key-ads", "bundles", "uploads", "agrees", "unmasks", "results")  # what a silo sends, in order


@dataclass
class LyingHub(Hub):
    """Takes whatever is signed, and opens attempts when it likes."""

    session_type: type[AggregatorSession] = LyingServer
    breaks_off: dict[int, Phase] = field(default_factory=dict)  # by attempt: when it acts as if that had failed

    @property
    def server(self) -> LyingServer:
        assert isinstance(self.session, LyingServer)
        return self.session

    def advance(self) -> None:
        super().advance()
        if self.breaks_off.get(self.attempt) is self.session.phase:
            self.open_again()

    def _missing(self) -> bool:
        """It closes joining with as few as it likes."""
        if self.session.phase is Phase.JOIN:
            return not self.waits_for.get(self.round, set(self.federation.silos)) - self.gone <= set(self.session.ads)
        return super()._missing()

    def open_again(self) -> None:
        """Another attempt at round 1."""
        self.model = self.federation.model
        self.gone.clear()
        self.open(1)


@dataclass
class LyingLink(MemoryLink):
    """What becomes of the server's answers to one silo."""

    openings: Callable[[OpeningAnswer], OpeningAnswer] = lambda answer: answer
    lists: dict[str, Alter] = field(default_factory=dict)  # by stage
    proof: Callable[[SumProof], SumProof] = lambda proof: proof
    vectors: Callable[[str, Words], Words] = lambda _, words: words
    total: Callable[[Words], Words] = lambda words: words

    async def opening(self, after: int, *, idle: bool) -> OpeningAnswer:
        return self.openings(await super().opening(after, idle=idle))

    async def receive(self, attempt: int, stage: str) -> bytes:
        body, alter = await super().receive(attempt, stage), self.lists.get(stage)
        if alter is None:
            return body
        if stage != "bundles":
            return WireList(messages=alter(parse(WireList, body).messages)).encode()
        answer = parse(SharesAnswer, body)
        return SharesAnswer(bundles=alter(answer.bundles), inbox=answer.inbox).encode()

    async def sum_proof(self, attempt: int) -> SumProof:
        return self.proof(await super().sum_proof(attempt))

    async def vector(self, attempt: int, silo: str, terms: Terms) -> Words:
        return self.vectors(silo, await super().vector(attempt, silo, terms))

    async def sum(self, attempt: int, terms: Terms) -> Words:
        return self.total(await super().sum(attempt, terms))


@dataclass
class Victim(Silo):
    """A silo that a server lies to."""

    link: LyingLink = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.link = LyingLink(self.hub, self.name)

    def stages(self, attempt: int) -> list[str]:
        """What it has sent in this attempt, at each stage once."""
        return list(dict.fromkeys(stage for number, stage, _ in self.link.sent if number == attempt))


@contextmanager
def played(hub: Hub, folder: Path) -> Iterator[dict[str, Victim]]:
    """One victim for each name in the roster; their journals are closed in the end."""
    parties = {name: Victim(hub, name, folder) for name in hub.federation.silos}
    try:
        yield parties
    finally:
        for party in parties.values():
            party.journal.close()


def federation_of(*, verify: bool = True, size: int = 5, mode: str = "malicious") -> Federation:
    """Two training rounds and the closing one."""
    federation = Federation(size, rounds=3, mode=mode, colluding=1 if mode == "malicious" else 0)
    federation.terms = replace(federation.terms, training_rounds=2, verify_sum=verify)
    return federation


def drops_out(party: Victim, stage: str, attempt: int = 1) -> None:
    """This silo vanishes before it sends its message of `stage`, and comes back in the next attempt."""

    async def vanish(number: int, name: str) -> None:
        if (number, name) == (attempt, stage):
            party.hub.gone.add(party.name)
            party.hub.advance()
            raise LeftOutError("it has dropped out")

    party.link.before = vanish


def endings(parties: Mapping[str, Silo], waited_for: Sequence[str]) -> list[str]:
    """Run all side by side until those of these names have ended: the codes with which they did."""

    async def main() -> list[BaseException | None]:
        tasks = {name: asyncio.create_task(party.runner().run()) for name, party in parties.items()}
        awaited = [tasks[name] for name in waited_for]
        done, _ = await asyncio.wait(awaited, timeout=BOUND)
        await _kill(tasks.values())
        assert len(done) == len(awaited), {name: party.said for name, party in parties.items()}
        return [task.exception() for task in awaited]

    return [error.code if isinstance(error, ProtocolError) else repr(error) for error in asyncio.run(main())]


def run_until(parties: Mapping[str, Silo], reached: Callable[[], bool]) -> None:
    """Run all side by side until something is so, and stop them there; the lied to may have ended before."""

    async def main() -> None:
        tasks = [asyncio.create_task(party.runner().run()) for party in parties.values()]
        async with asyncio.timeout(BOUND):
            while not reached():
                await asyncio.sleep(0.002)
        await _kill(tasks)

    asyncio.run(main())


async def _kill(tasks: Collection[asyncio.Task[None]]) -> None:
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.1)  # one that was just ending something else is told again
    await asyncio.gather(*tasks, return_exceptions=True)


def stops_again(party: Victim, code: str) -> None:
    """Started again from its journal and lied to in the same way, a silo stops alike and sends nothing new."""
    before = list(party.link.sent)
    party.restart()
    with pytest.raises(ProtocolError) as refused:
        run_all([party])
    assert refused.value.code == code, refused.value
    assert set(party.link.sent) == set(before)
