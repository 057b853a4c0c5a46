"""A silo's way to the coordinator: HTTPS outward through one port, tried again while the network is down."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import TypedDict

import aiohttp
from cryptography import x509
from yarl import URL

from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError, FedClipError, TransportError
from fedclip_secure.pki.certificates import ENROL_AGAIN, check_dates
from fedclip_secure.pki.identity import Identity
from fedclip_secure.transport.bodies import Chunks, Heard, Outgoing, Sink, in_one_piece
from fedclip_secure.transport.faults import Answer, Fault, Route, Shown, explain, is_dated, is_foreign, refusal
from fedclip_secure.transport.proxy import proxy_for
from fedclip_secure.transport.tls import client_context, peer_certificate

Waiting = Callable[[str, float], None]  # told before each wait: the reason, and the seconds until the next try

MAX_BODY = 64 * 2**20  # bytes of an answer that is held in memory, unless the caller allows other
_MAX_PROBLEM = 64 * 2**10  # bytes of an answer that says no
_CHUNK = 2**20  # bytes
_LOOK = 10.0  # seconds for a second handshake, which only makes a message better


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for an answer, and how often to try."""

    tries: int | None = None  # None: for ever, so that a run outlasts a night without VPN
    first_wait: float = 1.0  # seconds; doubled after each try
    longest_wait: float = 60.0  # seconds
    silence: float = 60.0  # seconds without one byte either way before a try is given up; long-polls take 25
    connect: float = 30.0  # seconds for DNS, proxy, TCP and TLS together

    def before(self, next_try: int, asked: float) -> float:
        """Seconds to wait before try number `next_try` (from 2); the server asked for at least `asked`."""
        doubled: float = self.first_wait * 2 ** min(next_try - 2, 30)
        # Jitter: silos that were cut off together do not come back together.
        return max(asked, min(doubled, self.longest_wait) * random.uniform(0.5, 1.0))  # noqa: S311 - no secret


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    limit: int  # most bytes of a good answer
    params: Mapping[str, str] = field(default_factory=dict)
    body: Outgoing | None = None


class _Look(aiohttp.Fingerprint):
    """aiohttp's hook between handshake and request: takes down the certificate, and lets the request go or not."""

    certificate: x509.Certificate | None = None

    def __init__(self, *, asks: bool) -> None:
        super().__init__(bytes(32))
        self._asks = asks

    def check(self, transport: asyncio.Transport) -> None:
        """Raise ServerFingerprintMismatch, unless it `asks`."""
        shown = peer_certificate(transport)
        if shown is not None:
            self.certificate = x509.load_der_x509_certificate(shown)
        if not self._asks:
            raise aiohttp.ServerFingerprintMismatch(self.fingerprint, b"", "", 0)


class _ProxyArguments(TypedDict, total=False):
    proxy: URL
    proxy_headers: dict[str, str]


