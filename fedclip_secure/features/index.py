"""What was found in each file when it was last read, so that an unchanged one is not read again."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from fedclip_secure.data.image_facts import ImageFacts
from fedclip_secure.disk import FAULTS_OF_OURS, is_damage, refused
from fedclip_secure.errors import DataError
from fedclip_secure.files import make_folder, open_regular

_log = logging.getLogger(__name__)
_WAIT = 60.0  # seconds that another process's write is waited for
# A file written twice within one tick of its file system's clock keeps its mtime; FAT's tick, the longest, is two
# seconds. One that was modified so lately is not put into the index.
_SETTLED_NS = 2_000_000_000
# By the columns' names: a later version may have more of them.
_FACTS_OF = "SELECT sha256, dicom, width, height, frames, below, above, span, deep_colour FROM facts WHERE decoding = ?"
_ADD_FACTS = (
    "INSERT OR REPLACE INTO facts (sha256, decoding, dicom, width, height, frames, below, above, span, deep_colour) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_PATIENTS_BY = "SELECT path, size, mtime_ns, unit, alike FROM patients WHERE normalise = ?"
_ADD_PATIENTS = (
    "INSERT OR REPLACE INTO patients (path, size, mtime_ns, normalise, unit, alike) VALUES (?, ?, ?, ?, ?, ?)"
)
_TABLES = (
    "files (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB)",
    # What is seen of an image depends on its bytes and on how they are decoded.
    "facts (sha256 BLOB, decoding BLOB, dicom INTEGER, width INTEGER, height INTEGER, frames INTEGER, "
    "below REAL, above REAL, span INTEGER, deep_colour INTEGER, PRIMARY KEY (sha256, decoding))",
    # Patients are kept as hashes alone. `alike`: without regard to case and zeros; both are empty without a patient.
    "patients (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, normalise TEXT, unit BLOB, alike BLOB)",
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What the index keeps of a file's bytes."""

    path: Path
    sha256: bytes
    size: int
    mtime_ns: int
    settled: bool  # not modified while it was read, nor shortly before


def read_contents(path: Path) -> tuple[Contents, bytes]:
    """Read a file whole, and look at its size and mtime before and after.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as stream:
        before = os.fstat(stream.fileno())
        data = stream.read()
        after = os.fstat(stream.fileno())
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(data) == after.st_size
    settled = same and time.time_ns() - after.st_mtime_ns >= _SETTLED_NS
    return Contents(path, hashlib.sha256(data).digest(), after.st_size, after.st_mtime_ns, settled), data


@dataclass(frozen=True, slots=True)
class Patient:
    """Whose an image is, by hashes; both empty where it does not say.

    `unit` is the same for the ids that silo.yaml lets count as one, `alike` for all that differ by case or zeros alone.
    """

    unit: bytes
    alike: bytes


class FileIndex:
    """Tables of (absolute path, size, mtime) -> SHA-256, and what else is known, in one SQLite file.

    It can always be made again from the images: a damaged one is deleted, and all files are read.

    Raises:
        DataError: it cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        make_folder(path.parent, "check `workdir` in silo.yaml")
        with self._told():
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                _log.warning("'%s': is damaged and was deleted; every image is read once more", path)
                self._connection.close()
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                self._open()

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()

    def known(self, paths: Sequence[Path]) -> list[bytes | None]:
        """For each of `paths` its SHA-256 where size and mtime are as they were, else None."""
        # All rows at once: one query for each path takes five times as long, and paths are in memory anyway.
        with self._told():
            rows = {row[0]: row[1:] for row in self._connection.execute("SELECT * FROM files")}
        return [row[2] if (row := rows.get(_name(path))) and _unchanged(path, *row[:2]) else None for path in paths]

    def add(self, files: Iterable[Contents]) -> None:
        """Keep what was read, but for files that had not settled: those are read again next time."""
        rows = [(_name(file.path), file.size, file.mtime_ns, file.sha256) for file in files if file.settled]
        with self._told(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)

    def facts(self, decoding: bytes) -> dict[bytes, ImageFacts]:
        """Of each image that was seen as `decoding` (32 bytes) has it, by its SHA-256."""
        with self._told():
            found = self._connection.execute(_FACTS_OF, (decoding,))
            return {row[0]: ImageFacts(bool(row[1]), *row[2:]) for row in found}

    def add_facts(self, facts: Mapping[bytes, ImageFacts], decoding: bytes) -> None:
        """Keep what was seen of images, by their SHA-256."""
        rows = [(sha256, decoding, *astuple(one)) for sha256, one in facts.items()]
        with self._told(), self._connection:
            self._connection.executemany(_ADD_FACTS, rows)

    def patients(self, paths: Sequence[Path], normalise: str) -> list[Patient | None]:
        """For each of `paths` its patient, where size and mtime are as they were when it was read so, else None."""
        with self._told():
            found = self._connection.execute(_PATIENTS_BY, (normalise,))
            rows = {row[0]: row[1:] for row in found}
        return [
            Patient(*row[2:]) if (row := rows.get(_name(path))) and _unchanged(path, *row[:2]) else None
            for path in paths
        ]

    def add_patients(self, patients: Iterable[tuple[Path, os.stat_result, Patient]], normalise: str) -> None:
        """Keep whose the files are; `os.stat_result` is from before they were read."""
        now = time.time_ns()
        rows = [
            (_name(path), seen.st_size, seen.st_mtime_ns, normalise, patient.unit, patient.alike)
            for path, seen, patient in patients
            if now - seen.st_mtime_ns >= _SETTLED_NS
        ]
        with self._told(), self._connection:
            self._connection.executemany(_ADD_PATIENTS, rows)

    def _open(self) -> None:
        self._path.touch(mode=0o600)
        self._path.chmod(0o600)  # a hash of an id can be guessed
        self._connection = sqlite3.connect(self._path, timeout=_WAIT)
        for table in _TABLES:
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table} WITHOUT ROWID")
        ((state,),) = self._connection.execute("PRAGMA quick_check(1)").fetchall()
        if state != "ok":
            raise sqlite3.DatabaseError(state)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FAULTS_OF_OURS:
            raise
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.Error) and is_damage(error):
                raise DataError(
                    f"'{self._path}': is damaged ({error}); delete it, and every image is read once more"
                ) from error
            raise DataError(refused(error, self._path, "be used", "check `workdir` in silo.yaml")) from error


def _unchanged(path: Path, size: int, mtime_ns: int) -> bool:
    try:
        status = path.stat()
    except OSError:  # reading it will say why
        return False
    return (size, mtime_ns) == (status.st_size, status.st_mtime_ns)


def _name(path: Path) -> bytes:
    return os.fsencode(path.absolute())
