"""CLIP models of open_clip: what a plan's names mean, and the network that a lock fixes."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from torch import nn

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import OpenClipEncoder
from fedclip_secure.config.plan import SHIPPED, OpenClipModel
from fedclip_secure.disk import refused
from fedclip_secure.errors import ModelError
from fedclip_secure.features.checkpoint import (
    check_file,
    check_tag,
    download,
    load_model,
    pinned,
    sha256_of,
)

_ASSETS = Path(__file__).parents[1] / "assets" / SHIPPED
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token"}  # all that open_clip's own configs use
_DEFAULT_PREPROCESSING = {  # CLIP's own, open_clip's default for weights without a tag
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def settle_clip(model: OpenClipModel, home: Path) -> tuple[nn.Module, OpenClipEncoder, Path]:
    """The network that `model` means, what to lock of it, and the file of its weights.

    Raises:
        ModelError: unknown model or tag, config that cannot be built, weights that do not fit it.
    """
    model, home = _located(model, home)
    config, overrides = _config(model, home)
    if open_clip.is_pretrained_cfg(model.name, model.pretrained):
        check_tag(model.name, model.pretrained, config)
        weights = download(model.name, model.pretrained)
        digest = sha256_of(weights)
        overrides = {**open_clip.get_pretrained_cfg(model.name, model.pretrained), **overrides}
    else:
        weights = home / model.pretrained
        if not weights.is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model.name)) or "none"
            raise ModelError(
                f"model.pretrained: {model.pretrained!r} is no file beside federation.yaml ({weights}) and no tag "
                f"that open_clip knows for {model.name} (tags: {tags})"
            )
        digest = sha256_of(weights)
        check_file(model.name, config, weights, digest)
        overrides = {**_common_preprocessing(model.name), **overrides}
    network = load_model(config, weights, model.config or model.name)
    resolved = {
        "name": model.name,
        "config": json.dumps(config, sort_keys=True, separators=(",", ":")),
        "weights_sha256": digest,
        "preprocessing": _preprocessing(model.name, network, overrides),
        "dim": config["embed_dim"],
        "logit_scale": _logit_scale(network, weights),
    }
    lock = check(resolved, OpenClipEncoder, f"encoder {model.name}")
    return network, lock, weights


def load_clip(lock: OpenClipEncoder, model: OpenClipModel, weights: Path | None) -> nn.Module:
    """The network that `lock` fixes, from the local file `weights` or from the tag of the plan's `model`.

    Raises:
        ModelError: no weights, other weights than the coordinator's, or weights that do not fit.
    """
    config = _checked(_parsed(lock.config, f"lock of {lock.name}"), f"lock of {lock.name}")
    tagged = open_clip.is_pretrained_cfg(lock.name, model.pretrained)
    if tagged:
        check_tag(lock.name, model.pretrained, config)
    elif lock.name == SHIPPED:
        weights = weights or _ASSETS / f"{SHIPPED}.safetensors"
    fetch = (lambda: download(lock.name, model.pretrained)) if tagged else None
    path = pinned(weights, fetch, model.pretrained, lock.weights_sha256)
    if not tagged:
        check_file(lock.name, config, path, lock.weights_sha256)
    return load_model(config, path, lock.name)


def _located(model: OpenClipModel, home: Path) -> tuple[OpenClipModel, Path]:
    """Where to look for config and weights: our own encoder's lie in the package, all others beside federation.yaml."""
    if model.name != SHIPPED:
        return model, home
    names = {"config": f"{SHIPPED}.json", "pretrained": f"{SHIPPED}.safetensors"}
    return model.model_copy(update=names), _ASSETS


def _config(model: OpenClipModel, home: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model config, and the preprocessing where the file has one (a hub's `open_clip_config.json` does)."""
    if model.config is None:
        if model.name not in open_clip.list_models():
            near = ", ".join(difflib.get_close_matches(model.name, open_clip.list_models(), n=3, cutoff=0.4))
            raise ModelError(
                f"model.name: open_clip has no model {model.name!r}; near: {near or 'none'}; "
                "for a model of your own set `model.config` to its JSON file"
            )
        return _checked(open_clip.get_model_config(model.name), model.name), {}
    path = home / model.config
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(refused(error, path, otherwise="check `model.config`")) from error
    except UnicodeDecodeError as error:
        raise ModelError(f"'{path}': cannot be read ({error}); check `model.config`") from error
    whole = _parsed(text, str(path))
    if not isinstance(whole, dict) or "model_cfg" not in whole:
        return _checked(whole, str(path)), {}
    preprocessing = whole.get("preprocess_cfg", {})
    return _checked(whole["model_cfg"], f"{path}: model_cfg"), preprocessing if isinstance(preprocessing, dict) else {}


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ModelError(f"{source}: is not JSON ({error})") from error


def _checked(config: Any, source: str) -> dict[str, Any]:
    keys = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    if not isinstance(config, dict) or any(not isinstance(config.get(key), kind) for key, kind in keys.items()):
        raise ModelError(f"{source}: is no open_clip model config; it needs `embed_dim`, `vision_cfg` and `text_cfg`")
    # They go to transformers as they are, where `trust_remote_code` would run a stranger's program.
    others = set(config["text_cfg"].get("tokenizer_kwargs") or {}) - _TOKENIZER_OPTIONS
    if others:
        raise ModelError(f"{source}: text_cfg.tokenizer_kwargs: {', '.join(sorted(others))} is not allowed; remove it")
    return config


def _common_preprocessing(name: str) -> dict[str, Any]:
    """What all of a model's tags agree on: a local copy of SigLIP's weights must not get CLIP's mean."""
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    variants = [{key: config[key] for key in _DEFAULT_PREPROCESSING} for config in known]
    return variants[0] if variants and all(variant == variants[0] for variant in variants) else {}


def _preprocessing(name: str, network: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    chosen = {key: overrides.get(key, default) for key, default in _DEFAULT_PREPROCESSING.items()}
    chosen = {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}
    height, width = _pair(network.visual.image_size)
    if height != width:
        raise ModelError(f"{name}: takes images of {height} x {width}; only square ones are supported")
    return {"size": height, **chosen}


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) else (int(size), int(size))


def _logit_scale(network: Any, weights: Path) -> float:
    # SigLIP's logit_bias is left out: a constant added to every class changes no softmax.
    scale = float(network.logit_scale.detach().double().exp())
    if not np.isfinite(scale):
        raise ModelError(f"{weights}: its logit_scale is {scale}; the checkpoint is damaged, fetch it again")
    return scale
