"""Whose the DICOM files are: PatientID, read once from each file and kept as a hash alone."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from fedclip_secure import canonical
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.dicom import patient_of
from fedclip_secure.data.image import FileKind, file_kinds
from fedclip_secure.data.patients import alike, unit_of
from fedclip_secure.data.report import EXAMPLES, Finding, each
from fedclip_secure.data.walk import READERS, looked_at
from fedclip_secure.errors import DataError
from fedclip_secure.features.index import FileIndex, Patient
from fedclip_secure.names import Normalisation

_AT_ONCE = 2048  # files between two writes of the index
_NO_DICOM = (FileKind.PICTURE, FileKind.OTHER)
_NOBODY = Patient(b"", b"")


def with_dicom_patients(
    files: Sequence[ImageFile],
    index_file: Path,
    normalise: Collection[Normalisation],
    otherwise: str,
    *,
    asked: bool,
    verify: bool = False,
) -> tuple[list[ImageFile], list[Finding]]:
    """`files` with the units that their PatientID gives them, and what is strange; ids are compared as by `normalise`.

    `verify`: read them again, whatever the index says. A file without PatientID stays a unit of its own; where a
    person `asked` for PatientIDs it is refused; `otherwise` says how else they are named. DICOM that cannot be parsed
    is left out where it is decoded. Neither names nor ids of patients are ever told.

    Raises:
        DataError: as said; a file cannot be opened; or the index cannot be used.
        ConfigError: pydicom is not installed.
    """
    patients = _patients(files, index_file, normalise, verify=verify)
    unparsed = [str(file.path) for file, patient in zip(files, patients, strict=True) if patient is None]
    others = {path for path, kind in zip(unparsed, file_kinds(unparsed), strict=True) if kind in _NO_DICOM}
    lost = [
        str(file.path)
        for file, patient in zip(files, patients, strict=True)
        if (patient is not None and not patient.unit) or str(file.path) in others
    ]
    if lost and asked:
        raise DataError(
            f"`data.patients: dicom` in silo.yaml: {len(lost)} of {len(files)} image(s) have no PatientID, first "
            f"{', '.join(map(repr, lost[:EXAMPLES]))}; {otherwise}"
        )
    named = [
        replace(file, unit=(patient and patient.unit) or None) for file, patient in zip(files, patients, strict=True)
    ]
    return named, list(_findings(len(files), lost, patients, otherwise))


def _patients(
    files: Sequence[ImageFile], index_file: Path, normalise: Collection[Normalisation], *, verify: bool
) -> list[Patient | None]:
    """None for a file that cannot be parsed."""
    how, paths = ",".join(normalise), [file.path for file in files]
    with closing(FileIndex(index_file)) as index, ThreadPoolExecutor(READERS) as pool:
        known: list[Patient | None] = [None] * len(paths) if verify else index.patients(paths, how)
        todo = [number for number, patient in enumerate(known) if patient is None]
        for start in range(0, len(todo), _AT_ONCE):
            part = todo[start : start + _AT_ONCE]
            found = list(pool.map(lambda number: _read(paths[number], normalise), part))
            for number, (_, patient) in zip(part, found, strict=True):
                known[number] = patient
            index.add_patients(
                [(paths[n], seen, one) for n, (seen, one) in zip(part, found, strict=True) if one is not None], how
            )
    return known


def _read(path: Path, normalise: Collection[Normalisation]) -> tuple[os.stat_result, Patient | None]:
    seen, patient = looked_at(path.stat, path), patient_of(path)
    if patient is None:
        return seen, None
    unit = unit_of(patient, normalise)
    if unit is None:
        return seen, _NOBODY
    return seen, Patient(unit, canonical.digest("fedclip/v1/patient-alike", alike(patient)))


def _findings(files: int, lost: Sequence[str], patients: Sequence[Patient | None], otherwise: str) -> Iterator[Finding]:
    units = defaultdict[bytes, set[bytes]](set)
    for patient in patients:
        if patient and patient.unit:
            units[patient.alike].add(patient.unit)
    groups, named = sum(len(group) > 1 for group in units.values()), files - len(lost)
    if lost:
        text = f"{len(lost)} of {files} DICOM file(s) have no PatientID and count as a patient each; {otherwise}"
        yield Finding("without PatientID", len(lost), text, each(lost), refused=True)
    if len(units) == 1 and named > 1:
        text = (
            f"all {named} DICOM file(s) with a PatientID have the same one, and so fall into one split; if it stands "
            f"for files that were made anonymous, {otherwise}"
        )
        yield Finding("one PatientID for all", named, text, (), refused=True)
    if groups:
        text = (
            f"{groups} group(s) of PatientIDs differ by case, encoding or leading zeros alone and count as different "
            "patients, each with a privacy budget of its own; if they are the same, set data.patients.normalise in "
            "silo.yaml before the first run"
        )
        yield Finding("PatientIDs that are alike", groups, text, (), refused=False)
