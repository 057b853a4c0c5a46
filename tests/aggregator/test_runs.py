"""Whole runs: the real server, real mutual TLS on loopback, real silo sessions; silos vanish, servers restart."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.secagg.messages import Complaint, Void, open_message, sign_message
from fedclip_secure.silo.run.link import Link
from fedclip_secure.transport.tls import client_context
from tests.aggregator.site import (
    NAMES,
    STAGES,
    Gate,
    Hand,
    Site,
    VanishedError,
    hands_of,
    move,
    silos_of,
    vanishing,
)
from tests.waiting import until


def test_three_rounds_of_four_silos_end_with_the_model_that_their_updates_add_up_to(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, training={"rounds": 3})

    async def run() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(*NAMES[:4])
            await silos.done()

    asyncio.run(run())
    status = site.status()
    assert (status.state, status.round, len(status.finished_rounds)) == ("finished", 4, 4)
    assert status.finished_rounds[-1]["model"] == site.foretold([NAMES[:4]] * 3)
    assert [silo.rounds_averaged for silo in status.silos] == [3] * 4
    assert status.events == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_is_restarted_at_any_stage_finishes_the_same_attempt_with_the_same_model(
    tmp_path: Path, stage: str
) -> None:
    site = Site.frozen(tmp_path)
    gate = Gate(stage)

    async def run() -> None:
        async with silos_of(site) as silos:
            async with site.serving():
                silos.start(*NAMES[:2])
                silos.start(*NAMES[2:4], before=gate)
                await until(lambda: gate.held == 2 and site.kept(stage) == 2)
            async with site.serving():
                gate.opened.set()
                await silos.done()

    asyncio.run(run())
    status = site.status()
    assert status.finished_rounds[-1]["model"] == site.foretold([NAMES[:4]])
    assert [row["attempt"] for row in status.finished_rounds] == [1, 2]
    assert status.events == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_others_finish_without_a_silo_that_vanishes_at_any_stage(tmp_path: Path, stage: str) -> None:
    deadlines = dict.fromkeys(("join", "share", "upload", "agree", "unmask"), 1)
    # Without a closing round for validation, in which the silo would be waited for once more.
    site = Site.frozen(tmp_path, deadlines=deadlines, splits={"train": 0.8, "validation": 0, "test": 0.2})

    async def run() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start("lab-b", before=vanishing(stage))
            silos.start("lab-a", "lab-c", "lab-d")
            await silos.done("lab-a", "lab-c", "lab-d")
            with pytest.raises(VanishedError):
                await silos.done("lab-b")

    asyncio.run(run())
    status = site.status()
    rest = ("lab-a", "lab-c", "lab-d")
    averaged = rest if STAGES.index(stage) <= STAGES.index("uploads") else NAMES[:4]
    assert status.state == "finished"
    assert status.finished_rounds[0]["survivors"] == list(averaged)
    assert status.finished_rounds[-1]["model"] == site.foretold([averaged])
    told = {"key-ads": [], "results": []}.get(stage, ["no answer within 1 s"])
    assert site.reasons("lab-b") == told


def test_below_the_floor_the_attempt_ends_with_a_reason_and_the_next_one_succeeds(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, deadlines={"share": 1})
    gate = Gate("bundles")

    async def run() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(*NAMES[:2])
            silos.start(*NAMES[2:4], before=gate)
            await until(lambda: site.reasons(None) != [])
            gate.opened.set()
            await silos.done()

    asyncio.run(run())
    status = site.status()
    assert site.reasons(None) == ["2 silos at stage 'share', the plan needs 3"]
    assert status.finished_rounds[0]["attempt"] == 2
    assert status.finished_rounds[-1]["model"] == site.foretold([NAMES[:4]])
    assert status.silos[3].dropped == {"share": 1}


def test_too_few_silos_wait_and_use_no_attempt(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, deadlines={"join": 1})

    async def run() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(*NAMES[:2])
            await until(lambda: any("2 joined, 3 are needed" in text for text in site.said))
            assert (site.status().attempt, site.status().stage) == (1, "join")
            silos.start(*NAMES[2:3])
            await silos.done()

    asyncio.run(run())
    assert site.status().finished_rounds[-1]["model"] == site.foretold([NAMES[:3]])


def test_a_silo_that_was_seen_before_a_restart_is_waited_for_after_it(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)
    gate = Gate("key-ads")

    async def run() -> None:
        async with silos_of(site) as silos:
            async with site.serving():
                silos.start(*NAMES[:3])
                silos.start("lab-d", before=gate)
                await until(lambda: gate.held == 1 and site.kept("key-ads") == 3)
            async with site.serving():
                await asyncio.sleep(0.5)  # three are enough, and would be asked at once
                assert site.status().stage == "join"
                gate.opened.set()
                await silos.done()

    asyncio.run(run())
    assert site.status().finished_rounds[0]["survivors"] == list(NAMES[:4])


def test_a_forged_weight_makes_the_sum_void_by_a_signed_word_and_halts_the_run_for_good(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> list[str]:
        records = {"lab-b": site.record("lab-b")}
        records["lab-b"].open_vector()[-3] = np.uint32(2**20)  # far above max_weight
        async with site.serving(), hands_of(site, records=records) as hands:
            await move(hands, *STAGES[:5])
            await until(lambda: site.status().state == "halted")
            answer = await Link(hands[0].client, tmp_path).opening(1, idle=False)
            assert (answer.state, answer.opening) == ("halted", None)
            signed = open_message(answer.void or b"", Void, "lung-xray", site.terms.roster)
            assert signed.sender == AGGREGATOR
            assert "the weights of 4 silos add up to" in signed.body.reason
            assert await hands[0].refused("agrees", b"") == (410, "ended")
        told = len(site.said)
        async with site.serving(), silos_of(site) as silos:  # a restart changes nothing
            silos.start("lab-a")
            with pytest.raises(TrustError, match="declared the sum void"):
                await silos.done()
            assert site.status().state == "halted"
        return site.said[told:]

    assert any(text.startswith("halted: the weights of 4 silos") for text in asyncio.run(run()))
    assert site.status().finished_rounds == []


async def complain(site: Site, hand: Hand, accused: str) -> None:
    body = Complaint(transcript=hand.session.transcript, accused=accused, code="bundle")
    wire = sign_message(body, "lung-xray", hand.name, site.identities[hand.name].sign)
    await hand.put("complaints", wire)


@pytest.mark.parametrize(
    ("silos", "left_out", "agreed"),
    [(4, {"lab-a"}, {}), (5, {"lab-a", "lab-b"}, {"threshold": "honest_but_curious"})],
)
def test_a_complaint_ends_the_attempt_and_leaves_out_both_or_where_that_is_too_few_the_accuser(
    tmp_path: Path, silos: int, left_out: set[str], agreed: dict[str, str]
) -> None:
    site = Site.frozen(tmp_path, silos, secure_aggregation=agreed)

    async def run() -> None:
        async with site.serving(), hands_of(site) as hands:
            await move(hands, "key-ads", "bundles")
            await complain(site, hands[0], "lab-b")
            await until(lambda: site.status().attempt == 2)
            for hand in hands:
                hand.attempt = 2
                if hand.name in left_out:
                    assert await hand.refused("key-ads", b"x") == (409, "left-out")
                else:
                    answer = await Link(hand.client, tmp_path).opening(1, idle=False)
                    assert (answer.state, answer.attempt) == ("open", 2)
            assert await hands[0].refused("complaints", b"x") == (409, "early")

    asyncio.run(run())
    assert "lab-a complains that what lab-b sent it does not open (bundle)" in site.reasons(None)


def test_whoever_a_complaint_left_out_takes_part_in_the_next_round(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)
    gate = Gate("key-ads", attempt=2)

    async def run() -> None:
        async with site.serving(), silos_of(site) as silos:
            async with hands_of(site) as hands:
                await move(hands, "key-ads", "bundles")
                await complain(site, hands[0], "lab-b")
            silos.start("lab-a")
            await until(lambda: any("waiting" in text for text in silos.heard["lab-a"]) or site.status().attempt == 2)
            silos.start("lab-b", "lab-c", "lab-d", before=gate)
            await until(lambda: gate.held == 3)
            gate.opened.set()
            await silos.done()

    asyncio.run(run())
    assert [row["survivors"] for row in site.status().finished_rounds] == [list(NAMES[1:4]), list(NAMES[:4])]


def test_complaints_of_strangers_and_about_other_attempts_are_refused_and_end_nothing(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        async with site.serving(), hands_of(site) as hands:
            await move(hands, "key-ads", "bundles")
            sign = site.identities["lab-a"].sign
            for body in (
                Complaint(transcript=bytes(32), accused="lab-b", code="bundle"),
                Complaint(transcript=hands[0].session.transcript, accused="nobody", code="bundle"),
            ):
                assert await hands[0].refused("complaints", sign_message(body, "lung-xray", "lab-a", sign)) == (
                    400,
                    "complaint",
                )
            await move(hands, "uploads", "agrees")
            assert site.status().attempt == 1

    asyncio.run(run())
    assert site.rows("SELECT * FROM complaints") == []


def test_a_complaint_that_is_none_is_refused_by_name_and_ends_nothing(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        async with site.serving(), hands_of(site) as hands:
            await move(hands, "key-ads", "bundles")
            body = Complaint(transcript=hands[0].session.transcript, accused="lab-c", code="bundle")
            for wire, code in (
                (b"", "encoding"),
                (os.urandom(1000), None),
                (sign_message(body, "lung-xray", "lab-b", site.identities["lab-b"].sign), "signature"),
                (sign_message(body, "lung-xray", "lab-a", site.identities["lab-b"].sign), "signature"),
                (sign_message(body, "other", "lab-a", site.identities["lab-a"].sign), "message"),
            ):
                status, told = await hands[0].refused("complaints", wire)
                assert (status, told if code else None) == (400, code)
            await move(hands, "uploads")
            await until(lambda: site.status().stage == "agree")
            wire = sign_message(body, "lung-xray", "lab-a", site.identities["lab-a"].sign)
            assert await hands[0].refused("complaints", wire) == (409, "late")
            await move(hands, "agrees")
            assert site.status().attempt == 1

    asyncio.run(run())
    assert site.rows("SELECT * FROM complaints") == []
    assert len(site.reasons("lab-a")) == 5
    assert site.reasons("lab-b") == site.reasons("lab-c") == []


def test_a_complaint_whose_body_comes_after_its_attempt_does_not_end_the_next_one(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, 5, secure_aggregation={"threshold": "honest_but_curious"})

    async def run() -> None:
        async with site.serving(), hands_of(site) as hands:
            await move(hands, "key-ads", "bundles")
            slow = await slow_complaint(site, hands[4], "lab-a")
            await complain(site, hands[0], "lab-b")
            await until(lambda: site.status().attempt == 2)
            assert b"410" in await slow()
            assert site.rows("SELECT accuser FROM complaints") == [("lab-a",)]

    asyncio.run(run())


async def slow_complaint(site: Site, hand: Hand, accused: str) -> Callable[[], Awaitable[bytes]]:
    """Sends head and half of a body; the answer's first line once the rest is sent."""
    body = Complaint(transcript=hand.session.transcript, accused=accused, code="bundle")
    wire = sign_message(body, "lung-xray", hand.name, site.identities[hand.name].sign)
    context = client_context(site.identities[hand.name])
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=context)
    head = f"POST /v1/attempts/1/complaints HTTP/1.1\r\nHost: x\r\nContent-Length: {len(wire)}\r\n\r\n"
    writer.write(head.encode() + wire[:50])
    await asyncio.sleep(0.2)  # the server has matched it to the attempt by now

    async def finish() -> bytes:
        writer.write(wire[50:])
        line = await reader.readline()
        writer.close()
        return line

    return finish
