from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import TypeVar

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding

from fedclip_secure.errors import ConfigError, DataError, FedClipError, TransportError, TrustError
from fedclip_secure.pki.certificates import read_certificate
from fedclip_secure.pki.identity import Identity
from fedclip_secure.transport import client as client_module
from fedclip_secure.transport.client import Client, Patience
from fedclip_secure.transport.problems import CONTENT_TYPE, Problem
from fedclip_secure.transport.tls import client_context, enrolment_context
from tests.disk import file_limit
from tests.transport.loopback import QUICK, ConnectProxy, Federation, Handler, Waits, alerting, serving, who
from tests.waiting import BOUND

T = TypeVar("T")
Use = Callable[[Client], Awaitable[T]]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Identity]:
    federation = Federation.create(tmp_path_factory.mktemp("federation"))
    return federation, federation.enrol("st-marys")


@pytest.fixture
def federation(shared: tuple[Federation, Identity]) -> Federation:
    return shared[0]


@pytest.fixture
def identity(shared: tuple[Federation, Identity]) -> Identity:
    return shared[1]


def run(
    handler: Handler,
    server: ssl.SSLContext | None,
    client: ssl.SSLContext,
    use: Use[T],
    *,
    host: str = "127.0.0.1",
    patience: Patience = QUICK,
    waits: Waits | None = None,
) -> T:
    async def scenario() -> T:
        async with serving(handler, server) as port:
            told = Waits() if waits is None else waits
            async with Client(f"https://{host}:{port}", client, told, patience) as session:
                return await use(session)

    async def bounded() -> T:
        return await asyncio.wait_for(scenario(), BOUND)

    return asyncio.run(bounded())


async def get(client: Client) -> bytes:
    return (await client.get("/v1/who")).body


def test_server_sees_the_name_in_the_silos_certificate(federation: Federation, identity: Identity) -> None:
    shown = run(who, federation.server_context(), client_context(identity), get)
    assert federation.authority.client_name(shown) == "st-marys"


def test_host_name_is_accepted_where_the_certificate_has_it(federation: Federation, identity: Identity) -> None:
    shown = run(who, federation.server_context(), client_context(identity), get, host="localhost")
    assert federation.authority.client_name(shown) == "st-marys"


def test_client_without_certificate_is_let_in_as_nobody(federation: Federation) -> None:
    pem = (federation.folder / "authority.pem").read_text()
    assert run(who, federation.server_context(), enrolment_context(pem), get) == b"nobody"


def test_interceptor_is_named_and_not_tried_again(federation: Federation, identity: Identity, tmp_path: Path) -> None:
    interceptor, waits = Federation.create(tmp_path), Waits()
    with pytest.raises(TrustError, match=r"not from this federation's authority; it was issued by .*lung-xray.*exempt"):
        run(who, interceptor.server_context(), client_context(identity), get, waits=waits)
    assert waits.told == []


