"""The data report: what was read, left out, doubled or spoilt; and what `strict` refuses."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan, PrivacyPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data import walk
from fedclip_secure.data.report import JSON, LEFT_OUT, PAGE, DataReport
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.features import extract as extracting
from fedclip_secure.features.index import read_contents
from fedclip_secure.training.inputs import Inputs, load_inputs
from fedclip_secure.training.prepare import prepare
from tests.data.test_dicom import dicom

CLASSES = ("cat", "dog")
HOUR_AGO = time.time() - 3600


class House:
    """A silo's folder, and a contract over two classes with a window of 12 bits."""

    def __init__(self, folder: Path, tower: Path, contract: Contract) -> None:
        self.images, self.work, self.weights, self.contract = folder / "images", folder / "work", tower, contract
        self.random = np.random.default_rng(0)

    def picture(self, name: str, value: int | None = None, size: int = 48) -> Path:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = self.random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise if value is None else np.full_like(noise, value)).save(path)
        return path

    def deep(self, above: int, least: int = 0) -> np.ndarray[Any, np.dtype[np.uint16]]:
        """Pixels of 16 bits, (48, 48), from `least` to below `above`."""
        return self.random.integers(least, above, (48, 48), dtype=np.uint16)

    def scan(self, name: str, patient: str, **tags: Any) -> Path:
        return dicom(self.images / name, self.deep(4096), PatientID=patient, **tags)

    def read(self, *, verify: bool = False, **data: Any) -> Inputs:
        for path in self.images.rglob("*"):
            if path.is_file():
                os.utime(path, (HOUR_AGO, HOUR_AGO))
        wanted = {"format": "folder", "path": str(self.images), **data}
        settings = {"name": "house", "data": wanted, "workdir": str(self.work), "device": "cpu"}
        silo = check({**settings, "weights": str(self.weights)}, SiloConfig, "silo.yaml")
        return load_inputs(silo, self.contract, lambda _: None, verify=verify)

    def report(self, **data: Any) -> DataReport:
        report = self.read(**data).report
        assert report is not None
        return report


@pytest.fixture
def contract(tower_plan: FederationPlan, random_tower: Path) -> Contract:
    model = tower_plan.model.model_copy(update={"image_window": (0, 4095)})
    plan = tower_plan.model_copy(update={"model": model, "classes": {"cat": "a cat", "dog": "a dog"}})
    return Contract(plan, prepare(plan, random_tower).lock)


@pytest.fixture
def house(tmp_path: Path, random_tower: Path, contract: Contract) -> House:
    return House(tmp_path, random_tower / "tower.safetensors", contract)


def pictures(house: House, each: int = 12) -> None:
    for name in CLASSES:
        for number in range(each):
            house.picture(f"{name}/{number:02}.png")


def kinds(report: DataReport) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def test_report_counts_images_by_class_and_split(house: House) -> None:
    pictures(house)
    house.picture("dog/more.png")
    inputs = house.read()
    assert inputs.report is not None
    report = inputs.report
    assert (report.used, report.patients, report.smallest_class, report.smallest) == (25, None, "cat", 12)
    assert {name: split.images for name, split in report.splits.items()} == {
        name: len(records) for name, records in inputs.splits.items()
    }
    assert sum(split.classes["dog"] for split in report.splits.values()) == 13
    assert report.findings == ()
    assert report.lines()[0] == "patients are not known: each image counts as a patient of its own"


def test_all_that_is_left_out_is_in_the_report_and_in_the_list(house: House) -> None:
    pictures(house)
    (house.images / "cat/notes.txt").write_text("x")
    (house.images / "cat/torn.png").write_bytes(b"torn")
    (house.images / "dog/gone.png").symlink_to(house.images / "nowhere.png")
    (house.images / "dog/@eaDir").mkdir()
    report = house.report()
    assert kinds(report) == {
        "left out: no image": 1,
        "left out: hidden, or a system's own": 1,
        "left out: a link to what is not there": 1,
        "left out: cannot be used": 1,
    }
    with (house.work / LEFT_OUT).open(newline="") as file:
        rows = list(csv.reader(file))
    assert [(Path(path).name, reason) for path, reason, _ in rows[1:]] == [
        ("notes.txt", "no image"),
        ("@eaDir", "hidden, or a system's own"),
        ("gone.png", "a link to what is not there"),
        ("torn.png", "cannot be used"),
    ]
    assert rows[4][2].endswith("torn.png': cannot be read as an image (not an image); replace it or move it away")
    assert report.warnings() == [
        "1 file(s) are no image and were left out (1 x .txt); move them away if they are not wanted",
        "1 file(s) are links to what is not there, or placeholders of what was not downloaded, and were left out; "
        "restore or download what they name",
        "1 file(s) cannot be used and were left out; replace them, or take them out of the data",
        "which images these are: data-report.html and data-report.json in the workdir",
    ]


