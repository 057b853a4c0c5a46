"""The tutorial, typed as it stands: each machine a folder and a shell of its own, everything else real.

Replaced are only what a test cannot have: the host and port, the proxy's address, and `scp`, which copies
between the folders. The clinic's images are real ones, saved as 16-bit grey like a scanner's.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.docs.pages import Block, blocks
from tests.federation.processes import ENVIRONMENT, ROOT, free_port
from tests.transport.loopback import ConnectProxy
from tests.waiting import BOUND

SITES = {"st-marys": "photo", "lakeside": "cartoon", "hillcrest": "art_painting", "northgate": "sketch"}
CLASSES = {"normal": "dog", "pneumonia": "horse", "covid": "house"}  # folder there: folder of the real images
_SCP = """#!/bin/bash
arguments=()
for each; do
  case $each in *:*) arguments+=("$MACHINES/${each%%:*}/${each#*:}");; *) arguments+=("$each");; esac
done
exec cp "${arguments[@]}"
"""


@dataclass
class Machine:
    """A folder, and a shell in it that lives as long as the tutorial."""

    folder: Path
    shell: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.log = self.folder.with_suffix(".log")
        machines = self.folder.parent
        environment = {**ENVIRONMENT, "MACHINES": str(machines), "PATH": f"{machines / 'bin'}:{ENVIRONMENT['PATH']}"}
        with self.log.open("w") as log:
            self.shell = subprocess.Popen(
                ["bash", "-euo", "pipefail"], cwd=self.folder, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def type(self, text: str) -> str:
        """Type a block; what it printed. It must succeed."""
        before = len(self.log.read_text())
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"{text}\necho typed-to-its-end\n")
        self.shell.stdin.flush()
        end = time.monotonic() + BOUND
        while "typed-to-its-end" not in (said := self.log.read_text()[before:]):
            assert self.shell.poll() is None, f"{self.folder.name} failed at\n{text}\n{said}{self._logs()}"
            assert time.monotonic() < end, f"{self.folder.name} took over {BOUND:.0f} s for\n{text}\n{self._logs()}"
            time.sleep(0.02)
        return said

    def _logs(self) -> str:
        files = sorted(self.folder.parent.glob("*/*.log"))
        return "".join(f"\n== {file.parent.name}/{file.name}\n{file.read_text()[-3000:]}" for file in files)

    def switch_off(self) -> None:
        """End the shell and what it has started and not ended."""
        subprocess.run(["kill", "-KILL", "--", f"-{self.shell.pid}"], check=False, stderr=subprocess.DEVNULL)
        self.shell.communicate()


@dataclass
class Walk:
    """What the tutorial left behind."""

    machines: dict[str, Machine]
    said: dict[str, str]  # by machine, all that it printed
    proxy: ConnectProxy
    port: int

    def silo(self, name: str) -> Path:
        return self.machines[name].folder


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, random_tower: Path, pacs_mini: Path) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "bin").mkdir()
    (folder / "bin" / "scp").write_text(_SCP)
    (folder / "bin" / "scp").chmod(0o755)
    machines = {name: Machine(folder / name) for name in ("agg", "workbench", *SITES)}
    for part in ("json", "safetensors"):
        (folder / "workbench" / f"chest-clip.{part}").write_bytes((random_tower / f"tower.{part}").read_bytes())
    for site, domain in SITES.items():
        _bring_images(folder / site, pacs_mini / domain)
    proxy = ConnectProxy(f"Basic {base64.b64encode(b'lakeside:secret').decode()}")
    try:
        with _ProxyThread(proxy) as proxy_port:
            walk = Walk(machines, dict.fromkeys(machines, ""), proxy, free_port())
            for block in blocks(ROOT / "docs" / "tutorial.md"):
                _follow(walk, block, proxy_port)
            yield walk
    finally:
        for machine in machines.values():
            machine.switch_off()


def _follow(walk: Walk, block: Block, proxy_port: int) -> None:
    """Type an `sh` block on its machines; write a file that is shown for a machine."""
    text = block.text
    for real, here in (
        ("https://agg.example.org", f"https://localhost:{walk.port}"),
        ("--hosts agg.example.org", f"--hosts localhost --port {walk.port}"),
        ("0.0.0.0:443", f"127.0.0.1:{walk.port}"),
        ("proxy.lakeside.example:3128", f"127.0.0.1:{proxy_port}"),
    ):
        text = text.replace(real, here)
    if block.language == "sh":
        assert block.words, f"on which machine?\n{text}"
        for name in block.words:
            walk.said[name] += walk.machines[name].type(text)
    elif block.language in ("yaml", "csv") and len(block.words) == 2:
        (walk.silo(block.words[0]) / block.words[1]).write_text(text)


class _ProxyThread:
    """The proxy, on a thread of its own."""

    def __init__(self, proxy: ConnectProxy) -> None:
        self._proxy, self._port = proxy, 0
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        async with self._proxy.running() as self._port:
            self._ready.set()
            await self._stop.wait()

    def __enter__(self) -> int:
        self._thread.start()
        assert self._ready.wait(BOUND)
        return self._port

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(BOUND)
        self._loop.close()


def _bring_images(silo: Path, domain: Path) -> None:
    """The silo's images, 12 bits in 16-bit PNG files; hillcrest lacks a class, lakeside has a list of them."""
    rows = [["path", "label", "patient"]]
    for label, source in CLASSES.items():
        if (silo.name, label) == ("hillcrest", "covid"):
            continue
        (silo / "xrays" / label).mkdir(parents=True)
        for number, image in enumerate(sorted((domain / source).iterdir())):
            with Image.open(image) as opened:
                grey = np.asarray(opened.convert("L").resize((64, 64)), dtype=np.uint16) * 16
            Image.fromarray(grey).save(silo / "xrays" / label / f"{number:03}.png")
            rows.append([f"{label}/{number:03}.png", label, f"{label}-patient-{number // 2}"])
    if silo.name == "lakeside":
        with (silo / "xrays" / "manifest.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    (silo / "new").mkdir()
    (silo / "new" / "scan.png").write_bytes((silo / "xrays" / "normal" / "000.png").read_bytes())


@pytest.mark.timeout(3600)
def test_the_tutorial_works_as_written(walk: Walk) -> None:
    last = {(walk.silo(site) / "work" / "adapters" / "last.safetensors").read_bytes() for site in SITES}
    assert len(last) == 1
    assert "lung-xray: finished" in walk.said["agg"]
    assert "4 silos; a round needs 3 of them, so 1 may be absent from a round" in walk.said["agg"]
    assert "accuracy on the test split" in walk.said["st-marys"]
    for name in ("predictions.csv", "mine.csv"):
        assert (walk.silo("st-marys") / name).read_text().startswith("path,class,probability,normal,")
    exported = (walk.silo("agg") / "lung-xray-adapter" / "adapter.json").read_text()
    assert json.loads(exported)["adapter"] == "last"
    assert (walk.silo("st-marys") / "given-away" / "adapter.safetensors").exists()
    assert "FedCLIP, local only" in (walk.silo("workbench") / "labs" / "table.md").read_text()


def test_the_site_behind_the_proxy_reached_the_coordinator_through_it_alone(walk: Walk) -> None:
    assert len(walk.proxy.asked) > 2
    assert {line.split(" HTTP/")[0] for line in walk.proxy.asked} == {f"CONNECT localhost:{walk.port}"}


def test_every_silo_took_part_in_every_round(walk: Walk) -> None:
    line = next(line for line in walk.said["agg"].splitlines() if line.startswith('{"federation"'))
    status = json.loads(line)
    assert [row["survivors"] for row in status["finished_rounds"]] == [sorted(SITES)] * 4  # 3, and one that counts


def test_a_renewed_certificate_is_for_the_same_key(walk: Walk) -> None:
    lines = [line for line in walk.said["st-marys"].splitlines() if line.startswith("fingerprint of this silo's key")]
    assert len(lines) == 2
    assert len(set(lines)) == 1


def test_the_silo_added_later_gets_a_federation_that_starts_from_the_last_adapter(walk: Walk) -> None:
    assert (walk.silo("agg") / "lung-xray-2" / "last.safetensors").read_bytes() == (
        walk.silo("st-marys") / "work" / "adapters" / "last.safetensors"
    ).read_bytes()
