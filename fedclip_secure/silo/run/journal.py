"""What a silo must remember across a crash, written down before it is done (PROTOCOL.md, section 11).

Of each model, keyed by its digest alone: the vector that was drawn for it, once; how far that has
got; and the list of names that this silo agreed to. The rule holds in whatever run, round or
attempt a model comes up again; but where only validation counts went out, in a closing round, a
later run may still train from that model. Of the present attempt: its secrets, and what arrived
and what left at each stage, so that a restarted silo sends the same bytes again.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedclip_secure.disk import FAULTS_OF_OURS, is_damage, lock_file, refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.pki.epoch_file import JOURNAL_BYTES, Epoch, lock_epoch
from fedclip_secure.privacy.ledger.receipts import Receipt
from fedclip_secure.secagg.keys import AttemptSecrets, SeedKeys
from fedclip_secure.secagg.messages import ServerAd
from fedclip_secure.secagg.opening_checks import Opening, Position
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.vectors import Vectors

_VERSION = 2
_PATIENCE = 10  # seconds; who reads receipts meanwhile (receipts.py) holds the database for the length of one query
_SCHEMA = """
CREATE TABLE epoch (one INTEGER PRIMARY KEY CHECK (one = 1), number INTEGER NOT NULL, journal BLOB NOT NULL);
CREATE TABLE models (
    model BLOB NOT NULL, trains INTEGER NOT NULL, plan BLOB NOT NULL, roster BLOB NOT NULL, round INTEGER NOT NULL,
    vector BLOB, stage INTEGER NOT NULL, agreed TEXT NOT NULL, ledger BLOB NOT NULL, PRIMARY KEY (model, trains));
CREATE TABLE receipts (
    roster BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, wire BLOB NOT NULL,
    PRIMARY KEY (roster, attempt));
CREATE TABLE positions (
    roster BLOB PRIMARY KEY, round INTEGER NOT NULL, attempt INTEGER NOT NULL, model BLOB NOT NULL);
CREATE TABLE attempt (
    one INTEGER PRIMARY KEY CHECK (one = 1), roster BLOB NOT NULL, number INTEGER NOT NULL, model BLOB NOT NULL,
    trains INTEGER NOT NULL, opening BLOB NOT NULL, base BLOB NOT NULL,
    seed BLOB NOT NULL, b BLOB NOT NULL, share_seal BLOB NOT NULL);
