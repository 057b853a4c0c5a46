"""What the server refuses, with which code, and that it notes whose it was. Real server, real mutual TLS."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request
from yarl import URL

from fedclip_secure import canonical
from fedclip_secure.aggregator.app import Server, get_authority, make_app, post_enrol
from fedclip_secure.aggregator.home import freeze
from fedclip_secure.errors import TransportError, TrustError
from fedclip_secure.secagg.messages import vector_hash
from fedclip_secure.secagg.sealing import sealed_body_limit
from fedclip_secure.secagg.silo_session import MaskedUpload
from fedclip_secure.transport.messages import EnrolRequest
from fedclip_secure.transport.tls import client_context
from tests.aggregator.site import NAMES, STAGES, Hand, Site, hands_of, move
from tests.waiting import until

POSTS = tuple(stage for stage in STAGES if stage != "uploads")


def with_hands(tmp_path: Path, work: Callable[[Site, list[Hand]], Awaitable[None]], **options: Any) -> Site:
    """Four silos that have seen the first opening; the server stops when `work` is done."""
    site = Site.frozen(tmp_path, **options)

    async def run() -> None:
        async with site.serving(), hands_of(site) as hands:
            await work(site, hands)

    asyncio.run(run())
    return site


def session(site: Site, name: str | None) -> aiohttp.ClientSession:
    """Plain aiohttp, with a silo's certificate or none."""
    authority = site.home.authority_certificate
    if name is None:
        context = ssl.create_default_context(cafile=str(authority))
    else:
        context = client_context(site.identities[name])
    return aiohttp.ClientSession(site.url, connector=aiohttp.TCPConnector(ssl=context))


async def problem(response: aiohttp.ClientResponse) -> tuple[int, str]:
    assert response.content_type == "application/problem+json", await response.text()
    body = await response.json(content_type=None)
    assert body["status"] == response.status
    assert len(body["detail"]) <= 2000
    return response.status, body["type"].removeprefix("urn:fedclip:problem:")


ROUTES = [
    ("GET", "/v1/contract"),
    ("GET", "/v1/roster"),
    ("GET", f"/v1/files/{'0' * 64}"),
    ("GET", f"/v1/models/{'0' * 64}"),
    ("GET", "/v1/opening"),
    ("GET", "/v1/rounds/1/results"),
    ("GET", "/v1/receipt"),
    ("GET", "/v1/attempts/1/sum"),
    ("GET", "/v1/attempts/1/sum-proof"),
    ("GET", "/v1/attempts/1/vectors/lab-a"),
    ("GET", "/v1/attempts/1/uploads"),
    ("GET", "/v1/attempts/1/bundles"),
    ("GET", "/v1/attempts/1/key-ads"),
    ("GET", "/v1/attempts/1/agrees"),
    ("PUT", "/v1/attempts/1/uploads"),
    ("POST", "/v1/attempts/1/complaints"),
    *(("POST", f"/v1/attempts/1/{stage}") for stage in POSTS),
]


def test_the_list_of_routes_is_complete() -> None:
    app = make_app(cast(Server, None))

    async def handlers() -> set[object]:
        found = [await app.router.resolve(make_mocked_request(method, path)) for method, path in ROUTES]
        return {match.handler for match in found} | {get_authority, post_enrol}

    assert {route.handler for route in app.router.routes()} == asyncio.run(handlers())


def test_every_route_but_enrolment_is_refused_without_a_certificate(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        async with site.serving(), session(site, None) as guest:
            for method, path in ROUTES:
                async with guest.request(method, path, data=None if method == "GET" else b"x") as response:
                    assert await problem(response) == (403, "refused"), path
            async with guest.get("/v1/authority") as response:
                assert response.status == 200

    asyncio.run(run())
    assert site.status().events == []


def test_a_certificate_of_another_authority_does_not_get_through_the_handshake(tmp_path: Path) -> None:
    site, other = Site.frozen(tmp_path / "one"), Site.frozen(tmp_path / "other")

    async def run() -> None:
        context = client_context(other.identities["lab-a"])
        context.load_verify_locations(cafile=site.home.authority_certificate)
        async with site.serving(), aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as stranger:
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, OSError)):
                await stranger.get(f"{site.url}/v1/contract")

    asyncio.run(run())


