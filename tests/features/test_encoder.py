from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fedclip_secure.config.lock import ImageEncoder, OpenClipEncoder
from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.encoder import Encoder, choose_device, load_encoder, resolve
from tools.random_tower import write_random_tower

MODEL = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")


@pytest.fixture(scope="session")
def resolved(random_tower: Path) -> Encoder:
    return resolve(MODEL, random_tower)[0]


@pytest.fixture
def home(random_tower: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_tower, tmp_path / "home"))


def reload(lock: ImageEncoder, weights: Path | None, model: OpenClipModel = MODEL) -> Encoder:
    return load_encoder(lock, model, weights, "cpu")


def test_lock_holds_all_that_decides_a_feature(resolved: Encoder, random_tower: Path) -> None:
    lock = resolved.lock
    assert isinstance(lock, OpenClipEncoder)
    assert json.loads(lock.config) == json.loads((random_tower / "tower.json").read_text())
    assert (lock.dim, lock.preprocessing.size, lock.preprocessing.resize_mode) == (64, 64, "shortest")
    assert lock.logit_scale == pytest.approx(1 / 0.07)


def test_silo_needs_no_config_file_and_gets_the_same_features(resolved: Encoder, random_tower: Path) -> None:
    encoder = reload(resolved.lock, random_tower / "tower.safetensors")
    batch = torch.rand(3, 3, 64, 64)
    features = encoder.encode_images(batch)
    assert features.dtype == np.float32
    assert features.shape == (3, 64)
    assert (features == resolved.encode_images(batch)).all()
    assert encoder.digest == resolved.digest


def test_image_features_equal_open_clips_own_and_are_not_normalised(resolved: Encoder, random_tower: Path) -> None:
    config = json.loads((random_tower / "tower.json").read_text())
    reference = open_clip.CLIP(**config).eval()
    open_clip.load_checkpoint(reference, str(random_tower / "tower.safetensors"))
    batch = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert np.allclose(reference.encode_image(batch).numpy(), resolved.encode_images(batch), atol=1e-6)
    assert not np.allclose(np.linalg.norm(resolved.encode_images(batch), axis=1), 1)


def test_text_features_are_the_normalised_mean_over_templates(resolved: Encoder, random_tower: Path) -> None:
    config = json.loads((random_tower / "tower.json").read_text())
    reference = open_clip.CLIP(**config).eval()
    open_clip.load_checkpoint(reference, str(random_tower / "tower.safetensors"))
    with torch.no_grad():
        text = reference.encode_text(open_clip.tokenize(["a dog", "the dog"]), normalize=True).mean(dim=0)
    found = resolved.text_features([["a dog", "the dog"], ["a cat"]])
    assert found.shape == (2, 64)
    assert found.dtype == np.float32
    assert np.allclose(found[0], text / text.norm(), atol=1e-6)


def test_encoder_is_frozen_and_in_eval_mode(resolved: Encoder) -> None:
    batch = torch.rand(2, 3, 64, 64, requires_grad=True)
    assert (resolved.encode_images(batch) == resolved.encode_images(batch)).all()
    assert batch.grad is None


def test_transform_gives_the_locked_size(resolved: Encoder) -> None:
    assert resolved.transform(Image.new("RGB", (100, 80))).shape == (3, 64, 64)


def test_digest_changes_with_weights_window_and_preprocessing(resolved: Encoder, random_tower: Path) -> None:
    lock, weights = resolved.lock, random_tower / "tower.safetensors"
    squash = lock.model_copy(update={"preprocessing": lock.preprocessing.model_copy(update={"resize_mode": "squash"})})
    windowed = MODEL.model_copy(update={"image_window": (0, 4095)})
    digests = {resolved.digest, reload(squash, weights).digest, reload(lock, weights, windowed).digest}
    assert len(digests) == 3


def test_other_weights_are_refused_with_both_digests(resolved: Encoder, tmp_path: Path) -> None:
    write_random_tower(tmp_path, seed=1)
    with pytest.raises(ModelError) as caught:
        reload(resolved.lock, tmp_path / "tower.safetensors")
    assert resolved.lock.weights_sha256 in str(caught.value)
    assert "set `weights: PATH` in silo.yaml" in str(caught.value)


