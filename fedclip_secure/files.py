"""Write a whole file or nothing."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError


@contextmanager
def writing_atomically(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write into, so that after a crash `path` is either as before or complete, and on the disk.

    Raises:
        DataError: the disk is full or not writable; `path` is as it was, as after any error in the block.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")  # threads and containers share a pid
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(refused(error, path, "be written", "choose another folder")) from error
    finally:
        with suppress(OSError):  # renamed by now, or the folder itself is missing or no folder
            temporary.unlink()


def make_folder(folder: Path, otherwise: str, mode: int = 0o777) -> None:
    """Make a folder, and those above it, where they are missing.

    Raises:
        DataError: the disk refuses; `otherwise` says how another folder is named.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(refused(error, folder, "be made", otherwise)) from error


def write_atomically(path: Path, data: bytes | memoryview, mode: int = 0o644) -> None:
    """Write `data` as the whole of `path`, or nothing.

    Raises:
        DataError: as `writing_atomically`.
    """
    with writing_atomically(path, mode) as file:
        file.write(data)


def write_output(path: Path, data: bytes) -> None:
    """Write what a person asked for: through links, and into a device or pipe as it stands, else atomically.

    Raises:
        DataError: it cannot be written.
    """
    target = path.resolve()
    if target.is_file() or not target.exists():
        write_atomically(target, data)
        return
    try:
        target.write_bytes(data)
    except OSError as error:
        raise DataError(refused(error, path, "be written", "choose another file")) from error


def open_regular(path: Path) -> BinaryIO:
    """A file to read. What is no regular one is refused: to open a pipe would wait for its writer.

    Raises:
        OSError: it cannot be opened, or it is a pipe, a device or a folder.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_of_windows(path: str) -> bool:
    """Whether `path` names a drive or a server's share as Windows does, on a system where that means nothing."""
    return os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", path) is not None
