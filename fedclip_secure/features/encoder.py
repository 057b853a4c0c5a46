"""A frozen encoder of images, pinned by the SHA-256 of its weights: a CLIP of open_clip, or a ViT of timm."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image
from torch import nn

from fedclip_secure import canonical
from fedclip_secure.config.lock import ImageEncoder, OpenClipEncoder, TimmEncoder
from fedclip_secure.config.plan import ImageModel, OpenClipModel, TimmModel
from fedclip_secure.config.silo import Precision
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.clip import load_clip, settle_clip
from fedclip_secure.features.download import first_line
from fedclip_secure.features.stage import FEATURES, Stage
from fedclip_secure.features.tokenizer import Tokenizer, check_tokens, tokenizer_of, tokens_sha256
from fedclip_secure.features.towers import TextTower, VisualTower
from fedclip_secure.features.vision_only import load_vision_only, settle_vision_only

Floats = npt.NDArray[np.float32]
_log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEPTH_RULE = "grey of up to 8 bits as it is"  # how images under a window became 8-bit, for features that are kept
_NO_LIMIT = sys.maxsize


class Encoder:
    """A network in eval mode, without gradients, as the lock fixes it: CLIP's two towers, or timm's of images alone.

    Attributes:
        lock: what `federation.lock` says about it.
        window: [low, high] of 16-bit images, from the plan.
        device: where it computes.
        transform: RGB image -> (3, S, S) float32, open_clip's evaluation preprocessing.
        digest: 32 bytes over all that decides a feature: weights, network, preprocessing, window and `precision`.

    `precision` is the image tower's. The text tower stays in fp32: it runs once, and so all silos have one task.
    `tokenizer` is a local folder of the text tower's tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        lock: ImageEncoder,
        window: tuple[int, int] | None,
        device: torch.device,
        precision: Precision = "fp32",
        *,
        tokenizer: Path | None = None,
    ) -> None:
        self.lock = lock
        self._tokenizer_folder = tokenizer
        self.window = window
        self.device = device
        self._dtype = _DTYPES[precision]
        self._at_once = _NO_LIMIT  # images; halved each time the device runs out of memory
        self._model: Any = model.eval().requires_grad_(False).to(device)
        both = isinstance(lock, OpenClipEncoder)
        self._visual: Any = self._model.visual if both else self._model
        self._features: Any = self._model.encode_image if both else self._model  # open_clip's towers give more, some
        self._visual.to(self._dtype)
        self.transform: Callable[[Image.Image], torch.Tensor] = open_clip.image_transform(
            lock.preprocessing.size,
            is_train=False,
            mean=tuple(lock.preprocessing.mean),
            std=tuple(lock.preprocessing.std),
            interpolation=lock.preprocessing.interpolation,
            resize_mode=lock.preprocessing.resize_mode,
        )
        self.digest = canonical.digest(
            "fedclip/v1/encoder",
            lock.network,
            lock.weights_sha256,
            lock.preprocessing.model_dump(mode="json"),
            None if window is None else [*window, _DEPTH_RULE],
            precision,
        )

    def digest_of(self, stage: Stage) -> bytes:
        """32 bytes over all that decides what an image is at `stage`."""
        if stage == FEATURES:
            return self.digest
        return canonical.digest("fedclip/v1/stage", self.digest, stage.kind, stage.block)

    def shape_of(self, stage: Stage) -> tuple[int, ...]:
        """Of one image at `stage`.

        Raises:
            ModelError: the tower is no vision transformer, or has fewer blocks.
        """
        if stage.kind == "features":
            return (self.lock.dim,)
        size = self.lock.preprocessing.size
        if stage.kind == "pixels":
            return (3, size, size)
        blocks = len(self.visual_tower().blocks)
        if stage.block >= blocks:
            raise ModelError(
                f"federation.yaml: method.first_block: {stage.block} is past the last of the tower's {blocks} blocks, "
                "which have the numbers from 0"
            )
        return self._encode(torch.zeros(1, 3, size, size), stage).shape[1:]

    def visual_tower(self) -> VisualTower:
        """The image tower cut open; its parameters are this encoder's own.

        Raises:
            ModelError: it is no vision transformer.
        """
        return VisualTower(self._visual)

    def text_tower(self, prompts: Sequence[str]) -> TextTower:
        """The text tower over `prompts`; its parameters are this encoder's own.

        Raises:
            ModelError: there is none, it cannot be cut open, or the tokenizer is not there.
        """
        return TextTower(self._model, self.tokens(prompts))

    def whole(self) -> nn.Module:
        """All of the model."""
        return self._model  # type: ignore[no-any-return]

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """(P, L) int64: the tokenizer's.

        Raises:
            ModelError: no text is read, or the tokenizer needs a package or a download that is not there.
        """
        return self._tokenizer(list(prompts)).to(self.device)

    def tokens_sha256(self, texts: Sequence[str]) -> str | None:
        """What the lock pins of the tokenizer, for a plan with these phrases and prompts; None where no text is read.

        Raises:
            ModelError: as `tokens`.
        """
        return tokens_sha256(self._tokenizer, texts) if isinstance(self.lock, OpenClipEncoder) else None

    def check_tokens(self, texts: Sequence[str]) -> None:
        """Refuse a tokenizer that is not the lock's, for a plan with these phrases and prompts.

        Raises:
            ModelError: it makes other tokens; or as `tokens`.
        """
        if not isinstance(self.lock, OpenClipEncoder):
            return
        if self.lock.tokens_sha256 is not None:
            check_tokens(self.lock, self._tokenizer, texts)
        elif "hf_tokenizer_name" in self.lock.config:
            _log.warning(
                "federation.lock: was made by version 0.1 and does not pin the tokenizer; if it is not the "
                "coordinator's, text features are other ones without any error: compare the folders"
            )

    def words(self, text: str) -> list[int]:
        """The tokens of `text` itself, without those of start, end and padding; the tokenizer has all three.

        Raises:
            ModelError: as `tokens`.
        """
        empty: list[int]
        full: list[int]
        empty, full = self.tokens(["", text]).tolist()
        end = empty[1]
        return full[1 : full.index(end)] if end in full else full[1:]

    def encode_images(self, batch: torch.Tensor, stage: Stage = FEATURES, *, in_one: bool = False) -> Floats:
        """What `batch` (B, 3, S, S) is at `stage`: features (B, D), not normalised, or tokens or pixels; float32.

        Where B images are too many for the device's memory, half as many are encoded at once, from then on; or none
        where they must be encoded `in_one` pass.

        Raises:
            ModelError: the device has too little memory for a single image, or for the one pass.
        """
        if in_one:
            try:
                return self._encode(batch, stage)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{self.device}: too little memory for {len(batch)} images at once, and with `privacy` no fewer "
                    "are encoded together; free the device, or set `device: cpu` in silo.yaml"
                ) from error
        rows, start = [], 0
        while start < len(batch):
            part = batch[start : start + self._at_once]
            try:
                rows.append(self._encode(part, stage))
            except torch.OutOfMemoryError as error:
                self._halve(len(part), error)
            else:
                start += len(part)
        return np.concatenate(rows)

    @torch.inference_mode()
    def _encode(self, part: torch.Tensor, stage: Stage) -> Floats:
        if stage.kind == "pixels":
            return _to_numpy(part)
        here = part.to(self.device, self._dtype)
        if stage.kind == "tokens":
            return _to_numpy(self.visual_tower().tokens(here, stage.block))
        return _to_numpy(self._features(here))

    def _halve(self, images: int, error: torch.OutOfMemoryError) -> None:
        if images == 1:
            raise ModelError(
                f"{self.device}: too little memory for one image; free the device, or set `device: cpu` in silo.yaml"
            ) from error
        self._at_once = images // 2
        _log.warning("%s: out of memory with %d images at once; going on with %d", self.device, images, self._at_once)

    @torch.inference_mode()
    def text_features(self, prompts: Sequence[Sequence[str]]) -> Floats:
        """One feature for each class's list of prompts: (C, D) float32 of norm 1; (0, D) where no text is read.

        The mean over a class's prompts of the normalised features, normalised again: prompt ensembling
        (Radford et al. 2021, section 3.1.4).

        Raises:
            ModelError: the tokenizer needs a package or a download that is not there.
        """
        if isinstance(self.lock, TimmEncoder):
            return np.zeros((0, self.lock.dim), dtype=np.float32)
        means = []
        for texts in prompts:
            features = self._text(self.tokens(texts))
            mean = torch.nn.functional.normalize(features.cpu().double(), dim=-1).mean(dim=0)
            means.append(torch.nn.functional.normalize(mean, dim=-1))
        return _to_numpy(torch.stack(means))

    def _text(self, tokens: torch.Tensor) -> torch.Tensor:
        try:
            return self._model.encode_text(tokens)  # type: ignore[no-any-return]
        except (IndexError, RuntimeError) as error:
            raise ModelError(
                f"the text tower of {self.lock.name} cannot read what its tokenizer makes ({first_line(error)}); "
                "check `text_cfg` in the model's config"
            ) from error

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if isinstance(self.lock, TimmEncoder):
            raise ModelError(f"{self.lock.name} reads no text; choose a method that learns a head, or another `model`")
        return tokenizer_of(self.lock, self._tokenizer_folder)