class Client:
    """One server, one TLS context. Use as `async with Client(...) as client`.

    Each request is tried again after connection errors, timeouts and the statuses 429, 502, 503 and 504; the server
    answers a repeat like the first. All requests raise, without another try:

        TransportError: the server's refusal (with `status` and, from problem details, `code`), an answer over its
            limit, a proxy's refusal; or the last failure when `patience` is at its end.
        TrustError: the server's certificate does not check out, or the server does not take ours.
    """

    def __init__(
        self,
        url: str,
        context: ssl.SSLContext,
        waiting: Waiting,
        patience: Patience | None = None,
        certificate: x509.Certificate | None = None,  # our own, where `context` shows one
    ) -> None:
        self._url = parse_server(url)
        self._context = context
        self._certificate = certificate
        self._waiting = waiting
        self._patience = patience or Patience()
        self._proxy = proxy_for(self._url)
        self._route = Route(self._url.authority, self._proxy.host if self._proxy else None)
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, identity: Identity, waiting: Waiting, patience: Patience | None = None) -> Client:
        """The client of an enrolled silo to the server that it enrolled with.

        Raises:
            ConfigError: HTTPS_PROXY cannot be used.
            TrustError: the identity's files changed since it was loaded.
        """
        return cls(identity.server, client_context(identity), waiting, patience, identity.certificate)

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, connect=self._patience.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            # A compressed answer could unpack to more than its limit.
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, *, params: Mapping[str, str] | None = None, limit: int = MAX_BODY) -> Answer:
        """GET; the answer's body has at most `limit` bytes."""
        return await self._in_memory(_Request("GET", path, limit, params or {}))

    async def post(self, path: str, body: bytes, *, limit: int = MAX_BODY) -> Answer:
        """POST a body that is small enough to be one piece."""
        return await self._in_memory(_Request("POST", path, limit, body=in_one_piece(body)))

    async def put_stream(self, path: str, chunks: Chunks, length: int) -> Answer:
        """PUT `length` bytes; `chunks` is called again for each try and must give the same bytes."""
        return await self._in_memory(_Request("PUT", path, MAX_BODY, body=Outgoing(chunks, length)))

    async def download(self, path: str, into: Path, limit: int) -> bool:
        """GET into a file; False where the server has nothing yet (204). `into` is then, as after an error, as before.

        It may not outlive a power cut: what was fetched can be fetched again, and syncing it takes as long as fetching.

        Raises:
            DataError: the disk refuses. The rest as the class says.
        """
        temporary = into.with_name(f".{into.name}.part")  # the next download replaces what a crash left behind
        try:
            with temporary.open("w+b") as file:
                answer = await self._exchange(_Request("GET", path, limit), Sink(file, str(into)))
            if arrived := answer.status == HTTPStatus.OK:
                temporary.replace(into)
        except OSError as error:
            raise DataError(refused(error, into, "be written", "choose another folder")) from error
        finally:
            with contextlib.suppress(OSError):  # renamed, or its folder may be what is missing
                temporary.unlink()
        return arrived

    async def _in_memory(self, request: _Request) -> Answer:
        buffer = io.BytesIO()
        answer = await self._exchange(request, Sink(buffer, "memory"))
        return Answer(answer.status, answer.headers, buffer.getvalue())

    async def _exchange(self, request: _Request, sink: Sink) -> Answer:
        tries = 1
        while True:
            outcome = await self._once(request, sink)
            if isinstance(outcome, Answer):
                return outcome
            if not outcome.transient or tries == self._patience.tries:
                raise outcome.error
            tries += 1
            seconds = self._patience.before(tries, outcome.after)
            self._waiting(str(outcome.error), seconds)
            await asyncio.sleep(seconds)

    async def _once(self, request: _Request, sink: Sink) -> Answer | Fault:
        if self._session is None:
            raise RuntimeError("a Client is used inside `async with`")
        if self._certificate is not None:
            # The server cannot tell us: asyncio closes a failed handshake without sending its TLS alert.
            check_dates(self._certificate, "this silo's certificate", ENROL_AGAIN)
        sink.restart()
        try:
            async with asyncio.timeout(self._patience.silence) as clock:
                heard = Heard(clock, self._patience.silence)
                async with self._session.request(
                    request.method,
                    self._url.with_path(request.path),
                    params=request.params,
                    data=None if request.body is None else request.body.pieces(heard),
                    headers={} if request.body is None else {"Content-Length": str(request.body.length)},
                    ssl=self._context,
                    allow_redirects=False,
                    **self._through_proxy(),
                ) as response:
                    return await self._receive(response, request.limit, sink, heard)
        except (aiohttp.ClientError, OSError) as error:  # ssl.SSLError and TimeoutError are OSErrors
            _raise_own(error)
            shown = await self._shown(error) if is_foreign(error) or is_dated(error) else None
            return explain(error, self._route, shown)

    async def _receive(self, response: aiohttp.ClientResponse, limit: int, sink: Sink, heard: Heard) -> Answer | Fault:
        success = response.status < HTTPStatus.MULTIPLE_CHOICES
        room, into = (limit, sink) if success else (_MAX_PROBLEM, Sink(io.BytesIO(), "memory"))
        size = 0
        async for chunk in response.content.iter_chunked(_CHUNK):
            heard()
            size += len(chunk)
            if size > room and success:
                raise TransportError(
                    f"{self._route.server}: answered with more than {room} bytes; is it a fedclip-agg of this version?",
                    status=response.status,
                )
            if size > room:
                break  # the status says enough
            into.write(chunk)
        if success:
            return Answer(response.status, response.headers, b"")
        into.file.seek(0)
        return refusal(Answer(response.status, response.headers, into.file.read()), self._route)

    async def _shown(self, error: BaseException) -> Shown | None:
        """The certificate that was refused, from a second handshake. To a stranger nothing is sent after it.

        Where its dates are at fault the server's clock is asked for, by a request that says nothing.
        """
        if self._session is None:
            return None
        look, clock = _Look(asks=is_dated(error)), None
        # A courtesy of the message: the refusal stands without it. A silent peer's TimeoutError is an OSError.
        with contextlib.suppress(aiohttp.ClientError, OSError, ValueError, OverflowError):
            async with (
                asyncio.timeout(_LOOK),
                self._session.get(self._url, ssl=look, allow_redirects=False, **self._through_proxy()) as response,
            ):
                clock = parsedate_to_datetime(response.headers.get("Date", "")).astimezone(UTC)
        with contextlib.suppress(ValueError):
            return None if look.certificate is None else Shown.of(look.certificate, clock)
        return None

    def _through_proxy(self) -> _ProxyArguments:
        if self._proxy is None:
            return {}
        return {"proxy": self._proxy.url, "proxy_headers": dict(self._proxy.headers)}


def parse_server(url: str) -> URL:
    """The server's URL with the path `/`.

    Raises:
        ConfigError: not https://HOST or https://HOST:PORT.
    """
    try:
        parsed = URL(url)
        usable = parsed.scheme == "https" and bool(parsed.host) and parsed.port is not None
    except ValueError:
        usable = False
    if not usable or parsed.user or parsed.path.strip("/") or parsed.query_string or parsed.fragment:
        raise ConfigError(f"{url}: must be https://HOST or https://HOST:PORT, as the coordinator gave it")
    return parsed.with_path("/")


def _raise_own(error: BaseException) -> None:
    """aiohttp wraps what the body's generator raises; an error of ours goes on as it was."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FedClipError):
            raise cause
        cause = cause.__cause__
