"""Vision transformers of timm, without their classifiers: encoders that read no text.

timm decides what the name of an architecture means. All else is locked: the size of images and their normalisation, how
the tokens become one feature, and the weights by their SHA-256. A checkpoint's own classifier is left out. An image's
shorter side becomes as long as the network's input, and the middle is cut out, as for CLIP; timm's own evaluation
enlarges the image before that by its `crop_pct`, and so cuts off a border of the shorter side too.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import TimmEncoder
from fedclip_secure.config.plan import TimmModel
from fedclip_secure.disk import refused
from fedclip_secure.errors import ModelError
from fedclip_secure.features.checkpoint import mismatch, pinned, sha256_of
from fedclip_secure.features.download import first_line, from_hub

_FILE = "model.safetensors"  # timm's on the hub
_CLASSIFIERS = ("head.", "head_dist.")


def settle_vision_only(model: TimmModel, home: Path) -> tuple[nn.Module, TimmEncoder, Path]:
    """The network that `model` means, what to lock of it, and the file of its weights.

    A file is preprocessed for as the architecture's first tag is.

    Raises:
        ModelError: unknown architecture or tag, no vision transformer, or weights that do not fit it.
    """
    name = _known(model.name)
    tagged = model.pretrained in _tags(name)
    about = _about(f"{name}.{model.pretrained}" if tagged else name)
    size = _size(model.name, about["input_size"])
    if tagged:
        _check_activation(name, model.pretrained, about)
    weights = _download(model.name, model.pretrained, about) if tagged else home / model.pretrained
    if not weights.is_file():
        raise ModelError(
            f"model.pretrained: {model.pretrained!r} is no file beside federation.yaml ({weights}) and no tag "
            f"that timm knows for {name} (tags: {', '.join(_tags(name)) or 'none'})"
        )
    network = _build(model.name, size)
    resolved = {
        "name": model.name,
        "weights_sha256": sha256_of(weights),
        "preprocessing": {
            "size": size,
            "mean": list(about["mean"]),
            "std": list(about["std"]),
            "interpolation": about["interpolation"],
            "resize_mode": "shortest",
        },
        "pool": network.global_pool,
        "dim": network.num_features,
    }
    lock = check(resolved, TimmEncoder, f"encoder {model.name}")
    return _filled(network, weights, model.name), lock, weights


def load_vision_only(lock: TimmEncoder, model: TimmModel, weights: Path | None) -> nn.Module:
    """The network that `lock` fixes, from the local file `weights` or from the tag of the plan's `model`.

    Raises:
        ModelError: no weights, other weights than the coordinator's, or weights that do not fit.
    """
    name = _known(lock.name)
    tag = model.pretrained

    def fetch() -> Path:
        return _download(lock.name, tag, _about(f"{name}.{tag}"))

    path = pinned(weights, fetch if tag in _tags(name) else None, tag, lock.weights_sha256)
    return _filled(_build(lock.name, lock.preprocessing.size, global_pool=lock.pool), path, lock.name)


def _known(model: str) -> str:
    """The architecture's name in timm."""
    name = model.removeprefix("timm/")
    if not timm.is_model(name):
        near = ", ".join(f"timm/{found}" for found in difflib.get_close_matches(name, timm.list_models(), n=3))
        raise ModelError(f"model.name: timm has no architecture {name!r}; near: {near or 'none'}")
    return name


def _tags(name: str) -> list[str]:
    return [known.partition(".")[2] for known in timm.list_pretrained(name)]


def _about(name: str) -> dict[str, Any]:
    """What timm says about an architecture's weights, with a tag or without; the same for all where it says nothing."""
    return asdict(timm.get_pretrained_cfg(name) or PretrainedCfg())


def _size(model: str, shape: tuple[int, int, int]) -> int:
    channels, height, width = shape
    if channels != 3 or height != width:
        raise ModelError(f"{model}: takes images of {channels} x {height} x {width}; only square ones are supported")
    return height


def _check_activation(name: str, tag: str, about: dict[str, Any]) -> None:
    """As open_clip's, some weights are for QuickGELU, and timm loads them into GELU without an error."""
    if "quickgelu" in name or not any("QuickGELU" in note for note in about.get("notes") or ()):
        return
    raise ModelError(
        f"the weights {tag!r} were trained with QuickGELU, the model {name} computes GELU: the features would be wrong "
        f"without any error; set `model.name: timm/{name.replace('_clip_', '_clip_quickgelu_')}`"
    )


def _download(model: str, tag: str, about: dict[str, Any]) -> Path:
    """timm's weights from the hub, or from the hub's cache on this machine."""
    return from_hub(about["hf_hub_id"], [_FILE], f"the weights {tag!r} of {model}")


def _build(model: str, size: int, **pool: Any) -> VisionTransformer:
    """The network for square images of `size` pixels, with random weights."""
    name = model.removeprefix("timm/")
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, img_size=size, **pool)
    except Exception as error:  # what is no vision transformer knows no `img_size`, and says so in many ways
        raise ModelError(f"model.name: timm builds no vision transformer {name!r} ({first_line(error)})") from error
    if not isinstance(network, VisionTransformer):
        raise ModelError(
            f"model.name: {name!r} is a {type(network).__name__} of timm, and only its VisionTransformer is supported; "
            "choose one as timm/vit_small_patch16_224"
        )
    return network


def _filled(network: nn.Module, weights: Path, model: str) -> nn.Module:
    """The network with all its weights from the file; float32, on the CPU."""
    state = {name: value for name, value in _read(weights).items() if not name.startswith(_CLASSIFIERS)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = mismatch(str(error)) or first_line(error)
        raise ModelError(f"{weights}: is a checkpoint of another model than {model}: {reason}") from error
    return network


def _read(weights: Path) -> dict[str, Tensor]:
    try:
        weights.open("rb").close()  # the readers' own errors carry no errno
    except OSError as error:
        raise ModelError(refused(error, weights, otherwise="check the path of the weights")) from error
    try:
        safe = weights.suffix == ".safetensors"
        state = load_file(weights) if safe else torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file, or one that carries code, makes the readers raise
        raise ModelError(f"{weights}: cannot be read as a checkpoint ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{weights}: is no state dict of named tensors; save the network's own `state_dict()`")
    return state
