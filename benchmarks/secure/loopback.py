"""Whole rounds over mutual TLS on this machine: a server's process and one for each silo.

Each silo's update is there before the round begins; nothing is trained. A round lasts from one average to the next:
with secure aggregation the results, the opening and all stages, each message signed, kept and acknowledged; plain,
one vector up and the mean down.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy.typing as npt
import yaml
from peers import plain

from fedclip_secure.aggregator.enrolment import enrol
from fedclip_secure.aggregator.home import Home, freeze, init_home, invite
from fedclip_secure.aggregator.serve import serve, stop_on_signals
from fedclip_secure.config.lock import write_lock
from fedclip_secure.data.dataset import Counts
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.authority import load_authority
from fedclip_secure.pki.certificates import parse_certificate
from fedclip_secure.pki.identity import Enrolment, Identity, create_key, signing_request
from fedclip_secure.pki.invitation import Invitation
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.link import Link
from fedclip_secure.silo.run.party import Party
from fedclip_secure.silo.run.runner import Runner
from fedclip_secure.transport.client import Client
from fedclip_secure.transport.messages import EnrolRequest
from secure.federation import WEIGHT, draw, layout_of, make_contract, make_plan

_PROCESSES = multiprocessing.get_context("spawn")
_PATIENCE = 600.0  # seconds without a word from a process before the run is given up
_PROMPTS = b"prompts"


@dataclass(frozen=True)
class Site:
    """A coordinator's folder with a frozen roster; each silo's folder lies beside it under the silo's name."""

    home: Home
    port: int
    silos: tuple[str, ...]
    parameters: int
    rounds: int

    def folder(self, silo: str) -> Path:
        """A silo's own folder."""
        return self.home.folder.parent / silo


Mark = Callable[[str], None]  # tells the process that started this one what has happened just now
Target = Callable[[Mark, Site, str], None]


def make_site(folder: Path, silos: int, parameters: int, rounds: int, verify_sum: str) -> Site:
    """A federation that is ready to run, made with the functions behind `fedclip-agg` and `fedclip-silo`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    site = Site(init_home(folder / "home", "bench", ["127.0.0.1"], port), port, _names(silos), parameters, rounds)
    home, initial = site.home, AdapterState(layout_of(parameters), draw(parameters, seed=0))
    plan = make_plan(rounds, verify_sum, f"https://127.0.0.1:{port}")
    home.plan_path.write_text(yaml.safe_dump(plan.model_dump(mode="json") | {"classes": plan.classes}), "utf-8")
    (home.folder / "prompts.safetensors").write_bytes(_PROMPTS)
    initial.to_file(home.initial_path)
    with home.initial_path.open("rb") as file:
        initial_file = hashlib.file_digest(file, "sha256").digest()
    contract = make_contract(home.plan(), initial, hashlib.sha256(_PROMPTS).digest(), initial_file)
    write_lock(home.lock_path, contract.lock)
    for silo in site.silos:
        _enrol(site, silo)
    freeze(home)
    return site


def _names(silos: int) -> tuple[str, ...]:
    return tuple(f"silo-{number:03}" for number in range(silos))


def _enrol(site: Site, silo: str) -> None:
    """As over the network, but without it."""
    folder, authority = site.folder(silo), load_authority(site.home.authority_folder)
    key, token = create_key(folder), Invitation.decode(invite(site.home, silo, valid=3600).token)
    request = EnrolRequest(token=token.secret, csr=signing_request(key, silo))
    store = site.home.store()
    answer = enrol(store, authority, "bench", request.encode(), time.time())
    store.close()
    enrolment = Enrolment(name=silo, server=f"https://127.0.0.1:{site.port}", federation="bench")
    certificate = parse_certificate(answer.certificate, "the answer")
    Identity(folder, enrolment, key, certificate, authority.certificate).save()


def secure_rounds(site: Site) -> list[float]:
    """Seconds from each average to the next in the plan's rounds, by the package's own server and runners."""
    return _measure(site, _secure_server, _secure_silo)


def plain_rounds(site: Site) -> list[float]:
    """The same of as many rounds of plain vectors."""
    return _measure(site, _plain_server, _plain_silo)


def _measure(site: Site, server: Target, silo: Target) -> list[float]:
    with contextlib.ExitStack() as stack:
        heard = stack.enter_context(_started(server, site, "server"))
        _wait_for(heard, "serving")
        silos = [stack.enter_context(_started(silo, site, name)) for name in site.silos]
        averaged = [_wait_for(heard, "averaged") for _ in range(site.rounds)]
        for one in silos:
            _wait_for(one, "done")
    return [after - before for before, after in itertools.pairwise(averaged)]


@contextlib.contextmanager
def _started(target: Target, site: Site, name: str) -> Iterator[Connection]:
    """What a process says that runs `target`."""
    heard, said = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_run, args=(target, said, site, name), daemon=True)
    process.start()
    said.close()  # the process has it now, and its end is the end of what is heard
    try:
        yield heard
    finally:
        process.terminate()
        process.join()


def _run(target: Target, said: Connection, site: Site, name: str) -> None:
    def mark(what: str) -> None:
        said.send((what, time.perf_counter()))

    target(mark, site, name)
    mark("done")


def _wait_for(heard: Connection, what: str) -> float:
    """When it happened, by the clock that all processes share."""
    while heard.poll(_PATIENCE):
        name, moment = heard.recv()
        if name == what:
            return float(moment)
    raise TimeoutError(f"nothing was heard of {what!r} for {_PATIENCE:.0f} s")


def _secure_server(mark: Mark, site: Site, _name: str) -> None:
    def say(text: str) -> None:
        for what in ("serving", "averaged"):
            if what in text:
                mark(what)

    async def main() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop)
        await serve(site.home, "127.0.0.1", site.port, say, stop)

    asyncio.run(main())


@dataclass
class _Trainer:
    """Gives the same update in every round."""

    update: npt.NDArray[Any]
    records: int = WEIGHT

    def check(self, _received: AdapterState) -> None:
        """Nothing is refused."""

    def train(self, _received: AdapterState) -> npt.NDArray[Any]:
        return self.update

    def validate(self, _state: AdapterState) -> Counts:
        return Counts(0, 0)


def _secure_silo(_mark: Mark, site: Site, name: str) -> None:
    identity, folder = Identity.load(site.folder(name)), site.folder(name) / "work"
    trainer = _Trainer(draw(site.parameters, seed=site.silos.index(name) + 1))
    journal = Journal(folder, identity.epoch_path)

    async def main() -> None:
        async with _client(identity) as client:
            link = Link(client, folder)
            offered = await link.offer("the server")
            party = Party(identity, Terms.of(offered.contract, offered.roster))
            await Runner(party, trainer, link, journal, lambda _text: None).run()

    asyncio.run(main())
    journal.close()


def _plain_server(mark: Mark, site: Site, _name: str) -> None:
    async def main() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop)
        await plain.serve(site.home, site.port, len(site.silos), mark, stop)

    asyncio.run(main())


def _plain_silo(_mark: Mark, site: Site, name: str) -> None:
    update, model = (draw(site.parameters, seed) for seed in (site.silos.index(name) + 1, 0))

    async def main() -> None:
        async with _client(Identity.load(site.folder(name))) as client:
            await plain.take_part(client, update, model, site.rounds)

    asyncio.run(main())


def _client(identity: Identity) -> Client:
    return Client.of(identity, lambda _reason, _seconds: None)