def test_a_silo_that_is_not_in_the_roster_is_refused(tmp_path: Path) -> None:
    site = Site.create(tmp_path)
    for name in (*NAMES[:4], "late"):
        site.enrol(name)
    # It was away from the roster when that was frozen: enrolled, with a certificate that is good.
    with site.store() as store:
        late = store.member("late")
        assert late is not None
        store._sql.execute("DELETE FROM members WHERE silo = 'late'")
    site.contract, _, site.terms = freeze(site.home)
    with site.store() as store:
        store._sql.execute(
            "INSERT INTO members VALUES (?, ?, ?, ?)", ("late", late.certificate, late.public_key, late.not_after)
        )

    async def run() -> None:
        async with site.serving(), session(site, "late") as client, client.get("/v1/opening") as response:
            assert await problem(response) == (403, "refused")

    asyncio.run(run())


def test_after_another_enrolment_the_older_certificate_is_refused_even_on_an_open_connection(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        async with site.serving(), site.client("lab-a") as client:
            assert (await client.get("/v1/contract")).status == 200
            site.enrol("lab-a")  # with the same key, so after the freeze too
            with pytest.raises(TransportError, match="has enrolled again since") as refusal:
                await client.get("/v1/contract")
            assert refusal.value.status == 403
            async with site.client("lab-a") as newer:
                assert (await newer.get("/v1/contract")).status == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/files/..%2f..%2fauthority%2fauthority-key.pem", (400, "message")),
        ("/v1/files/../authority/authority-key.pem", (404, "not-found")),
        ("/v1/models/%00", (400, "message")),
        (f"/v1/models/{'0' * 62}", (400, "message")),
        (f"/v1/models/{'0' * 64}", (404, "not-found")),
        ("/v1/rounds/99999999999/results", (400, "message")),
        ("/v1/rounds/-1/results", (400, "message")),
        ("/v1/rounds/%D9%A1/results", (400, "message")),  # a digit, but not an ASCII one
        ("/v1/opening?after=" + "9" * 5000, (400, "message")),
        ("/v1/attempts/7/sum", (410, "ended")),
        ("/v1/nothing", (404, "not-found")),
    ],
)
def test_odd_paths_give_a_problem_and_no_file(tmp_path: Path, path: str, expected: tuple[int, str]) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        url = URL(site.url + path, encoded=True)
        async with site.serving(), session(site, "lab-a") as client, client.get(url) as response:
            assert await problem(response) == expected

    asyncio.run(run())


def test_a_flood_of_headers_is_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        async with site.serving(), session(site, None) as guest:
            async with guest.get("/v1/authority", headers={"X-Long": "a" * 100_000}) as response:
                assert response.status == 400
            async with guest.get("/v1/authority") as response:
                assert response.status == 200

    asyncio.run(run())


def test_a_stranger_may_send_no_more_than_an_enrolment_needs(tmp_path: Path) -> None:
    site = Site.create(tmp_path)
    many = canonical.encode({f"key-{i:06}": i for i in range(500)})
    packed = gzip.compress(canonical.encode({"csr": b"0" * 2**20}))
    token = os.urandom(32)

    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield bytes(1000)

    async def run() -> None:
        async with site.serving(), session(site, None) as guest:
            for body, headers, expected in (
                (bytes(9000), {}, (413, "size")),
                (chunked(), {}, (413, "size")),
                (many, {}, (400, "message")),
                (packed, {"Content-Encoding": "gzip"}, (400, "encoding")),  # not unpacked
                (b"", {}, (400, "encoding")),
                (os.urandom(100), {}, (400, None)),
                (EnrolRequest(token=token, csr=b"x").encode(), {}, (403, "refused")),
            ):
                async with guest.post("/v1/enrol", data=body, headers=headers) as response:
                    status, code = await problem(response)
                    assert (status, code if expected[1] else None) == expected

    asyncio.run(run())


@pytest.mark.parametrize("stage", POSTS)
def test_bodies_that_are_no_message_are_refused_at_every_stage_by_name(tmp_path: Path, stage: str) -> None:
    before = STAGES[: STAGES.index(stage)]

    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, *before)
        await until(lambda: site.status().stage == Site.stage_of(stage))
        hand, rest = hands[0], hands[1:]
        good = await hand.make(stage)
        noncanonical = bytes([0x9F, 0xFF])  # an array of indefinite length
        for body in (b"", os.urandom(2000), noncanonical, canonical.encode({"x": 1}), canonical.encode([b"", b""])):
            status, code = await hand.refused(stage, body)
            assert (status, code) in {(400, "encoding"), (400, "message"), (400, "seal")}
        assert await hand.refused(stage, bytes(2 * 2**20)) == (413, "size")
        for other in rest[:1]:  # signed by somebody else
            status, code = await hand.refused(stage, await other.make(stage))
            assert (status, code) in {(400, "signature"), (400, "seal")}
        await hand.put(stage, good)

    site = with_hands(tmp_path, work)
    reasons = site.reasons("lab-a")
    assert len(reasons) == 7
    assert all(reason.startswith("refused (") for reason in reasons)
    assert {event["stage"] for event in site.status().events if event["silo"] == "lab-a"} == {Site.stage_of(stage)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_repeat_is_answered_alike_even_after_the_stage_has_closed(tmp_path: Path, stage: str) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, *STAGES[: STAGES.index(stage)])
        bodies = {}
        last = 3 if stage == "results" else 4  # the third result ends the round
        for hand in hands[: last - 1]:
            bodies[hand.name] = await hand.make(stage)
            await hand.put(stage, bodies[hand.name])
            await hand.put(stage, bodies[hand.name])
        if stage == "results":
            return
        await move(hands[3:], stage)
        for hand in hands[:3]:
            await hand.put(stage, bodies[hand.name])

    site = with_hands(tmp_path, work)
    assert site.status().events == []


