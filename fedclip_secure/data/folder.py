"""A folder per class: which images there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedclip_secure.data.classes import NAME_ABSENT, check_absent, composed, near, some
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.image import FileKind, file_kinds
from fedclip_secure.data.listing import LeftOut, Listing, Reason, kinds_of
from fedclip_secure.data.walk import Walk, is_housekeeping, looked_at, lost_link, walk
from fedclip_secure.errors import DataError


def read_folder(root: Path, classes: Sequence[str], absent_classes: Sequence[str] = ()) -> Listing:
    """List the images under `root/<class>/`, at any depth, by class and then by path; and what was left out.

    An image is what Pillow reads by its extension, or DICOM. Hidden files and folders, what systems leave beside
    people's files, and links to nothing are left out, as is any other file. `absent_classes` are the plan's
    classes that need no folder. Names are equal where their letters are, however these are encoded.

    Raises:
        DataError: no such root; a folder that cannot be listed; a class folder is missing, empty, there twice or
            unknown to the plan; a folder that belongs to two classes by a link; files lie beside the class folders.
    """
    found = Listing()
    folders = _class_folders(root, classes, found)
    _check_names(root, set(folders), classes, absent_classes)
    taken = dict[tuple[int, int], str]()
    for label, name in enumerate(classes):
        folder = folders.get(composed(name))
        if folder is not None:
            _take_class(folder, label, found, taken, may_be_empty=name in absent_classes)
    return found


def _class_folders(root: Path, classes: Sequence[str], listing: Listing) -> dict[str, Path]:
    """By the name of the class, which may be one that a system uses too: `recycled`."""
    known = {composed(name).lower() for name in classes}
    try:
        entries = looked_at(lambda: sorted(root.iterdir()), root)
    except DataError as error:
        raise DataError(f"{error}: `data.path` in silo.yaml") from error
    mine = [entry for entry in entries if composed(entry.name).lower() in known or not is_housekeeping(entry.name)]
    listing.left_out += [LeftOut(str(entry), Reason.PASSED_OVER) for entry in entries if entry not in mine]
    gone = [entry for entry in mine if not looked_at(entry.exists, entry)]
    if gone:
        raise DataError(lost_link(gone[0]))
    strays = [entry.name for entry in mine if not looked_at(entry.is_dir, entry)]
    if strays:
        raise DataError(
            f"'{root}': {len(strays)} file(s) lie beside the class folders ({some(strays)}); "
            "move each into the folder of its class, or out of here"
        )
    found = dict[str, Path]()
    for entry in mine:
        name = composed(entry.name)
        if name in found:
            raise DataError(
                f"'{root}': there are two folders {name!r}, whose letters are encoded in two ways; put all into one"
            )
        found[name] = entry
    return found


def _check_names(root: Path, folders: set[str], classes: Sequence[str], absent: Sequence[str]) -> None:
    known = [composed(name) for name in classes]
    unknown = sorted(folders - set(known))
    if unknown:
        raise DataError(
            f"'{root}': folder(s) that are no class of the plan: {some(unknown)}{near(unknown, known)}; "
            f"the plan's classes are {', '.join(map(repr, classes))}; rename the folder or move it away"
        )
    check_absent(absent, classes)
    missing = [name for name in classes if composed(name) not in folders and name not in absent]
    if missing:
        raise DataError(f"'{root}': no folder for class(es) {some(missing)}; create it, or {NAME_ABSENT}")


def images_in(folder: Path) -> tuple[list[str], list[LeftOut]]:
    """The images below `folder`, at any depth, rising; and what else is there.

    Raises:
        DataError: a folder cannot be listed, or the disk fails.
    """
    return _images_of(walk(folder))


def _images_of(found: Walk) -> tuple[list[str], list[LeftOut]]:
    kinds = file_kinds(found.files)
    images = [path for path, kind in zip(found.files, kinds, strict=True) if kind is not FileKind.OTHER]
    others = [path for path, kind in zip(found.files, kinds, strict=True) if kind is FileKind.OTHER]
    why = (
        (Reason.NO_IMAGE, others),
        (Reason.PASSED_OVER, found.passed_over),
        (Reason.DANGLING, found.dangling),
        (Reason.SPECIAL, found.special),
    )
    return images, [LeftOut(path, reason) for reason, paths in why for path in paths]


def _take_class(
    folder: Path, label: int, listing: Listing, taken: dict[tuple[int, int], str], *, may_be_empty: bool
) -> None:
    """Add what lies in the folder of one class; `taken` are the folders of others, by device and inode."""
    walked = walk(folder)
    twice = next((inode for inode in walked.folders if inode in taken), None)
    if twice is not None:
        raise DataError(
            f"'{walked.folders[twice]}' and '{taken[twice]}' are one folder, by a link, and its images would count "
            "under two classes; remove the link"
        )
    taken.update(walked.folders)
    images, left_out = _images_of(walked)
    others = [one.path for one in left_out if one.reason is Reason.NO_IMAGE]
    if not images and (others or not may_be_empty):
        held = f"holds no image, but {kinds_of(others)}" if others else "is empty"
        raise DataError(f"'{folder}': {held}; put images there, or remove the folder and {NAME_ABSENT}")
    listing.files += [ImageFile(Path(path), label) for path in images]
    listing.left_out += left_out
