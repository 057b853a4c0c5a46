"""SIGKILL at every durable write of a silo and of the server: the run finishes, and nobody signs twice.

Every process is real, over real mutual TLS; to start one costs a fork. The trainer makes another update each time
it is asked, so that a silo which draws twice over a model, or a sum over other names than the server says, shows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclip_secure.aggregator.home import Home
from fedclip_secure.model.state import AdapterState, Layout
from tests.aggregator.site import NAMES, PARAMETERS, Site
from tests.federation import failpoints
from tests.federation.processes import ROOT, start
from tests.waiting import BOUND

SERVER, SILO = "server", "lab-b"
TRIES = 5
DEADLINES = 3  # seconds, where a silo comes back late
LATE = 1.5 * DEADLINES
FORK = multiprocessing.get_context("fork")
Line = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Who of how many is killed, and where in each of its lives but the last."""

    silos: int
    victim: str
    points: tuple[str, ...] = ()
    late: bool = False


@dataclass(frozen=True)
class Outcome:
    case: Case
    story: str
    faults: list[str]
    points: list[str]  # that the victim passed in its last life
    reached: bool  # all the points of the case
    seconds: float

    def line(self) -> str:
        where = f"{self.case.victim} of {self.case.silos}{', late' if self.case.late else ''}"
        ending = [self.story, *self.faults, *([] if self.reached else ["not reached"])]
        return f"{where} | {' | '.join(self.case.points) or 'nowhere'} | {'; '.join(ending)}"


