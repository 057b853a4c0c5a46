"""Silos that agreed to a list of names in an attempt that then failed: they go on with these names or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from fedclip_secure.errors import TransportError
from fedclip_secure.secagg.silo_session import SiloSession
from tests.aggregator.liars import LIAR, NO_COUNTS, averaged, lying, others, run
from tests.aggregator.site import NAMES, STAGES, Before, Gate, Silos, Site, each, nothing, silos_of, vanishing
from tests.waiting import until

SHORT = {"join": 2, "share": 2, "upload": 2, "agree": 1}
ALL_FOUR = "lab-a, lab-b, lab-c, lab-d"


@contextlib.asynccontextmanager
async def agreed_in_vain(
    site: Site, bound: Sequence[str], free: Sequence[str], gone: Sequence[str] = (), then: Before = nothing
) -> AsyncIterator[Silos]:
    """The first attempt has failed: `bound` agreed to all, `free` have not seen the list, `gone` vanished there."""
    gate = Gate("list of uploads")
    async with silos_of(site) as silos:
        silos.start(*bound)
        silos.start(*free, before=each(gate, then))
        silos.start(*gone, before=vanishing("list of uploads"))
        await until(lambda: site.reasons(None) != [])
        assert gate.held == len(free)
        assert site.reasons(None) == [f"{len(bound)} silos at stage 'agree', {site.terms.threshold} must answer"]
        gate.opened.set()
        yield silos


def test_a_silo_that_agreed_in_vain_goes_on_with_the_same_names(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, deadlines=SHORT)

    async def among() -> None:
        async with site.serving(), agreed_in_vain(site, ["lab-a"], NAMES[1:4]) as silos:
            await silos.done()

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:4])] * 2
    assert site.status().finished_rounds[0]["attempt"] == 2


def test_while_enough_others_are_left_the_round_goes_on_without_a_bound_silo_which_is_back_in_the_next(
    tmp_path: Path,
) -> None:
    site = Site.frozen(tmp_path, 7, deadlines=SHORT)

    async def among() -> None:
        async with site.serving(), agreed_in_vain(site, ["lab-a"], NAMES[1:6], NAMES[6:7]) as silos:
            await silos.done(*NAMES[:6])

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[1:6]), list(NAMES[:6])]


def test_where_too_few_are_left_the_round_waits_for_who_is_missing_from_the_list_and_says_so(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, deadlines=SHORT)

    async def among() -> None:
        async with site.serving(), agreed_in_vain(site, ["lab-a"], NAMES[1:3], [LIAR]) as silos:
            await until(lambda: "blocked" in [event["kind"] for event in site.status().events])
            assert site.status().attempt == 2
            silos.start(LIAR)
            await silos.done()

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:4])] * 2
    assert site.reasons(None)[1].startswith(
        f"lab-a agreed to the sum over {ALL_FOUR} and go on with exactly these; missing: lab-d."
    )


@pytest.mark.parametrize("stage", ["bundles", "uploads"])
def test_an_attempt_that_a_bound_silo_cannot_go_on_with_ends_and_the_next_one_succeeds(
    tmp_path: Path, stage: str
) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines=SHORT)

    async def among() -> None:
        async with site.serving():
            late = Gate(stage, attempt=2)
            async with agreed_in_vain(site, ["lab-a"], NAMES[1:3], [LIAR]) as silos:
                silos.start(LIAR, before=late)
                await until(lambda: site.status().attempt == 3)
                late.opened.set()
                await silos.done()

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:4])]
    assert site.reasons(None)[1] == f"lab-a agreed to the sum over {ALL_FOUR} alone; lab-d dropped out"


def claiming(*names: str) -> type[SiloSession]:
    """A silo that says that it agreed to these names."""

    class Claiming(SiloSession):
        def join(self) -> bytes:
            self._record.agreed = names
            return super().join()

    return Claiming


def test_a_silo_that_claims_to_have_agreed_to_names_it_was_never_asked_for_is_refused_and_shuts_out_nobody(
    tmp_path: Path,
) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"join": 2})
    ended = run(site, lying(claiming("lab-a", LIAR)))
    assert isinstance(ended, TransportError)
    assert (ended.status, ended.code) == (400, "agreed")
    assert averaged(site) == [others(site)]
    assert site.reasons(LIAR)[0].startswith("refused (agreed)")


def test_a_silo_that_claims_a_list_of_an_earlier_attempt_shuts_out_nobody_while_more_others_are_free(
    tmp_path: Path,
) -> None:
    site = Site.frozen(tmp_path, 7, splits=NO_COUNTS, deadlines=SHORT)
    slow = Gate("uploads")

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            list_asked = Gate("list of uploads")
            silos.start(LIAR, before=list_asked, runner=lying(SiloSession, claiming(*NAMES[:5])))
            silos.start("lab-a", "lab-b", "lab-c", "lab-e", before=list_asked)
            silos.start("lab-f", "lab-g", before=slow)
            await until(lambda: site.reasons(None) == ["0 silos at stage 'agree', 5 must answer"])
            list_asked.opened.set()
            slow.opened.set()
            await silos.done()

    asyncio.run(among())
    assert averaged(site) == [others(site)]
    assert site.reasons(LIAR) == ["no answer within 1 s"]  # the claim may be true: it is not refused


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_is_restarted_at_any_stage_still_knows_who_is_bound_to_what(tmp_path: Path, stage: str) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines=SHORT)
    gate = Gate(stage, attempt=2)

    async def among() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with site.serving():
                silos = await stack.enter_async_context(agreed_in_vain(site, NAMES[:2], NAMES[2:4], then=gate))
                await until(lambda: gate.held == 2 and site.kept(stage) == 2)
            async with site.serving():
                gate.opened.set()
                await silos.done()

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:4])]
    assert site.status().finished_rounds[0]["attempt"] == 2
