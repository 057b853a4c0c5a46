"""What the coordinator settles once: the encoder, the layout of the shared parameters, the first adapter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from fedclip_secure.config.lock import ExternalEncoder, FederationLock, OpenClipEncoder, Parameter
from fedclip_secure.config.plan import FederationPlan, OpenClipModel
from fedclip_secure.data.dataset import Task
from fedclip_secure.data.embeddings import read_text_features
from fedclip_secure.errors import ConfigError
from fedclip_secure.features.checkpoint import sha256_of
from fedclip_secure.features.encoder import resolve
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.shared import read_shared


@dataclass(frozen=True, slots=True)
class Prepared:
    """`lock` is federation.lock; `initial_file` the bytes of initial.safetensors."""

    lock: FederationLock
    initial_file: bytes


def prepare(plan: FederationPlan, home: Path) -> Prepared:
    """Resolve `plan`; files that it names lie in `home`, the folder of federation.yaml.

    Raises:
        ConfigError: the method is unknown, or `initial` cannot be read.
        ModelError: the encoder cannot be built from what the plan names, or `initial` does not fit.
        DataError: the file of text features is at fault.
    """
    method = find_method(plan.method)
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
        encoder, task = _resolve(plan, home)
        torch.manual_seed(plan.training.seed)
        initial = read_shared(method.build(task), method.spec)
    if plan.initial is not None:
        path = home / plan.initial
        initial = AdapterState.from_safetensors(_read(path), initial.layout, str(path))
    data = initial.to_safetensors()
    lock = FederationLock(
        plan=plan.digest.hex(),
        encoder=encoder,
        layout=[Parameter(name=name, shape=list(shape)) for name, shape in initial.layout.entries],
        initial_model=initial.digest.hex(),
        initial_file=hashlib.sha256(data).hexdigest(),
    )
    return Prepared(lock, data)


def _resolve(plan: FederationPlan, home: Path) -> tuple[OpenClipEncoder | ExternalEncoder, Task]:
    classes = tuple(plan.classes)
    if isinstance(plan.model, OpenClipModel):
        encoder, _ = resolve(plan.model, home)
        return encoder.lock, Task(classes, encoder.text_features(plan.text_prompts()), encoder.lock.logit_scale)
    path = home / plan.model.text_features
    text_features, scale = read_text_features(path, classes, plan.model.dim)
    lock = ExternalEncoder(dim=plan.model.dim, text_features_sha256=sha256_of(path), logit_scale=scale)
    return lock, Task(classes, text_features, scale)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check `initial` in federation.yaml") from error