@dataclass
class Run:
    """One run of a federation that lies below `folder`; every process has its record there."""

    folder: Path
    port: int
    processes: dict[str, multiprocessing.process.BaseProcess] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        return Site(Home(self.folder / "home"), self.port)

    def start(self, name: str, point: str | None = None) -> None:
        arguments = [*arguments_of(self.folder, name, self.port), *([] if point is None else [point])]
        self.processes[name] = FORK.Process(target=_process, args=(self.folder / f"{name}.log", arguments))
        self.processes[name].start()

    def lines(self, name: str, *kinds: str) -> list[Line]:
        """What a process, over all its restarts, has recorded of these kinds."""
        lines = map(json.loads, (self.folder / f"{name}.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] in kinds]

    def lives(self, name: str) -> list[list[str]]:
        """The points that a process passed, from each of its starts."""
        lives: list[list[str]] = []
        for line in self.lines(name, "started", "point"):
            lives += [[]] if line["kind"] == "started" else []
            lives[-1] += [line["name"]] if line["kind"] == "point" else []
        return lives

    def finish(self, case: Case) -> list[str]:
        """All silos until they end, the victim as often as it is killed; what went wrong."""
        end, silos, points = time.monotonic() + BOUND, NAMES[: case.silos], iter(case.points)
        for name in (SERVER, *silos):
            self.start(name, next(points, None) if name == case.victim else None)
        while any(self.processes[name].exitcode is None for name in silos):
            connection.wait([process.sentinel for process in self.processes.values() if process.is_alive()], 0.5)
            if time.monotonic() > end:
                return self.hang()
            for name, code in [(name, process.exitcode) for name, process in self.processes.items()]:
                if code == -signal.SIGKILL and name == case.victim:
                    time.sleep(LATE if case.late else 0)
                    self.start(name, next(points, None))
                elif code or (name == SERVER and code is not None):
                    return [f"{name} ended with exit code {code}"]
        self.processes[SERVER].terminate()
        self.processes[SERVER].join(BOUND)
        return [] if self.processes[SERVER].exitcode == 0 else ["the server did not stop as it should"]

    def hang(self) -> list[str]:
        """Lets each process write its stacks into its log."""
        for process in self.processes.values():
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return [f"not finished within {BOUND:.0f} s"]

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


def arguments_of(folder: Path, name: str, port: int) -> list[str]:
    """What the entry point is told, to be this server or silo."""
    role, place = ("server", folder / "home") if name == SERVER else ("silo", folder / name)
    return [role, str(place), str(port), str(folder / f"{name}.jsonl")]


def _process(log: Path, arguments: list[str]) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    failpoints.main(*arguments)


@functools.cache
def template(folder: Path, silos: int, seconds: int) -> Site:
    """A frozen federation to copy. Its port is this worker's own, for one run after the other."""
    deadlines = dict.fromkeys(("join", "share", "upload", "agree", "unmask"), seconds)
    place = folder / f"template-{os.getpid()}-{silos}-{seconds}"
    return Site.frozen(place, silos, deadlines=deadlines, secure_aggregation={"verify_sum": "auto"})


def prepared(folder: Path, case: Case) -> Run:
    """A fresh federation whose silos were all just there: the first round waits for them."""
    original = template(folder, case.silos, DEADLINES if case.late else 60)
    run = Run(folder / f"run-{os.getpid()}-{time.monotonic_ns()}", original.port)
    shutil.copytree(original.home.folder.parent, run.folder)
    with run.site.store() as store:
        for name in NAMES[: case.silos]:
            store.seen(name, time.time())
    return run


def run_case(folder: Path, case: Case) -> Outcome:
    """Run it, a few times if the last point is one that the victim passes only when it is not the slowest."""
    for _ in range(TRIES):
        outcome = run_once(folder, case)
        if outcome.reached or outcome.faults:
            break
    return outcome


def run_once(folder: Path, case: Case) -> Outcome:
    """Run it, and look at what everybody did."""
    began, run = time.monotonic(), prepared(folder, case)
    try:
        faults = run.finish(case)
    finally:
        run.end()
    status, lives = run.site.status(), run.lives(case.victim)
    if not faults and status.state != "finished":
        faults.append(f"the run is {status.state}: {status.reason}")
    faults += wrong_models(run, status.finished_rounds) + broken_promises(run, NAMES[: case.silos])
    faults += [] if faults else wrong_adapters(run, case)
    told = story(run, case, status.finished_rounds)
    if faults:
        faults.append(f"see {run.folder}")
    else:
        shutil.rmtree(run.folder)
    return Outcome(case, told, faults, lives[-1], len(lives) == len(case.points) + 1, time.monotonic() - began)


def story(run: Run, case: Case, rounds: list[Line]) -> str:
    """How it ended: attempts that were given up, with their reasons, and who was not averaged."""
    ended = run.site.rows("SELECT number, ended FROM attempts WHERE ended <> 'done'")
    told = [f"attempt {number} ended: {reason}" for number, reason in ended]
    for row in rounds:
        missing = sorted(set(NAMES[: case.silos]) - set(row["survivors"]))
        told += [f"round {row['round']} without {', '.join(missing)}"] if missing else []
    return "; ".join(told) or "the same attempts, all silos"


def wrong_models(run: Run, rounds: list[Line]) -> list[str]:
    """Rounds that did not end with the model, and the counts, that the integers of their survivors add up to."""
    layout, wrong = Layout((("w", (PARAMETERS,)),)), []
    model = AdapterState(layout, np.linspace(-1, 1, PARAMETERS, dtype=np.float32))
    for row in rounds:
        total = np.sum([masked(run, silo, model.digest.hex()) for silo in row["survivors"]], axis=0)
        mean = (failpoints.STEP * total[:PARAMETERS]) * failpoints.MAX_WEIGHT / total[PARAMETERS]
        model = AdapterState(layout, (model.vector.astype(np.float64) + mean).astype(np.float32))
        if (row["model"], row["correct"], row["total"]) != (model.digest.hex(), *total[PARAMETERS + 1 :]):
            wrong.append(f"round {row['round']} ended with another model than its survivors' integers make")
    return wrong


def masked(run: Run, silo: str, model: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Update, weight and counts (words,) that `silo` has masked over this model."""
    lines = [line["integers"] for line in run.lines(silo, "signed") if line["integers"] and line["model"] == model]
    return np.array(lines[-1], dtype=np.uint32).view(np.int32).astype(np.int64)


def broken_promises(run: Run, silos: Iterable[str]) -> list[str]:
    """Two lists of names, or two vectors, over one model; two messages at one stage of one attempt."""
    said = defaultdict[tuple[Any, ...], set[str]](set)
    for silo in silos:
        for line in run.lines(silo, "signed"):
            for what in ("names", "integers"):
                said[silo, f"{what} over one model", line["model"]] |= {str(line[what])} - {"None"}
        for line in run.lines(silo, "sent"):
            said[silo, "messages at one stage", line["attempt"], line["stage"]].add(line["sha256"])
    return [f"{silo} has two {what}: {values}" for (silo, what, *_), values in said.items() if len(values) > 1]


def wrong_adapters(run: Run, case: Case) -> list[str]:
    """Whether every silo ended with one and the same adapter, the last model."""
    adapters = [run.folder / name / "work" / "adapters" / "last.safetensors" for name in NAMES[: case.silos]]
    last = run.site.status().finished_rounds[-1]["model"]
    found = {AdapterState.from_file(path, Layout((("w", (PARAMETERS,)),)), str(path)).digest.hex() for path in adapters}
    return [] if found == {last} else [f"the silos ended with {found}, the run with {last}"]


def kill_everywhere(
    folder: Path, case: Case, *, choose: Callable[[list[str]], Iterable[str]] = list, workers: int = 2
) -> None:
    """The run as `case` says, then one killed besides at each chosen point of the victim's last life.

    Prints the table, and leaves it as `kills.txt`.
    """
    run_it = functools.partial(run_case, folder)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        undisturbed = list(pool.map(run_it, [dataclasses.replace(case, late=False)] * 2))
        sure = set(undisturbed[0].points) & set(undisturbed[1].points)  # not so what a slow silo is left out of
        points = list(dict.fromkeys(undisturbed[0].points + undisturbed[1].points))
        cases = [dataclasses.replace(case, points=(*case.points, point)) for point in choose(points)]
        outcomes = [*undisturbed, *pool.map(run_it, cases)]
    table = "\n".join(outcome.line() for outcome in outcomes)
    (folder / "kills.txt").write_text(f"{table}\n")
    print(f"\n{table}\n{len(cases)} points, {sum(outcome.seconds for outcome in outcomes) / workers:.0f} s")
    assert [outcome.line() for outcome in outcomes if outcome.faults] == []
    assert [outcome.line() for outcome in outcomes if not outcome.reached and outcome.case.points[-1] in sure] == []


def one_of_each_kind(points: list[str]) -> Iterator[str]:
    """Kinds differ in function and operation; commits, by which all is decided, also in stage."""
    kinds = defaultdict[str, list[str]](list)
    for point in points:
        kind = re.sub(r" (lab-.|trains)(?=[ :])| \(\d+\): .*", "", point)
        kinds[kind if "COMMIT" in kind else re.sub(r" [A-Z]+(?=:)", "", kind)].append(point)
    for number, alike in enumerate(kinds.values()):
        yield alike[number % len(alike)]


def commits_of_the_first_round(points: list[str]) -> Iterator[str]:
    yield from (point for point in points if "Journal.step" in point and "COMMIT (1)" in point)


@pytest.mark.parametrize("victim", [SILO, SERVER])
def test_killed_at_a_write_of_each_kind_a_process_goes_on_and_the_run_finishes(tmp_path: Path, victim: str) -> None:
    kill_everywhere(tmp_path, Case(3, victim), choose=one_of_each_kind)


def test_killed_at_a_commit_and_back_after_the_deadlines_a_silo_goes_on_and_the_run_finishes(tmp_path: Path) -> None:
    kill_everywhere(tmp_path, Case(3, SILO, late=True), choose=commits_of_the_first_round, workers=4)


def test_each_process_can_be_a_program_of_its_own(tmp_path: Path) -> None:
    run, programs = prepared(tmp_path, Case(3, SILO)), dict[str, subprocess.Popen[str]]()

    def program(name: str, *point: str) -> subprocess.Popen[str]:
        arguments = ["-m", "tests.federation.failpoints", *arguments_of(run.folder, name, run.port), *point]
        return start(sys.executable, *arguments, cwd=ROOT, log=run.folder / f"{name}.log")

    try:
        programs = {name: program(name) for name in (SERVER, "lab-a", "lab-c")}
        programs[SILO] = program(SILO, "Journal.step AGREED: COMMIT (1): after")
        assert programs[SILO].wait(BOUND) == -signal.SIGKILL
        programs[SILO] = program(SILO)
        assert [programs[name].wait(BOUND) for name in NAMES[:3]] == [0, 0, 0]
    finally:
        for process in programs.values():
            process.kill()
            process.wait()
    rounds = run.site.status().finished_rounds
    assert [row["survivors"] for row in rounds] == [list(NAMES[:3])] * 2
    assert wrong_models(run, rounds) + broken_promises(run, NAMES[:3]) == []


@pytest.mark.long
@pytest.mark.parametrize("silos", [3, 4])
@pytest.mark.parametrize("victim", [SILO, SERVER])
def test_killed_at_any_durable_write_a_process_goes_on_and_the_run_finishes(
    tmp_path: Path, silos: int, victim: str
) -> None:
    kill_everywhere(tmp_path, Case(silos, victim))


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        Case(3, SILO, ("Journal.step AGREED: COMMIT (1): after",)),  # the epoch file is one step behind
        Case(3, SERVER, ("Store.end_round: COMMIT (1): after",)),
    ],
)
def test_killed_again_at_any_durable_write_after_its_restart_a_process_goes_on(tmp_path: Path, case: Case) -> None:
    kill_everywhere(tmp_path, case)


@pytest.mark.long
@pytest.mark.parametrize("silos", [3, 4])  # without it the others go on, or cannot
def test_a_silo_killed_at_any_durable_write_may_come_back_after_the_deadlines(tmp_path: Path, silos: int) -> None:
    kill_everywhere(tmp_path, Case(silos, SILO, late=True), workers=4)
