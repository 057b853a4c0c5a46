"""Silos that are killed again and again, under a server that ends attempts as it likes and asks for any names."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import Phase as Generation
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip_secure import canonical
from fedclip_secure.errors import FedClipError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Phase
from fedclip_secure.secagg.messages import Upload, by_sender, survivors_hash
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.journal import Drawn, Journal, Step
from fedclip_secure.silo.run.link import LeftOutError
from fedclip_secure.transport.messages import WireList, parse
from tests.fakes import Federation
from tests.silo.careless import CarelessSession
from tests.silo.memory import FixedTrainer, Hub, MemoryLink, Silo

SILOS = tuple(f"silo-{i:03d}" for i in range(4))  # floor and threshold are 3
STAGES = ("key-ads", "bundles", "uploads", "agrees")  # at which a server can end an attempt
KINDS = ("before", "after", "unwritten", "written", "behind")
AGREE = b"fedclip/v1/agree\x00"
QUIET = 0.06  # seconds without a message, after which nobody has anything left to do
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a walk syncs thousands of times


class KilledError(Exception):
    """The process is gone."""


@dataclass(frozen=True)
class Fate:
    """How one life of a silo ends: at the first moment of this kind after so many moments."""

    after: int
    kind: str  # before or after a message left; a step that was unwritten, or written; with the epoch file behind
    restored: bool  # it comes back with an older journal


@dataclass(frozen=True)
class Turn:
    """What the server does in one attempt."""

    absent: tuple[str, str]  # this silo (or none) leaves at this stage, and is not waited for
    ends: tuple[str, int] | None  # after so many messages of this stage
    careless: bool  # about names that silos agreed to
    shown_less: frozenset[str]  # silos that are shown a list of survivors that lacks one


@dataclass
class Record:
    """What was signed and sent, whatever the silos remember."""

    lists: dict[tuple[bytes, bytes], tuple[bytes, tuple[str, ...]]] = field(default_factory=dict)  # (T2, H(U3))
    vectors: dict[tuple[str, bytes], set[bytes]] = field(default_factory=lambda: defaultdict(set))  # of (silo, model)
    sums: dict[int, tuple[bytes, tuple[str, ...], Words]] = field(default_factory=dict)  # model, survivors, sum
    lost: set[tuple[str, bytes]] = field(default_factory=set)
    relapses: list[str] = field(default_factory=list)  # joined though lost
    seen: Counter[str] = field(default_factory=Counter)


class RestlessHub(Hub):
    """Goes by its turns; when they are over it is honest."""

    def __init__(self, federation: Federation, turns: list[Turn], record: Record) -> None:
        self.turns, self.record = turns, record
        self.model_of: dict[int, bytes] = {}  # digest, by attempt
        super().__init__(federation)

    @property
    def turn(self) -> Turn:
        over = self.attempt > len(self.turns)
        return Turn(("", ""), None, False, frozenset()) if over else self.turns[self.attempt - 1]

    def open(self, round_number: int) -> None:
        self.attempt += 1
        self.session_type = CarelessSession if self.turn.careless else AggregatorSession
        self.gone = {self.turn.absent[0]}
        self.model_of[self.attempt] = self.model.digest
        self.attempt -= 1
        super().open(round_number)

    def advance(self) -> None:
        stage, count = self.turn.ends or ("", 0)
        if stage and sum(key[:2] == (self.attempt, stage) for key in self.kept) >= count:
            self.open(self.round)
            return
        attempt, session = self.attempt, self.session
        super().advance()
        if session.phase is Phase.RESULT and self.total is not None:
            self.record.sums[attempt] = self.model_of[attempt], tuple(session.uploads), self.total

    def give_up(self) -> bool:
        """Nobody has anything left to do: on to the next attempt, or round; whether there is one."""
        before = self.attempt
        if self.session.phase < Phase.RESULT:
            self.open(self.round)
        else:
            self.gone = set(SILOS)
            self.advance()
        return self.attempt > before


class ChangingTrainer(FixedTrainer):
    """Never makes the same update twice."""

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        self.update += 0.001
        return super().train(received)


class WatchedLink(MemoryLink):
    """Notes which names a silo is asked to agree to."""

    hub: RestlessHub

    async def receive(self, attempt: int, stage: str) -> bytes:
        body = await super().receive(attempt, stage)
        if stage != "uploads":
            return body
        wires, roster = parse(WireList, body).messages, self.hub.federation.terms.roster
        if self.silo in self.hub.turn.shown_less:
            names = list(by_sender(wires, Upload, "test", roster))
            del wires[next(i for i, name in enumerate(names) if name != self.silo)]
            self.hub.record.seen["shown less"] += 1
        uploads = by_sender(wires, Upload, "test", roster)
        transcript = next(iter(uploads.values())).body.transcript
        listed = transcript, survivors_hash(transcript, uploads)
        self.hub.record.lists[listed] = self.hub.model_of[attempt], tuple(uploads)
        return WireList(messages=wires).encode()


class MortalJournal(Journal):
    """A journal whose process may be killed around each step."""

    def __init__(self, folder: Path, epoch: Path, moment: Callable[[str], None], *, recovering: bool = False) -> None:
        self._moment, self._file = moment, epoch
        super().__init__(folder, epoch, recovering=recovering)

    def draw(self, *args: Any, **options: Any) -> Drawn:
        drawn: Drawn = self._mortal(lambda: super(MortalJournal, self).draw(*args, **options))
        return drawn

    def start(self, *args: Any, **options: Any) -> None:
        self._mortal(lambda: super(MortalJournal, self).start(*args, **options))

    def step(self, stage: Stage, step: Step, agreed: tuple[str, ...] = ()) -> None:
        self._mortal(lambda: super(MortalJournal, self).step(stage, step, agreed))

    def leave(self) -> None:
        self._mortal(super().leave)

    def _mortal(self, write: Callable[[], Any]) -> Any:
        before = self._file.read_bytes() if self._file.exists() else None
        self._moment("unwritten")
        result = write()
        try:
            self._moment("behind")
        except KilledError:
            if before is None:
                self._file.unlink()
            else:
                self._file.write_bytes(before)
            raise
        self._moment("written")
        return result


class MortalSilo(Silo):
    """Lives as often as it has fates, and then once more."""

    hub: RestlessHub

    def __init__(self, hub: RestlessHub, name: str, folder: Path, fates: Iterable[Fate]) -> None:
        self._fates, self._backups, self._moments = list(fates), list[Path](), 0
        super().__init__(hub, name, folder)
        self.trainer = ChangingTrainer(hub.federation.parameters)
        self.link = WatchedLink(hub, name, before=self._before, after=self._after)

    def open_journal(self, *, recovering: bool = False) -> Journal:
        return MortalJournal(self.workdir, self.epoch, self._moment, recovering=recovering)

    def _moment(self, kind: str) -> None:
        self._moments += 1
        if self._fates and self._moments > self._fates[0].after and kind == self._fates[0].kind:
            self.hub.record.seen[kind] += 1
            if kind == "unwritten" and self._agree_unseen():
                self.person.signed.pop()  # it dies with the process
            raise KilledError(kind)

    def _agree_unseen(self) -> bool:
        """Whether the last that was signed is an `Agree` that has not left."""
        last = self.person.signed[-1] if self.person.signed else b""
        message = last.removeprefix(AGREE)
        return last != message and not any(message in body for _, _, body in self.link.sent)

    async def _before(self, attempt: int, stage: str) -> None:
        model, record = self.hub.model_of[attempt], self.hub.record
        if attempt == self.hub.attempt and self.hub.turn.absent == (self.name, stage):
            raise LeftOutError(stage)
        if stage == "key-ads":
            if (self.name, model) in record.lost:
                record.relapses.append(self.name)
        elif stage == "uploads":
            drawn = next(drawn for drawn in self.journal.models() if drawn.model == model)
            assert drawn.vector is not None
            record.vectors[self.name, model].add(self.journal.open_vector(drawn).tobytes())
        self._moment("before")

    async def _after(self, attempt: int, stage: str) -> None:
        self._moment("after")

    async def live(self) -> None:
        """Until the run is finished; again after each death."""
        while True:
            self._backups.append(self.folder / f"{self.name}-{len(self._backups)}")
            shutil.copytree(self.workdir, self._backups[-1])
            try:
                await self.runner().run()
            except KilledError:
                self._moments = 0
                self._reborn(self._fates.pop(0))
            except FedClipError as error:  # the server broke a rule; a person starts the silo again
                self.hub.record.seen[type(error).__name__] += 1
                await asyncio.sleep(QUIET / 4)
                self.restart()
            else:
                return

    def _reborn(self, fate: Fate) -> None:
        known = {drawn.model for drawn in self.journal.models()}
        self.journal.close()
        if fate.restored:
            shutil.rmtree(self.workdir)
            shutil.copytree(self._backups[len(self._backups) // 2], self.workdir)
        try:
            self.journal = self.open_journal()
        except TrustError:
            assert fate.restored
            self._recover(known)

    def _recover(self, known: set[bytes]) -> None:
        self.hub.record.seen["recovered"] += 1
        journal = self.open_journal(recovering=True)
        journal.recover()
        lost = {drawn.model for drawn in journal.models()}
        journal.close()
        assert lost <= known
        self.hub.record.lost |= {(self.name, model) for model in lost}
        self.journal = self.open_journal()


async def _walk(hub: RestlessHub, parties: list[MortalSilo]) -> None:
    """Until the run is finished, or nobody gets on though the server is honest."""
    tasks = [asyncio.create_task(party.live()) for party in parties]
    try:
        while not all(task.done() for task in tasks) and hub.attempt <= len(hub.turns) + 3:
            before = hub.attempt, len(hub.kept)
            await asyncio.sleep(QUIET)
            for task in tasks:
                if task.done():
                    task.result()
            if before == (hub.attempt, len(hub.kept)) and not hub.give_up():
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _agreed(party: MortalSilo) -> dict[bytes, set[tuple[str, ...]]]:
    """By model: the lists of names that this silo has signed."""
    agreed = defaultdict(set)
    for data in party.person.signed:
        if data.startswith(AGREE):
            body = canonical.decode(data.removeprefix(AGREE))["body"]
            model, names = party.hub.record.lists[body["transcript"], body["survivors"]]
            agreed[model].add(names)
    return agreed


FATES = st.builds(
    Fate,
    after=st.integers(0, 20),
    kind=st.sampled_from(KINDS),
    restored=st.sampled_from([False, False, False, True]),
)
TURNS = st.builds(
    Turn,
    absent=st.tuples(st.sampled_from(["", *SILOS]), st.sampled_from(STAGES[:3])),
    # Often when some have agreed, and others have not: what follows must then be over the same names.
    ends=st.none() | st.tuples(st.sampled_from([*STAGES, *["agrees"] * 4]), st.integers(1, 4)),
    careless=st.sampled_from([True, True, False]),
    shown_less=st.just(frozenset()) | st.frozensets(st.sampled_from(SILOS), max_size=2),
)


def test_no_silo_ever_signs_two_lists_of_names_or_sends_two_vectors_over_one_model() -> None:
    seen: Counter[str] = Counter()

    # A walk that fails is shown as it is: to shrink it takes minutes.
    @settings(max_examples=30, deadline=None, derandomize=True, database=None, phases=[Generation.generate])
    @given(
        turns=st.lists(TURNS, min_size=1, max_size=5), fates=st.tuples(*(st.lists(FATES, max_size=3) for _ in SILOS))
    )
    def walk(turns: list[Turn], fates: tuple[list[Fate], ...]) -> None:
        record = Record()
        hub = RestlessHub(Federation(4, rounds=2), turns, record)
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            parties = [MortalSilo(hub, name, Path(folder), mine) for name, mine in zip(SILOS, fates, strict=True)]
            asyncio.run(_walk(hub, parties))
            for party in parties:
                party.journal.close()
        for party in parties:
            for model, lists in _agreed(party).items():
                assert len(lists) == 1, f"{party.name} agreed to {lists} over {model.hex()}"
                seen["agreed"] += 1
            seen["held to its names"] += any("this silo agreed to the sum over" in line for line in party.said)
        for vectors in record.vectors.values():
            assert len(vectors) == 1, "a second vector left over one model"
        for model, survivors, total in record.sums.values():
            sent = [np.frombuffer(next(iter(record.vectors[name, model])), dtype=np.uint32) for name in survivors]
            assert np.array_equal(total, np.sum(sent, axis=0, dtype=np.uint32))
        assert record.relapses == []
        seen.update(record.seen)
        seen["finished"] += hub.finished

    walk()
    print(seen)
    rare = [kind for kind in (*KINDS, "agreed", "held to its names", "finished", "recovered") if seen[kind] < 3]
    assert rare == [], f"the walks did not go where they should: {seen}"
