"""Which file holds an encoder's weights, which activation they were trained with, and how they are loaded."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedclip_secure.disk import refused
from fedclip_secure.errors import ModelError
from fedclip_secure.extras import check_installed
from fedclip_secure.features.download import first_line, from_hub

_registering = threading.Lock()  # open_clip reads every config file it was ever given, each time it is given one
_OPENAI_MARKS = frozenset({"input_resolution", "context_length", "vocab_size"})  # entries only OpenAI's own files have


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits.

    Raises:
        ModelError: missing or unreadable.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(refused(error, path, otherwise="check the path of the weights")) from error


def pinned(weights: Path | None, fetch: Callable[[], Path] | None, pretrained: str, sha256: str) -> Path:
    """The local file `weights`, or else what `fetch` gets; its SHA-256 is `sha256`, the lock's.

    Raises:
        ModelError: there is neither, `pretrained` being the coordinator's own file; or it is another file.
    """
    if weights is None and fetch is None:
        raise ModelError(
            f"the plan's weights are the coordinator's own file {pretrained!r}, which cannot be downloaded; "
            f"copy it from the coordinator and set `weights: PATH` in silo.yaml (SHA-256 {sha256})"
        )
    path = fetch() if weights is None and fetch is not None else weights
    assert path is not None  # noqa: S101 - one of the two is given
    digest = sha256_of(path)
    if digest != sha256:
        raise ModelError(
            f"'{path}': is not the file that the coordinator locked\n"
            f"  SHA-256 here: {digest}\n  SHA-256 lock: {sha256}\n"
            "copy the coordinator's file and set `weights: PATH` in silo.yaml"
        )
    return path


def download(name: str, tag: str) -> Path:
    """Fetch the weights that open_clip knows as `name` and `tag`, or find them in the cache of this machine.

    Raises:
        ModelError: the download fails.
    """
    repository, _, file = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rpartition("/")
    file = file or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME else f"{file.rpartition('.')[0]}.safetensors"
    return from_hub(repository, list(dict.fromkeys([safe, file])), f"the weights {tag!r} of {name}")


def load_model(config: dict[str, Any], weights: Path, source: str) -> torch.nn.Module:
    """Build the open_clip model of `config` and load `weights` strictly; float32, on the CPU.

    Raises:
        ModelError: `source` names the config in errors; the config cannot be built, or the file is no
            checkpoint, another model's checkpoint, or carries code.
    """
    name = register(_with_text_tower(config, source))
    with _loadable(weights) as file:
        try:
            return open_clip.create_model(name, pretrained=str(file), pretrained_text=False)  # type: ignore[no-any-return]
        except Exception as error:  # open_clip, torch, timm and transformers each raise their own kinds
            reason = mismatch(str(error))
            if reason is not None:
                raise ModelError(f"{weights}: is a checkpoint of another model than {source}: {reason}") from error
            _build(name, source)
            raise ModelError(f"{weights}: cannot be read as a checkpoint ({first_line(error)})") from error


def _with_text_tower(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A text tower that transformers builds gets its config from this machine's cache: no hub is asked for it again.

    Raises:
        ConfigError: transformers is not installed.
        ModelError: its config is not in the cache, and nobody answers.
    """
    repository = config["text_cfg"].get("hf_model_name")
    if not repository or Path(repository).is_dir():
        return config
    what = f"the text tower of {source}"
    check_installed("transformers", what)
    path = from_hub(repository, ["config.json"], f"the config of {what}", "choose another model")
    return {**config, "text_cfg": {**config["text_cfg"], "hf_model_name": str(path.parent)}}


def register(config: dict[str, Any]) -> str:
    """Make `config` known to open_clip; returns the name, which is made of the config's own hash.

    Under the public name of a model a silo's version of open_clip could build something else.
    """
    text = json.dumps(config, sort_keys=True)
    name = f"fedclip-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    with _registering:
        if open_clip.get_model_config(name) is not None:
            return name
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.json")
            path.write_text(text, encoding="utf-8")
            open_clip.add_model_config(path)  # reads the file at once
    return name


def check_tag(name: str, tag: str, config: dict[str, Any]) -> None:
    """Refuse QuickGELU weights in a GELU model, and the reverse: both load, and give wrong features.

    Raises:
        ModelError: names the config that fits `tag`.
    """
    _compare(name, tag, config, _tag_needs_quick_gelu(name, tag))


