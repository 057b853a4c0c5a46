"""The ledger on the disk: all of its SQL. When a method returns, what it wrote survives a power cut."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedclip_secure.disk import FAULTS_OF_OURS, Meaning, is_damage, meaning_of, refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.files import sync_folder
from fedclip_secure.pki.keys import make_private_folder
from fedclip_secure.privacy.ledger.entries import SignedEntry
from fedclip_secure.privacy.ledger.unit_sets import UnitSet, load_key, make_key

_APPLICATION = int.from_bytes(b"fclg")
_VERSION = 1
_TABLES = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, entry BLOB NOT NULL, signature BLOB NOT NULL)",
    # Numbers of 4 bytes, little-endian.
    "CREATE TABLE sets (name BLOB PRIMARY KEY, admitted BLOB NOT NULL, left_out BLOB NOT NULL, code BLOB NOT NULL)",
    "CREATE TABLE units (number INTEGER PRIMARY KEY, pseudonym BLOB NOT NULL)",
)
_PATIENCE = 10  # seconds; another process holds the database for the length of one write
_ELSEWHERE = "name a folder for `ledger` in silo.yaml"
RESTORE = "restore the newest backup of the whole folder: the coordinator's receipts tell whether it is new enough"


@dataclass(frozen=True, slots=True)
class StoredSet:
    """A set of units and the code that authenticates it (`Units.code`)."""

    units: UnitSet
    code: bytes


class LedgerFile:
    """`ledger.sqlite` and `units.key` in a folder, made on first use; several processes may use them at once.

    Every method raises DataError where the disk or the database refuses, or another process holds it for long.
    """

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            TrustError: one of the two files is missing.
        """
        self.path, self._key_path = folder / "ledger.sqlite", folder / "units.key"
        with self._usable():
            if self._key_path.exists() and not (self.path.exists() and self.path.stat().st_size):
                raise TrustError(
                    f"'{self.path}': is missing or empty, and {self._key_path} shows that it was there; {RESTORE}"
                )
            if not folder.exists():
                make_private_folder(folder)
                sync_folder(folder.parent)
            self.path.touch(mode=0o600)
            # Training has a thread of its own, and pays from there; never two threads at once.
            self._sql = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            with self._usable():
                self._prepare()
                self.key = self._open_key()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the database."""
        self._sql.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A state that no other process changes meanwhile."""
        with self._usable():
            self._sql.execute("BEGIN")
            try:
                yield
            finally:
                if self._sql.in_transaction:  # a damaged database ends it by itself
                    self._sql.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone with the database; all that is written inside is on the disk at the end, or nothing after an error."""
        with self._usable():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                if self._sql.in_transaction:  # a full disk ends it by itself
                    self._sql.execute("ROLLBACK")
                raise

    def entries(self, first: int) -> list[SignedEntry]:
        """From this number (from 1) on, oldest first."""
        return [SignedEntry(*row) for row in self._blobs("entry, signature", "entries", first)]

    def units(self, first: int) -> list[bytes]:
        """Pseudonyms from this number (from 0) on, in the order of their numbers."""
        return [pseudonym for (pseudonym,) in self._blobs("pseudonym", "units", first)]

    def set_named(self, name: bytes) -> StoredSet | None:
        """The set of this name, if there is one."""
        query = f"SELECT {_cast('name, admitted, left_out, code')} FROM sets WHERE name = ?"  # noqa: S608  # as below
        row = self._sql.execute(query, (name,)).fetchone()
        return None if row is None else _stored_set(row)

    def append(self, number: int, signed: SignedEntry) -> None:
        """Write the next entry."""
        self._sql.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, signed.entry, signed.signature))

    def add_set(self, stored: StoredSet, known: int, new: Sequence[bytes]) -> None:
        """Write a set, and units (pseudonyms) that are `new` in it, after so many that are known."""
        chosen = stored.units
        blobs = [numbers.astype("<u4").tobytes() for numbers in (chosen.admitted, chosen.left_out)]
        self._sql.executemany("INSERT INTO units VALUES (?, ?)", enumerate(new, known))
        self._sql.execute("INSERT INTO sets VALUES (?, ?, ?, ?)", (chosen.name, *blobs, stored.code))

    # Within

    def _blobs(self, columns: str, table: str, first: int) -> list[tuple[bytes, ...]]:
        query = f"SELECT {_cast(columns)} FROM {table} WHERE number >= ? ORDER BY number"  # noqa: S608  # constants here
        return self._sql.execute(query, (first,)).fetchall()

    def _open_key(self) -> bytes:
        """The key that goes with this database; it is drawn after the tables are made and before the first entry."""
        if self._key_path.exists():
            return load_key(self._key_path)
        with self.writing():  # two processes that begin one ledger must not draw two keys
            used = self._sql.execute("SELECT EXISTS (SELECT * FROM entries)").fetchone() == (1,)
            return load_key(self._key_path) if used or self._key_path.exists() else make_key(self._key_path)

    def _prepare(self) -> None:
        with self.reading():
            new = self._is_new()
        self._sql.execute("PRAGMA synchronous=EXTRA")
        self._sql.execute("PRAGMA journal_mode=TRUNCATE")
        if new:
            with self.writing():
                if self._is_new():  # still, and not by another process meanwhile
                    self._make_tables()

    def _is_new(self) -> bool:
        """Whether it has no tables yet. What is no sound ledger of this version is refused before a byte is written."""
        application, version, pages, size = (
            self._sql.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version", "page_count", "page_size")
        )
        tables = self._sql.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()
        if not tables and application == version == 0:
            return True
        if application == _APPLICATION and version > _VERSION:
            raise DataError(f"'{self.path}': was written by a newer fedclip-silo; use that one")
        if application != _APPLICATION or tables != [(table,) for table in _TABLES]:
            raise sqlite3.DatabaseError("it is no ledger")
        whole = self.path.stat().st_size == pages * size  # what is missing of the last page would read as zeros
        if not whole or self._sql.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the database is not whole")
        return False

    def _make_tables(self) -> None:
        for table in _TABLES:
            self._sql.execute(table)
        self._sql.execute(f"PRAGMA application_id = {_APPLICATION}")
        self._sql.execute(f"PRAGMA user_version = {_VERSION}")

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(refused(error, error.filename or self.path, "be used", _ELSEWHERE)) from error
        except FAULTS_OF_OURS:
            raise
        except sqlite3.Error as error:
            if meaning_of(error, self.path) is Meaning.BUSY:
                raise DataError(
                    f"'{self.path}': another process has held this ledger for {_PATIENCE} s; run again, or stop the "
                    "one that hangs"
                ) from error
            if not is_damage(error):
                raise DataError(refused(error, self.path, "be used as the privacy ledger", _ELSEWHERE)) from error
            raise DataError(f"'{self.path}': is damaged as the privacy ledger ({error}); {RESTORE}") from error


def _cast(columns: str) -> str:
    """Bytes, whatever an edit has made of the types."""
    return ", ".join(f"CAST({column} AS BLOB)" for column in columns.split(", "))


def _stored_set(row: tuple[bytes, ...]) -> StoredSet:
    name, admitted, left_out, code = row
    if len(admitted) % 4 or len(left_out) % 4:
        raise sqlite3.DatabaseError("a set of units is cut")
    numbers = (np.frombuffer(blob, dtype="<u4").astype(np.uint32) for blob in (admitted, left_out))
    return StoredSet(UnitSet(name, *numbers), code)