def test_interceptor_is_recognised_through_a_proxy(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interceptor = Federation.create(tmp_path)
    with pytest.raises(TrustError, match=r"not from this federation's authority; it was issued by .*lung-xray"):
        run_through(ConnectProxy(), "", interceptor.server_context(), client_context(identity), monkeypatch)


def test_certificate_for_another_host_is_refused(identity: Identity, federation: Federation, tmp_path: Path) -> None:
    other = Federation(tmp_path, federation.authority)
    (tmp_path / "authority.pem").write_bytes((federation.folder / "authority.pem").read_bytes())
    other.write_server(*federation.authority.issue_server(["agg.example.org"]))
    with pytest.raises(TrustError, match="certificate is for another host"):
        run(who, other.server_context(), client_context(identity), get)
    with pytest.raises(TrustError, match="certificate is for another host"):
        run(who, other.server_context(), client_context(identity), get, host="localhost")


def test_expired_server_certificate_is_refused(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path)
    context = client_context(federation.enrol("st-marys"))
    federation.expire_server()
    said = (
        r"the server's certificate ended on \d{4}-\S+ \S+ UTC "
        r"\(this machine's clock says .* UTC and the server's agrees\); "
        "ask the coordinator to start `fedclip-agg serve` again, which makes it anew$"
    )
    with pytest.raises(TrustError, match=said):
        run(who, federation.server_context(), context, get, host="localhost")


def at_the_clock(difference: timedelta) -> Handler:
    """A server whose clock is ahead of this one by so much."""

    async def handle(request: web.Request) -> web.Response:
        return web.Response(headers={"Date": format_datetime(datetime.now(UTC) + difference, usegmt=True)})

    return handle


@pytest.mark.parametrize(
    ("begins", "ends", "ahead", "said"),
    [
        (
            -2,
            -1,
            -1.5,
            r"this machine's clock says .* UTC, and the server's .* UTC, at which its certificate is valid: they "
            r"differ by 90 minutes\. Nothing vouches for the server's: compare both with a third \(`timedatectl`, a "
            r"phone\) and set the wrong one$",
        ),
        (
            1,
            2,
            1.5,
            "at which its certificate is valid: they differ by 90 minutes",
        ),
        (1, 2, 0, "certificate is valid only from .* and the server's agrees.*look at the server's clock"),
        (-2, -1, -5, r"certificate ended on .* \(this machine's clock says [^(]* UTC\); ask the coordinator to start"),
    ],
)
def test_a_wrong_clock_is_told_from_a_certificate_that_is_over(
    tmp_path: Path, begins: float, ends: float, ahead: float, said: str
) -> None:
    federation = Federation.create(tmp_path)
    context = client_context(federation.enrol("st-marys"))
    federation.expire_server(timedelta(hours=begins), timedelta(hours=ends))
    with pytest.raises(TrustError, match=said):
        run(at_the_clock(timedelta(hours=ahead)), federation.server_context(), context, get, host="localhost")


@pytest.mark.parametrize("date", ["", "Date: noon\r\n", "Date: Mon, 01 Jan 0001 00:00:00 +2300\r\n"])
def test_a_server_without_a_clock_that_can_be_read_is_told_by_its_certificate(tmp_path: Path, date: str) -> None:
    async def handle(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.write(f"HTTP/1.1 200 OK\r\n{date}Content-Length: 0\r\n\r\n".encode())
        return web.Response()

    federation = Federation.create(tmp_path)
    context = client_context(federation.enrol("st-marys"))
    federation.expire_server()
    with pytest.raises(TrustError, match=r"certificate ended on .* \(this machine's clock says [^(]* UTC\); ask the"):
        run(handle, federation.server_context(), context, get, host="localhost")


def test_a_peer_that_says_nothing_after_it_was_refused_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    monkeypatch.setattr(client_module, "_LOOK", 0.2)
    federation = Federation.create(tmp_path)
    context = client_context(federation.enrol("st-marys"))
    federation.expire_server()
    with pytest.raises(TrustError, match=r"certificate ended on .* \(this machine's clock says [^(]* UTC\); ask the"):
        run(never, federation.server_context(), context, get, host="localhost")


@pytest.mark.parametrize("name", [b"\x14\x09lung\xffxray", b"\x03\x09\x00ung-xray"], ids=["T61String", "BIT STRING"])
def test_an_interceptor_whose_name_is_no_text_is_refused_without_it(
    identity: Identity, tmp_path: Path, name: bytes
) -> None:
    interceptor = Federation.create(tmp_path)
    shown = read_certificate(tmp_path / "server.pem").public_bytes(Encoding.DER)
    other = ssl.DER_cert_to_PEM_cert(shown.replace(b"\x0c\x09lung-xray", name))
    (tmp_path / "server.pem").write_text(other)
    with pytest.raises(
        TrustError, match=r"certificate is not from this federation's authority\. A proxy or an antivir"
    ):
        run(who, interceptor.server_context(), client_context(identity), get)


def test_silo_cannot_pose_as_the_server(federation: Federation, identity: Identity) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.folder / "certificate.pem", identity.folder / "key.pem")
    with pytest.raises(TrustError, match="not from this federation's authority"):
        run(who, context, client_context(identity), get)


def test_expired_silo_certificate_is_refused_in_plain_words(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path)
    identity = federation.enrol("st-marys")
    federation.expire_silo(identity)

    async def scenario() -> None:
        mine = read_certificate(identity.folder / "certificate.pem")
        context = client_context(identity)
        async with Client("https://127.0.0.1:1", context, Waits(), QUICK, certificate=mine) as client:
            await client.get("/v1/who")

    with pytest.raises(
        TrustError, match=r"this silo's certificate expired on \d{4}-.*ask the coordinator for a new inv"
    ):
        asyncio.run(scenario())


def test_certificates_of_strangers_and_expired_ones_never_reach_a_route(federation: Federation, tmp_path: Path) -> None:
    served: list[str] = []

    async def count(request: web.Request) -> web.Response:
        served.append(request.path)
        return web.Response()

    strangers, late = Federation.create(tmp_path), federation.enrol("late")
    federation.expire_silo(late)
    for identity in (strangers.enrol("st-marys"), late):
        context = enrolment_context((federation.folder / "authority.pem").read_text())
        context.load_cert_chain(identity.folder / "certificate.pem", identity.folder / "key.pem")
        with pytest.raises(TransportError, match="may be restarting, or not take this silo's certificate"):
            run(count, federation.server_context(), context, get)
    assert served == []


def test_tls_1_2_client_never_reaches_a_route(federation: Federation, identity: Identity) -> None:
    old = client_context(identity)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(TransportError, match="hung up during the TLS handshake"):
        run(who, federation.server_context(), old, get)


def behind_alerts(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    """What a user reads when a server refuses the handshake and sends its alert, as stacks other than asyncio do."""

    async def scenario(port: int) -> None:
        async with Client(f"https://127.0.0.1:{port}", client, Waits(), Patience(tries=1)) as session:
            await session.get("/v1/who")

    with alerting(server) as port, pytest.raises(FedClipError) as caught:
        asyncio.run(asyncio.wait_for(scenario(port), BOUND))
    return str(caught.value)


def test_tls_1_2_server_is_refused(federation: Federation, identity: Identity) -> None:
    old = federation.server_context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert "does not speak TLS 1.3" in behind_alerts(old, client_context(identity))


def test_alert_about_an_expired_certificate_is_explained(federation: Federation) -> None:
    late = federation.enrol("late")
    federation.expire_silo(late)
    said = behind_alerts(federation.server_context(), client_context(late))
    assert "this silo's certificate has expired, says the server" in said


def test_alert_about_a_strangers_certificate_is_explained(federation: Federation, tmp_path: Path) -> None:
    stranger = Federation.create(tmp_path).enrol("st-marys")
    context = enrolment_context((federation.folder / "authority.pem").read_text())
    context.load_cert_chain(stranger.folder / "certificate.pem", stranger.folder / "key.pem")
    said = behind_alerts(federation.server_context(), context)
    assert "belongs to another federation than this silo's certificate" in said


def test_port_of_a_plain_http_service_is_told(identity: Identity) -> None:
    with pytest.raises(TransportError, match="the port is another service's"):
        run(who, None, client_context(identity), get)


def test_problem_reaches_the_caller_with_its_code(federation: Federation, identity: Identity) -> None:
    async def refuse(request: web.Request) -> web.Response:
        problem = Problem.of("late", 409, "round 3 has closed; wait for the next")
        return web.Response(status=409, body=problem.encode(), content_type=CONTENT_TYPE)

    waits = Waits()
    with pytest.raises(TransportError, match="round 3 has closed; wait for the next") as caught:
        run(refuse, federation.server_context(), client_context(identity), get, waits=waits)
    assert (caught.value.status, caught.value.code, waits.told) == (409, "late", [])


def test_redirect_is_never_followed(federation: Federation, identity: Identity) -> None:
    async def redirect(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "https://127.0.0.1:1/"})

    with pytest.raises(TransportError, match="redirect"):
        run(redirect, federation.server_context(), client_context(identity), get)


@pytest.mark.parametrize(("status", "said"), [(200, "more than 1000 bytes"), (400, "HTTP 400 and no reason")])
def test_endless_answer_is_not_read(federation: Federation, identity: Identity, status: int, said: str) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for _ in range(1000):
            await response.write(bytes(2**16))
        return response

    async def small(client: Client) -> bytes:
        return (await client.get("/v1/who", limit=1000)).body

    with pytest.raises(TransportError, match=said):
        run(endless, federation.server_context(), client_context(identity), small)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_busy_server_is_tried_again(federation: Federation, identity: Identity, status: int) -> None:
    answers = iter([status, 200])

    async def busy(request: web.Request) -> web.Response:
        assert await request.read() == b"message"
        return web.Response(status=next(answers), headers={"Retry-After": "0"})

    async def post(client: Client) -> int:
        return (await client.post("/v1/messages", b"message")).status

    waits = Waits()
    assert run(busy, federation.server_context(), client_context(identity), post, waits=waits) == 200
    ((reason, _),) = waits.told
    assert f"HTTP {status}" in reason


def test_server_that_asks_for_time_gets_it() -> None:
    assert Patience(first_wait=1.0).before(2, asked=17.0) == 17.0
    assert 30.0 <= Patience(longest_wait=60.0).before(1000, asked=0.0) <= 60.0


def test_wait_for_a_server_that_comes_up_later_is_told(federation: Federation, identity: Identity) -> None:
    async def scenario() -> tuple[bytes, Waits]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        waits, patience = Waits(), Patience(first_wait=0.05, longest_wait=0.05)
        async with Client(f"https://127.0.0.1:{port}", client_context(identity), waits, patience) as client:
            request = asyncio.create_task(get(client))
            while len(waits.told) < 2:
                await asyncio.sleep(0.01)
            async with serving(who, federation.server_context(), port):
                return await request, waits

    shown, waits = asyncio.run(asyncio.wait_for(scenario(), BOUND))
    assert federation.authority.client_name(shown) == "st-marys"
    assert "refuses connections; is it running" in waits.told[0][0]
    assert all(0 < seconds <= 0.05 for _, seconds in waits.told)


def test_patience_ends_where_a_limit_is_set(identity: Identity) -> None:
    async def scenario() -> None:
        async with Client("https://127.0.0.1:1", client_context(identity), Waits(), QUICK) as client:
            await client.get("/v1/who")

    with pytest.raises(TransportError, match=r"127\.0\.0\.1:1: refuses connections"):
        asyncio.run(scenario())


def test_unknown_host_is_named(identity: Identity) -> None:
    async def scenario() -> None:
        async with Client("https://nowhere.invalid", client_context(identity), Waits(), QUICK) as client:
            await client.get("/v1/who")

    with pytest.raises(TransportError, match=r"nowhere\.invalid.*the name is not found"):
        asyncio.run(scenario())


def test_silent_server_is_given_up(federation: Federation, identity: Identity) -> None:
    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(10)
        return web.Response()

    hasty = Patience(tries=2, first_wait=0.01, silence=0.3)
    waits = Waits()
    with pytest.raises(TransportError, match="no answer in time"):
        run(silent, federation.server_context(), client_context(identity), get, patience=hasty, waits=waits)
    assert len(waits.told) == 1


def test_slow_upload_outlasts_the_silence_limit(federation: Federation, identity: Identity) -> None:
    """The limit counts from the last piece, not from the start."""

    async def count(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    async def trickle() -> AsyncIterator[bytes]:
        for _ in range(8):
            await asyncio.sleep(0.5)
            yield bytes(1000)

    async def put(client: Client) -> bytes:
        return (await client.put_stream("/v1/vector", trickle, 8000)).body

    hasty = Patience(tries=1, silence=3)
    assert run(count, federation.server_context(), client_context(identity), put, patience=hasty) == b"8000"


def test_broken_upload_is_sent_again_whole(federation: Federation, identity: Identity) -> None:
    tries: list[int] = []

    async def cut_once(request: web.Request) -> web.Response:
        if not tries:
            tries.append(len(await request.content.readexactly(2**20)))
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        tries.append(len(await request.read()))
        return web.Response()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield bytes(2**20)

    async def put(client: Client) -> int:
        return (await client.put_stream("/v1/vector", chunks, 2**23)).status

    assert run(cut_once, federation.server_context(), client_context(identity), put) == 200
    assert tries == [2**20, 2**23]


def test_upload_shorter_than_announced_is_an_error(federation: Federation, identity: Identity) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(10)

    async def put(client: Client) -> int:
        return (await client.put_stream("/v1/vector", chunks, 11)).status

    with pytest.raises(DataError, match="10 bytes were there to send, 11 were announced"):
        run(who, federation.server_context(), client_context(identity), put)


def test_early_refusal_of_an_upload_is_read(federation: Federation, identity: Identity) -> None:
    async def refuse(request: web.Request) -> web.Response:
        body = Problem.of("late", 409, "upload has closed; wait for the next attempt").encode()
        return web.Response(status=409, body=body, content_type=CONTENT_TYPE)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield bytes(2**20)

    async def put(client: Client) -> int:
        return (await client.put_stream("/v1/vector", chunks, 2**25)).status

    with pytest.raises(TransportError, match="upload has closed"):
        run(refuse, federation.server_context(), client_context(identity), put)


def test_cut_download_is_started_again(federation: Federation, identity: Identity, tmp_path: Path) -> None:
    whole = bytes(range(256)) * 4096
    served: list[int] = []

    async def cut_once(request: web.Request) -> web.StreamResponse:
        served.append(1)
        response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
        await response.prepare(request)
        await response.write(whole if len(served) > 1 else whole[:5000])
        if len(served) == 1 and request.transport is not None:
            request.transport.abort()
        return response

    async def download(client: Client) -> bool:
        return await client.download("/v1/model", tmp_path / "model", limit=2**21)

    assert run(cut_once, federation.server_context(), client_context(identity), download)
    assert len(served) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_bytes() == whole


def test_download_of_what_is_not_there_yet_leaves_the_file_as_it_was(
    federation: Federation, identity: Identity, tmp_path: Path
) -> None:
    answers = [web.Response(status=204), web.Response(body=b"after")]

    async def answer(request: web.Request) -> web.Response:
        return answers.pop(0)

    async def download(client: Client) -> list[tuple[bool, bytes]]:
        file = tmp_path / "model"
        return [(await client.download("/v1/model", file, limit=9), file.read_bytes()) for _ in range(2)]

    (tmp_path / "model").write_bytes(b"before")
    shown = run(answer, federation.server_context(), client_context(identity), download)
    assert shown == [(False, b"before"), (True, b"after")]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def fetched(client: Client, into: Path, limit: int = 5000) -> Awaitable[bool]:
    return client.download("/v1/model", into, limit)


async def zeros(request: web.Request) -> web.Response:
    return web.Response(body=bytes(5000))


def test_failed_download_leaves_the_file_as_it_was(federation: Federation, identity: Identity, tmp_path: Path) -> None:
    contexts = federation.server_context(), client_context(identity)
    (tmp_path / "model").write_bytes(b"before")
    with pytest.raises(TransportError, match="more than 4999 bytes"):
        run(zeros, *contexts, lambda client: fetched(client, tmp_path / "model", 4999))
    waits = Waits()
    with file_limit(4096), pytest.raises(DataError, match=r"model': cannot be written \(File too large\); free space"):
        run(zeros, *contexts, lambda client: fetched(client, tmp_path / "model"), waits=waits)
    assert waits.told == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_bytes() == b"before"


def test_download_without_a_folder_names_the_file(federation: Federation, identity: Identity, tmp_path: Path) -> None:
    contexts = federation.server_context(), client_context(identity)
    with pytest.raises(DataError, match="absent/model': cannot be written"):
        run(zeros, *contexts, lambda client: fetched(client, tmp_path / "absent" / "model"))


@pytest.mark.parametrize("url", ["http://agg.example.org", "agg.example.org", "https://", "https://a/b", "https://a:b"])
def test_url_that_is_no_https_host_is_refused(identity: Identity, url: str) -> None:
    with pytest.raises(ConfigError, match="must be https://HOST"):
        Client(url, client_context(identity), Waits())


def run_through(
    proxy: ConnectProxy,
    credentials: str,
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> bytes:
    async def scenario() -> bytes:
        async with serving(who, server) as port, proxy.running() as proxy_port:
            monkeypatch.setenv("HTTPS_PROXY", f"http://{credentials}127.0.0.1:{proxy_port}")
            async with Client(f"https://127.0.0.1:{port}", client, Waits(), QUICK) as session:
                return await get(session)

    async def bounded() -> bytes:
        return await asyncio.wait_for(scenario(), BOUND)

    return asyncio.run(bounded())


def test_proxy_of_the_environment_is_used_with_its_password(
    federation: Federation, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = base64.b64encode("anna:zürich:1".encode()).decode()
    proxy = ConnectProxy(authorization=f"Basic {pair}")
    context = client_context(identity)
    shown = run_through(proxy, "anna:z%C3%BCrich%3A1@", federation.server_context(), context, monkeypatch)
    assert federation.authority.client_name(shown) == "st-marys"
    assert proxy.asked[0].startswith("CONNECT 127.0.0.1:")


def test_proxy_that_wants_a_password_is_named(
    federation: Federation, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, context = ConnectProxy(authorization="Basic eA=="), client_context(identity)
    with pytest.raises(TransportError, match="wants a user name and password") as caught:
        run_through(proxy, "anna:hunter2@", federation.server_context(), context, monkeypatch)
    assert "hunter2" not in str(caught.value)
    assert "@ as %40, : as %3A, / as %2F" in str(caught.value)
    assert len(proxy.asked) == 1


def test_proxy_that_forbids_the_host_is_named(
    federation: Federation, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = client_context(identity)
    with pytest.raises(TransportError, match=r"refuses to connect to 127\.0\.0\.1:\d+ \(HTTP 403\)"):
        run_through(ConnectProxy(status=403), "", federation.server_context(), context, monkeypatch)


def test_proxy_that_is_down_is_named(
    federation: Federation, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "127.0.0.1:1")
    with pytest.raises(TransportError, match=r"the proxy 127\.0\.0\.1:1: refuses connections"):
        run(who, federation.server_context(), client_context(identity), get)


def test_proxy_whose_name_is_not_found_is_named_and_not_the_coordinator(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")  # RFC 6761: no DNS knows it

    async def scenario() -> None:
        async with Client("https://agg.example.org", client_context(identity), Waits(), QUICK) as client:
            await client.get("/v1/who")

    with pytest.raises(TransportError, match=r"^the proxy proxy\.invalid:3128: the name is not found; .*HTTPS_PROXY$"):
        asyncio.run(scenario())


@pytest.mark.parametrize("password", ["p/1", "1/2", "1#x", "p?x", "1?/#"])
def test_password_that_is_not_percent_encoded_is_told_how(
    identity: Identity, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    """Read as a URL, `user:1/2@proxy` is host `user`, port 1, which must not be asked for anything."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://hunter2:{password}@proxy.example.org:3128")
    with pytest.raises(ConfigError, match="in user and password % written as %25, @ as %40, : as %3A, / as") as caught:
        Client("https://agg.example.org", client_context(identity), Waits())
    assert "hunter2" not in str(caught.value)


def test_password_with_an_at_or_a_colon_is_taken_whole(
    federation: Federation, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ConnectProxy(authorization=f"Basic {base64.b64encode(b'anna:a@b:c').decode()}")
    shown = run_through(proxy, "anna:a@b:c@", federation.server_context(), client_context(identity), monkeypatch)
    assert federation.authority.client_name(shown) == "st-marys"


def test_host_in_no_proxy_is_reached_directly(
    federation: Federation, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    proxy, context = ConnectProxy(), client_context(identity)
    shown = run_through(proxy, "", federation.server_context(), context, monkeypatch)
    assert federation.authority.client_name(shown) == "st-marys"
    assert proxy.asked == []


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:1", "https://u:hunter2@127.0.0.1:1", "http://u:hunter2@h:x"])
def test_proxy_of_another_kind_is_refused(identity: Identity, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(ConfigError, match="HTTPS_PROXY must be http://HOST:PORT") as caught:
        Client("https://agg.example.org", client_context(identity), Waits())
    assert "hunter2" not in str(caught.value)
