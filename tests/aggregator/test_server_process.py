"""The server as a process of its own: killed, short of disk, and what it loads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedclip_secure.transport.tls import client_context
from tests.aggregator.site import NAMES, STAGES, Gate, Site, silos_of
from tests.peak import highest
from tests.waiting import BOUND, until

ROOT = Path(__file__).parents[2]
SERVER = """
import asyncio, pathlib, sys
from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.serve import serve, stop_on_signals

async def forever():
    stop = asyncio.Event()
    stop_on_signals(stop)
    home, port = Home(pathlib.Path(sys.argv[1])), int(sys.argv[2])
    await serve(home, "127.0.0.1", port, lambda text: print(text, flush=True), stop)

asyncio.run(forever())
print("heavy:", [name for name in ("torch", "open_clip", "opacus") if name in sys.modules])
"""


@contextlib.asynccontextmanager
async def server(site: Site) -> AsyncIterator[asyncio.subprocess.Process]:
    """A server process that listens; killed when the block ends, unless it has ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", SERVER, str(site.home.folder), str(site.port)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert b"serving" in await asyncio.wait_for(process.stdout.readline(), BOUND)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def limit_files(process: asyncio.subprocess.Process, size: int) -> None:
    """No file of the process may grow beyond `size` bytes from now on; -1 for no limit."""
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.parametrize("stage", ["uploads", "unmasks"])
def test_a_server_that_is_killed_finishes_the_same_attempt_when_it_is_back(tmp_path: Path, stage: str) -> None:
    site = Site.frozen(tmp_path)
    gate = Gate(stage)

    async def run() -> None:
        async with silos_of(site) as silos:
            async with server(site):
                silos.start(*NAMES[:2])
                silos.start(*NAMES[2:4], before=gate)
                await until(lambda: gate.held == 2 and site.kept(stage) == 2)
            async with server(site):
                gate.opened.set()
                await silos.done()

    asyncio.run(run())
    assert site.status().finished_rounds[-1]["model"] == site.foretold([NAMES[:4]])
    assert site.status().attempt == 2


def test_the_server_never_loads_torch_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)

    async def run() -> tuple[int | None, bytes, bytes]:
        async with server(site) as process:
            async with silos_of(site) as silos:
                silos.start(*NAMES[:4])
                await silos.done()
            process.send_signal(signal.SIGTERM)
            said, failed = await asyncio.wait_for(process.communicate(), BOUND)
            return process.returncode, said, failed

    code, said, failed = asyncio.run(run())
    assert (code, failed) == (0, b"")
    assert said.endswith(b"heavy: []\n")


# Vectors of 6 MB do not fit below 3 MB, the database does; below 1 byte nothing does.
@pytest.mark.parametrize(("stage", "size"), [("uploads", 3 * 2**20), *((stage, 1) for stage in STAGES)])
def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, stage: str, size: int
) -> None:
    site = Site.frozen(tmp_path, parameters=1_500_000 if size > 1 else 8)
    gate = Gate(stage)

    async def run() -> bool:
        async with server(site) as process, silos_of(site) as silos:
            silos.start(*NAMES[:4], before=gate)
            await until(lambda: gate.held == 4)
            limit_files(process, size)
            vectors = set((site.state / "vectors").iterdir())
            gate.opened.set()
            await until(lambda: all(any("its log says why" in text for text in silos.heard[n]) for n in NAMES[:4]))
            assert site.kept(stage) == 0
            await until(lambda: set((site.state / "vectors").iterdir()) == vectors)  # no half of one stays
            limit_files(process, -1)
            await silos.done()
            return process.returncode is None

    assert asyncio.run(run())
    status = site.status()
    assert status.finished_rounds[-1]["model"] == site.foretold([NAMES[:4]])
    assert (status.attempt, status.events) == (2, [])


def test_a_large_model_goes_out_to_silos_that_take_it_slowly_without_filling_the_memory(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, parameters=8_000_000)
    model = site.home.initial_path.read_bytes()
    request = f"GET /v1/models/{site.terms.initial_model.hex()} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    async def fetch(name: str, others: asyncio.Barrier) -> bool:
        context = client_context(site.identities[name])
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=context)
        writer.write(request)
        await others.wait()
        await asyncio.sleep(0.5)  # all are sent what they do not read yet
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(len(model))
        writer.close()
        await writer.wait_closed()
        return head.startswith(b"HTTP/1.1 200") and body == model

    async def run() -> int:
        async with server(site) as process:
            before, barrier = highest(process.pid), asyncio.Barrier(3)
            assert all(await asyncio.gather(*(fetch(name, barrier) for name in NAMES[:3])))
            return highest(process.pid) - before

    assert asyncio.run(run()) < len(model) / 2


def test_a_round_takes_the_server_at_most_four_vectors(tmp_path: Path) -> None:
    # Below 32 MB the C library may keep what is freed.
    site = Site.frozen(tmp_path, silos=3, parameters=9_000_000, deadlines={"upload": 120})

    async def run() -> int:
        async with server(site) as process, silos_of(site) as silos:
            before = highest(process.pid)
            silos.start(*NAMES[:3])
            await silos.done()
            return highest(process.pid) - before

    assert asyncio.run(run()) < 4 * 4 * site.terms.vector.words
    assert site.status().finished_rounds[-1]["model"] == site.foretold([NAMES[:3]])
