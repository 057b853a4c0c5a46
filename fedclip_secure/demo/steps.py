"""The demo from the first certificate to the last figure: what people at five places would type, in order."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedclip_secure.aggregator.home import Home, freeze, init_home, invite
from fedclip_secure.aggregator.status import RunStatus, read_status
from fedclip_secure.config.lock import Contract, write_lock
from fedclip_secure.config.plan import SHIPPED, Training
from fedclip_secure.config.silo import FolderData, Policy, SiloConfig, write_config
from fedclip_secure.demo.labs import (
    CAP,
    FEDERATION,
    Options,
    Scene,
    Site,
    check_options,
    encoder_of,
    plain_training,
    set_scene,
    write_plan,
)
from fedclip_secure.demo.measure import Accuracies, measure
from fedclip_secure.demo.processes import Crew, free_port, log_of, without_proxies
from fedclip_secure.demo.reports import Reports, write_reports
from fedclip_secure.errors import ConfigError, TransportError
from fedclip_secure.files import make_folder, write_atomically
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.sizes import upload_bytes
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted, save_accepted
from fedclip_secure.silo.run.final_models import adapter_folder, load_adapter
from fedclip_secure.training.prepare import prepare
from fedclip_secure.transport.enrolment import enroll

_SERVER = "aggregator"  # a name that no silo can have
_LOOK = 0.25  # seconds between two looks at the run
_INVITATION = 600.0  # seconds that a token of the demo can be used


@dataclass(frozen=True, slots=True)
class Telling:
    """Whom the demo tells what it does."""

    say: Callable[[str], None]
    show: Callable[[RunStatus], None]  # called a few times a second


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out."""

    scene: Scene
    status: RunStatus
    accuracies: Accuracies
    parameters: int
    update_bytes: int  # of one upload: the sealed vector
    dropped: list[dict[str, Any]]
    reports: Reports | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        finished = self.status.finished_rounds
        return {
            "federation": self.status.federation,
            "silos": [site.name for site in self.scene.training],
            "rounds_completed": len([row for row in finished if row["round"] <= self.status.rounds]),
            "model_digest": finished[-1]["model"],
            "encoder": SHIPPED,
            "transport": "TLS 1.3 with client certificates",
            "masked": True,
            "dropped": self.dropped,
            "unseen": None if self.scene.unseen is None else self.scene.unseen.name,
            "accuracy": asdict(self.accuracies),
            "update_bytes": self.update_bytes,
            "parameters": self.parameters,
            "epsilon": None if self.reports is None else self.reports.epsilon,
            "reports": [] if self.reports is None else [str(path) for path in self.reports.paths],
            "wall_seconds": self.seconds,
        }


