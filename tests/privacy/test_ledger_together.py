"""Two processes hammer one ledger, and one of them is killed before and after each of its durable writes.

Nothing is charged twice or lost, the chain stays whole, the note outside of the folder stays right, and no unit comes
above the cap, which the plans of both together would exceed by far.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fedclip_secure.errors import PolicyError
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.entries import chain_of
from fedclip_secure.privacy.ledger.ledger import Ledger, OpenRun
from tests.federation import failpoints
from tests.privacy.books import Books, terms, units
from tests.privacy.test_ledger_kills import lines
from tests.waiting import BOUND

FORK = multiprocessing.get_context("fork")
MEMORY = Path("/dev/shm")  # noqa: S108  # as many writes as the disk would take a minute for
CAP = Cap(1.95, 1e-5)  # four rounds of these:
SHAPE = {"rounds": 2, "max_retrains": 1}
VICTIM, OTHER = "lab-a", "lab-b"
# Who is in which plan: everybody in several of both silos.
PLANS = {VICTIM: {1: range(6), 2: range(3, 9)}, OTHER: {3: range(9), 4: range(5)}}
EVERYONE = units(range(9))


@pytest.fixture
def folder() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    yield home
    shutil.rmtree(home)


def _life(home: Path, silo: str, point: str | None) -> None:
    """Goes through its plans, as far as they fit; dies at `point`."""
    failpoints.RECORD.open(home / f"{silo}.jsonl")
    failpoints.RECORD.add("started")
    failpoints.POINTS.kill_at = point
    signal.alarm(int(BOUND))
    failpoints.watch_writes()
    note = home / "ledger.head"
    newest = bytes.fromhex(note.read_text()) if note.exists() else None
    ledger = Books(home / "ledger").open(silo)
    if newest is not None:
        ledger.check_newest(newest)
    for plan, numbers in PLANS[silo].items():
        try:
            run = ledger.open_run(terms(plan=plan, **SHAPE), units(numbers), CAP, changed_data=True)
        except PolicyError as error:
            failpoints.RECORD.add("refused", plan=plan, error=str(error))
            continue
        ledger.note_newest(note)
        for number in (1, 2):
            _train(ledger, run, number, note)
        run.finish()
        ledger.note_newest(note)
    ledger.close()


def _train(ledger: Ledger, run: OpenRun, number: int, note: Path) -> None:
    if number in run.state.trained or not run.may_train(number):
        return
    reservation = run.reserve(number)
    entry, admitted = reservation.entry.hex(), sorted(unit.hex() for unit in run.admitted)
    failpoints.RECORD.add("used", entry=entry, units=admitted)
    ledger.note_newest(note)
    run.settle(reservation)
    ledger.note_newest(note)


def begun(home: Path, silo: str, point: str | None = None) -> BaseProcess:
    process = FORK.Process(target=_life, args=(home, silo, point))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    process.join(BOUND)
    return process.exitcode


def check(home: Path, kills: int) -> Counter[str]:
    """Of the whole ledger; how many entries of which kind it has."""
    with Books(home / "ledger") as books:
        newest = bytes.fromhex((home / "ledger.head").read_text())
        ledger = books.open()
        ledger.check_newest(newest)
        chain, book = chain_of(ledger.entries()), ledger._book
        assert newest == ledger.head, "both have ended, and whoever wrote last has noted it"
        reserved = {entry: reserve for run in chain.runs.values() for entry, reserve in run.reservations.items()}
        used = [line for silo in PLANS for line in lines(home / f"{silo}.jsonl", "used")]
        assert len({line["entry"] for line in used}) == len(used), "one reservation pays for one use"
        assert {str(line["entry"]) for line in used} <= reserved.keys(), "each use was paid for"
        assert len(reserved) - len(used) <= kills, "only who died after paying has paid for nothing"
        recount = Counter[str]()
        for line in used:
            ids = [bytes.fromhex(unit) for unit in line["units"]]  # type: ignore[attr-defined]
            chosen = book._sets[reserved[str(line["entry"])].set]
            assert sorted(book.units.members(ids).numbers) == list(chosen.admitted)
            recount.update({unit: reserved[str(line["entry"])].steps for unit in line["units"]})  # type: ignore[attr-defined]
        charges = book.charges()
        lost = sum(
            reserve.steps for entry, reserve in reserved.items() if entry not in {line["entry"] for line in used}
        )
        for unit in EVERYONE:
            charged = int(charges.steps[book.units.members([unit]).numbers[0]].sum())
            assert recount[unit.hex()] <= charged <= recount[unit.hex()] + lost
        assert charges.spent(CAP).max() <= book.committed(besides=None).spent(CAP).max() <= CAP.budget
    return Counter(entry.kind for entry in chain.entries)


def test_two_processes_in_one_ledger_never_overspend_it_though_one_is_killed_at_any_write(folder: Path) -> None:
    whole = folder / "whole"
    whole.mkdir()
    assert ended(begun(whole, VICTIM)) == 0
    points = [str(line["name"]) for line in lines(whole / f"{VICTIM}.jsonl", "point")]
    assert sum("COMMIT" in point for point in points) > 30
    reached, refused = 0, 0
    for number, point in enumerate(points):
        home = folder / f"{number}"
        home.mkdir()
        victim, other = begun(home, VICTIM, point), begun(home, OTHER)
        killed = ended(victim) == -signal.SIGKILL
        assert ended(begun(home, VICTIM)) == 0, point  # while the other one goes on
        assert ended(other) == 0, point
        kinds = check(home, int(killed))
        assert kinds["settle"] <= kinds["reserve"] <= kinds["settle"] + killed, point
        reached += killed
        refused += any(lines(home / f"{silo}.jsonl", "refused") for silo in PLANS)
        shutil.rmtree(home)
    assert reached > len(points) / 2, "the other process changes what there is to do, but not so much"
    assert refused > len(points) / 2, "the cap is what they are held by"
