"""A ledger that was edited, cut, mixed up or put where it cannot be written is refused, and left as it is."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedclip_secure.errors import DataError, FedClipError, TrustError
from fedclip_secure.privacy.ledger import storage
from fedclip_secure.privacy.ledger.entries import chain_of
from tests.disk import file_limit
from tests.privacy.books import TERMS, Books, terms, units
from tests.users import give_away, without_privileges


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    with Books(tmp_path / "ledger") as books:
        yield books


@pytest.fixture
def used(books: Books) -> Books:
    """With entries begin, reserve, settle, data, reserve, begin; 12 units in 3 sets."""
    ledger = books.open()
    run = ledger.open_run(TERMS, units(range(10)), None)
    run.settle(run.reserve(1))
    ledger.open_run(TERMS, units(range(12)), None, changed_data=True).reserve(2)
    ledger.open_run(terms(plan=2), units(range(3)), None)
    books.close()
    return books


def refused(books: Books, kind: type[FedClipError], said: str) -> None:
    """Twice, as no lock may stay behind; and nothing is written."""
    before = books.files()
    for _ in range(2):
        with pytest.raises(kind, match=said):
            books.open()
    assert books.files() == before


def edit(books: Books, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(books.database)) as sql, sql:
        for statement in statements:
            sql.execute(statement)


# Edited


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE entries SET entry = CAST(replace(entry, '\"round\":1', '\"round\":3') AS BLOB) WHERE number = 2",
         "entry 2 of the ledger: the signature is not by"),
        ("UPDATE entries SET signature = zeroblob(64) WHERE number = 3", "entry 3 of the ledger: the signature is not"),
        ("DELETE FROM entries WHERE number = 2", "entry 2 of the ledger: .*missing or in another order"),
        ("DELETE FROM entries WHERE number = 1", "entry 1 of the ledger: .*missing or in another order"),
        ("UPDATE entries SET number = 9 WHERE number = 2", "entry 2 of the ledger: .*missing or in another order"),
        ("UPDATE sets SET admitted = substr(admitted, 5)", "entry 1 of the ledger: its units are not those"),
        ("UPDATE sets SET left_out = admitted, admitted = x''", "entry 1 of the ledger: its units are not those"),
        ("UPDATE sets SET admitted = CAST(admitted || x'7f7f7f7f' AS BLOB)", "entry 1 of the ledger: its units are"),
        ("UPDATE sets SET admitted = CAST(admitted AS TEXT), left_out = 1234", "its units are not those"),
        ("UPDATE sets SET code = zeroblob(32)", "entry 1 of the ledger: its units are not those"),
        ("DELETE FROM sets", "entry 1 of the ledger: its units are missing"),
        ("DELETE FROM sets WHERE length(admitted) = 48", "entry 4 of the ledger: its units are missing"),
        ("DELETE FROM units WHERE number = 11", "entry 4 of the ledger: its units are not those"),
        ("DELETE FROM units WHERE number = 3", "entry 1 of the ledger: its units are not those"),
        ("UPDATE units SET pseudonym = zeroblob(32) WHERE number = 4", "entry 1 of the ledger: its units are"),
        ("INSERT INTO units SELECT 12, pseudonym FROM units WHERE number = 0", "the table of units was edited"),
        ("UPDATE units SET pseudonym = x'00' WHERE number = 4", "the table of units was edited"),
    ],
)  # fmt: skip
def test_edited_ledger_is_refused_with_the_entry_and_the_remedy(used: Books, statement: str, said: str) -> None:
    edit(used, statement)
    refused(used, TrustError, rf"ledger\.sqlite': was edited.*{said}.*; restore the newest backup of the whole folder")


def test_two_sets_that_changed_places_are_found(used: Books) -> None:
    """Each has the code of its own name."""
    with contextlib.closing(sqlite3.connect(used.database)) as sql, sql:
        rows = sql.execute("SELECT name FROM sets WHERE length(admitted) IN (48, 12) ORDER BY length(admitted)")
        names = [name for (name,) in rows.fetchall()]
        for old, new in ((names[0], bytes(16)), (names[1], names[0]), (bytes(16), names[1])):
            sql.execute("UPDATE sets SET name = ? WHERE name = ?", (new, old))
    refused(used, TrustError, "entry 4 of the ledger: its units are not those")


def test_entries_of_another_ledger_are_not_taken(used: Books, tmp_path: Path) -> None:
    with Books(tmp_path / "other") as other:
        other.open().open_run(TERMS, units(range(3)), None)
        other.close()
        used.database.write_bytes(other.database.read_bytes())
    refused(used, TrustError, "entry 1 of the ledger: its units are not those")


def test_key_of_another_ledger_is_noticed(used: Books) -> None:
    used.key.write_bytes(bytes(32))
    refused(used, TrustError, "entry 1 of the ledger: its units are not those")


def test_cut_off_at_the_end_is_a_whole_ledger_that_only_receipts_can_tell(used: Books) -> None:
    head = used.open().head
    used.close()
    edit(used, "DELETE FROM entries WHERE number > 3")
    ledger = used.open()
    assert len(chain_of(ledger.entries()).entries) == 3
    with pytest.raises(TrustError, match="lacks 1 of the entries that the coordinator holds receipts for"):
        ledger.check_receipts([head])


# Lost


def test_lost_key_is_not_replaced(used: Books) -> None:
    used.key.unlink()
    refused(used, TrustError, r"units\.key': is missing.*restore it from the newest backup")


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is damaged"), (b"x" * 31, "is damaged"), (b"x" * 33, "is damaged")]
)
def test_damaged_key_is_refused(used: Books, content: bytes, said: str) -> None:
    used.key.write_bytes(content)
    refused(used, TrustError, rf"units\.key': {said}.*restore it")


def test_key_that_others_may_read_is_refused(used: Books) -> None:
    used.key.chmod(0o640)
    refused(used, TrustError, r"units\.key': others here may read this key .*run `chmod 600")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_lost_database_is_not_begun_anew(used: Books, damage: Callable[[Path], None]) -> None:
    damage(used.database)
    refused(
        used, TrustError, r"ledger\.sqlite': is missing or empty, and .*units\.key shows that it was there; restore"
    )


# Damaged, foreign, newer


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_cut_file_is_refused_with_the_remedy(used: Books, part: float) -> None:
    whole = used.database.read_bytes()
    used.database.write_bytes(whole[: int(part * len(whole))])
    refused(used, DataError, r"ledger\.sqlite': is damaged as the privacy ledger.*restore the newest backup")


def _garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


def _foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as sql:
        sql.execute("CREATE TABLE other (x)")
        sql.execute("PRAGMA user_version = 7")


def _foreign_with_a_log(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as sql:
        sql.execute("PRAGMA journal_mode=WAL")
        sql.execute("CREATE TABLE other (x)")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_garbage, "is damaged .*not a database.*restore the newest backup"),
        (_foreign, "is damaged .*it is no ledger.*restore the newest backup"),
        (_foreign_with_a_log, "is damaged .*it is no ledger.*restore the newest backup"),
        (Path.mkdir, "cannot be used as the privacy ledger .*name a folder for `ledger`"),
    ],
)
def test_file_that_is_no_ledger_is_refused_and_left_as_it_is(
    books: Books, make: Callable[[Path], None], said: str
) -> None:
    books.folder.mkdir()
    make(books.database)
    before = books.database.read_bytes() if books.database.is_file() else None
    with pytest.raises(DataError, match=rf"ledger\.sqlite'?: {said}"):
        books.open()
    assert before is None or books.files() == {"ledger.sqlite": before}


def test_newer_ledger_is_refused_and_not_put_down_as_damaged(used: Books) -> None:
    edit(used, "PRAGMA user_version = 2", "ALTER TABLE sets ADD COLUMN more")
    refused(used, DataError, r"ledger\.sqlite': was written by a newer fedclip-silo; use that one$")


def test_ledger_with_a_trigger_in_it_is_refused(used: Books) -> None:
    edit(used, "CREATE TRIGGER forget AFTER INSERT ON entries BEGIN DELETE FROM entries; END")
    refused(used, DataError, "it is no ledger")


# Disks and locks


@pytest.mark.parametrize("size", [0, 4096, 20480])
def test_full_disk_stops_a_step_and_nothing_of_it_is_kept(used: Books, size: int) -> None:
    ledger = used.open()
    before = ledger.entries()
    full = r"ledger\.sqlite': cannot be used .*\((disk I/O error|database or disk is full)\); free space"
    with file_limit(size), pytest.raises(DataError, match=full):
        ledger.open_run(terms(plan=3), units(range(2000)), None)
    assert ledger.entries() == before
    ledger.open_run(terms(plan=3), units(range(2000)), None).reserve(1)  # once there is space
    assert len(used.open().entries()) == len(before) + 2


def test_database_is_told_to_survive_a_power_cut(used: Books) -> None:
    sql = used.open()._book._file._sql
    told = {name: sql.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")}
    assert told == {"synchronous": 3, "journal_mode": "truncate"}  # 3: EXTRA


_LET = "': cannot be used .*let the user that runs this program"


@pytest.mark.parametrize(("mode", "name"), [(0o500, "ledger.sqlite"), (0o500, "."), (0, "ledger.sqlite"), (0, ".")])
def test_what_may_not_be_used_is_named_before_anything_is_spent(used: Books, mode: int, name: str) -> None:
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to others
        books = Books(used.folder.rename(Path(outside) / "ledger"))
        for path in (Path(outside), books.folder, *books.folder.iterdir()):
            give_away(path)
        (books.folder / "ledger.sqlite-journal").unlink()  # it stays behind, and would do to write into
        before = books.files()
        (books.folder / name).chmod(mode)
        with without_privileges(), pytest.raises(DataError, match=_LET):
            books.open().open_run(TERMS, units(range(12)), None).reserve(3)
        books.close()
        assert books.files() == before


def test_process_that_holds_the_ledger_for_long_is_waited_for_and_then_named(
    used: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PATIENCE", 0.2)
    first, before = used.open(), used.files()
    with contextlib.closing(sqlite3.connect(used.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        said = (
            rf"{used.database}': another process has held this ledger for 0.2 s; run again, or stop the one that hangs"
        )
        with pytest.raises(DataError, match=said):
            first.open_run(TERMS, units(range(12)), None).reserve(3)
        assert used.files() == before
        with Books(used.folder) as reader:
            assert reader.open().entries() == first.entries(), "reading waits for nobody"
        other.execute("ROLLBACK")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DataError, match=said), Books(used.folder) as reader:
            reader.open()
    first.open_run(TERMS, units(range(12)), None).reserve(3)


def test_ledger_that_is_exchanged_while_it_is_used_is_found_before_anything_is_written(used: Books) -> None:
    old = used.database.read_bytes()
    run = used.open().open_run(TERMS, units(range(12)), None)
    run.reserve(3)
    used.database.write_bytes(old)
    for _ in range(2):
        with pytest.raises(TrustError, match="was exchanged for another one while this program used it"):
            run.reserve(1)
    assert used.database.read_bytes() == old


def test_what_another_process_wrote_is_checked_before_anything_is_decided(used: Books) -> None:
    ledger = used.open()
    with Books(used.folder) as other:
        other.open().open_run(terms(plan=3), units(range(20, 24)), None)
        edit(used, "UPDATE sets SET admitted = substr(admitted, 5) WHERE rowid = (SELECT max(rowid) FROM sets)")
    for _ in range(2):
        with pytest.raises(TrustError, match=r"was edited.*entry 7 of the ledger: its units are not those"):
            ledger.open_run(TERMS, units(range(12)), None)
