"""What it means that a disk refuses, and what a person does about it: the one place that decides.

No fault of a disk is damage of a file: whoever may not read a key must not be told to make another.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import BinaryIO

from fedclip_secure.errors import DataError

Refusal = OSError | sqlite3.Error
_TRIAL = ".fedclip-trial-"  # how the name of a file of a moment begins
_LOCK_POLL = 0.05  # seconds between two tries for a lock


def _numbers(names: str) -> frozenset[int]:
    """Those that this system has: macOS has no EREMOTEIO."""
    return frozenset(getattr(errno, name) for name in names.split() if hasattr(errno, name))


# May do a moment later. The second line is what a mount through the network says (sshfs, Gluster, CIFS).
PASSING = _numbers(
    "EIO ESTALE ETIMEDOUT EAGAIN EINTR "
    "ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNABORTED ECONNRESET ECONNREFUSED"
)
# May be the fault of one file alone.
OF_ONE_FILE = _numbers("EACCES EPERM ENOENT ENOTDIR EISDIR EINVAL ELOOP ENAMETOOLONG")


class Meaning(Enum):
    """What an errno, or a code of SQLite, says about the disk."""

    PERMISSION = auto()
    READ_ONLY = auto()
    FAILING = auto()
    FULL = auto()
    FULL_OR_FAILING = auto()  # SQLite does not tell the two apart
    NO_LOCKS = auto()
    BUSY = auto()
    TOO_MANY_FILES = auto()
    OTHER = auto()  # a path that is missing, or of another kind: the caller knows what should be there


_ERRNOS = {
    number: meaning
    for meaning, numbers in {
        Meaning.PERMISSION: _numbers("EACCES EPERM"),
        Meaning.READ_ONLY: _numbers("EROFS"),
        Meaning.FAILING: PASSING | _numbers("EREMOTEIO ENODEV ENXIO"),
        Meaning.FULL: _numbers("ENOSPC EDQUOT EFBIG"),
        Meaning.NO_LOCKS: _numbers("ENOLCK EOPNOTSUPP ENOTSUP ENOSYS"),
        Meaning.BUSY: _numbers("EBUSY"),
        Meaning.TOO_MANY_FILES: _numbers("EMFILE ENFILE"),
    }.items()
    for number in numbers
}
FAULTS_OF_OURS = (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.IntegrityError)  # never the file's
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SAYS_DAMAGE = re.compile(r"no such (table|column)|has no column|malformed|unsupported file format|Could not decode")
_SQLITE = {
    sqlite3.SQLITE_PERM: Meaning.PERMISSION,
    sqlite3.SQLITE_READONLY: Meaning.PERMISSION,
    sqlite3.SQLITE_CANTOPEN: Meaning.PERMISSION,
    sqlite3.SQLITE_BUSY: Meaning.BUSY,
    sqlite3.SQLITE_LOCKED: Meaning.BUSY,
    sqlite3.SQLITE_PROTOCOL: Meaning.BUSY,
    sqlite3.SQLITE_IOERR: Meaning.FAILING,
    sqlite3.SQLITE_FULL: Meaning.FULL,
}
_REMEDIES = {
    Meaning.READ_ONLY: "the disk is mounted read-only: mount it writable, or name a folder on another disk",
    Meaning.FAILING: "the disk or the share fails; check it, and run again",
    Meaning.FULL: "free space there, or have the quota raised",
    Meaning.FULL_OR_FAILING: "free space there, or have the quota raised; if there is room, the disk fails: check it",
    Meaning.NO_LOCKS: "it lies on a disk that cannot lock files, as some network disks; move it to a local disk",
    Meaning.BUSY: "another process works on it; wait for it, or stop it",
    Meaning.TOO_MANY_FILES: "too many files are open; raise the limit (`ulimit -n`)",
}


def refused(error: Refusal, path: str | Path, what: str = "be read", otherwise: str = "check the path") -> str:
    """A message: `'path': cannot be read (Permission denied); let the user ...`.

    `otherwise` is what to do where the disk is not at fault: mostly, that the file is missing.
    """
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"'{path}': cannot {what} ({reason}); {remedy(error, path, what, otherwise)}"


@contextmanager
def telling(path: Path, what: str = "be read", otherwise: str = "check the path") -> Iterator[None]:
    """Raise DataError with the message of `refused` where the disk refuses in the block."""
    try:
        yield
    except OSError as error:
        raise DataError(refused(error, error.filename or path, what, otherwise)) from error


def remedy(
    error: Refusal, path: str | Path | None = None, what: str = "be read", otherwise: str = "check the path"
) -> str:
    """What a person does about it; without `path` the one that the error names, if it does."""
    where = Path(path or getattr(error, "filename", None) or ".")
    meaning = meaning_of(error, where)
    if meaning is Meaning.PERMISSION:
        return _permission(where, "read" if what == "be read" else "write")
    return _REMEDIES.get(meaning, otherwise)


def meaning_of(error: Refusal, path: Path) -> Meaning:
    """What `error`, met at `path`, says about the disk."""
    if isinstance(error, OSError):
        return _ERRNOS.get(error.errno or 0, Meaning.OTHER)
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    meaning = _SQLITE.get(code & 0xFF, Meaning.OTHER)
    if meaning is Meaning.PERMISSION:
        return _closed(path)
    if meaning is Meaning.BUSY and not _locks(path):  # SQLite's answer to ENOLCK
        return Meaning.NO_LOCKS
    return Meaning.FULL_OR_FAILING if code == sqlite3.SQLITE_IOERR_WRITE else meaning


def is_damage(error: sqlite3.Error) -> bool:
    """Whether a database is no sound one, and not merely out of reach.

    So is every bare `sqlite3.DatabaseError` without a code, which this package raises over what it reads.
    """
    code = getattr(error, "sqlite_errorcode", None)
    if type(error) is sqlite3.DatabaseError and code is None:
        return True
    if code is None or code & 0xFF == sqlite3.SQLITE_ERROR:
        return not isinstance(error, FAULTS_OF_OURS) and _SAYS_DAMAGE.search(str(error)) is not None
    return code & 0xFF in _DAMAGE


def check_disk(folder: Path, otherwise: str, *, private: bool = False) -> None:
    """Try in a file of a moment what must hold in `folder`, or where it would be made, before anything counts.

    That it can be written and locked, and, where it is for a `private` key, that others can be kept out.
    `otherwise` says how another folder is named.

    Raises:
        DataError: one of these does not hold.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=_nearest(folder), prefix=_TRIAL) as file:
            _try_locks(file.fileno())
            mode = stat.S_IMODE(Path(file.name).stat().st_mode)
    except OSError as error:
        if meaning_of(error, folder) is Meaning.NO_LOCKS:
            raise DataError(
                f"'{folder}': lies on a disk that cannot lock files ({error.strerror}), as some network disks; "
                f"{otherwise}"
            ) from error
        raise DataError(refused(error, folder, "be written", otherwise)) from error
    if private and mode & 0o077:
        raise DataError(
            f"'{folder}': lies on a disk that keeps no permissions (a file closed to others has mode {mode:04o}), as "
            f"FAT, NTFS and some shares; others on this machine could use the private key: {otherwise}"
        )


