"""A silo's receipts as its journal has them, read while `train` may be working on it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from fedclip_secure.disk import FAULTS_OF_OURS, is_damage, refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.pki.epoch_file import Epoch

_HOW_IT_STANDS = "run `fedclip-silo recover`, which says how it stands"
_PATIENCE = 10  # seconds; `train` holds the database for the length of one write


def read_receipts(workdir: Path, epoch: Path, roster: bytes) -> tuple[bytes, ...]:
    """All receipts of a roster's run, in the order of attempts. Nothing is written, and nobody is kept waiting.

    The epoch file is read first: whatever `train` does in between, its journal is then at least as far.

    Raises:
        TrustError: the journal is not the newest that this silo had.
        DataError: it is damaged, or cannot be read.
    """
    path, kept = workdir / "journal.sqlite", Epoch.load(epoch) or Epoch()
    if not path.exists() and not kept.number:
        return ()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", timeout=_PATIENCE, uri=True)) as sql:
            # Not read-only: what a killed process left half written, whoever opens the database takes back first.
            sql.execute("PRAGMA query_only=ON")
            sql.execute("BEGIN")
            number, journal = sql.execute("SELECT number, journal FROM epoch").fetchone()
            query = "SELECT wire FROM receipts WHERE roster = ? ORDER BY attempt"
            receipts = tuple(wire for (wire,) in sql.execute(query, (roster,)))
    except FAULTS_OF_OURS:
        raise
    except (sqlite3.Error, TypeError) as error:
        if isinstance(error, sqlite3.Error) and not is_damage(error):
            raise DataError(refused(error, path, otherwise=_HOW_IT_STANDS)) from error
        raise DataError(f"'{path}': its receipts cannot be read ({error}); {_HOW_IT_STANDS}") from error
    if kept.number > number or (kept.number and kept.journal != journal):
        raise TrustError(
            f"'{path}': does not match {epoch}: one of the two was restored from a backup, or lost, and receipts may "
            "be missing; run `fedclip-silo recover`"
        )
    return receipts
