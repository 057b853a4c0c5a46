from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.batch_size import batch_size, fitting
from fedclip_secure.features.encoder import Encoder, load_encoder, resolve

MODEL = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")


class Narrow(torch.nn.Module):
    """A tower whose device has room for so many images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.visual = torch.nn.Identity()
        self.sizes: list[int] = []

    def encode_image(self, batch: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("no room")
        return batch.flatten(1)[:, :2]


@pytest.fixture(scope="session")
def tower(random_tower: Path) -> Encoder:
    return resolve(MODEL, random_tower)[0]


def narrow(tower: Encoder, room: int) -> tuple[Encoder, Narrow]:
    model = Narrow(room)
    return Encoder(model, tower.lock, None, torch.device("cpu")), model


def test_out_of_memory_halves_the_batch_and_goes_on(tower: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder, model = narrow(tower, room=3)
    batch = torch.rand(10, 3, 4, 4)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(encoder.encode_images(batch), batch.flatten(1)[:, :2].numpy())
    assert model.sizes == [10, 5, 2, 2, 2, 2, 2]
    assert "out of memory with 10 images at once; going on with 5" in caplog.text
    model.sizes.clear()
    encoder.encode_images(batch)
    assert model.sizes == [2] * 5, "what was learned is kept"


def test_pass_whose_images_belong_together_is_not_halved(tower: Encoder) -> None:
    encoder, model = narrow(tower, room=3)
    with pytest.raises(ModelError, match=r"cpu: too little memory for 4 images at once, and with `privacy` no fewer"):
        encoder.encode_images(torch.rand(4, 3, 4, 4), in_one=True)
    assert model.sizes == [4]


def test_no_room_for_one_image_is_told_with_the_remedy(tower: Encoder) -> None:
    encoder, _ = narrow(tower, room=0)
    with pytest.raises(ModelError, match=r"cpu: too little memory for one image; .*`device: cpu`"):
        encoder.encode_images(torch.rand(4, 3, 4, 4))


@pytest.mark.parametrize(
    ("free", "each", "images"), [(2**30, 2**20, 512), (2**30, 3e6, 128), (100, 1e6, 1), (2**40, 0, 512)]
)
def test_batch_is_a_power_of_two_in_half_the_free_memory(free: int, each: float, images: int) -> None:
    assert fitting(free, each) == images


def test_batch_without_cuda_is_fixed(tower: Encoder) -> None:
    assert batch_size(tower) == 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_batch_on_cuda_fits_and_precisions_agree(tower: Encoder, random_tower: Path) -> None:
    batch = torch.rand(8, 3, 64, 64)
    for precision in ("fp16", "bf16", "fp32"):
        encoder = load_encoder(tower.lock, MODEL, random_tower / "tower.safetensors", "cuda", precision)
        assert 1 <= batch_size(encoder) <= 512
        assert np.allclose(encoder.encode_images(batch), tower.encode_images(batch), atol=0.05)


def test_fp16_on_a_cpu_is_refused_with_the_reason(tower: Encoder, random_tower: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision: fp16: few CPUs compute in it.*set `bf16` or `fp32`"):
        load_encoder(tower.lock, MODEL, random_tower / "tower.safetensors", "cpu", "fp16")


def test_bf16_really_computes_in_bf16_and_leaves_the_text_tower_alone(tower: Encoder, random_tower: Path) -> None:
    seen = set[torch.dtype]()
    encoder = load_encoder(tower.lock, MODEL, random_tower / "tower.safetensors", "cpu", "bf16")
    for module in encoder._model.visual.modules():
        module.register_forward_hook(
            lambda _module, _given, made: seen.add(made.dtype) if hasattr(made, "dtype") else None
        )
    assert encoder.encode_images(torch.rand(2, 3, 64, 64)).dtype == np.float32
    assert seen == {torch.bfloat16}
    prompts = [["a dog"], ["a cat"]]
    assert (encoder.text_features(prompts) == tower.text_features(prompts)).all()
