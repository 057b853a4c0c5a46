"""What a restarted server still knows of lies, and what silos say to one whose state folder is an older backup."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from fedclip_secure.errors import TrustError
from fedclip_secure.silo.run.link import Link
from tests.aggregator.liars import LIAR, NO_COUNTS, averaged, others, sharing
from tests.aggregator.site import NAMES, Gate, Hand, Silos, Site, hands_of, move, set_back, silos_of
from tests.aggregator.test_lying_silos import at_odds, garbage_for, wrong_salt_for
from tests.secagg.lies import Lie
from tests.waiting import until

REST = ["lab-a", "lab-c", "lab-e", "lab-f", "lab-g"]  # without the liar and lab-b


def test_commitments_that_came_before_a_restart_are_held_against_those_that_come_after_it(tmp_path: Path) -> None:
    site, gate = Site.frozen(tmp_path, 7, splits=NO_COUNTS), Gate("uploads")

    async def among() -> None:
        async with silos_of(site) as silos:
            async with site.serving():
                silos.start(LIAR, runner=sharing(wrong_salt_for("lab-b")))
                silos.start(*others(site), before=gate)
                await until(lambda: gate.held == 6 and site.kept("uploads") == 1)
            async with site.serving():
                gate.opened.set()
                await silos.done()

    asyncio.run(among())
    assert averaged(site) == [REST]
    assert site.reasons(None) == [at_odds(f"{LIAR} and lab-b")]


@pytest.mark.parametrize("lie", [wrong_salt_for("lab-b"), garbage_for("lab-b")], ids=["conflict", "complaint"])
def test_whoever_is_out_stays_out_of_the_round_when_the_server_is_restarted(tmp_path: Path, lie: Lie) -> None:
    site, gate = Site.frozen(tmp_path, 7), Gate("key-ads", attempt=2)

    async def among() -> None:
        async with silos_of(site) as silos:
            async with site.serving():
                silos.start(LIAR, runner=sharing(lie))
                silos.start(*others(site), before=gate)
                await until(lambda: gate.held == 5)
            async with site.serving():
                gate.opened.set()
                await silos.done()

    asyncio.run(among())
    assert averaged(site) == [REST, list(NAMES[:7])]
    assert len(site.reasons(None)) == 1


@pytest.mark.parametrize(("stage", "restarted"), [("bundles", False), ("results", False), ("results", True)])
def test_silos_that_know_a_later_attempt_than_a_restored_server_end_and_say_so(
    tmp_path: Path, stage: str, restarted: bool
) -> None:
    site = Site.frozen(tmp_path, training={"rounds": 3})
    first, second = Gate("key-ads", attempt=2), Gate(stage, attempt=3)

    async def run(silos: Silos) -> None:
        await set_back(site, silos, first, second)

    async def among() -> None:
        async with silos_of(site) as silos:
            await run(silos)
            async with site.serving():
                if restarted:
                    await silos.stop()
                    silos.start(*NAMES[:4])
                second.opened.set()
                for name in NAMES[:4]:
                    with pytest.raises(
                        TrustError, match=f"{name} has seen attempt 3, .* restored from an older backup"
                    ):
                        await silos.done(name)

    asyncio.run(among())
    assert len(site.status().finished_rounds) == 1


def test_whoever_asks_for_what_comes_after_an_attempt_that_was_never_opened_is_told_that_the_state_is_old(
    tmp_path: Path,
) -> None:
    site = Site.frozen(tmp_path)

    async def among() -> None:
        async with site.serving(), site.client(LIAR) as liar, silos_of(site) as silos:
            answer = await Link(liar, tmp_path).opening(2, idle=False)
            assert (answer.state, answer.opening) == ("halted", None)
            assert answer.reason.startswith(f"{LIAR} has seen attempt 2, which the coordinator's state does not know")
            silos.start(*NAMES[:4])  # it is no word of the run's, and a liar's question halts nobody else
            await silos.done()

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[:4])] * 2


def test_a_restarted_server_publishes_the_same_proof_and_vectors_of_the_sum(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, deadlines={"upload": 1})

    async def published(hand: Hand) -> tuple[bytes, list[bytes]]:
        async with site.client(hand.name) as client:
            link = Link(client, tmp_path)
            vectors = [await link.vector(1, name, site.terms) for name in NAMES[:3]]
            return (await link.sum_proof(1)).encode(), [vector.tobytes() for vector in vectors]

    async def among() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with site.serving():
                hands = await stack.enter_async_context(hands_of(site))
                await move(hands, "key-ads", "bundles")
                hands[3].gone = True
                await move(hands[:3], "uploads", "agrees", "unmasks")
                before = await published(hands[0])
            async with site.serving():
                assert await published(hands[1]) == before
                await move(hands[:3], "results")

    asyncio.run(among())
    assert site.status().finished_rounds[0]["survivors"] == list(NAMES[:3])
