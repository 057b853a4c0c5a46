"""`fedclip-silo extract` in the folder of a silo that has accepted a plan, without a server."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedclip_cli import silo
from fedclip_cli.console import image_progress

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import read_silo
from fedclip_secure.features.progress import Progress
from fedclip_secure.pki.roster import Roster
from fedclip_secure.silo.accepted import Accepted, save_accepted
from fedclip_secure.training.prepare import prepare
from tests.cli.test_agg_mistakes import refused, run


class Lab:
    """A silo with four photos of each class under `images`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "silo.yaml"
        self.images = folder / "images"

    def extract(self, *more: str) -> str:
        result = run("extract", "--config", str(self.config), *more, program=silo.main)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(self, said: str, *more: str) -> str:
        return refused(said, "extract", "--config", str(self.config), *more, program=silo.main)

    def set(self, data: str) -> None:
        lines = self.config.read_text().splitlines()
        self.config.write_text("\n".join(f"data: {data}" if line.startswith("data:") else line for line in lines))


@pytest.fixture
def lab(tmp_path: Path, random_tower: Path, pacs_mini: Path, tower_plan: FederationPlan) -> Lab:
    lab = Lab(tmp_path)
    for source in sorted((pacs_mini / "photo").iterdir()):
        (lab.images / source.name).mkdir(parents=True)
        for image in sorted(source.iterdir())[:4]:
            shutil.copy(image, lab.images / source.name)
            os.utime(lab.images / source.name / image.name, (time.time() - 3600,) * 2)
    lab.config.write_text(
        "name: lab\ndata: {format: folder, path: images}\n"
        f"device: cpu\nweights: {random_tower / 'tower.safetensors'}\n"
    )
    contract = Contract(tower_plan, prepare(tower_plan, random_tower).lock)
    names = ("aggregator", "lab", "other", "third")
    roster = Roster.of({name: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for name in names})
    save_accepted(lab.config, read_silo(lab.config), Accepted(contract, roster), None)
    return lab


def sizes(output: str) -> list[int]:
    line = next(line for line in output.splitlines() if line.startswith("features ready: "))
    return [int(part.split()[-1]) for part in line.removeprefix("features ready: ").split(", ")]


def test_broken_image_is_left_out_listed_and_warned_of(lab: Lab) -> None:
    assert sum(sizes(lab.extract())) == 28
    broken = lab.images / "dog" / "torn.jpg"
    broken.write_bytes(b"torn")
    said = lab.extract()
    assert sum(sizes(said)) == 28
    assert "1 file(s) cannot be used and were left out" in said
    assert f"  '{broken}': cannot be read as an image (not an image)" in said
    listed = lab.folder / "work" / "left-out.csv"
    assert f"all that was left out: {listed}" in said
    assert listed.read_text().splitlines()[1].startswith(f"{broken},cannot be used,")
    broken.unlink()
    assert "left out" not in lab.extract()
    assert listed.read_text().splitlines() == ["path,reason,detail"]


def test_data_are_told_as_a_table_and_as_json(lab: Lab) -> None:
    lines = lab.extract().splitlines()
    assert lines[0].split() == ["class", "train", "validation", "test", "all"]
    assert [line.split()[0] for line in lines[1:8]] == sorted(path.name for path in lab.images.iterdir())
    assert all(line.split()[-1] == "4" for line in lines[1:8])
    assert lines[8] == "patients are not known: each image counts as a patient of its own"
    assert lines[9] == "smallest class: 'dog', 4 image(s)"
    said = json.loads(lab.extract("--json"))
    assert (said["used"], said["smallest_class"], said["patients"]) == (28, "dog", None)


def test_strict_refuses_broken_images_on_the_command_line_and_in_the_file(lab: Lab) -> None:
    (lab.images / "dog" / "torn.jpg").write_bytes(b"torn")
    lab.refused(r"the data are not as `strict` asks.*1 file\(s\) cannot be used.*torn\.jpg", "--strict")
    lab.set("{format: folder, path: images, strict: true}")
    lab.refused(r"torn\.jpg")


def test_verify_finds_what_changed_under_the_same_size_and_time(lab: Lab) -> None:
    before = lab.extract()
    one, other = sorted((lab.images / "dog").iterdir())[:2]
    size, modified = one.stat().st_size, one.stat().st_mtime_ns
    one.write_bytes(other.read_bytes()[:size].ljust(size, b"\0"))
    os.utime(one, ns=(modified, modified))
    assert lab.extract() == before
    shards = list((lab.folder / "work" / "features").rglob("*.safetensors"))
    lab.extract("--verify")
    assert len(list((lab.folder / "work" / "features").rglob("*.safetensors"))) == len(shards) + 1


def test_other_precision_says_what_training_needs(lab: Lab) -> None:
    assert "to train on them" not in lab.extract("--precision", "fp32")
    assert "to train on them set `precision: bf16`" in lab.extract("--precision", "bf16")
    lab.refused("precision: fp16: few CPUs compute in it", "--precision", "fp16")


def test_patients_of_a_folder_and_of_a_manifest_fall_into_one_split(lab: Lab) -> None:
    images = sorted(path.relative_to(lab.images) for path in lab.images.rglob("*.jpg"))
    lab.folder.joinpath("patients.csv").write_text("path,patient\n" + "".join(f"{path},one\n" for path in images))
    lab.set("{format: folder, path: images, patients: patients.csv}")
    assert sorted(sizes(lab.extract())) == [0, 0, 28]
    rows = "".join(f"{path},{path.parts[0]},one\n" for path in images)
    lab.folder.joinpath("records.csv").write_text("path,label,patient\n" + rows)
    lab.set("{format: manifest, path: records.csv, root: images}")
    assert sorted(sizes(lab.extract())) == [0, 0, 28]
    lab.set("{format: manifest, path: records.csv}")
    lab.refused(r"none of the 4 image\(s\) of a class can be used; .*No such file")


def test_plain_progress_tells_speed_time_left_and_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    with image_progress() as show:
        monkeypatch.setattr(time, "monotonic", lambda: now + 11)
        show(Progress(10, 1000, 0, 2, 8.94, 110.7))
        show(Progress(20, 1000, 0, 2, 8.94, 109.7))
        monkeypatch.setattr(time, "monotonic", lambda: now + 22)
        show(Progress(30, 1000, 0, 0, None, None))
        show(Progress(1000, 1000, 0, 0, None, None))
        show(Progress(1000, 1000, 0, 0, None, None))
    lines = capsys.readouterr().out.splitlines()
    assert [line[line.index("extracted") :] for line in lines] == [
        "extracted 10 of 1000 images, 8.9 images/s, 0:01:51 left, 2 broken",
        "extracted 30 of 1000 images",
        "extracted 1000 of 1000 images",
    ]


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress(168, 168, 168, 0, None, None), "168 images: the cache has the features of all"),
        (Progress(12, 60, 12, 0, None, None), "extracted 0 of 48 images (12 more are in the cache)"),
        (Progress(60, 60, 12, 0, None, None), "extracted 48 of 48 images (12 more are in the cache)"),
        (Progress(48, 48, 0, 0, None, None), "extracted 48 of 48 images"),
    ],
)
def test_plain_progress_counts_what_is_encoded_and_says_what_the_cache_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, progress: Progress, line: str
) -> None:
    now = time.monotonic()
    with image_progress() as show:
        monkeypatch.setattr(time, "monotonic", lambda: now + 11)
        show(progress)
    assert capsys.readouterr().out.endswith(f" {line}\n")
