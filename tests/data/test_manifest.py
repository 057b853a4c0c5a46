from __future__ import annotations

import logging
import os
import unicodedata
from pathlib import Path

import pytest

from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.manifest import read_manifest, stored_as, with_patients
from fedclip_secure.data.patients import unit_of
from fedclip_secure.errors import DataError
from fedclip_secure.names import Column
from tests.data.test_folder import save

CLASSES = ("cat", "dog")
GOOD = "path,label\na.png,cat\nb/c.png,dog\n"


def read(tmp_path: Path, text: str | bytes, absent: tuple[str, ...] = ()) -> list[ImageFile]:
    path = tmp_path / "records.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_manifest(path, Path("/images"), CLASSES, absent)


def test_rows_become_images_in_the_files_order(tmp_path: Path) -> None:
    assert read(tmp_path, "path,label\nb/c.png,dog\na.png,cat\n/abs/d.png,cat\n") == [
        ImageFile(Path("/images/b/c.png"), 1),
        ImageFile(Path("/images/a.png"), 0),
        ImageFile(Path("/abs/d.png"), 0),
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.rstrip("\n").encode(),
        GOOD.replace("\n", "\n\n").encode(),
        b'label,path\r\n"cat","a.png"\r\ndog, b/c.png \r\n',
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data) == read(tmp_path, GOOD)


def test_a_patients_images_share_a_unit_and_others_do_not(tmp_path: Path) -> None:
    files = read(tmp_path, "path,label,patient\na.png,cat,P 1\nb.png,dog,P 1\nc.png,dog,P 2\n")
    units = [file.unit for file in files]
    assert units[0] == units[1] != units[2]
    assert [len(unit or b"") for unit in units] == [32, 32, 32]


def test_unit_depends_on_the_patient_alone(tmp_path: Path) -> None:
    one = read(tmp_path, "path,label,patient\na.png,cat,p\nb.png,dog,q\n")
    two = read(tmp_path, "patient,path,label\nq,x.png,cat\np,y.png,dog\n")
    assert [file.unit for file in one] == [file.unit for file in reversed(two)]


def test_every_faulty_row_is_named_with_its_line(tmp_path: Path) -> None:
    text = "path,label,patient\na.png,cat,p\n,dog,p\nb.png,Dog,p\n./a.png,dog,p\nc.png,dog\nd.png,dog,\n"
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    assert str(caught.value).splitlines()[1:] == [
        "  line 3: has no path",
        "  line 4: label 'Dog' is no class of the plan ('Dog' -> 'dog'?)",
        "  line 5: path './a.png' stands in line 2 already, with label 'cat'",
        "  line 6: has 2 cell(s), must have 3 (path,label,patient); quote text that holds commas",
        "  line 7: has no patient",
    ]