def test_file_with_another_digest_is_not_parsed(resolved: Encoder, tmp_path: Path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="not the file that the coordinator locked"):
        reload(resolved.lock, tmp_path / "junk.safetensors")


def test_silo_without_the_coordinators_file_is_told_to_copy_it(resolved: Encoder) -> None:
    with pytest.raises(ModelError, match=r"copy it from the coordinator and set `weights: PATH` in silo\.yaml"):
        reload(resolved.lock, None)


def test_missing_weights_of_the_silo_are_named(resolved: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.safetensors': cannot be read"):
        reload(resolved.lock, tmp_path / "gone.safetensors")


def test_unknown_model_is_refused_with_near_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model 'ViT-B32'; near: .*ViT-B-32"):
        resolve(OpenClipModel(name="ViT-B32", pretrained="openai"), tmp_path)


def test_unknown_tag_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'opneai' is no file beside federation\.yaml .*tags: openai, "):
        resolve(OpenClipModel(name="ViT-B-32", pretrained="opneai"), tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no open_clip model config"),
        ('{"embed_dim": 8, "vision_cfg": {}}', "it needs `embed_dim`, `vision_cfg` and `text_cfg`"),
        ('{"embed_dim": 8, "vision_cfg": {"x": 1}, "text_cfg": {}}', "open_clip cannot build this model config"),
    ],
)
def test_config_at_fault_is_named(home: Path, content: str, match: str) -> None:
    (home / "tower.json").write_text(content)
    with pytest.raises(ModelError, match=rf"tower\.json.*{match}"):
        resolve(MODEL, home)


def test_config_may_not_run_a_strangers_code(home: Path) -> None:
    config = json.loads((home / "tower.json").read_text())
    config["text_cfg"] |= {"hf_tokenizer_name": "someone/model", "tokenizer_kwargs": {"trust_remote_code": True}}
    (home / "tower.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="tokenizer_kwargs: trust_remote_code is not allowed"):
        resolve(MODEL, home)


def test_preprocessing_of_a_hub_config_is_kept(home: Path) -> None:
    config = json.loads((home / "tower.json").read_text())
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
    (home / "tower.json").write_text(json.dumps(whole))
    lock = resolve(MODEL, home)[0].lock
    assert isinstance(lock, OpenClipEncoder)
    assert (lock.preprocessing.mean, lock.preprocessing.resize_mode) == ([0.5] * 3, "squash")
    assert json.loads(lock.config) == config


def test_preprocessing_at_fault_is_named(home: Path) -> None:
    config = json.loads((home / "tower.json").read_text())
    (home / "tower.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"interpolation": "random"}}))
    with pytest.raises(ConfigError, match="interpolation"):
        resolve(MODEL, home)


def test_missing_config_is_named(home: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.json': cannot be read"):
        resolve(MODEL.model_copy(update={"config": "gone.json"}), home)


def test_device_that_is_not_there_is_named() -> None:
    assert choose_device("cpu").type == "cpu"
    there = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == there
    with pytest.raises(ConfigError, match="torch finds no such device"):
        choose_device("mps" if there == "cuda" else "cuda")


def test_openai_weights_in_a_gelu_model_are_refused_before_any_download(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"trained with QuickGELU.*set `model\.name: ViT-B-32-quickgelu`"):
        resolve(OpenClipModel(name="ViT-B-32", pretrained="openai"), tmp_path)


def test_openai_file_in_a_gelu_model_is_refused(home: Path) -> None:
    marks = {name: torch.tensor(64) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**load_file(home / "tower.safetensors"), **marks}, home / "openai.pt")
    model = MODEL.model_copy(update={"pretrained": "openai.pt"})
    with pytest.raises(ModelError, match=r"'openai\.pt' were trained with QuickGELU.*\"quick_gelu\": true"):
        resolve(model, home)
