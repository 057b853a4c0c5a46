"""A silo that sends far too much, or begins to send and stalls, while the others run."""

from __future__ import annotations

import asyncio
import io
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedclip_secure.secagg.sealing import OVERHEAD
from fedclip_secure.transport.tls import client_context
from tests.aggregator.liars import LIAR, NO_COUNTS, averaged, others
from tests.aggregator.site import Site, silos_of
from tests.aggregator.test_refusals import ROUTES, problem, session
from tests.waiting import until

FLOOD = 10_000_000  # bytes


async def in_pieces(data: bytes) -> AsyncIterator[bytes]:
    """Without a length that could be refused before anything is read."""
    for start in range(0, len(data), 2**16):
        yield data[start : start + 2**16]


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
def test_ten_megabytes_of_random_bytes_on_every_route_harm_nobody(tmp_path: Path, announced: bool) -> None:
    site, flood = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"join": 2}), os.urandom(FLOOD)
    # A list that has not closed is waited for, whatever came with the question: ask for what is over.
    routes = [
        (method, path.replace("attempts/1", "attempts/7") if method == "GET" else path) for method, path in ROUTES
    ]

    async def among() -> None:
        async with site.serving(), session(site, LIAR) as liar, silos_of(site) as silos:
            for method, path in [*routes, ("POST", "/v1/enrol")]:
                data = io.BytesIO(flood) if announced else in_pieces(flood)
                async with liar.request(method, path, data=data) as response:
                    if method == "GET":
                        assert response.status in (200, 204, 404, 410), path
                    else:
                        assert await problem(response) in ((413, "size"), (409, "early")), path
            silos.start(*others(site))
            await silos.done()

    asyncio.run(among())
    assert averaged(site) == [others(site)]
    assert list((site.state / "vectors").glob("*.part")) == []


async def stalled(site: Site, method: str, path: str, body: bytes, length: int) -> asyncio.StreamWriter:
    """A request that has begun and does not go on."""
    context = client_context(site.identities[LIAR])
    _, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=context)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + body)
    await writer.drain()
    return writer


def test_bodies_that_stall_at_every_stage_are_waited_for_no_longer_than_the_stage(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"upload": 2})
    connections: list[asyncio.StreamWriter] = []

    async def before(attempt: int, stage: str) -> None:
        if stage in ("key-ads", "bundles"):
            connections.extend(
                [await stalled(site, "POST", f"/v1/attempts/1/{stage}", b"\xa1", 1000) for _ in range(20)]
            )
        if stage == "uploads":
            head = struct.pack(">I", 32 + OVERHEAD + 500) + bytes(100)
            connections.append(await stalled(site, "PUT", "/v1/attempts/1/uploads", head, 2000))
            await until(lambda: list((site.state / "vectors").glob("*.part")) != [])
            await asyncio.Event().wait()

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(LIAR, before=before)
            silos.start(*others(site))
            await silos.done(*others(site))
            assert len(connections) == 41
            for writer in connections:
                writer.transport.abort()
            await until(lambda: list((site.state / "vectors").glob("*.part")) == [])

    asyncio.run(among())
    assert averaged(site) == [others(site)]
    assert site.status().attempt == 1
    assert site.reasons(LIAR) == ["no answer within 2 s"]
