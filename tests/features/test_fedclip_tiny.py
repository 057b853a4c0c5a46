from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.data.drawn.drawings import draw
from fedclip_secure.data.drawn.labs import CLASSES, LABS
from fedclip_secure.data.drawn.staining import Look, render
from fedclip_secure.features.encoder import Encoder, load_encoder, resolve

ASSETS = Path(str(files("fedclip_secure"))) / "assets" / "fedclip-tiny"
MODEL = OpenClipModel(
    name="fedclip-tiny", pretrained="fedclip-tiny.safetensors", config="fedclip-tiny.json", image_window=None
)
SEED = 100  # 0 to 4 are kept for the demo's acceptance
PER_CLASS = 20


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return resolve(MODEL, ASSETS)[0]


def zero_shot(encoder: Encoder, look: Look) -> float:
    """Accuracy over PER_CLASS drawings of each class under `look`."""
    text = encoder.text_features([[f"a micrograph of {phrase}"] for phrase in CLASSES.values()])
    random = np.random.default_rng(SEED)
    pictures = [
        encoder.transform(render(draw(kind, random), look, random)) for kind in CLASSES for _ in range(PER_CLASS)
    ]
    found = (encoder.encode_images(torch.stack(pictures)) @ text.T).argmax(axis=1)
    return float((found == np.repeat(np.arange(len(CLASSES)), PER_CLASS)).mean())


def test_both_files_are_under_ten_megabytes_together() -> None:
    assert {path.name for path in ASSETS.iterdir()} == {"fedclip-tiny.json", "fedclip-tiny.safetensors"}
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 10_000_000


def test_weights_are_kept_in_half_precision_and_computed_in_single(encoder: Encoder) -> None:
    with safe_open(ASSETS / "fedclip-tiny.safetensors", framework="np") as file:
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping
    assert {kind for key, kind in kinds.items() if not key.endswith("num_batches_tracked")} == {"F16"}
    assert encoder.encode_images(torch.rand(1, 3, 64, 64)).dtype == np.float32


def test_silo_loads_what_the_coordinator_locked(encoder: Encoder) -> None:
    config = json.loads((ASSETS / "fedclip-tiny.json").read_text("utf-8"))
    assert (encoder.lock.dim, encoder.lock.preprocessing.size) == (config["embed_dim"], 64)
    loaded = load_encoder(encoder.lock, MODEL, ASSETS / "fedclip-tiny.safetensors", "cpu")
    batch = torch.rand(2, 3, 64, 64)
    assert (loaded.encode_images(batch) == encoder.encode_images(batch)).all()
    assert loaded.digest == encoder.digest


def test_it_knows_the_classes_where_no_lab_is_special(encoder: Encoder) -> None:
    assert zero_shot(encoder, replace(LABS["willow"].look, stripes=(0.0, 1.0))) > 0.9


@pytest.mark.parametrize("name", LABS)
def test_the_labs_common_scanner_leaves_room_to_learn(encoder: Encoder, name: str) -> None:
    assert 0.25 < zero_shot(encoder, LABS[name].look) < 0.85
