"""Images listed in a CSV file, and the patients that they belong to.

The first row names the columns. All images of one patient share a unit, and so a split.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedclip_secure.data.classes import NAME_ABSENT, check_absent, composed, decomposed, near, some
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.image import named_as_picture
from fedclip_secure.data.patients import unit_of, warn_of_likes
from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError
from fedclip_secure.files import is_of_windows
from fedclip_secure.names import Column, Normalisation

_LISTED_FAULTS = 10
_PATIENT = r"patient|subject|person|(?<![a-z])(mrn|pid)(?![a-z])"  # in the name of a column
_NONE = {"nan", "none", "null", "na", "n/a", "#n/a"}  # in small letters: of pandas, databases and spreadsheets
_log = logging.getLogger(__name__)


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
    *,
    normalise: Collection[Normalisation] = (),
    columns: Mapping[Column, str] | None = None,
) -> list[ImageFile]:
    """Read `path,label[,patient]`: image file under `root`, class folder of the plan, patient; in the file's order.

    UTF-8, with or without a byte order mark, with any line ends. `columns` says what the three are called there, where
    they are called otherwise; an empty name says that there is no such column. Other columns are not read, which the
    log says. Without patients each image is a unit of its own. `absent_classes` are the plan's classes that need no
    row, `normalise` is what ids of patients may differ in; those that differ in more of the kind are named in the log.

    Raises:
        DataError: not such a file; faulty rows, the first ten by line; a class without any row.
    """
    check_absent(absent_classes, classes)
    numbers = {composed(name): number for number, name in enumerate(classes)}
    rows, faults = _rows(path, root, _Header(("path", "label"), ("patient",), columns or {}, "data.columns"))
    for row in rows:
        if row.label not in numbers:
            faults.append((row.line, f"label {row.label!r} is no class of the plan{near([row.label], classes)}"))
    _refuse(path, faults)
    found = {row.label for row in rows}
    missing = [name for name in classes if composed(name) not in found and name not in absent_classes]
    if missing:
        raise DataError(f"'{path}': no image of class(es) {some(missing)}; add some, or {NAME_ABSENT}")
    warn_of_likes(path, (row.patient for row in rows), normalise)
    return [ImageFile(Path(stored_as(row.path)), numbers[row.label], unit_of(row.patient, normalise)) for row in rows]


def with_patients(
    files: Sequence[ImageFile],
    path: Path,
    root: Path,
    *,
    normalise: Collection[Normalisation] = (),
    columns: Mapping[Column, str] | None = None,
) -> list[ImageFile]:
    """`files` with the units that `path,patient` rows give them; rows of other files are ignored.

    `normalise` and `columns` are as for `read_manifest`.

    Raises:
        DataError: not such a file; faulty rows; images that no row names, the first ten.
    """
    rows, faults = _rows(path, root, _Header(("path", "patient"), (), columns or {}, "data.patients.columns"))
    _refuse(path, faults)
    patients = {composed(row.path): row.patient for row in rows}
    places = [composed(os.path.normpath(file.path)) for file in files]
    lost = [place for place in places if place not in patients]
    if lost:
        raise DataError(
            f"'{path}': names no patient for {len(lost)} of {len(places)} image(s), first '{lost[0]}'; add a row "
            f"for each, with its path from '{root}' on, for a patient's images must not be torn apart"
        )
    warn_of_likes(path, patients.values(), normalise)
    units = [unit_of(patients[place], normalise) for place in places]
    return [replace(file, unit=unit) for file, unit in zip(files, units, strict=True)]


def stored_as(path: str) -> str:
    """`path` with the letters of each part encoded as the disk has them; as it is where there is no such file."""
    if os.path.lexists(path):
        return path
    found = Path(path).anchor
    for part in Path(found, path).parts[bool(found) :]:
        forms = (str(Path(found, form)) for form in (part, composed(part), decomposed(part)))
        form = next(filter(os.path.lexists, forms), None)
        if form is None:
            return path
        found = form
    return found


@dataclass(frozen=True, slots=True)
class _Header:
    """Which columns are wanted; `named` says what they are called, and `key` where a person says so."""

    needed: Sequence[Column]
    optional: Sequence[Column]
    named: Mapping[Column, str]
    key: str

    def called(self, name: Column) -> str:
        """What a wanted column is called in the file; empty: there is none."""
        return self.named.get(name, name)


def _rows(path: Path, root: Path, header: _Header) -> tuple[list[_Row], list[tuple[int, str]]]:
    """The well-formed rows, and what is wrong with the others, by line."""
    rows, faults, seen = list[_Row](), list[tuple[int, str]](), dict[str, tuple[int, str]]()
    lines = _read(path)
    first = next(lines, (1, []))[1]
    places = _places(path, first, header)
    for line, cells in lines:
        fault = _fault(cells, first, places)
        if fault is None:
            named = {name: cells[place] for name, place in places.items()}
            where, fault = _where(root, named["path"])
            label = composed(named.get("label", ""))
            if composed(where) in seen:
                line_before, label_before = seen[composed(where)]
                other = f", with label {label_before!r}" if label_before != label else ""
                fault = f"path {named['path']!r} stands in line {line_before} already{other}"
            elif fault is None:
                seen[composed(where)] = (line, label)
                rows.append(_Row(line, where, label, named.get("patient", "")))
        if fault is not None:
            faults.append((line, fault))
    if not rows and not faults:
        raise DataError(f"'{path}': has no rows below its header; list the images there")
    return rows, faults


def _where(root: Path, cell: str) -> tuple[str, str | None]:
    """The file that a path means here, and what is wrong with the path."""
    plain = os.path.normpath(root / cell)
    if os.name == "nt" or os.path.lexists(plain):
        return plain, None
    if is_of_windows(cell):
        return plain, f"path {cell!r} is one of Windows; write it from the folder of `data.root` in silo.yaml on"
    return os.path.normpath(root / os.path.expanduser(cell.replace("\\", "/"))), None  # noqa: PTH111 - never raises


def _read(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            try:
                for cells in reader:
                    if reader.line_num == 1 and any("\0" in cell for cell in cells):
                        raise DataError(f"'{path}': is not UTF-8 (zero bytes, as UTF-16 has); export it as CSV UTF-8")
                    if cells:
                        yield reader.line_num, [cell.strip() for cell in cells]
            except csv.Error as error:
                raise DataError(f"'{path}': line {reader.line_num} is not CSV ({error}); export it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}': is not UTF-8 (byte {error.start}); export it as CSV UTF-8") from error
    except OSError as error:
        raise DataError(refused(error, path, otherwise="check `data` in silo.yaml")) from error


def _places(path: Path, header: list[str], wanted: _Header) -> dict[Column, int]:
    """Where each wanted column stands, by our name of it."""
    called = {name: wanted.called(name) for name in (*wanted.needed, *wanted.optional) if wanted.called(name)}
    twice = {name for name in called.values() if header.count(name) > 1}
    must = {*wanted.needed, *wanted.named}
    lacking = [name for name in called if called[name] not in header and name in must]
    others = [name for name in header if name not in called.values()]
    other = next((sign for sign in (";", "\t", "|") if len(header) == 1 and sign in header[0]), None)
    if other is not None:
        raise DataError(f"'{path}': its cells are separated by {other!r}, found {header[0][:100]}; export with commas")
    if lacking and any(named_as_picture(cell) for cell in header):
        names = ",".join(called.values())
        raise DataError(f"'{path}': its first line names an image; write one with the columns above it: {names}")
    if lacking or twice:
        form = ",".join(called[name] for name in wanted.needed)
        form += "".join(f"[,{called[name]}]" for name in wanted.optional if name in called)
        raise DataError(
            f"'{path}': its first line must be {form}, separated by commas, "
            f"found {','.join(header)[:100] or 'nothing'}{near(others, list(called.values()))}; rename the columns, or "
            f"say in silo.yaml what they are called there: `{wanted.key}: {{{_example(lacking or [*twice], others)}}}`"
        )
    _check_patients(path, others, wanted, called)
    if others:
        _log.warning("'%s': column(s) that are not read: %s", path, some(others))
    return {name: header.index(called[name]) for name in called if called[name] in header}


def _example(lacking: Sequence[str], others: Sequence[str]) -> str:
    return f"{lacking[0]}: {others[0] or 'NAME'}" if others else f"{lacking[0]}: NAME"


def _check_patients(path: Path, others: Sequence[str], wanted: _Header, called: Mapping[Column, str]) -> None:
    """A column of patients that is overlooked would tear their images apart."""
    if "patient" not in wanted.optional or called.get("patient", "") in ("", *others):
        return
    likely = [name for name in others if re.search(_PATIENT, name, re.IGNORECASE) or near([name], ["patient"])]
    if likely:
        raise DataError(
            f"'{path}': column {likely[0]!r} seems to name patients, and is not read; set `{wanted.key}: "
            f"{{patient: {likely[0]}}}` in silo.yaml, or `data.patients: none` if each image is to count by itself"
        )


def _fault(cells: list[str], header: Sequence[str], places: Mapping[Column, int]) -> str | None:
    if len(cells) != len(header):
        return f"has {len(cells)} cell(s), must have {len(header)} ({','.join(header)}); quote text that holds commas"
    wanted = [cells[place] for place in places.values()]
    odd = [cell for cell in wanted if any(unicodedata.category(letter) == "Cc" for letter in cell)]
    if odd:
        return f"holds control characters: {odd[0]!r}"
    empty = [name for name, place in places.items() if not cells[place]]
    if "patient" in places and cells[places["patient"]].casefold() in _NONE:
        return f"patient {cells[places['patient']]!r} is what programs write where there is none"
    return f"has no {' and no '.join(empty)}" if empty else None


def _refuse(path: Path, faults: list[tuple[int, str]]) -> None:
    if not faults:
        return
    listed = [f"  line {line}: {text}" for line, text in sorted(faults)[:_LISTED_FAULTS]]
    if len(faults) > _LISTED_FAULTS:
        listed.append(f"  and {len(faults) - _LISTED_FAULTS} more")
    raise DataError("\n".join([f"'{path}': {len(faults)} row(s) cannot be used; mend these and run again:", *listed]))
