"""An outage takes down the server and all silos when some have agreed to a list of names and others have not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from fedclip_secure.secagg.terms import threshold
from fedclip_secure.silo.run.runner import Runner
from tests.aggregator.site import NAMES, Gate, Silos, Site, silos_of
from tests.waiting import until

TRAINING_ONLY = {"train": 0.8, "validation": 0, "test": 0.2}


@dataclass
class Federation:
    """`silos` in the roster; of those in the first attempt the last `bound` have agreed when the outage comes."""

    folder: Path
    silos: int
    bound: int
    delivered: bool = True  # or only journalled
    outsiders: int = 0  # that are not there before the outage
    deadlines: dict[str, int] = field(default_factory=dict)  # seconds
    rounds: int = 1

    def __post_init__(self) -> None:
        self.site = Site.frozen(
            self.folder, self.silos, deadlines=self.deadlines, splits=TRAINING_ONLY, training={"rounds": self.rounds}
        )
        self.names = NAMES[: self.silos]
        self.first = self.names[: self.silos - self.outsiders]  # the list that is agreed to
        self.agreed = self.first[len(self.first) - self.bound :]
        self.free = self.first[: len(self.first) - self.bound]
        with self.site.store() as store:
            for name in self.first:
                store.seen(name, time.time())  # so that the first attempt waits for all of them

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Silos]:
        """The server; silos can be started. At the end of the block all stop."""
        async with self.site.serving(), silos_of(self.site) as silos:
            yield silos

    async def agree(self, silos: Silos) -> None:
        """Until the bound silos have agreed, and the others have masked and know of no list yet."""
        agreed, free = Gate("list of agrees" if self.delivered else "agrees"), Gate("list of uploads")
        silos.start(*self.agreed, before=agreed)
        silos.start(*self.free, before=free)
        await until(lambda: (agreed.held, free.held) == (len(self.agreed), len(self.free)))
        assert self.site.kept("agrees") == (self.bound if self.delivered else 0)

    async def agree_in_vain(self) -> None:
        """Some agree, the attempt ends, and all stop."""
        async with self.up() as silos:
            await self.agree(silos)
            await until(lambda: self.site.status().attempt == 2)

    async def come_back(self, *names: str) -> None:
        """These run, without a disturbance, to the end of the run."""
        async with self.up() as silos:
            silos.start(*names)
            await silos.done()

    def blocked(self) -> list[str]:
        """What `status` says of a round that only a person can help on."""
        return [event["reason"] for event in self.site.status().events if event["kind"] == "blocked"]

    def averaged(self) -> list[Sequence[str]]:
        """Who, round by round; the model is what they make."""
        rounds = self.site.status().finished_rounds
        assert rounds[-1]["model"] == self.site.foretold([row["survivors"] for row in rounds])
        return [tuple(row["survivors"]) for row in rounds]


class GivingUp(Runner):
    """As `train --abandon-round 1`."""

    async def run(self, abandon: int | None = None) -> None:
        await super().run(1)


def below_threshold(*quick: int, at_least: int = 0) -> list[ParameterSet]:
    """(n, k) for n of 3 to 7 and each k < t; all but those of `quick` sizes belong to the long tests."""
    return [
        pytest.param(silos, bound, marks=() if silos in quick else pytest.mark.long)
        for silos in range(3, 8)
        for bound in range(at_least, threshold(silos, "malicious", 1))
    ]


def floor(silos: int) -> int:
    """Fewest silos of a round, where one may collude."""
    return max(3, threshold(silos, "malicious", 1))


@pytest.mark.parametrize(("silos", "bound"), below_threshold(3, 4))
@pytest.mark.parametrize("delivered", [True, False])
def test_after_an_outage_amid_agreeing_the_same_attempt_goes_on(
    tmp_path: Path, silos: int, bound: int, delivered: bool
) -> None:
    federation = Federation(tmp_path, silos, bound, delivered)

    async def run() -> None:
        async with federation.up() as first:
            await federation.agree(first)
        await federation.come_back(*federation.names)

    asyncio.run(run())
    assert federation.averaged() == [federation.names]
    assert federation.site.status().finished_rounds[0]["attempt"] == 1
    assert federation.site.status().events == []


@pytest.mark.parametrize(("silos", "bound"), below_threshold(4))
@pytest.mark.parametrize("delivered", [True, False])
def test_an_attempt_that_ended_amid_agreeing_is_followed_by_one_over_the_same_names(
    tmp_path: Path, silos: int, bound: int, delivered: bool
) -> None:
    federation = Federation(tmp_path, silos, bound, delivered, deadlines={"agree": 1})

    async def run() -> None:
        await federation.agree_in_vain()
        await federation.come_back(*federation.names)

    asyncio.run(run())
    assert federation.averaged() == [federation.names]
    assert federation.site.status().finished_rounds[0]["attempt"] == 2


@pytest.mark.parametrize(("silos", "bound"), [case for case in below_threshold(4, at_least=1) if case.values[0] != 3])
def test_a_silo_that_was_not_on_the_list_cannot_come_into_the_round(tmp_path: Path, silos: int, bound: int) -> None:
    federation = Federation(tmp_path, silos, bound, outsiders=1, deadlines={"agree": 1})

    async def run() -> None:
        await federation.agree_in_vain()
        await federation.come_back(*federation.names)

    asyncio.run(run())
    assert federation.averaged() == [federation.first]


@pytest.mark.parametrize(("silos", "bound"), [(4, 0), (7, 1)])
def test_without_a_silo_that_is_gone_for_good_the_free_ones_go_on_while_they_are_enough(
    tmp_path: Path, silos: int, bound: int
) -> None:
    federation = Federation(tmp_path, silos, bound, deadlines={"agree": 1, "join": 1}, rounds=2)
    left, free = federation.names[1:], federation.free[1:]
    assert len(free) >= floor(silos)

    async def run() -> None:
        await federation.agree_in_vain()
        await federation.come_back(*left)

    asyncio.run(run())
    assert federation.averaged() == [free, left]  # the bound ones are back in the next round


@pytest.mark.parametrize(("silos", "bound"), [case for case in below_threshold(4, at_least=1) if case.values != (7, 1)])
def test_where_they_are_too_few_the_round_waits_and_says_so_until_the_bound_ones_give_it_up(
    tmp_path: Path, silos: int, bound: int
) -> None:
    federation = Federation(tmp_path, silos, bound, deadlines={"agree": 1, "join": 1})
    lost, *left = federation.names
    assert len(federation.free) - 1 < floor(silos)

    async def run() -> None:
        await federation.agree_in_vain()
        async with federation.up() as first:
            first.start(*left)
            await until(lambda: federation.blocked() != [])
        if len(left) >= floor(silos):
            async with federation.up() as second:
                second.start(*federation.agreed, runner=GivingUp)
                second.start(*federation.free[1:])
                await second.done()

    asyncio.run(run())
    (told, *_) = federation.blocked()
    assert f"{', '.join(federation.agreed)} agreed to the sum over {', '.join(federation.first)}" in told
    assert f"missing: {lost}. " in told
    assert "--abandon-round 1" in told
    if len(left) >= floor(silos):
        assert federation.averaged() == [tuple(left)]
