"""Any sequence of runs, rounds, ends, crashes and changed data: charges and admissions are those of a plain recount."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedclip_secure.errors import ConfigError, DataError, PolicyError
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.entries import Data, Reserve, Settle, chain_of
from fedclip_secure.privacy.ledger.ledger import OpenRun, Reservation
from tests.privacy.books import Books, terms, units

MEMORY = Path("/dev/shm")  # noqa: S108  # thousands of writes, each to the disk's own pace
CAP = Cap(3.0, 1e-5)
PLANS = {
    1: terms(plan=1, rounds=3, max_retrains=1, noise_multiplier=6.0, sample_rate=0.3),
    2: terms(plan=2, rounds=2, max_retrains=0, noise_multiplier=12.0, sample_rate=1.0),
    3: terms(plan=3, rounds=4, max_retrains=2, noise_multiplier=6.0, sample_rate=0.3),
    4: terms(plan=4, rounds=5, max_retrains=0, noise_multiplier=2.0, sample_rate=0.05, releases=2),
}
EVERYONE = units(range(8))


@dataclass
class Recount:
    """What one run was, kept with sets and loops."""

    admitted: set[int]
    left_out: set[int]  # now
    ever_left_out: set[int]
    rounds: list[int] = field(default_factory=list)  # reserved
    settled: set[int] = field(default_factory=set)  # rounds
    ended: bool = False

    def held(self, plan: int) -> int:
        """How many rounds are kept for it."""
        done = self.ended or len(self.settled) == PLANS[plan].rounds
        return 0 if done else PLANS[plan].rounds + PLANS[plan].max_retrains - len(self.rounds)


class Walk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._home = tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None)
        self.books = Books(Path(self._home) / "ledger")
        self.ledger = self.books.open()
        self.runs: dict[tuple[str, int], Recount] = {}
        self.spent = defaultdict[int, list[Event]](list)
        self.settled = 0
        self.silo, self.plan, self.round = "lab-a", 0, 0
        self.run: OpenRun | None = None
        self.reservation: Reservation | None = None

    def teardown(self) -> None:
        self.books.close()
        shutil.rmtree(self._home)

    def cost(self, unit: int, more: list[Event]) -> float:
        return math.fsum(CAP.cost([event]) for event in [*self.spent[unit], *more])

    def kept(self, unit: int, besides: Recount | None) -> list[Event]:
        """What other runs may still cost it."""
        others = [(plan, run) for (_, plan), run in self.runs.items() if run is not besides and unit in run.admitted]
        return [PLANS[plan].per_round() for plan, run in others for _ in range(run.held(plan))]

    @rule(plan=st.sampled_from(sorted(PLANS)), who=st.sets(st.integers(0, 7), min_size=1), changed=st.booleans())
    def open(self, plan: int, who: set[int], changed: bool) -> None:
        before, known = self.ledger.entries(), self.runs.get((self.silo, plan))
        left = known.held(plan) if known else PLANS[plan].rounds + PLANS[plan].max_retrains
        barred = known.ever_left_out if known else set()
        fits = {
            unit
            for unit in who - barred
            if self.cost(unit, [*self.kept(unit, known), *[PLANS[plan].per_round()] * left]) <= CAP.budget * (1 + 1e-12)
        }
        if not fits:
            with pytest.raises(PolicyError, match=r"no unit can take part|every unit of the data was left out"):
                self.ledger.open_run(PLANS[plan], units(who), CAP, changed_data=changed)
            assert self.ledger.entries() == before
            return
        if known is not None and known.ended:
            self.run, self.plan, self.reservation = self.ledger.open_run(PLANS[plan], units(who), CAP), plan, None
            assert self.ledger.entries() == before
            return
        same = known is None or (known.admitted, known.left_out) == (fits, who - fits)
        if not same and not changed:
            with pytest.raises(DataError, match="--changed-data"):
                self.ledger.open_run(PLANS[plan], units(who), CAP)
            assert self.ledger.entries() == before
            return
        self.run = self.ledger.open_run(PLANS[plan], units(who), CAP, changed_data=changed)
        self.plan, self.reservation = plan, None
        assert self.run.admitted == {*units(fits)}
        assert self.run.left_out == len(who - fits)
        assert len(self.ledger.entries()) == len(before) + (known is None or not same)
        rounds, settled = (known.rounds, known.settled) if known else ([], set[int]())
        self.runs[self.silo, plan] = Recount(fits, who - fits, barred | (who - fits), rounds, settled)

    @precondition(lambda self: self.run is not None)
    @rule(number=st.integers(1, 6))
    def reserve(self, number: int) -> None:
        assert self.run is not None
        plan, known, before = PLANS[self.plan], self.runs[self.silo, self.plan], self.ledger.entries()
        retrains = len(known.rounds) - len(set(known.rounds))
        used_up = number in known.rounds and retrains == plan.max_retrains
        if number > plan.rounds or known.ended or used_up or not self.fits(plan.per_round(), known):
            assert self.run.may_train(number) == (number <= plan.rounds and not known.ended and not used_up)
            with pytest.raises(PolicyError):
                self.run.reserve(number)
            assert self.ledger.entries() == before
            return
        assert self.run.may_train(number)
        self.reservation, self.round = self.run.reserve(number), number
        known.rounds.append(number)
        for unit in known.admitted:
            self.spent[unit].append(plan.per_round())

    @precondition(lambda self: self.run is not None and self.reservation is not None)
    @rule()
    def settle(self) -> None:
        assert self.run is not None
        assert self.reservation is not None
        self.run.settle(self.reservation)
        self.runs[self.silo, self.plan].settled.add(self.round)
        self.reservation, self.settled = None, self.settled + 1

    @rule()
    def end(self) -> None:
        """Of all runs of the silo: they are of one federation."""
        mine = [(plan, run) for (silo, plan), run in self.runs.items() if silo == self.silo and run.held(plan)]
        if not mine:
            with pytest.raises(ConfigError, match="no unfinished run"):
                self.ledger.end_runs("pets")
            return
        assert self.ledger.end_runs("pets") == sum(run.held(plan) for plan, run in mine)
        for _, run in mine:
            run.ended = True

    def fits(self, one: Event, known: Recount) -> bool:
        """Whether every unit of a run can pay for a round, beside what others hold."""
        costs = [self.cost(unit, [*self.kept(unit, known), one]) for unit in known.admitted]
        return max(costs) <= CAP.budget * (1 + 1e-12)

    @rule(silo=st.sampled_from(["lab-a", "lab-b"]), seconds=st.integers(0, 3))
    def crash(self, silo: str, seconds: int) -> None:
        """And start again, under this or the other identity."""
        entries = self.ledger.entries()
        self.books.now += seconds
        self.ledger, self.silo = self.books.open(silo), silo
        assert self.ledger.entries() == entries
        self.run = self.reservation = None

    @invariant()
    def charges_are_those_of_a_recount(self) -> None:
        book = self.ledger._book
        charged = book.charges().spent(CAP)
        for unit, name in enumerate(EVERYONE):
            members, expected = book.units.members([name]), self.cost(unit, [])
            found = 0.0 if members.new else float(charged[members.numbers[0]])
            assert math.isclose(found, expected, rel_tol=1e-12)
            assert found <= CAP.budget
            assert self.cost(unit, self.kept(unit, None)) <= CAP.budget * (1 + 1e-12)

    @invariant()
    def chain_is_whole_and_complete(self) -> None:
        entries = chain_of(self.ledger.entries()).entries
        assert sum(isinstance(entry, Reserve) for entry in entries) == sum(
            len(run.rounds) for run in self.runs.values()
        )
        assert sum(isinstance(entry, Settle) for entry in entries) == self.settled
        names = [entry.set for entry in entries if isinstance(entry, Data)]
        assert len(names) == len(set(names))


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to make a finding smaller takes minutes
    suppress_health_check=list(HealthCheck),
)


def test_no_plan_of_the_walk_fits_for_ever() -> None:
    """Else the walk would never come to the cap."""
    one_of_each = [plan.total() for plan in PLANS.values()]
    assert all(CAP.cost([event]) < CAP.budget for event in one_of_each)
    assert CAP.cost(one_of_each) > CAP.budget
    assert len({dataclasses.replace(event, steps=1) for event in one_of_each}) == 3
