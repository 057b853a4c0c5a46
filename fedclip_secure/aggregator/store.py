"""Everything that the aggregator must still know after a power cut: all of its SQL.

SQLite in WAL mode with synchronous=FULL: when a method returns, what it wrote is on the disk.
Vectors and models are files beside the database: `blobs`.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fedclip_secure.aggregator.blobs import RESTORE, Blobs
from fedclip_secure.disk import FAULTS_OF_OURS, is_damage, is_locked, lock_file, refused
from fedclip_secure.errors import DataError, ProtocolError, TrustError
from fedclip_secure.model.round_models import ModelPoint, best_of
from fedclip_secure.secagg.terms import Terms

_VERSION = 1
_STATUS_LOOKS = 1.0  # seconds for a `status` that looks at the lock just then
_PATIENCE = 30  # seconds that another process's write is waited for
_ELSEWHERE = "give another folder with --dir"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    secret_hash BLOB PRIMARY KEY, silo TEXT NOT NULL, expires_at REAL NOT NULL, csr_hash BLOB);
CREATE TABLE IF NOT EXISTS members (
    silo TEXT PRIMARY KEY, certificate BLOB NOT NULL, public_key BLOB NOT NULL, not_after REAL NOT NULL);
CREATE TABLE IF NOT EXISTS frozen (
    one INTEGER PRIMARY KEY CHECK (one = 1), contract BLOB NOT NULL, roster BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    number INTEGER PRIMARY KEY, round INTEGER NOT NULL, opening BLOB NOT NULL, seal_private BLOB NOT NULL,
    opened_at REAL NOT NULL, closed INTEGER NOT NULL DEFAULT 0, ended TEXT, survivors TEXT NOT NULL DEFAULT '',
    given_up INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS messages (
    attempt INTEGER NOT NULL, phase INTEGER NOT NULL, silo TEXT NOT NULL, body BLOB NOT NULL,
    received_hash BLOB NOT NULL, PRIMARY KEY (attempt, phase, silo));
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, survivors TEXT NOT NULL, weight INTEGER NOT NULL,
    correct INTEGER NOT NULL, total INTEGER NOT NULL, start_model BLOB NOT NULL, model BLOB NOT NULL,
    sum_hash BLOB NOT NULL, ended_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    silo TEXT, stage TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS complaints (
    id INTEGER PRIMARY KEY, round INTEGER NOT NULL, attempt INTEGER NOT NULL, accuser TEXT NOT NULL,
    accused TEXT NOT NULL, UNIQUE (attempt, accuser, accused));
CREATE TABLE IF NOT EXISTS receipts (silo TEXT PRIMARY KEY, wire BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS presence (silo TEXT PRIMARY KEY, seen_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS halted (one INTEGER PRIMARY KEY CHECK (one = 1), reason TEXT NOT NULL, void BLOB);
"""


@dataclass(frozen=True, slots=True)
class Member:
    """An enrolled silo."""

    silo: str
    certificate: bytes  # DER
    public_key: bytes  # Ed25519, 32 bytes
    not_after: float  # seconds since 1970


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt as it was opened; `closed` counts the phases that are over."""

    number: int
    round: int
    opening: bytes
    seal_private: bytes = field(repr=False)
    opened_at: float
    closed: int
    ended: str | None
    survivors: str  # of one that ended after silos were asked to agree to them
    given_up: int  # by the coordinator


@dataclass(frozen=True, slots=True)
class RoundRow:
    """A finished round; the counts are of the model it started from."""

    round: int
    attempt: int
    survivors: tuple[str, ...]
    weight: int
    correct: int
    total: int
    start_model: bytes
    model: bytes
    sum_hash: bytes
    ended_at: float


def ended(rounds: Sequence[RoundRow], terms: Terms) -> bool:
    """Whether no round follows the newest of `rounds`."""
    return bool(rounds) and terms.ends_with(rounds[-1].round, rounds[-1].start_model, rounds[-1].model)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a coordinator will want to know."""

    at: float
    kind: str  # dropped, refused, ended, blocked or halted
    round: int
    attempt: int
    silo: str | None
    stage: str
    reason: str