def conduct(options: Options, telling: Telling) -> Outcome:
    """Run the demo in `options.out`, a new folder. No process outlives this call.

    Raises:
        ConfigError: the folder is not empty; too few sites; no such method, or none that goes with the options.
        ModelError: the method does not go with the demo's encoder.
        TransportError: a process ended with an error; its log is named.
    """
    began = time.monotonic()
    check_options(options)
    _claim(options.out)
    telling.say("drawing the labs" if options.data is None else f"looking at {options.data}")
    telling.say(f"encoder: {encoder_of(options)}")
    scene = set_scene(options)
    home, contract, port = _coordinate(options, scene)
    threads = max(1, (os.cpu_count() or 1) // len(scene.training))
    with without_proxies(), Crew(threads) as crew:
        crew.start(_SERVER, "fedclip-agg", "serve", "--listen", f"127.0.0.1:{port}", folder=home.folder)
        crew.wait_for_port(_SERVER, port, log_of(home.folder))
        telling.say("enrolling: each silo makes its key, and gets a certificate for a one-time token")
        for site in scene.training:
            _enrol(options, home, contract, scene, site)
        _announce(home, scene)
        accepted = Accepted(contract, freeze(home)[1])
        for site in scene.training:
            folder = _folder(options.out, site)
            save_accepted(folder / "silo.yaml", _config(options, scene, site), accepted, None)
            crew.start(site.silo, "fedclip-silo", "train", folder=folder)
        telling.say(
            f"{len(scene.training)} silos train, each a process, over mutual TLS; logs in {options.out / 'silos'}"
        )
        killed = _watch(crew, home, scene, options, telling)
    telling.say("measuring")
    outcome = _outcome(options, scene, home, accepted, killed)
    if options.dp:
        configs = {site.name: _config(options, scene, site) for site in scene.training}
        outcome = replace(outcome, reports=write_reports(home, accepted, configs, telling.say))
    return replace(outcome, seconds=round(time.monotonic() - began, 1))


def _claim(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is not an empty folder; choose another")
    make_folder(out, "choose another with --out")


def _folder(out: Path, site: Site) -> Path:
    return (out / "silos" / site.silo).resolve()


def _coordinate(options: Options, scene: Scene) -> tuple[Home, Contract, int]:
    """What the coordinator does before anybody connects."""
    port = free_port()
    home = init_home(options.out / "coordinator", FEDERATION, ["localhost"], port)
    write_plan(home.plan_path, scene, options, f"https://localhost:{port}")
    prepared = prepare(home.plan(), home.folder)
    write_atomically(home.initial_path, prepared.initial_file)
    write_lock(home.lock_path, prepared.lock)
    return home, home.contract(), port


def _enrol(options: Options, home: Home, contract: Contract, scene: Scene, site: Site) -> None:
    folder = _folder(options.out, site)
    folder.mkdir(parents=True)
    write_config(folder / "silo.yaml", _config(options, scene, site))
    token = invite(home, site.silo, _INVITATION).token
    asyncio.run(enroll(contract.plan.server, token, folder / "identity", lambda *_: None))


def _announce(home: Home, scene: Scene) -> None:
    """Have the first round wait for all silos: whose process is the first to be ready is chance."""
    with closing(home.store()) as store:
        for site in scene.training:
            store.seen(site.silo, time.time())


def _config(options: Options, scene: Scene, site: Site) -> SiloConfig:
    data = FolderData(format="folder", path=str(site.images), absent_classes=scene.absent(site))
    folder = _folder(options.out, site)
    return SiloConfig(
        name=site.silo,
        data=data,
        identity=str(folder / "identity"),
        workdir=str(folder / "work"),
        ledger=str(folder / "ledger"),
        device="auto",
        policy=Policy(require_privacy=True, max_epsilon=CAP) if options.dp else Policy(),
    )


def _watch(crew: Crew, home: Home, scene: Scene, options: Options, telling: Telling) -> Site | None:
    """Until every silo has ended; the one that was killed on the way, if that was asked for.

    Raises:
        TransportError: a process failed.
    """
    victim = scene.training[-1] if options.kill_one else None
    killed = False
    while True:
        status = read_status(home, time.time())
        telling.show(status)
        if victim is not None and not killed and _in_the_middle(status, victim):
            crew.kill(victim.silo)
            killed = True
            telling.say(f"killed {victim.name} in round {status.round}, at stage {status.stage}")
        running = [site for site in scene.training if not (killed and site == victim)]
        folders = {_SERVER: home.folder, **{site.silo: _folder(options.out, site) for site in running}}
        for name, folder in folders.items():
            if crew.ended(name) not in (None, 0):
                raise TransportError(f"{name} ended with an error: {_last_words(log_of(folder))}")
        if all(crew.ended(site.silo) == 0 for site in running):
            return victim
        time.sleep(0.01 if victim is not None and not killed else _LOOK)


def _last_words(log: Path) -> str:
    """The error at the end of a log, and where it stands."""
    text = log.read_text("utf-8", errors="replace")
    return f"{text.rpartition('error: ')[2].strip()[-800:]}\n(all of it: {log})"


def _in_the_middle(status: RunStatus, victim: Site) -> bool:
    """The victim has taken part in a round, and is in the middle of another."""
    averaged = any(victim.silo in row["survivors"] for row in status.finished_rounds)
    return averaged and status.stage == "share" and status.round <= status.rounds


def _outcome(options: Options, scene: Scene, home: Home, accepted: Accepted, victim: Site | None) -> Outcome:
    terms = Terms.of(accepted.contract, accepted.roster)
    sites = (*scene.training, *([scene.unseen] if scene.unseen else []))
    workdirs = {site.name: _folder(options.out, site) / "work" for site in sites}
    status = read_status(home, time.time())
    survivor = next(site for site in scene.training if site != victim)
    start = AdapterState.from_safetensors(home.initial_path.read_bytes(), terms.layout, str(home.initial_path))
    end = load_adapter(adapter_folder(workdirs[survivor.name]) / "last.safetensors", terms)
    return Outcome(
        scene=scene,
        status=status,
        accuracies=measure(accepted.contract, scene, workdirs, start, end, Training(**plain_training(options))),
        parameters=terms.layout.size,
        update_bytes=upload_bytes(terms, survivor.silo),
        dropped=_dropped(status, scene, victim),
        reports=None,
        seconds=0.0,
    )


def _dropped(status: RunStatus, scene: Scene, victim: Site | None) -> list[dict[str, Any]]:
    """Who did not answer in time, at which stage; a silo killed between two stages misses the next joining."""
    names = {site.silo: site.name for site in scene.training}
    found = [
        {"silo": names[event["silo"]], "round": event["round"], "stage": event["stage"], "reason": event["reason"]}
        for event in status.events
        if event["kind"] == "dropped"
    ]
    if victim is not None and not any(entry["silo"] == victim.name for entry in found):
        missed = next(row["round"] for row in status.finished_rounds if victim.silo not in row["survivors"])
        found.append({"silo": victim.name, "round": missed, "stage": "join", "reason": "killed by --kill-one"})
    return found
