"""A real HTTPS server on loopback, a CONNECT proxy, and what the tests of this folder need to make certificates."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclip_secure.pki.authority import AUTHORITY_CERTIFICATE, Authority, create_authority
from fedclip_secure.pki.certificates import write_certificate
from fedclip_secure.pki.identity import Enrolment, Identity, create_key, signing_request
from fedclip_secure.pki.keys import PublicKey, write_private_key
from fedclip_secure.transport.client import Patience
from fedclip_secure.transport.tls import peer_certificate, server_context
from tests.waiting import BOUND

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
QUICK = Patience(tries=2, first_wait=0.01, silence=BOUND, connect=BOUND)


@dataclass
class Waits:
    """What was told before each wait."""

    told: list[tuple[str, float]] = field(default_factory=list)

    def __call__(self, reason: str, seconds: float) -> None:
        self.told.append((reason, seconds))


@dataclass
class Federation:
    """An authority, its server's certificate, and silos."""

    folder: Path
    authority: Authority

    @classmethod
    def create(cls, folder: Path, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> Federation:
        federation = cls(folder, create_authority(folder, "lung-xray"))
        key, certificate = federation.authority.issue_server(hosts)
        federation.write_server(key, certificate)
        return federation

    def write_server(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        write_private_key(self.folder / "server-key.pem", key)
        write_certificate(self.folder / "server.pem", certificate)

    def server_context(self) -> ssl.SSLContext:
        authority = self.folder / AUTHORITY_CERTIFICATE
        return server_context(self.folder / "server.pem", self.folder / "server-key.pem", authority)

    def enrol(self, name: str) -> Identity:
        folder = self.folder / name
        key = create_key(folder)
        certificate = self.authority.issue_silo(name, signing_request(key, name))
        enrolment = Enrolment(name=name, server="https://127.0.0.1", federation="lung-xray")
        identity = Identity(folder, enrolment, key, certificate, self.authority.certificate)
        identity.save()
        return identity

    def expired(
        self,
        name: str,
        key: PublicKey,
        usage: x509.ObjectIdentifier,
        begins: timedelta = timedelta(hours=-2),
        ends: timedelta = timedelta(hours=-1),
    ) -> x509.Certificate:
        """As the authority would have issued it for another time, from now: two hours ago for one hour."""
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.key.public_key())
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.authority.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self.authority.key, hashes.SHA256())
        )

    def expire_server(self, begins: timedelta = timedelta(hours=-2), ends: timedelta = timedelta(hours=-1)) -> None:
        key, usage = ec.generate_private_key(ec.SECP256R1()), ExtendedKeyUsageOID.SERVER_AUTH
        self.write_server(key, self.expired("aggregator", key.public_key(), usage, begins, ends))

    def expire_silo(self, identity: Identity) -> None:
        certificate = self.expired(identity.name, identity.key.public, ExtendedKeyUsageOID.CLIENT_AUTH)
        write_certificate(identity.folder / "certificate.pem", certificate)


@contextlib.asynccontextmanager
async def serving(handler: Handler, context: ssl.SSLContext | None, port: int = 0) -> AsyncIterator[int]:
    """Serve every path with `handler` on 127.0.0.1; gives the port."""
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def alerting(context: ssl.SSLContext) -> Iterator[int]:
    """Handshakes on blocking sockets, which send the alert of a failed one; gives the port."""

    def answer() -> None:
        while True:
            connection, _ = listener.accept()
            if ended.is_set():
                connection.close()
                return
            # A copy outlives the failed handshake: closing with the client's request unread would reset the
            # connection, and the reset could overtake the alert.
            with connection.dup() as copy:
                with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                    tls.recv(65536)
                with contextlib.suppress(OSError):
                    copy.settimeout(5)
                    copy.shutdown(socket.SHUT_WR)
                    while copy.recv(65536):
                        pass

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join(BOUND)


async def who(request: web.Request) -> web.Response:
    """Answer with the DER of the certificate that the client showed."""
    shown = peer_certificate(request.transport) if request.transport else None
    return web.Response(body=shown or b"nobody")


@dataclass
class ConnectProxy:
    """A CONNECT proxy that counts, and may demand a password."""

    authorization: str | None = None  # the header's value that it demands
    status: int | None = None  # refuse with it
    asked: list[str] = field(default_factory=list)  # the first line of each request
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        async with server:
            try:
                yield server.sockets[0].getsockname()[1]
            finally:
                await asyncio.wait_for(asyncio.gather(*self.tasks), BOUND)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.asked.append(head[0])
        status = self.status
        if self.authorization is not None and f"Proxy-Authorization: {self.authorization}" not in head:
            status = 407
        if status is not None:
            writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
            await _close(writer)
            return
        host, port = head[0].split()[1].rsplit(":", 1)
        upstream, onward = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_pump(reader, onward), _pump(upstream, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
