"""Runs with nothing left to learn before the plan's last round, and what a server keeps of a long run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclip_secure.data.dataset import Counts
from fedclip_secure.errors import TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.silo.run.attendance import Attendance
from fedclip_secure.silo.run.final_models import Course, fetch_course
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.link import Link
from tests.aggregator.site import (
    NAMES,
    STAGES,
    Gate,
    Site,
    SteadyTrainer,
    VanishedError,
    silos_of,
    vanishing,
)
from tests.waiting import until

FOUR = NAMES[:4]
STILL = "nothing is left to learn: round 3 changed no parameter"


@dataclass
class Sated(SteadyTrainer):
    """Learns nothing more from the model of digest `full`."""

    full: str = ""

    def train(self, received: AdapterState) -> np.ndarray[Any, np.dtype[np.float64]]:
        update = super().train(received)
        return np.zeros_like(update) if received.digest.hex() == self.full else update


@dataclass
class Turning(SteadyTrainer):
    """Takes one parameter up, and then down again."""

    def train(self, received: AdapterState) -> np.ndarray[Any, np.dtype[np.float64]]:
        update = np.zeros(len(self.integers))
        update[0] = -0.0625 if received.vector[0] > -1 else 0.0625
        return update


@dataclass
class Proud(SteadyTrainer):
    """Finds the model of digest `best` the best of all, and of the others each alike."""

    best: str = ""

    def validate(self, state: AdapterState) -> Counts:
        return Counts(5 if state.digest.hex() == self.best else 3, 5)


def sated(site: Site, rounds: int = 2) -> Any:
    """Trainers that learn for so many rounds of all four."""
    full = site.foretold([FOUR] * rounds)

    def make(name: str, parameters: int) -> Sated:
        made = SteadyTrainer.of(name, parameters)
        return Sated(made.records, made.integers, full=full)

    return make


async def course_of(site: Site, name: str) -> Course:
    """What this silo makes of the run, from signed results alone."""
    async with site.client(name) as client:
        return await fetch_course(Link(client, site.identities[name].folder), site.terms)


def attendance_of(site: Site, name: str, course: Course) -> Attendance:
    folder = site.identities[name].folder
    journal = Journal(folder / "work", site.identities[name].epoch_path)
    try:
        return Attendance.of(course, journal.models(), site.terms, {})
    finally:
        journal.close()


@pytest.mark.parametrize("validation", [0.2, 0.0], ids=["with a closing round", "without"])
def test_a_run_with_nothing_left_to_learn_is_finished_and_says_after_which_round(
    tmp_path: Path, validation: float
) -> None:
    splits = {"train": 0.8 - validation, "validation": validation, "test": 0.2}
    site = Site.frozen(tmp_path, training={"rounds": 50}, splits=splits)

    async def run() -> Course:
        async with site.serving(), silos_of(site) as silos:
            silos.trainer_of = sated(site)
            silos.start(*FOUR)
            await silos.done()
            said = "round 3 of 50 changed no parameter, and is the last one: nothing is left to learn"
            assert all(silos.heard[name][-1] == said for name in FOUR)
            return await course_of(site, "lab-a")

    course = asyncio.run(run())
    status = site.status()
    assert (status.state, len(status.finished_rounds), status.attempt) == ("finished", 3, 3)
    assert status.reason.startswith(STILL)
    assert any(line.startswith(f"finished: {STILL}") for line in site.said)
    assert (course.still, course.rounds) == (True, 3)
    assert course.points[-1].model.hex() == status.finished_rounds[-1]["model"] == site.foretold([FOUR] * 2)
    assert attendance_of(site, "lab-a", course).told() == "took part in 3 of 3 round(s)"


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_is_restarted_in_the_round_that_changes_nothing_ends_the_run_all_the_same(
    tmp_path: Path, stage: str
) -> None:
    site = Site.frozen(tmp_path, training={"rounds": 50})
    gate = Gate(stage, attempt=3)

    async def run() -> Course:
        async with silos_of(site) as silos:
            silos.trainer_of = sated(site)
            async with site.serving():
                silos.start(*FOUR[:2])
                silos.start(*FOUR[2:], before=gate)
                await until(lambda: gate.held == 2 and site.status().attempt == 3 and site.kept(stage) == 2)
            async with site.serving():
                gate.opened.set()
                await silos.done()
                return await course_of(site, "lab-d")

    assert asyncio.run(run()).still
    status = site.status()
    assert (status.state, len(status.finished_rounds), status.attempt) == ("finished", 3, 3)


def test_a_server_that_is_started_again_after_the_end_opens_no_other_round(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, training={"rounds": 50})

    async def run() -> None:
        async with silos_of(site) as silos:
            silos.trainer_of = sated(site)
            async with site.serving():
                silos.start(*FOUR)
                await silos.done()
            async with site.serving():
                silos.start(*FOUR)
                await silos.done()
                assert (await course_of(site, "lab-b")).still

    asyncio.run(run())
    assert site.status().attempt == 3
    assert sum(line.startswith(f"finished: {STILL}") for line in site.said) == 2


@pytest.mark.parametrize("stage", ["key-ads", "uploads", "unmasks", "results"])
def test_a_silo_that_missed_the_end_learns_of_it_from_what_the_others_signed(tmp_path: Path, stage: str) -> None:
    deadlines = dict.fromkeys(("join", "share", "upload", "agree", "unmask"), 1)
    site = Site.frozen(tmp_path, training={"rounds": 50}, deadlines=deadlines)

    async def run() -> Course:
        async with site.serving(), silos_of(site) as silos:
            silos.trainer_of = sated(site)
            silos.start(*FOUR[:3])
            silos.start("lab-d", before=vanishing(stage, attempt=3))
            await silos.done(*FOUR[:3])
            with pytest.raises(VanishedError):
                await silos.done("lab-d")
            silos.start("lab-d")
            await silos.done("lab-d")
            return await course_of(site, "lab-d")

    course = asyncio.run(run())
    assert (course.still, course.rounds) == (True, 3)
    missed = stage in ("key-ads", "uploads")
    attendance = attendance_of(site, "lab-d", course)
    assert (attendance.taken, sum(attendance.missed.values())) == ((2, 1) if missed else (3, 0))


def test_a_silo_that_was_never_there_says_so(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, training={"rounds": 50}, deadlines={"join": 1})

    async def run() -> Course:
        async with site.serving(), silos_of(site) as silos:
            full = site.foretold([FOUR[:3]] * 2)
            silos.trainer_of = lambda name, size: Sated(
                SteadyTrainer.of(name, size).records, SteadyTrainer.of(name, size).integers, full=full
            )
            silos.start(*FOUR[:3])
            await silos.done()
            silos.start("lab-d")
            await silos.done("lab-d")
            return await course_of(site, "lab-d")

    attendance = attendance_of(site, "lab-d", asyncio.run(run()))
    assert attendance.poor
    told = "took part in 0 of 3 round(s); missed 3 (3: it was not there, or has been started again since)"
    assert attendance.told() == told


def test_a_run_whose_models_go_in_a_circle_is_halted_and_says_so(tmp_path: Path) -> None:
    """Each silo has sent an update over that model, and sends no second one: they would wait for ever."""
    site = Site.frozen(tmp_path, training={"rounds": 50})

    async def run() -> None:
        for _ in range(2):  # a restart changes nothing
            async with site.serving(), silos_of(site) as silos:
                silos.trainer_of = Turning.of
                silos.start(*FOUR)
                for name in FOUR:
                    with pytest.raises(TrustError, match="the aggregator halted the run: the models go in a circle"):
                        await silos.done(name)

    asyncio.run(run())
    status = site.status()
    assert (status.state, len(status.finished_rounds)) == ("halted", 2)
    assert status.reason.startswith("the models go in a circle: round 2 came back to the model that round 1 started")
    assert sum(line == f"halted: {status.reason}" for line in site.said) == 2


@pytest.mark.parametrize("best", [0, 3, 11], ids=["the first", "an early one", "a late one"])
def test_of_however_many_rounds_the_server_keeps_three_models_and_the_best_is_one_of_them(
    tmp_path: Path, best: int
) -> None:
    site = Site.frozen(tmp_path, training={"rounds": 12}, parameters=1000)
    models, seen = site.state / "models", list[int]()
    finest = site.foretold([FOUR] * best)

    async def count(attempt: int, stage: str) -> None:
        if attempt > 1 and stage == "uploads":
            seen.append(len(list(models.iterdir())))

    async def run() -> Course:
        async with site.serving(), silos_of(site) as silos:
            silos.trainer_of = lambda name, size: Proud(
                SteadyTrainer.of(name, size).records, SteadyTrainer.of(name, size).integers, best=finest
            )
            silos.start(*FOUR, before=count)
            await silos.done()
            return await course_of(site, "lab-c")

    course = asyncio.run(run())
    assert max(seen) <= 3
    assert len(seen) == 12 * 4
    top = max(course.points, key=lambda point: point.correct)
    kept = {path.stem for path in models.iterdir()}
    assert (top.round, top.model.hex()) == (best, finest)
    assert {finest, course.points[-1].model.hex()} <= kept
    assert sum(path.stat().st_size for path in models.iterdir()) < 3 * (4 * 1000 + 1000)


def test_models_that_a_crash_left_behind_are_removed_when_the_server_starts(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)
    stray = site.state / "models" / f"{'0' * 64}.safetensors"
    stray.write_bytes(b"of a round that was never written down")

    async def run() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(*FOUR)
            await silos.done()

    asyncio.run(run())
    assert not stray.exists()
    assert site.status().state == "finished"
