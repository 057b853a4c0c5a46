"""Enrolment at the real server: tokens, repeats, and what the freeze forbids."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from fedclip_secure.aggregator.home import freeze
from fedclip_secure.errors import TransportError, TrustError
from fedclip_secure.pki.identity import Identity
from fedclip_secure.pki.invitation import Invitation
from fedclip_secure.silo.run.link import Link
from fedclip_secure.transport.enrolment import enroll
from tests.aggregator.site import NAMES, Site


async def ask(site: Site, invitation: Invitation, folder: Path) -> Identity:
    return await enroll(site.url, invitation.encode(), folder, lambda _reason, _seconds: None)


def test_a_silo_enrols_once_and_the_same_request_gets_the_same_certificate_again(tmp_path: Path) -> None:
    site = Site.create(tmp_path)

    async def run() -> None:
        async with site.serving():
            token = site.token("lab-a")
            first = await ask(site, token, tmp_path / "lab-a")
            again = await ask(site, token, tmp_path / "lab-a")
            assert first.certificate == again.certificate
            with pytest.raises(TransportError, match="used already, with another key") as refusal:
                await ask(site, token, tmp_path / "thief")
            assert (refusal.value.status, refusal.value.code) == (403, "refused")
            site.identities["lab-a"] = first
            async with site.client("lab-a") as client:
                with pytest.raises(TransportError) as early:
                    await client.get("/v1/contract")
                assert (early.value.status, early.value.code) == (409, "early")

    asyncio.run(run())


def test_expired_unknown_and_replaced_tokens_are_refused(tmp_path: Path) -> None:
    site = Site.create(tmp_path)
    replaced, expired = site.token("lab-b"), site.token("lab-a", valid=-1)
    site.token("lab-b")
    unknown = Invitation.create("lab-c", expired.authority_fingerprint)

    async def run() -> None:
        async with site.serving():
            for invitation, reason in ((expired, "has expired"), (replaced, "not known"), (unknown, "not known")):
                with pytest.raises(TransportError, match=reason) as refusal:
                    await ask(site, invitation, tmp_path / invitation.name)
                assert refusal.value.status == 403

    asyncio.run(run())
    assert [silo.name for silo in site.status().silos if silo.enrolled] == []


def test_after_the_freeze_only_the_pinned_key_gets_a_certificate(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)
    token, stolen = site.token("lab-a"), site.token("lab-b")

    async def run() -> None:
        async with site.serving():
            before = site.identities["lab-a"].certificate
            assert (await ask(site, token, site.identities["lab-a"].folder)).certificate != before
            with pytest.raises(TransportError, match="the roster is frozen and pins another key of lab-b"):
                await ask(site, stolen, tmp_path / "another")

    asyncio.run(run())
    with pytest.raises(TrustError, match="frozen without lab-e"):
        site.token("lab-e")
    with pytest.raises(TrustError, match="frozen already"):
        freeze(site.home)


def test_a_token_that_was_left_over_at_the_freeze_is_of_no_use(tmp_path: Path) -> None:
    site = Site.create(tmp_path)
    left_over = site.token("lab-e")
    for name in NAMES[:4]:
        site.enrol(name)
    freeze(site.home)

    async def run() -> None:
        async with site.serving():
            with pytest.raises(TransportError, match="pins another key of lab-e, or none"):
                await ask(site, left_over, tmp_path / "lab-e")

    asyncio.run(run())


def test_status_tells_how_far_a_federation_is(tmp_path: Path) -> None:
    site = Site.create(tmp_path)
    site.token("lab-d")
    for name in NAMES[:3]:
        site.enrol(name)
    status = site.status()
    assert (status.state, status.round, status.stage, status.floor) == ("enrolling", 0, None, None)
    assert [silo.enrolled for silo in status.silos] == [True, True, True, False]
    site.enrol("lab-d")
    site.contract, _, site.terms = freeze(site.home)
    status = site.status()
    assert (status.state, status.floor, status.absent_tolerated) == ("frozen", 3, 1)
    assert all(silo.certificate_ends and silo.certificate_ends > time.time() for silo in status.silos)

    async def run() -> None:
        async with site.serving(), site.client("lab-a") as client:
            await client.get("/v1/opening")
            status = site.status()
            assert (status.state, status.round, status.attempt, status.stage) == ("running", 1, 1, "join")
            assert status.silos[0].last_seen is not None
            assert status.as_json()["answered"] == []

    asyncio.run(run())
    assert site.status().state == "running"  # stopped, and not over


def test_a_silo_that_waits_for_the_freeze_counts_as_present_once_it_comes(tmp_path: Path) -> None:
    site = Site.create(tmp_path)
    for name in NAMES[:4]:
        site.enrol(name)

    async def run() -> None:
        async with site.serving(), site.client("lab-d") as client:
            waiting = asyncio.create_task(Link(client, tmp_path).opening(0, idle=False))
            await asyncio.sleep(0.3)
            freeze(site.home)
            assert (await waiting).state == "open"
            assert [silo for silo, _ in site.rows("SELECT silo, seen_at FROM presence")] == ["lab-d"]

    asyncio.run(run())
