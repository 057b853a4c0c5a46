"""Runs the server: one TLS port, until it is told to stop. What it was doing is in the store."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable

from aiohttp import web

from fedclip_secure.aggregator.app import Server, make_app
from fedclip_secure.aggregator.guests import dismiss_guests
from fedclip_secure.aggregator.home import Home, check_charges
from fedclip_secure.aggregator.rounds import Rounds
from fedclip_secure.aggregator.store import Store
from fedclip_secure.config.lock import Contract
from fedclip_secure.errors import TransportError, TrustError
from fedclip_secure.pki.authority import load_authority
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.transport.tls import server_context

_FREEZE_POLL = 1.0  # seconds between two looks for a frozen roster


async def serve(home: Home, host: str, port: int, say: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set.

    Raises:
        TransportError: the port is taken.
        TrustError: keys or certificates are at fault.
        ConfigError: the plan is at fault.
    """
    plan = home.plan()
    authority = load_authority(home.authority_folder)
    context = server_context(home.server_certificate, home.server_key, home.authority_certificate)
    store = home.store()
    lock = store.lock()
    server = Server(store, authority, plan.federation)
    # A compressed body could unpack to more than its limit.
    runner = web.AppRunner(make_app(server), access_log=None, shutdown_timeout=2, auto_decompress=False)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - set up above
    guests = asyncio.create_task(dismiss_guests(runner.server))
    try:
        try:
            await web.TCPSite(runner, host, port, ssl_context=context).start()
        except OSError as error:
            raise TransportError(
                f"{host}:{port}: cannot listen there ({error.strerror}); choose with --listen"
            ) from error
        say(f"serving {plan.federation} on {host}:{port}")
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
        guests.cancel()
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
        raise TrustError(f"{home.signing_key}: is not the key that the roster pins; restore it")
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


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` on SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