def resolve(model: ImageModel, home: Path) -> tuple[Encoder, Path]:
    """Settle what the plan's `model` means, for the lock; `home` is the folder of federation.yaml.

    Returns the encoder on the CPU, whose `lock` is what to write down, and the file of its weights.

    Raises:
        ModelError: unknown model or tag, config that cannot be built, weights that do not fit it.
    """
    settled: tuple[nn.Module, ImageEncoder, Path]
    settled = settle_vision_only(model, home) if isinstance(model, TimmModel) else settle_clip(model, home)
    network, lock, weights = settled
    own = home / model.tokenizer if isinstance(model, OpenClipModel) and model.tokenizer is not None else None
    return Encoder(network, lock, model.image_window, torch.device("cpu"), tokenizer=own), weights


def load_encoder(
    lock: ImageEncoder,
    model: ImageModel,
    weights: Path | None,
    device: str,
    precision: Precision = "fp32",
    *,
    tokenizer: Path | None = None,
) -> Encoder:
    """Load the encoder that `lock` fixes, on `device` (auto, cpu, cuda, mps), its image tower in `precision`.

    `model` is the plan's; `weights` a local checkpoint, without which the plan's tag is downloaded. The
    file is parsed only once its SHA-256 is the lock's. `tokenizer` is a local folder of it, without which the one that
    the lock's config names is downloaded.

    Raises:
        ConfigError: the device is not there, or does not compute in this precision; or lock and model are of two kinds.
        ModelError: no weights, other weights than the coordinator's, or weights that do not fit; or the tokenizer is
            the coordinator's own folder, and there is no copy of it.
    """
    target = choose_device(device)
    _check_precision(target, precision)
    if isinstance(lock, OpenClipEncoder) and isinstance(model, OpenClipModel):
        if model.tokenizer is not None and tokenizer is None:
            raise ModelError(
                f"the plan's tokenizer is the coordinator's own folder {model.tokenizer!r}, which cannot be "
                "downloaded; copy it from the coordinator and set `tokenizer: PATH` in silo.yaml"
            )
        network = load_clip(lock, model, weights)
    elif isinstance(lock, TimmEncoder) and isinstance(model, TimmModel):
        network = load_vision_only(lock, model, weights)
    else:
        raise ConfigError("federation.lock: its encoder is not the plan's; ask the coordinator to run `prepare` again")
    return Encoder(network, lock, model.image_window, target, precision, tokenizer=tokenizer)


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        ConfigError: the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    if not there[device]:
        raise ConfigError(f"silo.yaml: device: {device}: torch finds no such device here; set `auto` or `cpu`")
    return torch.device(device)


def _check_precision(device: torch.device, precision: Precision) -> None:
    # A silent fp32 instead would make other features than the person asked for, under another key of the cache.
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "silo.yaml: precision: fp16: few CPUs compute in it, and the others are slower than in fp32; "
            "set `bf16` or `fp32`, or a `device` that is a GPU"
        )


def _to_numpy(features: torch.Tensor) -> Floats:
    return np.ascontiguousarray(features.float().cpu().numpy())
