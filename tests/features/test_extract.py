from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.data.dataset import FeatureSet, ImageFile
from fedclip_secure.data.folder import load_image, read_folder
from fedclip_secure.errors import DataError
from fedclip_secure.features.cache import FeatureCache
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.features.extract import extract

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.fixture(scope="session")
def encoder(random_tower: Path) -> Encoder:
    return resolve(OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json"), random_tower)[0]


@pytest.fixture
def files(tmp_path: Path) -> list[ImageFile]:
    random = np.random.default_rng(0)
    found = []
    for number in range(10):
        path = tmp_path / f"images/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)
        found.append(ImageFile(path, number % 2))
    return found


class Runs:
    """Extracts into one store, opened anew each time, and keeps the progress calls of the last run."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self.encoder, self.folder = encoder, folder
        self.calls: list[tuple[int, int]] = []

    def __call__(self, files: list[ImageFile], batch_size: int = 3) -> FeatureSet:
        self.calls = []
        cache = FeatureCache(self.folder, self.encoder.digest, self.encoder.lock.dim)
        return extract(files, self.encoder, cache, batch_size, lambda done, total: self.calls.append((done, total)))


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


def test_second_run_encodes_nothing(run: Runs, files: list[ImageFile]) -> None:
    first = run(files)
    second = run(files)
    assert run.calls == [(10, 10)]
    assert (first.image_features == second.image_features).all()


def test_new_images_alone_are_encoded(run: Runs, files: list[ImageFile]) -> None:
    run(files[:6])
    run(files)
    assert run.calls[0] == (6, 10)


def test_duplicates_are_encoded_once_and_stay_two_records(run: Runs, files: list[ImageFile], tmp_path: Path) -> None:
    copy = ImageFile(Path(shutil.copy(files[0].path, tmp_path / "copy.png")), 1)
    found = run([*files, copy])
    assert run.calls[-1] == (10, 10)
    assert len(found) == 11
    assert (found.image_features[0] == found.image_features[10]).all()
    assert (found.unit_ids[0] == found.unit_ids[10]).all()


def test_broken_images_are_named_after_all_others_are_cached(run: Runs, files: list[ImageFile]) -> None:
    for number in (2, 5):
        files[number].path.write_bytes(b"broken %d" % number)
    files[7].path.unlink()
    with pytest.raises(DataError) as caught:
        run(files)
    assert str(caught.value).startswith("3 image(s) cannot be used; all others are in the cache")
    assert all(f"{number}.png" in str(caught.value) for number in (2, 5, 7))
    run([file for number, file in enumerate(files) if number not in (2, 5, 7)])
    assert run.calls == [(7, 7)]


def test_first_ten_of_many_broken_images_are_listed(run: Runs, tmp_path: Path) -> None:
    broken = [ImageFile(tmp_path / f"gone{number}.png", 0) for number in range(12)]
    with pytest.raises(DataError, match=r"^12 image") as caught:
        run(broken)
    assert str(caught.value).count("gone") == 10
    assert str(caught.value).endswith("and 2 more")


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
    files = read_folder(pacs_mini / "sketch", CLASSES)
    found = run(files, batch_size=64)
    assert found.image_features.shape == (168, 64)
    assert np.bincount(found.labels).tolist() == [24] * 7