@pytest.mark.parametrize("name", ["closed.png", "IM000001"])
def test_file_that_is_closed_is_left_out_by_name_and_not_the_end_of_all(
    house: House, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pictures(house)
    path, opened = house.picture("cat/x.png").rename(house.images / "cat" / name), os.open

    def closed(where: Any, *arguments: Any, **options: Any) -> int:
        if Path(where) == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(where, *arguments, **options)

    monkeypatch.setattr(os, "open", closed)
    report = house.report()
    assert (report.used, kinds(report)) == (24, {"left out: cannot be used": 1})
    assert report.findings[0].examples[0].startswith(f"'{path}': cannot be read (Permission denied); let the user")


@pytest.mark.parametrize("names", [("0", "1"), ("grade.1", "grade.2"), ("classes", "sum")])
def test_classes_may_have_any_name_on_the_page(
    tmp_path: Path, random_tower: Path, tower_plan: FederationPlan, names: tuple[str, str]
) -> None:
    plan = tower_plan.model_copy(update={"classes": dict.fromkeys(names, "a thing")})
    house = House(tmp_path, random_tower / "tower.safetensors", Contract(plan, prepare(plan, random_tower).lock))
    for number in range(12):
        house.picture(f"{names[number % 2]}/{number}.png")
    assert house.report().used == 12
    page = (house.work / PAGE).read_text("utf-8")
    assert all(re.search(rf"<td>{re.escape(name)}</td>.*<td class=\"n\">6</td></tr>", page) for name in names)


def test_ten_of_many_are_named_and_all_are_listed(house: House) -> None:
    pictures(house)
    for number in range(5000):
        (house.images / f"cat/{number}.xyz").write_text("x")
    (finding,) = house.report().findings
    assert finding.text.startswith("5000 file(s) are no image and were left out (5000 x .xyz)")
    lines = finding.told().splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  and 4990 more, which data-report.json has"
    assert "and 4990 more, which data-report.json has" in (house.work / PAGE).read_text("utf-8")
    assert len(json.loads((house.work / JSON).read_text("utf-8"))["findings"][0]["groups"]) == 5000
    assert len((house.work / LEFT_OUT).read_text().splitlines()) == 5001


def test_equal_bytes_under_two_labels_are_found(house: House) -> None:
    pictures(house)
    shutil.copy(house.images / "cat/00.png", house.images / "dog/copy.png")
    shutil.copy(house.images / "cat/01.png", house.images / "cat/again.png")
    report = house.report()
    assert kinds(report) == {"equal bytes under several labels": 2, "equal bytes under one label": 2}
    assert report.findings[0].examples == (f"{house.images / 'cat/00.png'} = {house.images / 'dog/copy.png'}",)
    assert [finding.refused for finding in report.findings] == [True, False], (
        "an image that is there twice counts twice, which may be meant"
    )


def test_equal_bytes_of_two_patients_in_several_splits_are_found(house: House, tmp_path: Path) -> None:
    pictures(house)
    rows = ["path,label,patient"]
    for number in range(40):
        path = house.images / f"cat/same{number}.png"
        shutil.copy(house.images / "cat/00.png", path)
        rows.append(f"{path},cat,p{number}")
    rows += [f"{house.images}/dog/{number:02}.png,dog,q{number}" for number in range(12)]
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(rows))
    report = house.report(format="manifest", path=str(listed))
    assert kinds(report)["equal bytes in several splits"] == 40
    assert (report.patients, report.patients_from) == (52, "csv")


def test_images_of_which_a_window_left_nothing_are_found(house: House) -> None:
    pictures(house)
    for number in range(3):
        Image.fromarray(house.deep(60000, 6000)).save(house.images / f"cat/deep{number}.png")
    house.picture("dog/tiny.png", size=20)
    report = house.report()
    assert kinds(report) == {"of one colour, or nearly": 3, "clipped": 3, "tiny": 1}
    assert report.findings[0].text.startswith("3 of 28 image(s) (11%) are of one colour, or nearly; ")
    assert "model.image_window" in report.findings[0].text
    assert kinds(house.report()) == kinds(report), "what was seen is kept with the features"


def test_pages_that_no_window_spoilt_are_to_be_looked_at(
    tmp_path: Path, random_tower: Path, tower_plan: FederationPlan
) -> None:
    plan = tower_plan.model_copy(update={"classes": {"cat": "a cat", "dog": "a dog"}})
    contract = Contract(plan, prepare(plan, random_tower).lock)
    house = House(tmp_path, random_tower / "tower.safetensors", contract)
    pictures(house)
    house.picture("dog/page.png", value=128)
    (finding,) = house.report().findings
    said = "1 of 25 image(s) (4%) are of one colour, or nearly; they show nothing: look at them, and replace what is"
    assert finding.text == f"{said} spoilt"