class Store:
    """The aggregator's database and files in `folder`, made on first use (0700: it holds sealing keys)."""

    def __init__(self, folder: Path, *, reading: bool = False) -> None:
        """`reading`: nothing is written, be it beside a running server, without one, or before there is a state.

        Raises:
            DataError: the disk refuses, or it is no aggregator's state of this version.
        """
        self._folder, self._path = folder, folder / "aggregator.sqlite"
        self.blobs = Blobs(folder)
        with self._usable():
            self._sql = _opened_to_read(self._path) if reading else self._opened()
            try:
                self._begin(reading=reading)
            except BaseException:
                self._sql.close()
                raise

    def _begin(self, *, reading: bool) -> None:
        new = self._is_new()
        if new and reading:
            self._sql.close()
            self._sql = sqlite3.connect(":memory:")
        if new:
            self._sql.execute(f"PRAGMA user_version = {_VERSION}")
        if new or not reading:
            self._sql.executescript(_SCHEMA)

    def _opened(self) -> sqlite3.Connection:
        self.blobs.make_folders()
        sql = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None)
        sql.execute("PRAGMA journal_mode=WAL")
        sql.execute("PRAGMA synchronous=FULL")
        sql.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten
        return sql

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(refused(error, self._folder, "be used as the aggregator's state", _ELSEWHERE)) from error
        except FAULTS_OF_OURS:
            raise
        except sqlite3.Error as error:
            if is_damage(error):
                raise DataError(f"'{self._path}': is damaged as the aggregator's state ({error}); {RESTORE}") from error
            raise DataError(refused(error, self._path, "be used as the aggregator's state", _ELSEWHERE)) from error

    def _is_new(self) -> bool:
        """Whether it has no tables yet. Nothing is written into a database that this version would not understand."""
        (version,) = self._sql.execute("PRAGMA user_version").fetchone()
        (tables,) = self._sql.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and version != _VERSION:
            raise DataError(
                f"'{self._folder}': was written by another version of fedclip-agg; finish that run with that version, "
                "or start in a new folder"
            )
        return not tables

    def lock(self) -> BinaryIO:
        """Keep other servers off this state while the file that is returned is open.

        Raises:
            DataError: another server runs on it; or the disk refuses.
        """
        held = f"'{self._folder}': another `fedclip-agg serve` runs on it; stop that one first"
        return lock_file(self._folder / "serve.lock", held, _STATUS_LOOKS)

    def locked(self) -> bool:
        """Whether a server runs on this state.

        Raises:
            DataError: the disk refuses to tell.
        """
        return is_locked(self._folder / "serve.lock")

    def close(self) -> None:
        """Close the database."""
        self._sql.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._usable():
            try:
                self._sql.execute("BEGIN IMMEDIATE")
                yield self._sql
                self._sql.execute("COMMIT")
            finally:
                if self._sql.in_transaction:  # SQLite ends some that fail by itself
                    self._sql.execute("ROLLBACK")

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[Any]:
        with self._usable():
            return self._sql.execute(query, values).fetchall()

    def _row(self, query: str, values: tuple[object, ...] = ()) -> Any:
        return next(iter(self._rows(query, values)), None)

    # Enrolment

    def add_invitation(self, silo: str, secret_hash: bytes, expires_at: float) -> None:
        """Store an invitation; an earlier one for the same silo that was not used is void."""
        with self._transaction() as sql:
            sql.execute("DELETE FROM invitations WHERE silo = ? AND csr_hash IS NULL", (silo,))
            sql.execute("INSERT INTO invitations VALUES (?, ?, ?, NULL)", (secret_hash, silo, expires_at))

    def invited(self, secret_hash: bytes, csr: bytes, now: float) -> tuple[str, bool]:
        """The silo that a token was made for, and whether it was used already with this very request.

        Raises:
            TrustError: unknown, expired, or used with another request.
        """
        row = self._row("SELECT silo, expires_at, csr_hash FROM invitations WHERE secret_hash = ?", (secret_hash,))
        if row is None:
            raise TrustError("the token is not known here: another was made since, or it is of another federation")
        silo, expires_at, csr_hash = row
        if csr_hash is not None and csr_hash != hashlib.sha256(csr).digest():
            raise TrustError(
                f"the token for {silo} was used already, with another key; if that was not you, tell the coordinator"
            )
        if csr_hash is None and expires_at < now:
            raise TrustError(f"the token for {silo} has expired; ask the coordinator for a new one")
        return str(silo), csr_hash is not None

    def enrol(self, secret_hash: bytes, csr: bytes, member: Member) -> None:
        """Use up a token and keep the certificate, in one step."""
        with self._transaction() as sql:
            sql.execute(
                "UPDATE invitations SET csr_hash = ? WHERE secret_hash = ?", (hashlib.sha256(csr).digest(), secret_hash)
            )
            sql.execute(
                "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)",
                (member.silo, member.certificate, member.public_key, member.not_after),
            )

    def member(self, silo: str) -> Member | None:
        """An enrolled silo, or None."""
        return next((member for member in self.members() if member.silo == silo), None)

    def members(self) -> list[Member]:
        """All enrolled silos, in the order of names."""
        return [Member(*row) for row in self._rows("SELECT * FROM members ORDER BY silo")]

    def open_invitations(self, now: float) -> list[tuple[str, float]]:
        """Invitations that can still be used: silo, expiry."""
        query = "SELECT silo, expires_at FROM invitations WHERE csr_hash IS NULL AND expires_at >= ? ORDER BY silo"
        return [(silo, expires) for silo, expires in self._rows(query, (now,))]

    def freeze(self, contract: bytes, roster: bytes) -> None:
        """Close the roster, once and for all."""
        with self._transaction() as sql:
            sql.execute("INSERT INTO frozen VALUES (1, ?, ?)", (contract, roster))

    def frozen(self) -> tuple[bytes, bytes] | None:
        """Contract and roster in canonical form, once they are frozen."""
        row = self._row("SELECT contract, roster FROM frozen")
        return None if row is None else (row[0], row[1])

    # Attempts

    def open_attempt(self, number: int, round_number: int, opening: bytes, seal_private: bytes, now: float) -> None:
        """Keep an opening before any silo sees it."""
        with self._transaction() as sql:
            sql.execute(
                "INSERT INTO attempts (number, round, opening, seal_private, opened_at) VALUES (?, ?, ?, ?, ?)",
                (number, round_number, opening, seal_private, now),
            )

    def last_attempt(self) -> AttemptRow | None:
        """The newest attempt."""
        row = self._row("SELECT * FROM attempts ORDER BY number DESC LIMIT 1")
        return None if row is None else AttemptRow(*row)

    def close_phase(self, attempt: int) -> None:
        """One more phase of the attempt is over."""
        with self._transaction() as sql:
            sql.execute("UPDATE attempts SET closed = closed + 1 WHERE number = ?", (attempt,))

    def give_up(self, attempt: int) -> None:
        """The coordinator does not want to wait any longer for answers that do not come."""
        with self._transaction() as sql:
            sql.execute("UPDATE attempts SET given_up = 1 WHERE number = ?", (attempt,))

    def end_attempt(self, attempt: int, reason: str) -> None:
        """The attempt is over; its secrets and vectors are of no more use and go. Who was to be averaged stays."""
        uploads = self.messages(attempt, phase=2)
        vectors = [body[:32] for _, body in uploads]
        with self._transaction() as sql:
            sql.execute("UPDATE attempts SET ended = ?, seal_private = x'' WHERE number = ?", (reason, attempt))
            sql.execute(
                "UPDATE attempts SET survivors = ? WHERE number = ? AND closed > 2",
                (" ".join(sorted(silo for silo, _ in uploads)), attempt),
            )
            sql.execute("DELETE FROM messages WHERE attempt = ? AND phase < 5", (attempt,))
        self._rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the log holds what was overwritten, until it is cut
        for vector in vectors:
            self.blobs.remove_vector(vector)

    def asked(self, round_number: int) -> list[tuple[str, ...]]:
        """The lists of survivors that silos were asked to agree to in earlier attempts at a round."""
        query = "SELECT DISTINCT survivors FROM attempts WHERE round = ? AND survivors <> ''"
        return [tuple(names.split()) for (names,) in self._rows(query, (round_number,))]

    def tries_since_asked(self, round_number: int) -> int:
        """Attempts at a round that have ended since silos were last asked to agree."""
        query = (
            "SELECT count(*) FROM attempts WHERE round = ? AND ended IS NOT NULL AND number > "
            "(SELECT max(number) FROM attempts WHERE round = ? AND survivors <> '')"
        )
        return int(self._row(query, (round_number, round_number))[0])

    def ended_attempts(self, round_number: int) -> int:
        """Attempts at a round that have ended."""
        query = "SELECT count(*) FROM attempts WHERE round = ? AND ended IS NOT NULL"
        return int(self._row(query, (round_number,))[0])

    def known(self, attempt: int, phase: int, silo: str, received: bytes) -> bool:
        """Whether this very message was acknowledged before.

        Raises:
            ProtocolError: `differs`: another one was.
        """
        query = "SELECT received_hash FROM messages WHERE attempt = ? AND phase = ? AND silo = ?"
        row = self._row(query, (attempt, phase, silo))
        if row is None:
            return False
        if row[0] != received:
            raise ProtocolError(
                "differs", f"{silo} sent another message at this stage before: sha256 {row[0].hex()}", silo=silo
            )
        return True

    def add_message(self, attempt: int, phase: int, silo: str, body: bytes, received: bytes) -> None:
        """Keep a checked message before it is acknowledged; `received` is the SHA-256 of what came in."""
        with self._transaction() as sql:
            sql.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?)", (attempt, phase, silo, body, received))

    def messages(self, attempt: int, phase: int) -> list[tuple[str, bytes]]:
        """Silo and body of a phase's messages, in the order they came."""
        query = "SELECT silo, body FROM messages WHERE attempt = ? AND phase = ? ORDER BY rowid"
        return [(silo, body) for silo, body in self._rows(query, (attempt, phase))]

    # Rounds

    def end_round(self, row: RoundRow) -> None:
        """Keep a round's outcome and close its unmasking, in one step."""
        values = (
            row.round, row.attempt, " ".join(row.survivors), row.weight, row.correct, row.total,
            row.start_model, row.model, row.sum_hash, row.ended_at,
        )  # fmt: skip
        with self._transaction() as sql:
            sql.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            sql.execute("UPDATE attempts SET closed = closed + 1 WHERE number = ?", (row.attempt,))
        for earlier in self.rounds()[:-1]:  # who was away then takes the model, not the sum
            if earlier.sum_hash != row.sum_hash:
                self.blobs.remove_vector(earlier.sum_hash)

    def rounds(self) -> list[RoundRow]:
        """All finished rounds."""
        rows = self._rows("SELECT * FROM rounds ORDER BY round")
        return [RoundRow(r[0], r[1], tuple(r[2].split()), *r[3:]) for r in rows]

    def add_complaint(self, row: AttemptRow, accuser: str, accused: str) -> None:
        """Keep a complaint; one that is made again in the same attempt counts once."""
        with self._transaction() as sql:
            sql.execute(
                "INSERT OR IGNORE INTO complaints (round, attempt, accuser, accused) VALUES (?, ?, ?, ?)",
                (row.round, row.number, accuser, accused),
            )

    def complaints(self, round_number: int) -> list[tuple[str, str]]:
        """Accuser and accused of a round's complaints, in the order they came."""
        query = "SELECT accuser, accused FROM complaints WHERE round = ? ORDER BY id"
        return self._rows(query, (round_number,))

    def keep_receipt(self, silo: str, wire: bytes) -> None:
        """Keep the newest receipt of a silo's privacy ledger."""
        with self._transaction() as sql:
            sql.execute("INSERT OR REPLACE INTO receipts VALUES (?, ?)", (silo, wire))

    def receipt(self, silo: str) -> bytes | None:
        """The newest receipt of a silo."""
        row = self._row("SELECT wire FROM receipts WHERE silo = ?", (silo,))
        return None if row is None else bytes(row[0])

    def halt(self, reason: str, void: bytes | None) -> None:
        """The run cannot go on without a person."""
        with self._transaction() as sql:
            sql.execute("INSERT OR REPLACE INTO halted VALUES (1, ?, ?)", (reason, void))

    def halted(self) -> tuple[str, bytes | None] | None:
        """Why the run cannot go on, and the signed word that says so."""
        row = self._row("SELECT reason, void FROM halted")
        return None if row is None else (row[0], row[1])

    # What a coordinator sees

    def add_event(self, event: Event) -> None:
        """Note an event."""
        with self._transaction() as sql:
            sql.execute(
                "INSERT INTO events (at, kind, round, attempt, silo, stage, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (event.at, event.kind, event.round, event.attempt, event.silo, event.stage, event.reason),
            )

    def events(self) -> list[Event]:
        """All events, oldest first."""
        query = "SELECT at, kind, round, attempt, silo, stage, reason FROM events ORDER BY id"
        return [Event(*row) for row in self._rows(query)]

    def seen(self, silo: str, now: float) -> None:
        """A silo was heard of."""
        with self._transaction() as sql:
            sql.execute("INSERT OR REPLACE INTO presence VALUES (?, ?)", (silo, now))

    def presence(self) -> dict[str, float]:
        """When each silo was last heard of."""
        return dict(self._rows("SELECT silo, seen_at FROM presence"))

    def models_wanted(self, initial: bytes) -> set[bytes]:
        """Digests of the models that may still be asked for, at most three however long the run.

        The newest one; the one that it was made of, until its round is confirmed and for silos that are slow; and the
        best, which each silo fetches at the end.
        """
        rounds = self.rounds()
        if not rounds:
            return {initial}
        points = [ModelPoint(row.round - 1, row.start_model, row.correct, row.total) for row in rounds]
        newest = rounds[-1]
        return {newest.start_model, newest.model, best_of(points).model}

    def vectors_wanted(self) -> set[bytes]:
        """SHA-256 of the vectors that a running attempt or the last round still needs."""
        bodies = self._rows("SELECT body FROM messages WHERE phase = 2")
        return {row.sum_hash for row in self.rounds()[-1:]} | {body[:32] for (body,) in bodies}


def _opened_to_read(path: Path) -> sqlite3.Connection:
    """The database as it stands; an empty one where it is not there yet."""
    try:
        path.stat()
    except FileNotFoundError:
        return sqlite3.connect(":memory:")
    alone = _copied(path)
    if alone is None:
        return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", timeout=_PATIENCE, uri=True)
    sql = sqlite3.connect(":memory:")
    if alone:
        sql.deserialize(alone)
    return sql


def _copied(path: Path) -> bytes | None:
    """The database where nobody writes to it, from memory: SQLite would make a log beside it only to read it.

    None where there is a log, of a server that runs or was killed: what counts is in both, and SQLite puts it together.
    """
    log = path.with_name(f"{path.name}-wal")
    while not log.exists():
        before, data, after = path.stat(), path.read_bytes(), path.stat()
        if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and not log.exists():
            # 1 for 2: read without a log, which a database in memory cannot have (SQLite's file format, 1.3.3).
            return data[:18] + data[18:20].replace(b"\x02", b"\x01") + data[20:]
    return None