def test_a_differing_repeat_is_refused_with_the_hash_of_the_first(tmp_path: Path) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, "key-ads", "bundles", "uploads", "agrees")
        sealed = [await hand.make("unmasks") for hand in hands]
        await hands[0].put("unmasks", sealed[0])
        with pytest.raises(TransportError, match=hashlib.sha256(sealed[0]).hexdigest()) as refusal:
            await hands[0].put("unmasks", sealed[0] + b"x")
        assert (refusal.value.status, refusal.value.code) == (409, "differs")

    site = with_hands(tmp_path, work)
    assert len(site.reasons("lab-a")) == 1
    assert site.reasons("lab-a")[0].startswith("refused (differs)")


def test_uploads_that_are_no_vector_of_the_plan_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, "key-ads", "bundles")
        hand, body = hands[0], await hands[0].make("uploads")
        other = await hands[1].make("uploads")
        most = sealed_body_limit(4 * site.terms.vector.words)
        assert await hand.refused("uploads", body + bytes(most + 1 - len(body))) == (413, "size")
        assert await hand.refused("uploads", body + b"x") == (413, "length")
        assert await hand.refused("uploads", body[:-1]) == (413, "length")
        assert await hand.refused("uploads", bytes(len(body))) == (413, "length")
        assert await hand.refused("uploads", body[:-1] + bytes([body[-1] ^ 1])) == (400, "seal")
        assert await hand.refused("uploads", other) == (400, "seal")
        assert list((site.state / "vectors").iterdir()) == []
        await hand.put("uploads", body)
        assert len(list((site.state / "vectors").iterdir())) == 1

    site = with_hands(tmp_path, work)
    assert all(reason.startswith("refused (") for reason in site.reasons("lab-a"))
    assert len(site.reasons("lab-a")) == 6


def test_a_second_upload_is_answered_like_the_first_where_it_is_the_same_and_else_refused_with_the_stored_hash(
    tmp_path: Path,
) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, "key-ads", "bundles")
        hand, first = hands[0], await hands[0].upload()
        second = MaskedUpload(hand.session._commit(first.words + 1), first.words + 1)
        assert hand.session._commit(first.words) == first.header  # the session is where it was
        for _ in range(2):  # sealed anew each time: what is inside counts
            await hand.put("uploads", hand.sealed(first))
        stored = {path.name: path.read_bytes() for path in (site.state / "vectors").iterdir()}
        received = hashlib.sha256(vector_hash(first.words) + first.header).hexdigest()
        with pytest.raises(TransportError, match=received) as refusal:
            await hand.put("uploads", hand.sealed(second))
        assert (refusal.value.status, refusal.value.code) == (409, "differs")
        assert {path.name: path.read_bytes() for path in (site.state / "vectors").iterdir()} == stored
        await move(hands[1:], "uploads")
        await hand.put("uploads", hand.sealed(first))
        await move(hands, "agrees", "unmasks")
        await until(lambda: site.status().stage == "result")

    site = with_hands(tmp_path, work)
    assert len(site.reasons("lab-a")) == 1


def test_a_late_upload_is_told_so_and_not_read(tmp_path: Path) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        *three, straggler = hands
        await move(hands, "key-ads", "bundles")
        late = await straggler.make("uploads")
        await move(three, "uploads")
        straggler.gone = True
        await until(lambda: site.status().stage == "agree")
        assert await straggler.refused("uploads", late) == (409, "late")
        assert await straggler.refused("uploads", b"") == (409, "late")
        assert len(list((site.state / "vectors").iterdir())) == 3

    site = with_hands(tmp_path, work, deadlines={"upload": 1})
    assert site.reasons("lab-d") == ["no answer within 1 s"]


