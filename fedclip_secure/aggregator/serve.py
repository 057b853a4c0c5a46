"""Runs the server: one TLS port, until it is told to stop. What it was doing is in the store."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from aiohttp import web

from fedclip_secure.aggregator.app import Server, make_app
from fedclip_secure.aggregator.home import Home, check_charges, renew_server_certificate
from fedclip_secure.aggregator.rounds import Rounds
from fedclip_secure.aggregator.store import Store
from fedclip_secure.aggregator.unauthenticated import dismiss_guests
from fedclip_secure.config.lock import Contract
from fedclip_secure.disk import check_disk
from fedclip_secure.errors import FedClipError, TransportError, TrustError
from fedclip_secure.pki.authority import Authority, load_authority
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.transport.tls import server_context

_CERTIFICATE_POLL = 86400.0  # seconds between two looks at its end
_FREEZE_POLL = 1.0  # seconds between two looks for a frozen roster


async def serve(home: Home, host: str | None, port: int, say: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set; `host` None: on all addresses, of IPv4 and IPv6.

    Raises:
        TransportError: the port is taken.
        TrustError: keys or certificates are at fault.
        ConfigError: the plan is at fault.
    """
    plan = home.plan()
    check_disk(home.folder / "state", "move the whole folder that `init` made to a local disk")
    authority = load_authority(home.authority_folder)
    told = renew_server_certificate(home, authority, datetime.now(UTC))
    context = server_context(home.server_certificate, home.server_key, home.authority_certificate)
    store = home.store()
    lock = store.lock()
    server = Server(store, authority, plan.federation)
    # A compressed body could unpack to more than its limit.
    runner = web.AppRunner(make_app(server), access_log=None, shutdown_timeout=2, auto_decompress=False)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - set up above
    tending = [
        asyncio.create_task(dismiss_guests(runner.server)),
        asyncio.create_task(_keep_valid(home, authority, context, say)),
    ]
    try:
        await _listen(runner, host, port, context)
        say(f"serving {plan.federation} on {_place(host, port)}")
        if told is not None:
            say(told)
        running = asyncio.create_task(_run(home, server, say))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running  # its error, if it failed
            await stopping
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        for task in tending:
            task.cancel()
        if server.rounds is not None:
            server.rounds.release()
        await runner.cleanup()
        store.close()
        lock.close()


async def _run(home: Home, server: Server, say: Callable[[str], None]) -> None:
    """Wait for the freeze, then run the rounds."""
    if server.store.frozen() is None:
        say("open for enrolment; `fedclip-agg freeze` closes the roster and starts the run")
    while (frozen := server.store.frozen()) is None:
        await asyncio.sleep(_FREEZE_POLL)
    contract, roster = Contract.decode(frozen[0], "the store"), Roster.decode(frozen[1])
    check_charges(contract)
    if home.plan() != contract.plan:
        say(f"{home.plan_path} has changed since the freeze; the frozen plan counts, the file does not")
    terms = Terms.of(contract, roster)
    key = SigningKey.load(home.signing_key)
    if dict(roster.members)["aggregator"] != key.public_bytes:
        raise TrustError(f"'{home.signing_key}': is not the key that the roster pins; restore it")
    blobs, initial_file = server.store.blobs, bytes.fromhex(contract.lock.initial_file)
    if not blobs.file_path(initial_file).is_file():
        raise TrustError("the initial adapter is missing from the store; restore the state folder")
    if terms.initial_model in server.store.models_wanted(terms.initial_model):
        blobs.copy_model(terms.initial_model, initial_file)
    server.rounds = Rounds(server.store, terms, key, contract.plan.deadlines, say)
    absent = terms.absent_tolerated or "none"
    say(f"roster of {len(roster.silos)} silos; a round needs {terms.floor} of them, so {absent} may be absent from it")
    await server.rounds.run()
    if server.rounds.finished:
        say(f"finished: {_came_to(server.store, terms)}. The result stays here to be fetched; stop with Ctrl-C")


def _came_to(store: Store, terms: Terms) -> str:
    last = store.rounds()[-1]
    if terms.moved_nothing(last.round, last.start_model, last.model):
        return terms.still(last.round)
    return f"{terms.training_rounds} rounds"


async def _listen(runner: web.AppRunner, host: str | None, port: int, context: ssl.SSLContext) -> None:
    """Take connections.

    Raises:
        TransportError: the address cannot be had, and what helps.
    """
    try:
        if host is None:
            await web.SockSite(runner, _everywhere(port), ssl_context=context).start()
        else:
            await web.TCPSite(runner, host, port, ssl_context=context).start()
    except OSError as error:
        helps = "choose with --listen"
        if isinstance(error, PermissionError):
            helps = (
                "a port below 1024 needs the capability CAP_NET_BIND_SERVICE (systemd: "
                "AmbientCapabilities=CAP_NET_BIND_SERVICE); give it, or choose a higher one with --listen"
            )
        raise TransportError(f"{_place(host, port)}: cannot listen there ({error.strerror}); {helps}") from error


def _everywhere(port: int) -> socket.socket:
    """One socket for all addresses of both families; of IPv4 alone where this machine has no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # switched off
                raise
    return socket.create_server(("", port))


def _place(host: str | None, port: int) -> str:
    if host is None:
        return f"port {port} of all addresses"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _keep_valid(home: Home, authority: Authority, context: ssl.SSLContext, say: Callable[[str], None]) -> None:
    """A server may run for longer than its certificate. Connections that are open keep the one that they began with."""
    while True:
        await asyncio.sleep(_CERTIFICATE_POLL)
        try:
            told = renew_server_certificate(home, authority, datetime.now(UTC))
            context.load_cert_chain(home.server_certificate, home.server_key)
        except (FedClipError, OSError) as error:
            told = f"the server's certificate could not be looked after: {error}"
        if told is not None:
            say(told)


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` on SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
