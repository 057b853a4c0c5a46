from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.data.dataset import FeatureSet, ImageFile
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.features.extract import ExtractOptions, extract
from fedclip_secure.features.fixed_batches import Seats
from fedclip_secure.features.stage import FEATURES, Stage

KEYS = [bytes([number]) * 32 for number in range(200)]


def images_of(keys: list[bytes]) -> list[torch.Tensor]:
    return [torch.full((3, 2, 2), float(key[0])) for key in keys]


def test_every_image_is_in_one_pass_at_the_row_of_its_hash_and_passes_have_one_shape() -> None:
    seats, seen = Seats(8), dict[bytes, int]()
    for key, image in zip(KEYS, images_of(KEYS), strict=True):
        seats.add(key, image)
        for keys, images in seats.passes(all_of_them=False):
            assert images.shape == (8, 3, 2, 2)
            assert len(keys) >= 4, "hardly a row is empty"
            seen |= {key: row for key, row in keys.items() if images[row].eq(key[0]).all()}
    assert not all(key in seen for key in KEYS)
    assert all(key in seats for key in KEYS if key not in seen)
    for keys, images in seats.passes(all_of_them=True):
        assert images.shape == (8, 3, 2, 2)
        seen |= {key: row for key, row in keys.items() if images[row].eq(key[0]).all()}
        empty = [row for row in range(8) if row not in keys.values()]
        assert not images[empty].any()
    assert seen == {key: int.from_bytes(key[:8], "big") % 8 for key in KEYS}


@pytest.fixture(scope="module")
def encoder(random_tower: Path) -> Encoder:
    return resolve(OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json"), random_tower)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(41):
        Image.fromarray(random.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [ImageFile(folder / f"{number}.png", number % 2) for number in range(41)]


def apart(files: list[ImageFile], encoder: Encoder, folder: Path, stage: Stage = FEATURES) -> FeatureSet:
    options = ExtractOptions(batch_size=8, stage=stage, apart=True)
    return extract(files, encoder, folder, lambda _: None, options).features


@pytest.mark.parametrize("stage", [FEATURES, Stage("tokens", 1), Stage("pixels")])
def test_features_of_an_image_are_the_same_bits_whichever_others_are_there(
    encoder: Encoder, files: list[ImageFile], tmp_path: Path, stage: Stage
) -> None:
    whole = apart(files, encoder, tmp_path / "whole", stage).taken
    for name, kept in {
        "first gone": range(1, 41),
        "alone": [40],
        "backwards": range(40, -1, -1),
        "few": [3, 9],
    }.items():
        found = apart([files[number] for number in kept], encoder, tmp_path / name, stage).taken
        assert np.array_equal(found, whole[list(kept)])


def test_images_that_come_later_are_encoded_as_if_they_had_been_there(
    encoder: Encoder, files: list[ImageFile], tmp_path: Path
) -> None:
    apart(files[:20], encoder, tmp_path / "grown")
    assert np.array_equal(
        apart(files, encoder, tmp_path / "grown").taken, apart(files, encoder, tmp_path / "whole").taken
    )


def test_features_of_mixed_batches_are_not_taken_for_those_of_images_apart(
    encoder: Encoder, files: list[ImageFile], tmp_path: Path
) -> None:
    mixed = extract(files, encoder, tmp_path, lambda _: None, ExtractOptions(batch_size=8)).features
    folders = {path.parent for path in tmp_path.rglob("*.safetensors")}
    assert np.allclose(apart(files, encoder, tmp_path).taken, mixed.taken, rtol=1e-4, atol=1e-5)
    assert len({path.parent for path in tmp_path.rglob("*.safetensors")} - folders) == 1