def lock_file(path: Path, held: str, patience: float = 0.0) -> BinaryIO:
    """Hold the lock of a file, made if it is missing, while what is returned is open.

    For `patience` seconds it is tried again: `is_locked` of another process holds it for a moment.

    Raises:
        DataError: `held`, where another process holds it; or the disk refuses.
    """
    file = None
    try:
        file = path.open("ab")
        _lock(file, time.monotonic() + patience)
    except OSError as error:
        if file is not None:
            file.close()
        raise DataError(
            held if isinstance(error, BlockingIOError) else refused(error, path, "be locked", "choose another folder")
        ) from error
    return file


def _lock(file: BinaryIO, until: float) -> None:
    import fcntl  # noqa: PLC0415 - not on Windows, where reports are verified without any lock

    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(_LOCK_POLL)
        else:
            return


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file; nothing is written.

    Raises:
        DataError: the disk refuses to tell.
    """
    import fcntl  # noqa: PLC0415 - as above

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise DataError(refused(error, path)) from error
    return False


def user_name(uid: int) -> str:
    """The name of a user of this machine; one that has none, as in a container, by its number."""
    import pwd  # noqa: PLC0415 - as above

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def owner_of_new(folder: Path) -> int | None:
    """The user to whom a file belongs that this process makes in `folder`; on many shares not its own."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_TRIAL) as file:
            return Path(file.name).stat().st_uid
    except OSError:
        return None


def owner_of(path: Path) -> int | None:
    """The user to whom `path` belongs, or, while it is missing, the folder in which it would be made."""
    try:
        return _nearest(path).stat().st_uid
    except OSError:
        return None


def _permission(path: Path, right: str) -> str:
    if not hasattr(os, "geteuid"):
        return f"let the user that runs this program {right} it"
    owner, here = owner_of(path), os.geteuid()
    whose = "" if owner in (None, here) else f" (it belongs to '{user_name(owner or 0)}')"
    folder = "its folder" if right == "write" else "enter the folders above it"
    return f"let the user that runs this program, '{user_name(here)}', {right} it{whose} and {folder}"


def _nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    whole = path.absolute()
    return next((each for each in (whole, *whole.parents) if each.exists()), Path("/"))


def _closed(path: Path) -> Meaning:
    """Why SQLite could not open or write `path`: it says the same of all causes."""
    try:
        there = _nearest(path)
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            return Meaning.READ_ONLY
    except OSError as error:
        return _ERRNOS.get(error.errno or 0, Meaning.OTHER)
    if there not in (path.absolute(), path.absolute().parent):  # not even the folder is there
        return Meaning.OTHER
    open_to_us = all(os.access(each, os.R_OK | os.W_OK, effective_ids=True) for each in (there, path.absolute().parent))
    return Meaning.OTHER if open_to_us else Meaning.PERMISSION


def _locks(path: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            _try_locks(file.fileno())
    except OSError as error:
        return _ERRNOS.get(error.errno or 0) is not Meaning.NO_LOCKS
    return True


def _try_locks(descriptor: int) -> None:
    """Both kinds: ours, and the one that SQLite takes."""
    import fcntl  # noqa: PLC0415 - as above

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(descriptor, fcntl.LOCK_UN)