def test_the_upload_of_another_silo_is_refused_however_it_is_sealed(tmp_path: Path) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, "key-ads", "bundles")
        liar, victim = hands[0], hands[1]
        theirs = await victim.upload()
        await liar.upload()
        assert await liar.refused("uploads", victim.sealed(theirs)) == (400, "seal")
        assert await liar.refused("uploads", liar.sealed(theirs)) == (400, "signature")
        await victim.put("uploads", victim.sealed(theirs))
        assert site.kept("uploads") == 1

    site = with_hands(tmp_path, work)
    assert [reason.split(":")[0] for reason in site.reasons("lab-a")] == ["refused (seal)", "refused (signature)"]
    assert site.reasons("lab-b") == []


def test_an_upload_that_grows_beyond_the_plan_without_announcing_it_is_cut_off(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield bytes(2**16)

    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, "key-ads", "bundles")
        path = "/v1/attempts/1/uploads"
        async with session(site, "lab-a") as client, client.put(path, data=endless()) as response:
            assert await problem(response) == (413, "length")

    site = with_hands(tmp_path, work)
    assert site.reasons("lab-a")[0].startswith("refused (length)")


def test_an_upload_whose_connection_breaks_leaves_no_file_and_may_come_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        await move(hands, "key-ads", "bundles")
        body = await hands[0].make("uploads")
        _, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=client_context(site.identities["lab-a"]))
        head = f"PUT /v1/attempts/1/uploads HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[:-10])
        await until(lambda: len(list((site.state / "vectors").iterdir())) == 1)
        writer.transport.abort()
        await until(lambda: list((site.state / "vectors").iterdir()) == [])
        await hands[0].put("uploads", body)
        assert site.kept("uploads") == 1

    with_hands(tmp_path, work)
    assert caplog.records == []  # no fault of the server's


def test_a_message_for_a_stage_that_has_closed_or_has_not_come_is_told_so(tmp_path: Path) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        *three, straggler = hands
        late = await straggler.make("key-ads")
        assert await hands[0].refused("bundles", b"") == (400, "encoding")
        await move(three, "key-ads")
        straggler.gone = True
        await until(lambda: site.status().stage == "share")
        assert await straggler.refused("key-ads", late) == (409, "late")
        assert await straggler.refused("agrees", late) == (409, "early")

    site = with_hands(tmp_path, work, deadlines={"join": 1})
    assert not any("late" in reason for reason in site.reasons("lab-d"))


def test_a_silo_cannot_fill_the_disk_with_refusals(tmp_path: Path) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        long = canonical.encode({f"{i:04}" + "k" * 900: 0 for i in range(1000)})
        for _ in range(30):
            assert await hands[0].refused("bundles", long) == (400, "message")

    site = with_hands(tmp_path, work)
    assert len(site.reasons("lab-a")) == 20
    assert "further ones are not noted" in site.reasons("lab-a")[-1]
    assert all(len(reason) < 700 for reason in site.reasons("lab-a"))


def test_a_problem_says_nothing_of_the_server_s_folders(tmp_path: Path) -> None:
    async def work(site: Site, hands: list[Hand]) -> None:
        (site.state / "models" / f"{'ab' * 32}.safetensors").symlink_to(site.state / "models" / f"{'ab' * 32}.none")
        (site.state / "files" / ("cd" * 32)).write_bytes(b"")
        for path in (f"/v1/models/{'ab' * 32}", "/v1/attempts/1/nothing"):
            with pytest.raises((TransportError, TrustError)) as refusal:
                await hands[0].client.get(path)
            assert str(tmp_path) not in str(refusal.value)

    with_hands(tmp_path, work)


def test_a_silo_has_one_upload_arriving_at_a_time(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        async with site.serving(), hands_of(site) as hands:
            await move(hands, "key-ads", "bundles")
            body, go_on = await hands[0].make("uploads"), asyncio.Event()

            async def slow() -> AsyncIterator[bytes]:
                yield body[:100]
                await go_on.wait()
                yield body[100:]

            path = "/v1/attempts/1/uploads"
            first = asyncio.create_task(hands[0].client.put_stream(path, slow, len(body)))
            await until(lambda: any((site.state / "vectors").glob("*.part")))
            async with site.client(hands[0].name) as other:
                again = Hand(site, hands[0].name, other, hands[0].session)
                assert await again.refused("uploads", body) == (503, "busy")
            go_on.set()
            assert (await first).status == 204

    asyncio.run(run())
