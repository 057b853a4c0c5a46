"""Connections without a certificate: anybody may open them, so they end soon and there are few of them."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from fedclip_secure.transport.tls import peer_certificate

MOST = 100  # guests at a time; the oldest go first. A process may hold some thousand connections in all
LIFE = 60.0  # seconds, of which an enrolment takes one
_LOOK = 1.0  # seconds between two looks


async def dismiss_guests(server: web.Server, most: int = MOST, life: float = LIFE) -> None:
    """Close what guests hold open too long, or too many of; silos keep their connections. Runs until cancelled."""
    came: dict[web.RequestHandler, float] = {}
    while True:
        now = time.monotonic()
        guests = {handler: handler.transport for handler in server.connections if handler.transport is not None}
        guests = {handler: transport for handler, transport in guests.items() if peer_certificate(transport) is None}
        came = {handler: came.get(handler, now) for handler in guests}
        oldest = sorted(came, key=lambda handler: came[handler])
        for place, handler in enumerate(reversed(oldest)):
            if place >= most or now - came[handler] >= life:
                guests[handler].abort()  # without the goodbye of TLS, which a guest could put off
        await asyncio.sleep(_LOOK)
