"""What somebody without a certificate can hold open."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from aiohttp import web

from fedclip_secure.aggregator.unauthenticated import MOST, dismiss_guests
from tests.aggregator.site import Site
from tests.waiting import BOUND, until


def test_strangers_hold_few_connections_and_silos_keep_theirs(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> None:
        context = ssl.create_default_context(cafile=str(site.home.authority_certificate))
        async with site.serving(), site.client("lab-a") as silo:
            await silo.get("/v1/contract")
            held = [await asyncio.open_connection("127.0.0.1", site.port, ssl=context) for _ in range(MOST + 20)]
            await until(lambda: sum(reader.at_eof() or bool(reader.exception()) for reader, _ in held) == 20)
            assert all(reader.at_eof() or bool(reader.exception()) for reader, _ in held[:20])  # the oldest
            await silo.get("/v1/contract")
            for _, writer in held:
                writer.transport.abort()

    asyncio.run(run())


def test_a_stranger_s_connection_ends_though_it_says_nothing() -> None:
    async def run() -> None:
        runner = web.AppRunner(web.Application())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert runner.server is not None
        task = asyncio.create_task(dismiss_guests(runner.server, life=0.5))
        reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
        async with asyncio.timeout(BOUND):
            assert await reader.read() == b""
        writer.close()
        task.cancel()
        await runner.cleanup()

    asyncio.run(run())