def test_first_ten_of_many_faults_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"records\.csv': 12 row\(s\) cannot be used") as caught:
        read(tmp_path, "path,label\n" + "x.png\n" * 12)
    assert str(caught.value).count("line ") == 10
    assert str(caught.value).endswith("and 2 more")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("", "found nothing"),
        ("a.png,cat", "its first line names an image; write one with the columns above it: path,label,patient"),
        ("path;label", "its cells are separated by ';', found path;label; export with commas"),
        ("path\tlabel", r"its cells are separated by '\\t', found path"),
        ("path", "found path"),
        ("path,label,path", "found path,label,path"),
        (
            "path,label,patinet",
            r"column 'patinet' seems to name patients, and is not read; set `data\.columns: \{patient: patinet\}`",
        ),
    ],
)
def test_header_at_fault_is_told(tmp_path: Path, header: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read(tmp_path, f"{header}\na.png,cat\n" if header else "")


def test_manifest_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows below its header"):
        read(tmp_path, "path,label\n")


def test_class_without_images_is_told_unless_named_absent(tmp_path: Path) -> None:
    text = "path,label\na.png,cat\n"
    with pytest.raises(DataError, match=r"no image of class\(es\) 'dog'; add some, or .*absent_classes"):
        read(tmp_path, text)
    assert len(read(tmp_path, text, ("dog",))) == 1
    with pytest.raises(DataError, match=r"absent_classes.*'Dog' -> 'dog'"):
        read(tmp_path, text, ("Dog",))


def test_file_that_is_no_utf8_csv_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not UTF-8 \(byte 12\); export it as CSV UTF-8"):
        read(tmp_path, b"path,label\n\xe4\xff.png,cat\n".replace(b"\xe4", b"a"))
    with pytest.raises(DataError, match="line 2 is not CSV"):
        read(tmp_path, 'path,label\n"a"x.png,cat\n')
    with pytest.raises(DataError, match=r"gone\.csv': cannot be read \(No such file"):
        read_manifest(tmp_path / "gone.csv", tmp_path, CLASSES)


def test_images_of_a_folder_get_their_patients(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text("path,patient\ncat/a.png,p\ndog/b.png,p\ncat/not-here.png,q\n")
    root = tmp_path / "images"
    files = [ImageFile(root / "cat/a.png", 0), ImageFile(root / "dog/b.png", 1)]
    found = with_patients(files, path, root)
    assert found[0].unit is not None
    assert found[0].unit == found[1].unit
    assert [file.label for file in found] == [0, 1]


def test_image_without_a_patient_is_named(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text("path,patient\na.png,p\n")
    files = [ImageFile(tmp_path / name, 0) for name in ("a.png", "b.png", "c.png")]
    with pytest.raises(
        DataError, match=r"names no patient for 2 of 3 image\(s\), first .*b\.png.*with its path from '.*' on"
    ):
        with_patients(files, path, tmp_path)
    path.write_text("path,label\na.png,cat\n")
    with pytest.raises(DataError, match="must be path,patient,"):
        with_patients(files, path, tmp_path)


def test_a_path_with_control_characters_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: holds control characters"):
        read(tmp_path, "path,label\na\x00.png,cat\n")


def test_letters_that_are_encoded_in_two_ways_are_equal(tmp_path: Path) -> None:
    name, mac = (unicodedata.normalize(form, "Lungenentzündung") for form in ("NFC", "NFD"))
    images = tmp_path / "images"
    save(images / mac / unicodedata.normalize("NFD", "Müller.png"))
    (tmp_path / "lists").mkdir()
    listed = tmp_path / "lists/list.csv"
    listed.write_text(f"path,label,patient\n{name}/Müller.png,{mac},Müller\n{name}/b.png,{name},p\n")
    first, second = read_manifest(listed, images, [name])
    assert first.path.exists()
    assert first.label == second.label == 0
    patients = tmp_path / "lists/patients.csv"
    patients.write_text(f"path,patient\n{name}/Müller.png,p\n")
    (file,) = with_patients(read_folder(images, [name]).files, patients, images)
    assert file.unit is not None
    listed.write_text(f"path,label\n{name}/b.png,{name}\n{mac}/b.png,{name}\n")
    with pytest.raises(DataError, match=r"line 3: path .* stands in line 2 already"):
        read_manifest(listed, images, [name])


def test_each_part_of_a_path_may_be_encoded_in_its_own_way(tmp_path: Path) -> None:
    mac = unicodedata.normalize("NFD", "Prüfung")
    stored = save(tmp_path / unicodedata.normalize("NFC", "Übung") / mac / unicodedata.normalize("NFC", "ö.png"))
    assert stored_as(unicodedata.normalize("NFC", str(stored))) == str(stored)
    assert stored_as(unicodedata.normalize("NFD", str(stored))) == str(stored)
    assert stored_as(str(stored.parent / "ü.png")) == str(stored.parent / "ü.png")


def test_other_columns_are_told_and_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = ',path,label,report\n0,a.png,cat,"two\nlines"\n1,b.png,dog,\n'
    with caplog.at_level(logging.WARNING):
        assert [file.label for file in read(tmp_path, text)] == [0, 1]
    assert "records.csv': column(s) that are not read: '', 'report'" in caplog.text


def test_columns_go_by_the_names_that_silo_yaml_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_text("File Name,diagnosis,mrn\na.png,cat,p\nb.png,dog,p\n")
    named: dict[Column, str] = {"path": "File Name", "label": "diagnosis", "patient": "mrn"}
    files = read_manifest(path, Path("/images"), CLASSES, columns=named)
    assert [file.path for file in files] == [Path("/images/a.png"), Path("/images/b.png")]
    assert files[0].unit == files[1].unit == unit_of("p", ())
    with pytest.raises(
        DataError, match=r"must be FileName,diagnosis\[,mrn\].*say in silo\.yaml .*`data\.columns: \{path: "
    ):
        read_manifest(path, Path("/images"), CLASSES, columns={**named, "path": "FileName"})


def test_letters_of_all_languages_and_spaces_of_all_widths_are_taken(tmp_path: Path) -> None:
    names = ["1.00\u202fPM.png", "a\u00a0b.png", "\u3000肺.png", "\U0001f468\u200d\u2695.png"]
    text = "path,label\n" + "".join(f"{name},{('cat', 'dog')[n % 2]}\n" for n, name in enumerate(names))
    assert [file.path.name for file in read(tmp_path, text)] == [*names[:2], "肺.png", names[3]]


@pytest.mark.parametrize("patient", ["NaN", "none", "NULL", "n/a"])
def test_what_programs_write_for_none_is_no_patient(tmp_path: Path, patient: str) -> None:
    with pytest.raises(DataError, match=rf"line 2: patient '{patient}' is what programs write where there is none"):
        read(tmp_path, f"path,label,patient\na.png,cat,{patient}\nb.png,dog,p\n")


@pytest.mark.parametrize(
    "column", ["mrn_hash", "person_id", "PatientID", "patient_id", "subject", "MRN", "patinet", "Patients"]
)
def test_column_that_seems_to_name_patients_is_not_passed_over(tmp_path: Path, column: str) -> None:
    text = f"path,label,{column}\na.png,cat,p\nb.png,dog,p\n"
    with pytest.raises(DataError, match=rf"'{column}' seems to name patients.*`data\.columns: {{patient: {column}}}`"):
        read(tmp_path, text)
    path = tmp_path / "records.csv"
    assert read_manifest(path, tmp_path, CLASSES, columns={"patient": ""})[0].unit is None


@pytest.mark.skipif(os.name == "nt", reason="paths of Windows mean something there")
def test_paths_as_windows_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = "path,label\nscans\\one\\a.png,cat\n~/b.png,dog\n"
    assert [file.path for file in read(tmp_path, text)] == [Path("/images/scans/one/a.png"), Path("/home/me/b.png")]
    for path in ("C:\\scans\\a.png", "d:/scans/a.png", "\\\\server\\share\\a.png"):
        with pytest.raises(
            DataError, match=r"line 3: path '.*' is one of Windows; write it from the folder of `data.ro"
        ):
            read(tmp_path, f"path,label\na.png,dog\n{path},cat\n")


def test_name_with_a_backslash_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    save(tmp_path / "a\\b.png")
    path = tmp_path / "records.csv"
    path.write_text("path,label\na\\b.png,cat\nc.png,dog\n")
    assert read_manifest(path, tmp_path, CLASSES)[0].path == tmp_path / "a\\b.png"
