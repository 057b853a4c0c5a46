"""Whose DICOM files are: by PatientID, read once, kept as hashes alone."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.data import walk
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.patients import unit_of
from fedclip_secure.errors import DataError
from fedclip_secure.features import patients as reading
from fedclip_secure.features.patients import with_dicom_patients
from fedclip_secure.names import Normalisation
from tests.data.test_dicom import dicom

OTHERWISE = "set `patients: none`"


def scans(folder: Path, *patients: str | None) -> list[ImageFile]:
    """A file for each id, an hour old; None: a file without the tag."""
    found = []
    for number, patient in enumerate(patients):
        pixels = np.full((8, 8), number, np.uint8)
        found.append(ImageFile(dicom(folder / f"{number}.dcm", pixels, PatientID=patient), 0))
        if patient is None:
            forget(found[-1].path)
        os.utime(found[-1].path, (time.time() - 3600,) * 2)
    return found


def forget(path: Path) -> None:
    from pydicom import dcmread

    file = dcmread(path)
    del file.PatientID
    file.save_as(path)


def read(files: list[ImageFile], *how: Normalisation, asked: bool = False) -> list[bytes | None]:
    index = files[0].path.parent / "work/files.sqlite"
    return [file.unit for file in with_dicom_patients(files, index, how, OTHERWISE, asked=asked)[0]]


def said(files: list[ImageFile], *how: Normalisation) -> dict[str, str]:
    _, findings = with_dicom_patients(files, files[0].path.parent / "work/files.sqlite", how, OTHERWISE, asked=False)
    return {finding.kind: finding.text for finding in findings}


def test_images_of_one_patient_id_share_the_unit_that_a_csv_file_would_give_them(tmp_path: Path) -> None:
    units = read(scans(tmp_path, "P 1", " P 1 ", "P2"))
    assert units == [unit_of("P 1", ()), unit_of("P 1", ()), unit_of("P2", ())]


def test_files_are_read_once_and_ids_are_kept_as_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = scans(tmp_path, "Jane-Doe-1970", "Jane-Doe-1970", "other")
    first = read(files)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "patient_of", lambda path: pytest.fail(f"{path} is read again"))
        assert read(files) == first
    kept = (tmp_path / "work/files.sqlite").read_bytes()
    assert b"Jane" not in kept
    assert first[0] is not None
    assert first[0] in kept
    dicom(files[2].path, np.zeros((8, 8), np.uint8), PatientID="Jane-Doe-1970")
    assert read(files)[2] == first[0], "a file that changed is read again"


def test_ids_are_the_same_where_silo_yaml_says_so(tmp_path: Path) -> None:
    files = scans(tmp_path, "p001", "P1", "q")
    assert len(set(read(files))) == 3
    (text,) = said(files).values()
    assert text.startswith("1 group(s) of PatientIDs differ by case, encoding or leading zeros alone")
    assert "p001" not in text, "no id of a patient is told"
    assert len(set(read(files, "casefold", "strip_zeros"))) == 2
    assert not said(files, "casefold", "strip_zeros")


def test_file_without_an_id_counts_by_itself_and_is_refused_where_ids_were_asked_for(tmp_path: Path) -> None:
    files = scans(tmp_path, "p", None, "")
    assert read(files)[1:] == [None, None]
    assert said(files)["without PatientID"].startswith("2 of 3 DICOM file(s) have no PatientID and count as a patient")
    with pytest.raises(DataError, match=r"2 of 3 image\(s\) have no PatientID, first '.*1\.dcm'.*`patients: none`"):
        read(files, asked=True)


def test_one_id_for_all_files_is_said_with_the_way_out(tmp_path: Path) -> None:
    files = scans(tmp_path, *["ANONYMOUS"] * 5)
    assert len(set(read(files))) == 1
    text = said(files)["one PatientID for all"]
    assert text.startswith("all 5 DICOM file(s) with a PatientID have the same one")
    assert "`patients: none`" in text


def test_file_that_cannot_be_read_ends_the_run_and_never_becomes_a_patient_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = scans(tmp_path, "p", "p")
    opened = os.open

    def stale(path: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if str(path).endswith("1.dcm"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", stale)
    monkeypatch.setattr(walk, "PATIENCE", (0.0, 0.0))
    with pytest.raises(DataError, match=r"1\.dcm': cannot be read \(Stale file handle\); the disk or the share fails"):
        read(files)


def test_id_that_cannot_be_parsed_is_one_that_is_not_there(tmp_path: Path) -> None:
    files = scans(tmp_path, "p", "p")
    path = files[0].path
    tag = b"\x10\x00\x20\x00"
    path.write_bytes(path.read_bytes().replace(tag + b"LO", tag + b"L\0"))
    assert read(files) == [None, unit_of("p", ())]
    with pytest.raises(DataError, match=r"1 of 2 image\(s\) have no PatientID, first '.*0\.dcm'; set `patients: none`"):
        read(files, asked=True)


def test_index_of_an_older_version_is_used(tmp_path: Path) -> None:
    files = scans(tmp_path, "p")
    (tmp_path / "work").mkdir()
    with sqlite3.connect(tmp_path / "work/files.sqlite") as old:
        old.execute("CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB)")
    old.close()
    assert read(files) == [unit_of("p", ())]