def test_grey_dicom_of_8_bits_is_as_bright_as_the_picture_of_it(house: House) -> None:
    pictures(house)
    pixels = np.linspace(20, 220, 48 * 48).reshape(48, 48).astype(np.uint8)
    Image.fromarray(pixels).save(house.images / "cat/x.png")
    dicom(house.images / "cat/x.dcm", pixels)
    features = house.read()
    everything = [record for split in features.splits.values() for record in split.image_features]
    same = [n for n, one in enumerate(everything) if sum(np.allclose(one, other) for other in everything) == 2]
    assert len(same) == 2, "the two give one feature"


def scans(house: House, patients: int = 12, each: int = 4) -> None:
    for patient in range(patients):
        for number in range(each):
            house.scan(f"{CLASSES[patient % 2]}/{patient}-{number}.dcm", f"P{patient}")


def test_patients_of_dicom_are_never_torn_apart(house: House) -> None:
    scans(house)
    inputs = house.read()
    assert inputs.report is not None
    units = [{unit.tobytes() for unit in records.unit_ids} for records in inputs.splits.values()]
    assert sum(map(len, units)) == len(set.union(*units)) == 12
    assert (inputs.report.patients, inputs.report.patients_from, inputs.report.used) == (12, "dicom", 48)
    assert inputs.report.lines()[0] == "12 patient(s), by PatientID of DICOM"
    assert sum(split.patients or 0 for split in inputs.report.splits.values()) == 12
    assert house.report(patients="dicom").patients == 12
    assert house.report(patients="none").patients is None


def test_pictures_among_dicom_are_told_and_refused_where_patients_are_asked_of_dicom(house: House) -> None:
    scans(house)
    house.picture("cat/photo.png")
    report = house.report()
    assert report.patients is None
    assert "48 of 49 images that were found are DICOM, whose PatientID is not read" in report.warnings()[0]
    with pytest.raises(DataError, match="48 of 49 images that were found are DICOM"):
        house.read(strict=True)
    with pytest.raises(DataError, match=r"1 of 49 image\(s\) have no PatientID, first '.*photo\.png'"):
        house.read(patients="dicom")


def test_manifest_of_dicom_takes_patients_from_it_too(house: House, tmp_path: Path) -> None:
    scans(house)
    listed = tmp_path / "list.csv"
    rows = [f"{path.parent.name}/{path.name},{path.parent.name}" for path in house.images.rglob("*.dcm")]
    listed.write_text("\n".join(["path,label", *rows]))
    assert house.report(format="manifest", path=str(listed), root=str(house.images)).patients == 12


def test_picture_without_an_extension_in_a_manifest_is_no_dicom(house: House, tmp_path: Path) -> None:
    listed = ["path,label"]
    for number in range(24):
        path = house.picture(f"{CLASSES[number % 2]}/{number}.png")
        path.rename(path.with_suffix(""))
        listed.append(f"{path.with_suffix('')},{path.parent.name}")
    (tmp_path / "list.csv").write_text("\n".join(listed))
    report = house.report(format="manifest", path=str(tmp_path / "list.csv"))
    assert (report.used, report.patients, report.findings) == (24, None, ())


def test_dicom_under_another_name_is_told(house: House) -> None:
    pictures(house)
    for number in range(3):
        house.scan(f"cat/{number}.dcm", "p").rename(house.images / f"cat/scan{number}.png")
    (text,) = [text for text in house.report().warnings() if "DICOM" in text]
    assert text.startswith("3 image(s) are DICOM under the name of another format, and their PatientID is not read")
    assert not house.report(patients="none").warnings()


def test_one_patient_for_all_leaves_splits_empty_which_is_told(house: House) -> None:
    for number in range(12):
        house.scan(f"{CLASSES[number % 2]}/{number}.dcm", "ANON")
    report = house.report()
    assert {"one PatientID for all", "empty splits"} <= set(kinds(report))
    assert sorted(split.images for split in report.splits.values()) == [0, 0, 12]


def test_torn_dicom_is_left_out_where_patients_are_asked_of_dicom(house: House) -> None:
    scans(house)
    (house.images / "cat/torn.dcm").write_bytes(b"torn")
    report = house.report(patients="dicom")
    assert kinds(report)["left out: cannot be used"] == 1
    assert report.patients == 12


def test_verify_reads_patients_again(house: House) -> None:
    scans(house, 4, 3)
    assert house.report().patients == 4
    for path in house.images.rglob("*.dcm"):
        before = path.stat().st_size
        file = dcmread(path)
        file.PatientID = "P0"
        file.save_as(path)
        assert path.stat().st_size == before
    assert house.report().patients == 4, "size and time are as they were"
    assert house.report(verify=True).patients == 1


