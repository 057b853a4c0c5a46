from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.data.dataset import FeatureSet, ImageFile
from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.image import load_image
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.features.encoder import Encoder, load_encoder, resolve
from fedclip_secure.features.extract import ExtractOptions, extract
from fedclip_secure.features.progress import Progress
from fedclip_secure.features.stage import FEATURES, Stage
from fedclip_secure.features.unusable_images import Broken

ROOT = Path(__file__).resolve().parents[2]
HOUR_AGO = time.time_ns() - 3_600_000_000_000
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.fixture(scope="session")
def encoder(random_tower: Path) -> Encoder:
    return resolve(OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json"), random_tower)[0]


def age(files: list[ImageFile]) -> None:
    """Make them an hour old: what was written this moment the index does not take."""
    for file in files:
        os.utime(file.path, ns=(HOUR_AGO, HOUR_AGO))


@pytest.fixture
def files(tmp_path: Path) -> list[ImageFile]:
    random = np.random.default_rng(0)
    found = []
    for number in range(10):
        path = tmp_path / f"images/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)
        found.append(ImageFile(path, number % 2))
    age(found)
    return found


class Runs:
    """Extracts into one store, opened anew each time, and keeps the progress calls of the last run."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self.encoder, self.folder = encoder, folder
        self.calls: list[tuple[int, int]] = []
        self.cached: list[int] = []
        self.broken: list[Broken] = []

    def __call__(
        self,
        files: list[ImageFile],
        batch_size: int = 3,
        *,
        verify: bool = False,
        stage: Stage = FEATURES,
        apart: bool = False,
    ) -> FeatureSet:
        self.calls, self.cached = [], []
        options = ExtractOptions(verify, batch_size, stage, apart)
        found = extract(files, self.encoder, self.folder, self._show, options)
        self.broken = found.broken
        return found.features

    def _show(self, now: Progress) -> None:
        self.calls.append((now.done, now.total))
        self.cached.append(now.cached)


@pytest.fixture
def run(encoder: Encoder, tmp_path: Path) -> Runs:
    return Runs(encoder, tmp_path / "store")


def test_features_are_the_encoders_own_in_the_order_of_the_files(
    run: Runs, encoder: Encoder, files: list[ImageFile]
) -> None:
    found = run(files)
    images = [encoder.transform(load_image(file.path, None))[None] for file in files]
    for image, row in zip(images, found.image_features, strict=True):
        assert np.allclose(encoder.encode_images(image)[0], row, atol=1e-5)
    assert found.labels.tolist() == [0, 1] * 5
    assert found.unit_ids[4].tobytes() == hashlib.sha256(files[4].path.read_bytes()).digest()
    assert run.calls == [(0, 10), (3, 10), (6, 10), (9, 10), (10, 10)]


@pytest.mark.parametrize("stage", [Stage("tokens", 0), Stage("tokens", 2), Stage("pixels")])
def test_another_stage_lies_beside_the_features_and_is_encoded_once(
    run: Runs, encoder: Encoder, files: list[ImageFile], stage: Stage
) -> None:
    found = run(files, stage=stage)
    images = torch.stack([encoder.transform(load_image(file.path, None)) for file in files])
    assert found.inputs is not None
    assert found.inputs.shape == (10, *encoder.shape_of(stage))
    assert np.allclose(found.inputs, encoder.encode_images(images, stage), atol=1e-5)
    assert np.allclose(found.image_features, encoder.encode_images(images), atol=1e-5)
    again = run(files, stage=stage)
    assert run.calls == [(10, 10), (10, 10)]
    assert again.inputs is not None
    assert (again.inputs == found.inputs).all()
    assert run(files).inputs is None


def test_second_run_encodes_nothing(run: Runs, files: list[ImageFile]) -> None:
    first = run(files)
    second = run(files)
    assert run.calls == [(10, 10)]
    assert (first.image_features == second.image_features).all()


def test_progress_counts_images_as_they_are_encoded_and_not_as_they_are_read(run: Runs, files: list[ImageFile]) -> None:
    run(files, batch_size=2, apart=True)  # each waits for others that fill a pass with it
    assert run.calls[:2] == [(0, 10), (0, 10)]
    assert run.calls[-1] == (10, 10)
    assert run.cached == [0] * len(run.calls)


def test_what_the_cache_has_of_a_file_that_is_read_again_is_not_counted_as_encoded(
    run: Runs, files: list[ImageFile]
) -> None:
    run(files)
    run(files, verify=True)
    assert (run.calls[0], run.calls[-1]) == ((0, 10), (10, 10))
    assert (run.cached[0], run.cached[-1]) == (0, 10)


def test_new_images_alone_are_encoded(run: Runs, files: list[ImageFile]) -> None:
    run(files[:6])
    run(files)
    assert run.calls[0] == (6, 10)


def test_duplicates_are_encoded_once_and_stay_two_records(run: Runs, files: list[ImageFile], tmp_path: Path) -> None:
    copy = ImageFile(Path(shutil.copy(files[0].path, tmp_path / "copy.png")), 1)
    found = run([*files, copy])
    assert run.calls[-1] == (11, 11)
    (shard,) = run.folder.rglob("*.safetensors")
    assert len(load_file(shard)["keys"]) == 10
    assert len(found) == 11
    assert (found.image_features[0] == found.image_features[10]).all()
    assert (found.unit_ids[0] == found.unit_ids[10]).all()


def break_some(files: list[ImageFile]) -> list[ImageFile]:
    """Three files at fault; the others."""
    for number in (2, 5):
        files[number].path.write_bytes(b"broken %d" % number)
    files[7].path.unlink()
    return [file for number, file in enumerate(files) if number not in (2, 5, 7)]


def test_broken_images_are_left_out_with_their_reasons(run: Runs, files: list[ImageFile]) -> None:
    whole = break_some(files)
    found = run(files)
    assert found.labels.tolist() == [file.label for file in whole]
    assert (found.image_features == run(whole).image_features).all()
    run(files)
    assert [image.number for image in run.broken] == [2, 5, 7]
    assert ["not an image" in image.reason for image in run.broken] == [True, True, False]
    assert "7.png': cannot be read (No such file" in run.broken[2].reason


def test_image_that_was_mended_is_used_again(run: Runs, files: list[ImageFile]) -> None:
    whole = files[2].path.read_bytes()
    break_some(files)
    run(files)
    files[2].path.write_bytes(whole)
    assert len(run(files)) == 8


def test_class_of_which_nothing_is_left_is_refused(run: Runs, files: list[ImageFile], tmp_path: Path) -> None:
    gone = [ImageFile(tmp_path / f"gone{number}.png", 2) for number in range(3)]
    with pytest.raises(DataError, match=r"none of the 3 image\(s\) of a class can be used; .*Check the disk"):
        run([*files, *gone])


def test_image_that_needs_the_plans_window_stops_the_run(run: Runs, files: list[ImageFile]) -> None:
    """It is not the file's fault: leaving all 16-bit images out would be a silent loss."""
    Image.fromarray(np.full((70, 80), 4000, np.uint16)).save(files[3].path)
    with pytest.raises(ConfigError, match=r"3\.png': holds grey values .*model\.image_window"):
        run(files)


def test_unchanged_file_is_not_read_again_but_by_verify(run: Runs, files: list[ImageFile]) -> None:
    first = run(files)
    data = bytearray(files[4].path.read_bytes())
    Image.new("RGB", (70, 80)).save(files[4].path)
    files[4].path.write_bytes(files[4].path.read_bytes().ljust(len(data), b"\0"))
    age(files)
    assert (run(files).unit_ids == first.unit_ids).all()
    assert run.calls == [(10, 10)]
    assert (run(files, verify=True).unit_ids[4] != first.unit_ids[4]).any()
    assert run.calls[0] == (0, 10)
    assert (run(files).unit_ids[4] != first.unit_ids[4]).any()
    assert run.calls == [(10, 10)]


def test_changed_file_is_read_again(run: Runs, files: list[ImageFile]) -> None:
    first = run(files)
    Image.new("RGB", (70, 80)).save(files[4].path)
    second = run(files)
    assert run.calls[0] == (9, 10)
    assert (first.unit_ids[4] != second.unit_ids[4]).any()


def test_images_of_one_patient_share_their_unit(run: Runs, files: list[ImageFile]) -> None:
    unit = b"p" * 32
    found = run([replace(files[0], unit=unit), replace(files[1], unit=unit), *files[2:]])
    assert [row.tobytes() == unit for row in found.unit_ids] == [True] * 2 + [False] * 8


def test_other_precision_has_a_cache_of_its_own_and_nearly_the_same_features(
    run: Runs, files: list[ImageFile], random_tower: Path
) -> None:
    exact = run(files).image_features
    weights = random_tower / "tower.safetensors"
    model = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")
    run.encoder = load_encoder(run.encoder.lock, model, weights, "cpu", "bf16")
    rough = run(files).image_features
    assert run.calls[0] == (0, 10)
    assert not (exact == rough).all()
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosine.min() > 0.999


def test_run_that_was_killed_goes_on_from_its_last_shard(run: Runs, random_tower: Path, tmp_path: Path) -> None:
    images = tmp_path / "many"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 3), dtype=np.uint8)
    files = []
    for number, pixels in enumerate(noise):
        files.append(ImageFile(images / f"{number}.bmp", 0))
        Image.fromarray(pixels).save(files[-1].path)
    age(files)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(random_tower), str(images), str(run.folder)], cwd=ROOT
    )
    while not list(run.folder.rglob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = run(files, batch_size=32)
    before = run.calls[0][0]
    assert 512 <= before < 1500, "what was stored is not encoded again"
    assert run.calls[-1] == (1500, 1500)
    stored = sum(len(load_file(path)["keys"]) for path in run.folder.rglob("*.safetensors"))
    assert stored == len({unit.tobytes() for unit in found.unit_ids}) == 1500, "no image is stored twice"


KILLED = """
import sys
from pathlib import Path
from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.features.encoder import resolve
from fedclip_secure.features.extract import ExtractOptions, extract
tower, images, folder = map(Path, sys.argv[1:])
model = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")
files = [ImageFile(images / f"{number}.bmp", 0) for number in range(1500)]
extract(files, resolve(model, tower)[0], folder, lambda progress: None, ExtractOptions(batch_size=32))
"""


def test_damaged_shard_is_encoded_again(run: Runs, files: list[ImageFile]) -> None:
    first = run(files)
    (shard,) = run.folder.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    second = run(files)
    assert run.calls[0] == (0, 10)
    assert (first.image_features == second.image_features).all()


def test_no_images_is_an_error(run: Runs) -> None:
    with pytest.raises(DataError, match="no images"):
        run([])


def test_real_images_are_extracted(run: Runs, pacs_mini: Path) -> None:
    files = read_folder(pacs_mini / "sketch", CLASSES).files
    found = run(files, batch_size=64)
    assert found.image_features.shape == (168, 64)
    assert np.bincount(found.labels).tolist() == [24] * 7


def test_absolute_and_relative_paths_may_stand_together(
    encoder: Encoder, files: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixed = [ImageFile(Path("images/0.png"), 0), files[1]]
    found = extract(mixed, encoder, tmp_path / "store", lambda _: None, ExtractOptions())
    assert len(found.features) == 2
