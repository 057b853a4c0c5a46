"""A folder per class: which images there are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedclip_secure.data.classes import NAME_ABSENT, check_absent, composed, near, some
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.image import is_image
from fedclip_secure.data.walk import Walk, is_housekeeping, looked_at, walk
from fedclip_secure.errors import DataError

_KINDS = 5  # of files that are no images, in a warning
_log = logging.getLogger(__name__)


def read_folder(root: Path, classes: Sequence[str], absent_classes: Sequence[str] = ()) -> list[ImageFile]:
    """List the images under `root/<class>/`, at any depth, by class and then by path.

    An image is what Pillow reads by its extension, or DICOM. Hidden files and folders, and what systems leave beside
    people's files, are passed over; other files are skipped with a warning in the log. `absent_classes` are the plan's
    classes that need no folder. Names are equal where their letters are, however these are encoded.

    Raises:
        DataError: no such root; a folder that cannot be listed; a class folder is missing, empty, there twice or
            unknown to the plan; files lie beside the class folders.
    """
    folders = _class_folders(root)
    _check_names(root, set(folders), classes, absent_classes)
    files: list[ImageFile] = []
    for label, name in enumerate(classes):
        folder = folders.get(composed(name))
        if folder is not None and not (name in absent_classes and _is_empty(folder)):
            files += [ImageFile(path, label) for path in _images(folder)]
    return files


def _class_folders(root: Path) -> dict[str, Path]:
    """By the name of the class."""
    try:
        entries = looked_at(lambda: sorted(root.iterdir()), root)
    except DataError as error:
        raise DataError(f"{error}: `data.path` in silo.yaml") from error
    mine = [entry for entry in entries if not is_housekeeping(entry.name)]
    strays = [entry.name for entry in mine if not entry.is_dir()]
    if strays:
        raise DataError(
            f"{root}: {len(strays)} file(s) lie beside the class folders ({some(strays)}); "
            "move each into the folder of its class, or out of here"
        )
    found = dict[str, Path]()
    for entry in mine:
        name = composed(entry.name)
        if name in found:
            raise DataError(
                f"{root}: there are two folders {name!r}, whose letters are encoded in two ways; put all files into one"
            )
        found[name] = entry
    return found


def _check_names(root: Path, folders: set[str], classes: Sequence[str], absent: Sequence[str]) -> None:
    known = [composed(name) for name in classes]
    unknown = sorted(folders - set(known))
    if unknown:
        raise DataError(
            f"{root}: folder(s) that are no class of the plan: {some(unknown)}{near(unknown, known)}; "
            f"the plan's classes are {', '.join(map(repr, classes))}; rename the folder or move it away"
        )
    check_absent(absent, classes)
    missing = [name for name in classes if composed(name) not in folders and name not in absent]
    if missing:
        raise DataError(f"{root}: no folder for class(es) {some(missing)}; create it, or {NAME_ABSENT}")


def _is_empty(folder: Path) -> bool:
    return not walk(folder).files


def _images(folder: Path) -> list[Path]:
    found = walk(folder)
    images = [path for path in found.files if is_image(path)]
    others = Counter(_kind(path) for path in set(found.files).difference(images))
    if not images:
        held = f"holds no image, but {_listed(others)}" if others else "is empty"
        raise DataError(f"{folder}: {held}; put images there, or remove the folder and {NAME_ABSENT}")
    _tell(folder, found, others)
    return [Path(path) for path in images]


def _tell(folder: Path, found: Walk, others: Counter[str]) -> None:
    """Say what was left out, and why."""
    if others:
        _log.warning("%s: skipped files that are no images: %s", folder, _listed(others))
    if found.housekeeping:
        _log.warning("%s: passed over what systems leave there: %s", folder, _listed(found.housekeeping))
    if found.dangling:
        count, first = len(found.dangling), found.dangling[0]
        _log.warning("%s: left out %d link(s) to files that are not there, first %s", folder, count, first)


def _kind(path: str) -> str:
    _, dot, end = path.rpartition("/")[2].rpartition(".")
    return dot + end.lower() if dot and end.isalpha() else "without a known extension"


def _listed(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    some_kinds = ", ".join(f"{count} x {kind}" for kind, count in ordered[:_KINDS])
    left = len(counts) - _KINDS
    return some_kinds + (f" and {left} other kind(s)" if left > 0 else "")