def test_page_shows_images_as_they_are_now(house: House) -> None:
    pictures(house)
    house.read()
    page = house.work / PAGE
    before = page.read_bytes()
    house.picture("cat/00.png")
    house.read(verify=True)
    after = page.read_bytes()
    assert after != before
    page.write_bytes(b"")
    house.read()
    assert page.read_bytes() == after


def test_promise_for_each_patient_rests_on_patient_id_only_where_a_person_says_so(house: House) -> None:
    scans(house)
    privacy = PrivacyPlan(
        unit="patient", sample_rate=0.5, steps_per_round=1, noise_multiplier=1.0, max_grad_norm=1.0, update_divisor=4,
        delta=1e-5,
    )  # fmt: skip
    plan = house.contract.plan.model_copy(update={"privacy": privacy})
    house.contract = Contract(plan, house.contract.lock)
    with pytest.raises(ConfigError, match="the plan protects each patient, and only PatientID of DICOM names them"):
        house.read()
    assert house.report(patients="dicom").patients == 12


def test_class_may_be_called_as_a_systems_folder_is(house: House) -> None:
    plan = house.contract.plan.model_copy(update={"classes": {"recycled": "paper", "dog": "a dog"}})
    house.contract = Contract(plan, prepare(plan, house.weights.parent).lock)
    for number in range(8):
        house.picture(f"{('recycled', 'dog')[number % 2]}/{number}.png")
    assert house.report().used == 8


def test_what_is_no_file_is_left_out_and_never_waited_for(house: House) -> None:
    pictures(house)
    os.mkfifo(house.images / "cat/pipe")
    os.mkfifo(house.images / "cat/pipe.dcm")
    (house.images / "dog/loop").symlink_to(house.images / "dog/loop")
    report = house.report()
    assert kinds(report) == {"left out: a link to what is not there": 1, "left out: no regular file": 2}
    assert report.used == 24


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EMFILE, errno.ENODEV, errno.ENOMEM])
def test_fault_that_is_not_one_files_own_ends_the_run(
    house: House, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pictures(house)
    monkeypatch.setattr(walk, "PATIENCE", ())

    def failing(path: Path) -> object:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(extracting, "read_contents", failing)
    with pytest.raises(DataError, match=r"\.png': cannot be read \("):
        house.read()


def test_several_frames_are_told_and_the_middle_one_of_dicom_counts(house: House) -> None:
    pictures(house)
    frames = np.stack([np.full((48, 48), value, np.uint8) for value in (0, 0, 200, 0)])
    frames[2, :24] = 100
    house.images.joinpath("cat").mkdir(exist_ok=True)
    path = house.images / "cat/film.dcm"
    dicom(path, frames[0], NumberOfFrames=4, PixelData=frames.tobytes())
    assert kinds(house.report(patients="none")) == {"of several frames": 1}


def test_strict_refuses_what_is_wrong_and_the_report_is_there_to_look_at(house: House) -> None:
    pictures(house)
    assert house.report(strict=True).findings == ()
    house.picture("cat/black.png", value=0)
    (house.images / "dog/notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"(?s)not as `strict` asks.*notes\.txt.*of one colour.*black\.png"):
        house.read(strict=True)
    assert kinds(house.report()) == {"left out: no image": 1, "of one colour, or nearly": 1}
    assert "black.png" in (house.work / PAGE).read_text()


def test_page_and_json_are_for_the_house_alone_and_written_when_something_changed(house: House) -> None:
    pictures(house)
    house.picture("cat/<b>&.png", value=0)
    house.read()
    page, said = house.work / PAGE, json.loads((house.work / JSON).read_text())
    assert page.stat().st_mode & 0o077 == 0
    assert said["used"] == 25
    assert said["findings"][0]["kind"] == "of one colour, or nearly"
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 6 + 6 + 1
    assert "<b>&.png" not in text
    assert "&lt;b&gt;&amp;.png" in text
    assert "http" not in text.replace("http-equiv", "")
    written = page.stat().st_mtime_ns
    house.read()
    assert page.stat().st_mtime_ns == written
    (house.images / "cat/<b>&.png").unlink()
    house.read()
    assert "&lt;b&gt;" not in page.read_text()


def test_disk_that_fails_while_an_image_is_read_ends_the_run_by_its_name(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(house)
    read, left = read_contents, {"03.png": 2}
    monkeypatch.setattr(walk, "PATIENCE", (0.0, 0.0, 0.0))

    def failing(path: Path) -> object:
        if left.get(path.name, 0):
            left[path.name] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(extracting, "read_contents", failing)
    assert house.report().used == 24, "a hiccup passes"
    shutil.rmtree(house.work)
    left["03.png"] = 1000
    with pytest.raises(
        DataError, match=r"03\.png': cannot be read \(Input/output error\); the disk or the share fails"
    ):
        house.read()