CREATE TABLE steps (stage INTEGER PRIMARY KEY, received BLOB NOT NULL, sent BLOB NOT NULL);
CREATE TABLE abandoned (at REAL NOT NULL, round INTEGER NOT NULL, model BLOB NOT NULL, agreed TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What this silo drew for one model, and how far that has got. `vector` is None where it is lost."""

    model: bytes  # digest
    trains: bool  # whether an update is in it, and not only validation counts
    plan: bytes
    roster: bytes
    round: int
    vector: bytes | None  # SHA-256
    stage: Stage  # the farthest, over all attempts
    agreed: tuple[str, ...]  # names; none before the first agreement
    ledger: bytes  # with privacy: the hash of the ledger's newest entry when it was drawn


@dataclass(frozen=True, slots=True)
class Step:
    """What arrived before a stage and what left at its end."""

    received: bytes
    sent: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SavedAttempt:
    """The attempt that was going on when the silo stopped."""

    opening: bytes  # the signed ServerAd
    trains: bool
    secrets: AttemptSecrets
    steps: Mapping[Stage, Step]


_ELSEWHERE = "set another `workdir` in silo.yaml"


class DamagedJournalError(DataError):
    """The journal cannot be read as one."""


class Journal:
    """A database and one vector in the workdir, and the epoch file; when a method returns, all of it is on the disk.

    Every method raises DataError where the disk or the database refuses.
    """

    def __init__(self, folder: Path, epoch: Path, *, recovering: bool = False) -> None:
        """Open, or make, the journal.

        Raises:
            TrustError: it does not match the epoch file and this is not for `recover`.
        """
        self._path, self._vectors, self._epoch_path = folder / "journal.sqlite", Vectors(folder / "vectors"), epoch
        self._identity = lock_epoch(epoch)  # two journals under one identity could each draw a vector over one model
        try:
            with self._readable():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._vectors.make_folder()
                held = f"'{self._path}': another fedclip-silo uses this workdir; wait for it, or stop it"
                self._workdir = lock_file(folder / "journal.lock", held)  # two could draw two vectors over a model
        except BaseException:
            self._identity.close()
            raise
        try:
            with self._readable():
                self._path.touch(mode=0o600)
                self._sql = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None)
        except BaseException:
            self._workdir.close()
            self._identity.close()
            raise
        try:
            self._prepare()
            if not recovering and not self.matches_epoch():
                raise TrustError(
                    f"'{self._path}': does not match {epoch}: one of the two was restored from a backup, or lost, and "
                    "this silo could sign a second time over a model; run `fedclip-silo recover`"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the database, and let others work under this identity."""
        self._sql.close()
        self._workdir.close()
        self._identity.close()

    # Models

    def drawn(self, model: bytes, *, trains: bool) -> Drawn | None:
        """What was drawn for this model. A training round may follow a closing round over it, and nothing else."""
        query = "SELECT * FROM models WHERE model = ? AND trains >= ? ORDER BY stage >= ? DESC, trains"
        with self._readable():
            row = self._sql.execute(query, (model, int(trains), int(Stage.UPLOADED))).fetchone()
        return None if row is None else _drawn(row)

    def models(self) -> list[Drawn]:
        """All that was ever drawn, in the order of rounds."""
        with self._readable():
            return [_drawn(row) for row in self._sql.execute("SELECT * FROM models ORDER BY round, trains")]

    def draw(self, ad: ServerAd, vector: Words, *, trains: bool, ledger: bytes = b"") -> Drawn:
        """Keep the vector (words,) for a model before anything of it leaves; the one before it goes."""
        earlier = self.drawn(ad.model, trains=trains)
        if earlier is not None and earlier.stage >= Stage.UPLOADED:
            raise ValueError("a vector over this model may have left; a second one could disclose it")
        with self._readable():
            sha256 = self._vectors.save(vector)
        with self._step() as sql:
            sql.execute(
                "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?, ?, '', ?)",
                (ad.model, int(trains), ad.plan, ad.roster, ad.round, sha256, int(Stage.OPENED), ledger),
            )
        self._keep_vector(sha256)
        return Drawn(ad.model, trains, ad.plan, ad.roster, ad.round, sha256, Stage.OPENED, (), ledger)

    def vector(self, drawn: Drawn) -> Words | None:
        """The vector (words,), mapped from its file; None where it is lost or damaged."""
        with self._readable():
            return None if drawn.vector is None else self._vectors.open(drawn.vector)

    def open_vector(self, drawn: Drawn) -> Words:
        """The vector, which must be there.

        Raises:
            DataError: it is lost or damaged.
        """
        vector = self.vector(drawn)
        if vector is None:
            raise DataError(
                f"'{self._vectors.folder}': the vector of round {drawn.round} is lost; run `fedclip-silo train`"
            )
        return vector

    # Attempts

    def position(self, roster: bytes) -> Position:
        """How far this silo has followed the run of this roster."""
        query = "SELECT round, attempt, model FROM positions WHERE roster = ?"
        with self._readable():
            row = self._sql.execute(query, (roster,)).fetchone()
        return Position() if row is None else Position(*row)

    def start(self, opening: Opening, wire: bytes, secrets: AttemptSecrets, *, trains: bool) -> None:
        """Note an attempt and its secrets before its first message leaves; those of the last one go."""
        ad, keys = opening.ad, secrets.keys
        with self._step() as sql:
            _forget_attempt(sql)
            sql.execute(
                "INSERT INTO attempt VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    ad.roster, ad.attempt, ad.model, int(trains), wire, opening.base,
                    keys.seed, secrets.b, secrets.share_seal.private,
                ),
            )  # fmt: skip
            sql.execute(
                "INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", (ad.roster, ad.round, ad.attempt, ad.model)
            )

    def step(self, stage: Stage, step: Step, agreed: tuple[str, ...] = ()) -> None:
        """Note what arrived and what is about to leave. With `agreed`, this silo is bound to these names."""
        with self._step() as sql:
            taken = sql.execute(
                "INSERT INTO steps SELECT ?, ?, ? FROM attempt WHERE ? > (SELECT coalesce(max(stage), 0) FROM steps)",
                (int(stage), step.received, step.sent, int(stage)),
            )
            if taken.rowcount != 1:
                raise ValueError(f"{stage.name} is a step backward, or a step of no attempt")
            sql.execute(
                "UPDATE models SET stage = max(stage, ?), agreed = coalesce(nullif(?, ''), agreed) "
                "WHERE (model, trains) = (SELECT model, trains FROM attempt)",
                (int(stage), " ".join(agreed)),
            )
            if stage is Stage.DONE:  # nothing but the result is left to send
                sql.execute("UPDATE attempt SET seed = x'', b = x'', share_seal = x''")
                sql.execute("DELETE FROM steps WHERE stage < ?", (int(Stage.DONE),))
                sql.execute("UPDATE models SET vector = NULL")
        if stage is Stage.DONE:
            self._keep_vector(None)

    def leave(self) -> None:
        """The attempt is over for this silo: its secrets are of no more use and go."""
        with self._step() as sql:
            _forget_attempt(sql)

    def attempt(self, roster: bytes) -> SavedAttempt | None:
        """The attempt of this roster's run that was going on when the silo stopped. After DONE it has no secrets."""
        with self._readable():
            query = "SELECT trains, opening, base, seed, b, share_seal FROM attempt WHERE roster = ?"
            row = self._sql.execute(query, (roster,)).fetchone()
            steps = self._sql.execute("SELECT stage, received, sent FROM steps").fetchall()
        if row is None:
            return None
        trains, opening, base, seed, b, share_seal = row
        return SavedAttempt(
            opening,
            bool(trains),
            AttemptSecrets(SeedKeys(base, seed), b, SealKey(share_seal)),
            {Stage(stage): Step(received, sent) for stage, received, sent in steps},
        )

    def add_receipt(self, receipt: Receipt, wire: bytes) -> None:
        """Keep what the aggregator signed for an upload; one that comes again is the same."""
        with self._step() as sql:
            sql.execute(
                "INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?)",
                (receipt.roster, receipt.round, receipt.attempt, wire),
            )

    def receipts(self, roster: bytes) -> list[bytes]:
        """All receipts of a roster's run, in the order of attempts."""
        query = "SELECT wire FROM receipts WHERE roster = ? ORDER BY attempt"
        with self._readable():
            return [wire for (wire,) in self._sql.execute(query, (roster,))]

    # What a person decides

    def abandon(self, drawn: Drawn) -> None:
        """Forget what was drawn for, and agreed over, a model, so that this silo can start on it again."""
        with self._step() as sql:
            _forget_attempt(sql)
            sql.execute("DELETE FROM models WHERE model = ? AND trains = ?", (drawn.model, int(drawn.trains)))
            sql.execute(
                "INSERT INTO abandoned VALUES (?, ?, ?, ?)",
                (time.time(), drawn.round, drawn.model, " ".join(drawn.agreed)),
            )

    def matches_epoch(self) -> bool:
        """Whether this journal is the newest that this silo had."""
        mine, kept = self._epoch(), Epoch.load(self._epoch_path)
        if kept is None:
            return False
        unused = kept.number == mine.number == 0  # whatever journal was made here before: it never took a step
        stopped_between = (kept.journal, kept.number + 1) == (mine.journal, mine.number)
        if unused or stopped_between:
            mine.save(self._epoch_path)
            return True
        return mine == kept

    def recover(self) -> None:
        """Go on with a journal that is not the newest: each model that it or the epoch file knows is lost.

        Raises:
            TrustError: neither of the two is left, so nobody knows over which models this silo must not sign.
        """
        kept = Epoch.load(self._epoch_path) or Epoch()
        if kept.number == self._epoch().number == 0:
            raise TrustError(
                f"{self._path}, {self._epoch_path}: neither the journal nor the epoch file is left, so this silo "
                "cannot know what it has signed; restore one of them, or join a new federation with a new identity"
            )
        lost = {*kept.models, *((drawn.model, drawn.trains) for drawn in self.models())}
        with self._step() as sql:
            _forget_attempt(sql)
            sql.execute("UPDATE models SET vector = NULL, stage = max(stage, ?)", (int(Stage.UPLOADED),))
            sql.executemany(
                "INSERT OR IGNORE INTO models VALUES (?, ?, x'', x'', 0, NULL, ?, '', x'')",
                [(model, int(trains), int(Stage.UPLOADED)) for model, trains in sorted(lost)],
            )
            sql.execute("UPDATE epoch SET number = max(number, ?)", (kept.number,))

    # Within

    def _keep_vector(self, sha256: bytes | None) -> None:
        """Remove all but this one."""
        with self._readable():
            self._vectors.keep(sha256)

    def _epoch(self) -> Epoch:
        """As the database has it."""
        with self._readable():
            number, journal = self._sql.execute("SELECT number, journal FROM epoch").fetchone()
            models = self._sql.execute(
                "SELECT model, trains FROM models WHERE stage >= ? ORDER BY model, trains", (int(Stage.UPLOADED),)
            ).fetchall()
        return Epoch(number, journal, tuple((model, bool(trains)) for model, trains in models))

    def _prepare(self) -> None:
        with self._readable():
            self._sql.execute("PRAGMA synchronous=EXTRA")
            self._sql.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten, as far as the disk allows
            # The rollback file holds pages as they were, deleted secrets too: nothing of it stays.
            self._sql.execute("PRAGMA journal_mode=TRUNCATE")
            self._check()

    def _check(self) -> None:
        """Its soundness and version; an empty one gets its tables."""
        (pages,), (size,) = (self._sql.execute(f"PRAGMA page_{of}").fetchone() for of in ("count", "size"))
        whole = self._path.stat().st_size == pages * size  # what is missing of the last page would read as zeros
        if not whole or self._sql.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the database is damaged")
        (version,) = self._sql.execute("PRAGMA user_version").fetchone()
        (tables,) = self._sql.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables == 0:
            self._sql.execute("BEGIN")
            for statement in _SCHEMA.split(";"):
                self._sql.execute(statement)
            self._sql.execute("INSERT INTO epoch VALUES (1, 0, ?)", (os.urandom(JOURNAL_BYTES),))
            self._sql.execute(f"PRAGMA user_version = {_VERSION}")
            self._sql.execute("COMMIT")
        elif version > _VERSION:
            raise DataError(f"'{self._path}': was written by a newer fedclip-silo; use that one")
        elif 0 < version < _VERSION:
            raise DataError(f"'{self._path}': was written by an older fedclip-silo; finish that run with that one")
        elif version != _VERSION:
            raise sqlite3.DatabaseError("it is no journal")

    @contextmanager
    def _step(self) -> Iterator[sqlite3.Connection]:
        """One transaction, then the epoch file: what the two say differs by at most one step."""
        with self._readable():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield self._sql
                self._sql.execute("UPDATE epoch SET number = number + 1")
                self._sql.execute("COMMIT")
            except BaseException:
                if self._sql.in_transaction:  # a full disk ends it by itself
                    self._sql.execute("ROLLBACK")
                raise
        self._epoch().save(self._epoch_path)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(refused(error, error.filename or self._path, "be used", _ELSEWHERE)) from error
        except FAULTS_OF_OURS:
            raise
        except sqlite3.Error as error:
            if not is_damage(error):
                raise DataError(refused(error, self._path, "be used as the silo's journal", _ELSEWHERE)) from error
            raise DamagedJournalError(
                f"'{self._path}': is damaged as the silo's journal ({error}); run `fedclip-silo recover`: without its "
                "journal this silo could sign twice over a model"
            ) from error


def _drawn(row: tuple[Any, ...]) -> Drawn:
    model, trains, plan, roster, number, vector, stage, agreed, ledger = row
    return Drawn(model, bool(trains), plan, roster, number, vector, Stage(stage), tuple(agreed.split()), ledger)


def _forget_attempt(sql: sqlite3.Connection) -> None:
    sql.execute("DELETE FROM attempt")
    sql.execute("DELETE FROM steps")