def check_file(name: str, config: dict[str, Any], weights: Path, digest: str) -> None:
    """As `check_tag`, for a file: by its SHA-256 where that stands in an address that open_clip has, or by its format.

    What a bare state dict without these marks was trained with cannot be known: nothing in such a file
    says it, so it is taken at the config's word.

    Raises:
        ModelError: names the config that fits.
    """
    known = [quick for prefix, quick in _published() if digest.startswith(prefix)]
    if known:
        _compare(name, weights.name, config, known[0])
    elif _is_torchscript(weights) or _OPENAI_MARKS.issubset(_keys(weights)):
        _compare(name, weights.name, config, True)


def _compare(name: str, weights: str, config: dict[str, Any], needed: bool) -> None:
    if needed == bool(config.get("quick_gelu", False)):
        return
    right, wrong = ("QuickGELU", "GELU") if needed else ("GELU", "QuickGELU")
    raise ModelError(
        f"the weights {weights!r} were trained with {right}, the model config {name} computes {wrong}: "
        f"the features would be wrong without any error; {_fitting(name, needed)}"
    )


def _fitting(name: str, quick_gelu: bool) -> str:
    other = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
    if other != name and other in open_clip.list_models():
        return f"set `model.name: {other}`"
    return f'set `model.config` to a config with "quick_gelu": {json.dumps(quick_gelu)}'


@cache
def _published() -> tuple[tuple[str, bool], ...]:
    """Every file that open_clip has an address of: SHA-256 or its first hex digits, and whether it needs QuickGELU."""
    found = []
    for name, tag in open_clip.list_pretrained():
        url = open_clip.get_pretrained_url(name, tag)
        match = re.search(r"/([0-9a-f]{64})/[^/]+$", url) or re.search(r"-([0-9a-f]{8,64})\.pth?$", url)
        if match:
            found.append((match[1], _tag_needs_quick_gelu(name, tag)))
    return tuple(found)


def _tag_needs_quick_gelu(name: str, tag: str) -> bool:
    # A model whose own built-in config says QuickGELU was trained so, also where its tag is not marked.
    built_in = open_clip.get_model_config(name) or {}
    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu") or built_in.get("quick_gelu"))


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.endswith("/constants.pkl") for entry in archive.namelist())
    except (OSError, zipfile.BadZipFile):  # not a zip: safetensors, or a file that loading reports
        return False


def _keys(path: Path) -> set[str]:
    """Names in a state dict; empty where the file is none, which loading then reports."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged file makes the readers raise
        return set()
    return set(state) if isinstance(state, dict) else set()


@contextmanager
def _loadable(path: Path) -> Iterator[Path]:
    """The file as open_clip's strict loader takes it: OpenAI's format without its three extra entries."""
    if _is_torchscript(path):
        raise ModelError(
            f"'{path}': is a TorchScript archive, which carries code and is not loaded; save its state dict as "
            "safetensors and name that file (OpenAI's weights: `pretrained: openai` fetches them so)"
        )
    if not _OPENAI_MARKS.issubset(_keys(path)):
        yield path
        return
    safe = path.suffix == ".safetensors"
    state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    tensors = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "weights.safetensors")
        save_file({key: value.contiguous() for key, value in tensors.items() if key not in _OPENAI_MARKS}, plain)
        yield plain


def _build(name: str, source: str) -> None:
    """Tell a config that cannot be built from a checkpoint that cannot be read."""
    try:
        open_clip.create_model(name, pretrained_text=False)
    except Exception as error:  # as in load_model
        raise ModelError(f"{source}: open_clip cannot build this model config ({first_line(error)})") from error


def mismatch(message: str) -> str | None:
    """Torch's listing of every key in two lines; None where the message is no such listing."""
    parts = []
    for kind, listed in re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]+)", message):
        keys = re.findall(r'"([^"]+)"', listed)
        parts.append(f"{len(keys)} {kind.lower()} (first {keys[0]})")
    shapes = re.findall(
        r"size mismatch for (\S+): copying a param with shape torch.Size\((\[[^\]]*\])\) from checkpoint, "
        r"the shape in current model is torch.Size\((\[[^\]]*\])\)",
        message,
    )
    if shapes:
        key, theirs, ours = shapes[0]
        parts.append(f"{len(shapes)} of another shape (first {key}: {theirs} in the file, {ours} in the model)")
    return "; ".join(parts) or None
