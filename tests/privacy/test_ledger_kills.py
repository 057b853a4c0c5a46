"""SIGKILL before and after every durable write of a ledger: the chain stays whole, and what was used is paid for."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

from fedclip_secure.privacy.ledger.entries import Begin, Data, Reserve, Settle, chain_of
from fedclip_secure.privacy.ledger.ledger import Ledger, OpenRun
from tests.federation import failpoints
from tests.privacy.books import Books, terms, units
from tests.waiting import BOUND

FORK = multiprocessing.get_context("fork")
TERMS = terms(rounds=2, max_retrains=2)
BEFORE, AFTER = units(range(5)), units(range(3, 8))  # the data change after the first round


def _life(folder: Path, record: Path, point: str | None) -> None:
    """Trains each round that is not settled yet; dies at `point`."""
    failpoints.RECORD.open(record)
    failpoints.RECORD.add("started")
    failpoints.POINTS.kill_at = point
    signal.alarm(int(BOUND))
    failpoints.watch_writes()
    ledger = Books(folder).open()
    run = ledger.open_run(TERMS, AFTER if 1 in settled(ledger) else BEFORE, None, changed_data=True)
    if 1 not in settled(ledger):
        _train(run, 1)
        run = ledger.open_run(TERMS, AFTER, None, changed_data=True)
    if 2 not in settled(ledger):
        _train(run, 2)
    ledger.close()


def _train(run: OpenRun, round_number: int) -> None:
    reservation = run.reserve(round_number)
    failpoints.RECORD.add("used", units=sorted(unit.hex() for unit in run.admitted))
    run.settle(reservation)


def settled(ledger: Ledger) -> set[int]:
    entries = chain_of(ledger.entries()).entries
    done = {entry.reservation for entry in entries if isinstance(entry, Settle)}
    hashes = [signed.hash.hex() for signed in ledger.entries()]
    return {
        entry.round for entry, name in zip(entries, hashes, strict=True) if isinstance(entry, Reserve) and name in done
    }


def live(folder: Path, record: Path, point: str | None) -> int | None:
    """The exit code of one life."""
    process = FORK.Process(target=_life, args=(folder, record, point))
    process.start()
    process.join(BOUND)
    return process.exitcode


def lines(record: Path, kind: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, record.read_text().splitlines()) if line["kind"] == kind]


def check(folder: Path, record: Path) -> list[str]:
    """Opens, which checks all of it; kinds of its entries, if each use of each unit was paid for before."""
    with Books(folder) as books:
        ledger = books.open()
        entries = chain_of(ledger.entries()).entries
        uses = lines(record, "used")
        assert sum(isinstance(entry, Reserve) for entry in entries) >= len(uses)
        charges = ledger._book.charges()
        for unit in {*BEFORE, *AFTER}:
            used = sum(unit.hex() in str(line["units"]) for line in uses)
            members = ledger._book.units.members([unit])
            steps = 0 if members.new else int(charges.steps[members.numbers[0]].sum())
            assert steps >= used * TERMS.per_round().steps
    return [entry.kind for entry in entries]


def test_killed_before_or_after_any_durable_write_a_ledger_is_whole_and_covers_what_was_used(tmp_path: Path) -> None:
    assert live(tmp_path / "undisturbed", tmp_path / "undisturbed.jsonl", None) == 0
    whole = ["begin", "reserve", "settle", "data", "reserve", "settle"]
    assert check(tmp_path / "undisturbed", tmp_path / "undisturbed.jsonl") == whole
    points = [str(line["name"]) for line in lines(tmp_path / "undisturbed.jsonl", "point")]
    assert sum("COMMIT" in point for point in points) == 2 * (2 + len(whole)), points  # tables, key, entries
    for number, point in enumerate(points):
        folder, record = tmp_path / f"{number}" / "ledger", tmp_path / f"{number}.jsonl"
        folder.parent.mkdir()
        assert live(folder, record, point) == -signal.SIGKILL, point
        assert os.path.lexists(folder) or "mkdir" in point
        kinds = check(folder, record)
        assert kinds == whole[: len(kinds)], point
        assert live(folder, record, None) == 0, point
        final = check(folder, record)
        retrained = kinds[-1:] == ["reserve"]  # reserved, and perhaps used: it is paid for once more
        assert len(final) == len(whole) + retrained, point
        assert sum(kind == "settle" for kind in final) == 2, point


def test_what_a_kill_leaves_behind_is_typed_entries_of_one_run(tmp_path: Path) -> None:
    """Killed after the first reserve and again after the second: two reservations, one of them a retrain."""
    folder, record = tmp_path / "ledger", tmp_path / "record.jsonl"
    for _ in range(2):
        point = "OpenRun.reserve Ledger.reserve LedgerFile.writing: COMMIT (1): after"
        assert live(folder, record, point) == -signal.SIGKILL
    assert live(folder, record, None) == 0
    with Books(folder) as books:
        entries = chain_of(books.open().entries()).entries
    assert sum(isinstance(entry, Begin) for entry in entries) == sum(isinstance(entry, Data) for entry in entries) == 1
    made = [(entry.round, entry.retrain) for entry in entries if isinstance(entry, Reserve)]
    assert made == [(1, 0), (1, 1), (1, 2), (2, 2)]
