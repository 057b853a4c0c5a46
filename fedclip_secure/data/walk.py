"""The one way in which folders of images are looked at: what is there, what is passed over, and what cannot be seen.

Nothing that cannot be looked at counts as empty, and what systems leave beside people's files counts as no image.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedclip_secure.disk import PASSING, refused
from fedclip_secure.errors import DataError

T = TypeVar("T")
READERS = 16  # threads
PATIENCE = (0.5, 2.0, 8.0)  # seconds between tries of what a share may do a moment later

# Folders and files, lower-case, of systems and not of people: thumbnails, snapshots, bins, and what zip adds.
_HOUSEKEEPING = frozenset({
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot", "$recycle.bin",
    "system volume information", "recycler", "recycled", "lost+found", "__macosx", "network trash folder",
    "temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "trashbox", "recycle bin", "@sharebin",
    "thevolumesettingsfolder", "_vti_cnf", "_gsdata_", "lost.dir", "config.msi", "@synoresource", "@snapshot",
    "$windows.~bt", "$windows.~ws", "msocache", "appledouble",
})  # fmt: skip
# Office's locks, Synology's thumbnails, QNAP's bins, what chkdsk found, and streams of Windows that became files.
_HOUSEKEEPING_LIKE = re.compile(
    r"~\$|syno(photo|file)_thumb_|network recycle bin|found\.\d{3}$|.*:(zone\.identifier|encryptable)$", re.IGNORECASE
)


@dataclass(slots=True)
class Walk:
    """What a folder holds at any depth. Texts are paths under it: a Path for each would cost seconds in a million."""

    files: list[str] = field(default_factory=list)  # rising
    passed_over: list[str] = field(default_factory=list)  # hidden files and folders, and a system's own
    dangling: list[str] = field(default_factory=list)  # links to what is not there, or to themselves
    folders: dict[tuple[int, int], str] = field(default_factory=dict)  # all that were looked at, by device and inode
    special: list[str] = field(default_factory=list)  # pipes, sockets, devices: reading one might never end


def is_housekeeping(name: str) -> bool:
    """Whether a file or folder is a system's own; hidden ones are."""
    return name.startswith(".") or name.lower() in _HOUSEKEEPING or _HOUSEKEEPING_LIKE.match(name) is not None


def walk(folder: Path) -> Walk:
    """Look at every folder below `folder`; links are followed, each folder is looked at once.

    Raises:
        DataError: a folder cannot be listed, and which.
    """
    found = Walk()
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        status = looked_at(Path(here).stat, here)
        if (status.st_dev, status.st_ino) in found.folders:
            continue
        found.folders[status.st_dev, status.st_ino] = here
        for entry in _entries(here):
            _take(entry, found, waiting)
    found.files.sort()
    return found


def subfolders(folder: Path) -> list[str]:
    """The names of the folders right below `folder`, rising, but for hidden ones.

    Raises:
        DataError: it cannot be listed; one of them is a link to what is not there.
    """
    kinds = {entry.name: _looked_up(entry) for entry in _entries(str(folder)) if not entry.name.startswith(".")}
    gone = [name for name, kind in kinds.items() if kind == "dangling"]
    if gone:
        raise DataError(lost_link(folder / gone[0]))
    return [name for name, kind in kinds.items() if kind == "folder"]


def lost_link(path: Path) -> str:
    """What is said of a link, where a folder is expected."""
    return f"'{path}': is a link to what is not there; mount or restore what it names, or remove it"


def looked_at(look: Callable[[], T], path: str | Path) -> T:
    """What `look` gives, patiently.

    Raises:
        DataError: names `path`, the fault, and what to do about it.
    """
    try:
        return patiently(look)
    except OSError as error:
        raise DataError(refused(error, path)) from error


def patiently(look: Callable[[], T]) -> T:
    """What `look` gives; where a share or a disk hiccups, after some tries.

    Raises:
        OSError: the last try's.
    """
    for wait in PATIENCE:
        try:
            return look()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(wait)
    return look()


def in_threads(look: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """What `look` gives for each of `paths`: on a share most of the time is waiting."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(look, paths))


def _entries(here: str) -> list[os.DirEntry[str]]:
    def listed() -> list[os.DirEntry[str]]:
        with os.scandir(here) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    return looked_at(listed, here)


def _take(entry: os.DirEntry[str], found: Walk, waiting: list[str]) -> None:
    if entry.name.startswith(".") and entry.name.endswith(".icloud"):
        found.dangling.append(entry.path)  # what iCloud has not downloaded
    elif is_housekeeping(entry.name):
        found.passed_over.append(entry.path)
    elif entry.name.lower() == "dicomdir" and _looked_up(entry) == "file":
        found.passed_over.append(entry.path)  # of a medium: it lists the images beside it
    else:
        lists = {"folder": waiting, "file": found.files, "dangling": found.dangling, "special": found.special}
        lists[_looked_up(entry)].append(entry.path)


def _looked_up(entry: os.DirEntry[str]) -> str:
    return looked_at(lambda: _kind(entry), entry.path)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except FileNotFoundError:
        return "dangling"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "dangling"
    return "special"
