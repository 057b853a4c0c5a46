"""What a silo must remember across a crash: which models it has begun to add its update to.

After a restart the vector that was drawn for a model is gone, and a second one over the same model
would disclose the difference of the two. So a restarted silo sits such a model out.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fedclip_secure.errors import DataError
from fedclip_secure.secagg.opening import Position


class Journal:
    """A small database in the workdir; when a method returns, what it wrote is on the disk."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sql = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._sql.execute("PRAGMA synchronous=FULL")
            self._sql.execute(
                "CREATE TABLE IF NOT EXISTS begun "
                "(model BLOB NOT NULL, roster BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise DataError(
                f"{path}: cannot be used as the silo's journal ({error}); free space or fix its owner"
            ) from error

    def close(self) -> None:
        """Close the database."""
        self._sql.close()

    def begun(self, model: bytes) -> bool:
        """Whether this silo has ever joined an attempt over this model, in whatever run or round."""
        return self._sql.execute("SELECT 1 FROM begun WHERE model = ?", (model,)).fetchone() is not None

    def begin(self, model: bytes, roster: bytes, round_number: int, attempt: int) -> None:
        """Note a joining before the first message leaves."""
        self._sql.execute("INSERT INTO begun VALUES (?, ?, ?, ?)", (model, roster, round_number, attempt))

    def position(self, roster: bytes) -> Position:
        """How far this silo has followed the run of this roster."""
        row = self._sql.execute(
            "SELECT round, attempt, model FROM begun WHERE roster = ? ORDER BY attempt DESC LIMIT 1", (roster,)
        ).fetchone()
        return Position() if row is None else Position(*row)
