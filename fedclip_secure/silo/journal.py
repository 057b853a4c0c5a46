"""What a silo must remember across a crash: the attempts it joined, and the models over which it sent its vector.

After a restart the vector that was drawn for a model is gone. If it may have left, a second one over
the same model would disclose the difference of the two, and the silo sits such a model out. The rule holds
for a model's digest alone, in whatever run or round it comes up again; but where only validation
counts went out, in a closing round, a later run may still train from that model.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedclip_secure.errors import DataError
from fedclip_secure.secagg.messages import ServerAd
from fedclip_secure.secagg.opening import Position


class Journal:
    """A small database in the workdir; when a method returns, what it wrote is on the disk.

    Every method raises DataError where the database cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._readable():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sql = sqlite3.connect(path, timeout=0, isolation_level=None)
            self._lock()
            self._sql.execute("PRAGMA synchronous=FULL")
            if self._sql.execute("PRAGMA quick_check").fetchone() != ("ok",):  # a cut file would read as empty
                raise sqlite3.DatabaseError("the database is damaged")
            self._sql.execute(
                "CREATE TABLE IF NOT EXISTS joined "
                "(roster BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, model BLOB NOT NULL)"
            )
            self._sql.execute("CREATE TABLE IF NOT EXISTS sent (model BLOB NOT NULL, trained INTEGER NOT NULL)")

    def _lock(self) -> None:
        """Keep the database to this process: two of them could each draw a vector over one model."""
        try:
            self._sql.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._sql.execute("BEGIN EXCLUSIVE")
            self._sql.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            raise DataError(f"{self._path}: another fedclip-silo uses this workdir; wait for it, or stop it") from error

    def close(self) -> None:
        """Close the database."""
        self._sql.close()

    def sent(self, model: bytes, *, trains: bool) -> bool:
        """Whether a vector of this silo over this model may have left, in whatever run or round.

        A training round (`trains`) may follow a closing round over the same model, and nothing else.
        """
        query = "SELECT 1 FROM sent WHERE model = ? AND trained >= ?"
        with self._readable():
            return self._sql.execute(query, (model, int(trains))).fetchone() is not None

    def join(self, ad: ServerAd) -> None:
        """Note an attempt before its first message leaves."""
        with self._readable():
            self._sql.execute("INSERT INTO joined VALUES (?, ?, ?, ?)", (ad.roster, ad.round, ad.attempt, ad.model))

    def send(self, model: bytes, *, trains: bool) -> None:
        """Note a masked vector before it leaves."""
        with self._readable():
            self._sql.execute("INSERT INTO sent VALUES (?, ?)", (model, int(trains)))

    def position(self, roster: bytes) -> Position:
        """How far this silo has followed the run of this roster."""
        query = "SELECT round, attempt, model FROM joined WHERE roster = ? ORDER BY attempt DESC LIMIT 1"
        with self._readable():
            row = self._sql.execute(query, (roster,)).fetchone()
        return Position() if row is None else Position(*row)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise DataError(
                f"{self._path}: cannot be used as the silo's journal ({error}); free space or fix its owner. If it is "
                "damaged, move it away only when the round that this silo last joined is over: the journal is what "
                "keeps a second update over one model from leaving"
            ) from error
