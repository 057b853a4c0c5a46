"""The same server without secure aggregation: silos send plain vectors and get their mean back.

The same TLS contexts, the same client, the same folder and database, the same durability (a vector is synced, its
name too, and its arrival is in the database before it is acknowledged) and the same long-polls; no masks, one stage.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from aiohttp import web

from fedclip_secure.aggregator.app import LONG_POLL
from fedclip_secure.aggregator.edge import problems
from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.store import Store
from fedclip_secure.files import write_atomically
from fedclip_secure.model.state import Floats
from fedclip_secure.pki.authority import Authority, load_authority
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.transport.client import Client
from fedclip_secure.transport.tls import peer_certificate, server_context

_CHUNK = 2**18  # bytes, as in the aggregator
_PIECE = 2**20  # bytes that a silo sends at a time, as in a sealed body
FLOAT = np.dtype("<f4")


@dataclass
class Plain:
    """What the handlers share. `averaged` is called when a round's mean is on the disk."""

    store: Store
    authority: Authority
    folder: Path
    silos: int
    averaged: Callable[[], None]
    arrived: dict[int, dict[str, bytes]] = field(default_factory=dict)  # round: silo: SHA-256
    done: dict[int, asyncio.Event] = field(default_factory=dict)

    def mean_path(self, number: int) -> Path:
        """Where the mean of a round lies."""
        return self.folder / f"mean-{number}.f4"

    def finished(self, number: int) -> asyncio.Event:
        """Set once the mean of a round is there."""
        return self.done.setdefault(number, asyncio.Event())


_PLAIN = web.AppKey("plain", Plain)


async def put_vector(request: web.Request) -> web.Response:
    """A silo's vector; the last one of a round is averaged with the others."""
    plain, silo, number = request.app[_PLAIN], _caller(request), int(request.match_info["round"])
    blobs, sha256, arriving = plain.store.blobs, hashlib.sha256(), plain.store.blobs.new_vector_path()
    with arriving.open("wb") as file:
        async for piece in request.content.iter_chunked(_CHUNK):
            sha256.update(piece)
            file.write(piece)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    digest = sha256.digest()
    arriving.replace(blobs.vector_path(digest))
    blobs.sync_vectors()
    plain.store.add_message(number, Phase.UPLOAD, silo, digest, digest)
    vectors = plain.arrived.setdefault(number, {})
    vectors[silo] = digest
    if len(vectors) == plain.silos:
        await asyncio.to_thread(_average, plain, number)
        plain.averaged()
        plain.finished(number).set()
    return web.Response(status=204)


async def get_mean(request: web.Request) -> web.StreamResponse:
    """Long-poll: the mean of a round."""
    plain, number = request.app[_PLAIN], int(request.match_info["round"])
    _caller(request)
    try:
        async with asyncio.timeout(LONG_POLL):
            await plain.finished(number).wait()
    except TimeoutError:
        return web.Response(status=204)
    return web.FileResponse(plain.mean_path(number))


def _average(plain: Plain, number: int) -> None:
    total: Floats | None = None
    for digest in plain.arrived[number].values():
        path = plain.store.blobs.vector_path(digest)
        vector = np.fromfile(path, dtype=FLOAT)
        total = vector if total is None else np.add(total, vector, out=total)
        path.unlink()
    assert total is not None  # noqa: S101 - the last vector has just arrived
    write_atomically(plain.mean_path(number), (total / np.float32(plain.silos)).data.cast("B"))


def _caller(request: web.Request) -> str:
    certificate = None if request.transport is None else peer_certificate(request.transport)
    if certificate is None:
        raise web.HTTPForbidden
    return request.app[_PLAIN].authority.client_name(certificate)


async def serve(home: Home, port: int, silos: int, say: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serve until `stop` is set; `say` is told when it listens, and of each round."""
    plain = Plain(
        home.store(),
        load_authority(home.authority_folder),
        home.folder,
        silos,
        lambda: say("averaged"),
    )
    app = web.Application(middlewares=[problems])
    app[_PLAIN] = plain
    app.add_routes([web.put("/v1/rounds/{round}/vectors", put_vector), web.get("/v1/rounds/{round}/mean", get_mean)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2, auto_decompress=False)
    await runner.setup()
    context = server_context(home.server_certificate, home.server_key, home.authority_certificate)
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
    say("serving")
    await stop.wait()
    await runner.cleanup()
    plain.store.close()


async def take_part(client: Client, update: Floats, model: Floats, rounds: int) -> None:
    """A silo: send `update` in every round and step by the mean that comes back."""
    body = memoryview(update).cast("B")

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), _PIECE):
            yield bytes(body[start : start + _PIECE])

    for number in range(1, rounds + 1):
        await client.put_stream(f"/v1/rounds/{number}/vectors", chunks, len(body))
        answer = None
        while answer is None or answer.status != 200:
            answer = await client.get(f"/v1/rounds/{number}/mean", limit=len(body))
        model = model + np.frombuffer(answer.body, dtype=FLOAT)
