"""Whose the DICOM files are: PatientID, read once from each file and kept as a hash alone."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from fedclip_secure import canonical
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.dicom import patient_of
from fedclip_secure.data.patients import alike, unit_of
from fedclip_secure.data.walk import looked_at
from fedclip_secure.errors import DataError
from fedclip_secure.features.index import FileIndex, Patient
from fedclip_secure.names import Normalisation

_READERS = 16  # threads: on a share most of the time is waiting
_AT_ONCE = 2048  # files between two writes of the index
_NAMED = 10
_NOBODY = Patient(b"", b"")
_OWN = "; give them one in a CSV file at `data.patients` in silo.yaml, or set `patients: none`"
_log = logging.getLogger(__name__)


def with_dicom_patients(
    files: Sequence[ImageFile], index_file: Path, normalise: Collection[Normalisation], *, asked: bool
) -> list[ImageFile]:
    """`files` with the units that their PatientID gives them; ids are compared as `normalise` says.

    A file without PatientID stays a unit of its own, which is told; where a person `asked` for PatientIDs it is
    refused. Neither names nor ids of patients are ever told.

    Raises:
        DataError: as said; a file cannot be opened; or the index cannot be used.
        ConfigError: pydicom is not installed.
    """
    patients = _patients(files, index_file, normalise)
    lost = [str(file.path) for file, patient in zip(files, patients, strict=True) if not patient.unit]
    if lost and asked:
        raise DataError(
            f"`data.patients: dicom` in silo.yaml: {len(lost)} of {len(files)} image(s) have no PatientID, first "
            f"{', '.join(map(repr, lost[:_NAMED]))}{_OWN}"
        )
    _tell(len(files), len(lost), patients)
    return [replace(file, unit=patient.unit or None) for file, patient in zip(files, patients, strict=True)]


def _patients(files: Sequence[ImageFile], index_file: Path, normalise: Collection[Normalisation]) -> list[Patient]:
    how, paths = ",".join(normalise), [file.path for file in files]
    with closing(FileIndex(index_file)) as index, ThreadPoolExecutor(_READERS) as pool:
        known = index.patients(paths, how)
        todo = [number for number, patient in enumerate(known) if patient is None]
        for start in range(0, len(todo), _AT_ONCE):
            part = todo[start : start + _AT_ONCE]
            found = list(pool.map(lambda number: _read(paths[number], normalise), part))
            index.add_patients([(paths[number], *one) for number, one in zip(part, found, strict=True)], how)
            for number, (_, patient) in zip(part, found, strict=True):
                known[number] = patient
    return [patient or _NOBODY for patient in known]


def _read(path: Path, normalise: Collection[Normalisation]) -> tuple[os.stat_result, Patient]:
    seen, patient = looked_at(path.stat, path), patient_of(path)
    unit = unit_of(patient, normalise)
    if unit is None:
        return seen, _NOBODY
    return seen, Patient(unit, canonical.digest("fedclip/v1/patient-alike", alike(patient)))


def _tell(files: int, lost: int, patients: Sequence[Patient]) -> None:
    if lost:
        _log.warning("%d of %d DICOM file(s) have no PatientID and count as a patient each%s", lost, files, _OWN)
    units = defaultdict[bytes, set[bytes]](set)
    for patient in patients:
        if patient.unit:
            units[patient.alike].add(patient.unit)
    groups = sum(len(group) > 1 for group in units.values())
    if groups:
        _log.warning(
            "%d group(s) of PatientIDs differ by case or leading zeros alone and count as different patients, each "
            "with a privacy budget of its own; if they are the same, set data.patients.normalise in silo.yaml "
            "before the first run", groups,
        )  # fmt: skip
    if len(units) == 1 and files - lost > 1:
        _log.warning(
            "all %d DICOM file(s) with a PatientID have the same one, and so fall into one split; if it stands for "
            "files that were made anonymous, set `data.patients: none` in silo.yaml, or name their patients in a CSV "
            "file there", files - lost,
        )  # fmt: skip
