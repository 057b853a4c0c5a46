"""A folder per class: which images there are."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedclip_secure.data.classes import NAME_ABSENT, check_absent, near, some
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.image import readable_extensions
from fedclip_secure.errors import DataError

_log = logging.getLogger(__name__)


def read_folder(root: Path, classes: Sequence[str], absent_classes: Sequence[str] = ()) -> list[ImageFile]:
    """List the images under `root/<class>/`, at any depth, by class and then by path.

    An image is what Pillow reads by its extension, or `*.dcm`. Hidden files and folders are skipped; other files
    are skipped with a warning in the log. `absent_classes` are the plan's classes that need no folder.

    Raises:
        DataError: no such root; a class folder is missing, empty or unknown to the plan; files lie
            beside the class folders.
    """
    folders = _class_folders(root)
    _check_names(root, set(folders), classes, absent_classes)
    extensions = readable_extensions()
    files: list[ImageFile] = []
    for label, name in enumerate(classes):
        if name in folders:
            files += [ImageFile(path, label) for path in _images(root / name, extensions)]
    return files


def _class_folders(root: Path) -> list[str]:
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root}: cannot be opened ({error.strerror}); check `data.path` in silo.yaml") from error
    strays = [entry.name for entry in entries if not entry.is_dir()]
    if strays:
        raise DataError(
            f"{root}: {len(strays)} file(s) lie beside the class folders ({some(strays)}); "
            "move each into the folder of its class, or out of here"
        )
    return [entry.name for entry in entries]


def _check_names(root: Path, folders: set[str], classes: Sequence[str], absent: Sequence[str]) -> None:
    unknown = sorted(folders - set(classes))
    if unknown:
        raise DataError(
            f"{root}: folder(s) that are no class of the plan: {some(unknown)}{near(unknown, classes)}; "
            f"the plan's classes are {', '.join(classes)}; rename the folder or move it away"
        )
    check_absent(absent, classes)
    missing = [name for name in classes if name not in folders and name not in absent]
    if missing:
        raise DataError(f"{root}: no folder for class(es) {some(missing)}; create it, or {NAME_ABSENT}")


def _images(folder: Path, extensions: frozenset[str]) -> list[Path]:
    found, others = [], Counter[str]()
    for path in sorted(visible_files(folder)):
        _, dot, end = path.rpartition("/")[2].rpartition(".")
        suffix = dot + end.lower() if dot else ""
        if suffix in extensions:
            found.append(Path(path))
        else:
            others[suffix or "no extension"] += 1
    listed = ", ".join(f"{count} x {suffix}" for suffix, count in others.items())
    if not found:
        held = f"holds no image, but {listed}" if others else "is empty"
        raise DataError(f"{folder}: {held}; put images there, or remove the folder and {NAME_ABSENT}")
    if others:
        _log.warning("%s: skipped files that are no images by their extension: %s", folder, listed)
    return found


def visible_files(folder: Path) -> Iterator[str]:
    """Every file that is not hidden; links to folders are followed, each folder once.

    As text: a Path for each would cost a second in a hundred thousand files.
    """
    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (f"{here}/{name}" for name in names if not name.startswith("."))
