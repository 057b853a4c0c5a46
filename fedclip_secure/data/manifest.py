"""Images listed in a CSV file, and the patients that they belong to.

The first row names the columns. All images of one patient share a unit, and so a split.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedclip_secure import canonical
from fedclip_secure.data.classes import NAME_ABSENT, check_absent, composed, decomposed, near, some
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.patients import normalised, warn_of_likes
from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError
from fedclip_secure.names import Normalisation

_LISTED_FAULTS = 10


@dataclass(frozen=True, slots=True)
class _Row:
    line: int  # in the file, from 1; of a row over several lines the last
    path: str  # normalised, under the root
    label: str
    patient: str


def read_manifest(
    path: Path,
    root: Path,
    classes: Sequence[str],
    absent_classes: Sequence[str] = (),
    normalise: Collection[Normalisation] = (),
) -> list[ImageFile]:
    """Read `path,label[,patient]`: image file under `root`, class folder of the plan, patient; in the file's order.

    UTF-8, with or without a byte order mark, with any line ends. Without a patient column each image is
    a unit of its own. `absent_classes` are the plan's classes that need no row, `normalise` is what ids of patients
    may differ in; those that differ in more of the kind are named in the log.

    Raises:
        DataError: not such a file; faulty rows, the first ten by line; a class without any row.
    """
    check_absent(absent_classes, classes)
    numbers = {composed(name): number for number, name in enumerate(classes)}
    rows, faults = _rows(path, root, ("path", "label"), ("patient",))
    for row in rows:
        if row.label not in numbers:
            faults.append((row.line, f"label {row.label!r} is no class of the plan{near([row.label], classes)}"))
    _refuse(path, faults)
    found = {row.label for row in rows}
    missing = [name for name in classes if composed(name) not in found and name not in absent_classes]
    if missing:
        raise DataError(f"{path}: no image of class(es) {some(missing)}; add some, or {NAME_ABSENT}")
    warn_of_likes(path, (row.patient for row in rows), normalise)
    return [ImageFile(Path(stored_as(row.path)), numbers[row.label], _unit(row.patient, normalise)) for row in rows]


def with_patients(
    files: Sequence[ImageFile], path: Path, root: Path, normalise: Collection[Normalisation] = ()
) -> list[ImageFile]:
    """`files` with the units that `path,patient` rows give them; rows of other files are ignored.

    `normalise` is as for `read_manifest`.

    Raises:
        DataError: not such a file; faulty rows; images that no row names, the first ten.
    """
    rows, faults = _rows(path, root, ("path", "patient"), ())
    _refuse(path, faults)
    patients = {composed(row.path): row.patient for row in rows}
    places = [composed(os.path.normpath(file.path)) for file in files]
    lost = [place for place in places if place not in patients]
    if lost:
        raise DataError(
            f"{path}: names no patient for {len(lost)} image(s), first {lost[0]}; "
            "add a row for each, for a patient's images must not be torn apart"
        )
    warn_of_likes(path, patients.values(), normalise)
    units = [_unit(patients[place], normalise) for place in places]
    return [replace(file, unit=unit) for file, unit in zip(files, units, strict=True)]


def stored_as(path: str) -> str:
    """`path` with its letters encoded as the disk has them; as it is where there is no such file."""
    return next((form for form in (path, composed(path), decomposed(path)) if os.path.lexists(form)), path)


def _unit(patient: str, normalise: Collection[Normalisation]) -> bytes | None:
    return canonical.digest("fedclip/v1/patient", normalised(patient, normalise)) if patient else None


def _rows(
    path: Path, root: Path, needed: Sequence[str], optional: Sequence[str]
) -> tuple[list[_Row], list[tuple[int, str]]]:
    """The well-formed rows, and what is wrong with the others, by line."""
    rows, faults, seen = list[_Row](), list[tuple[int, str]](), dict[str, int]()
    lines = _read(path)
    columns = _columns(path, next(lines, (1, []))[1], needed, optional)
    for line, cells in lines:
        fault = _fault(cells, columns)
        if fault is None:
            named = dict(zip(columns, cells, strict=True))
            where = os.path.normpath(root / named["path"])
            if composed(where) in seen:
                fault = f"path {named['path']!r} stands in line {seen[composed(where)]} already"
            else:
                seen[composed(where)] = line
                rows.append(_Row(line, where, composed(named.get("label", "")), named.get("patient", "")))
        if fault is not None:
            faults.append((line, fault))
    if not rows and not faults:
        raise DataError(f"{path}: has no rows below its header; list the images there")
    return rows, faults


def _read(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            try:
                for cells in reader:
                    if cells:
                        yield reader.line_num, [cell.strip() for cell in cells]
            except csv.Error as error:
                raise DataError(f"{path}: line {reader.line_num} is not CSV ({error}); export it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); export it as CSV UTF-8") from error
    except OSError as error:
        raise DataError(refused(error, path, otherwise="check `data` in silo.yaml")) from error


def _columns(path: Path, header: list[str], needed: Sequence[str], optional: Sequence[str]) -> list[str]:
    names = (*needed, *optional)
    unknown = [name for name in header if name not in names]
    if unknown or len(set(header)) != len(header) or not set(needed) <= set(header):
        form = ",".join(needed) + "".join(f"[,{name}]" for name in optional)
        raise DataError(
            f"{path}: its first line must be {form}, separated by commas, "
            f"found {','.join(header)[:100] or 'nothing'}{near(unknown, names)}; rename or remove the other columns"
        )
    return header


def _fault(cells: list[str], columns: Sequence[str]) -> str | None:
    if len(cells) != len(columns):
        return f"has {len(cells)} cell(s), must have {len(columns)} ({','.join(columns)}); quote text that holds commas"
    if not all(cell.isprintable() for cell in cells):
        return "holds control characters"
    empty = [name for name, cell in zip(columns, cells, strict=True) if not cell]
    return f"has no {' and no '.join(empty)}" if empty else None


def _refuse(path: Path, faults: list[tuple[int, str]]) -> None:
    if not faults:
        return
    listed = [f"  line {line}: {text}" for line, text in sorted(faults)[:_LISTED_FAULTS]]
    if len(faults) > _LISTED_FAULTS:
        listed.append(f"  and {len(faults) - _LISTED_FAULTS} more")
    raise DataError("\n".join([f"{path}: {len(faults)} row(s) cannot be used; mend these and run again:", *listed]))
