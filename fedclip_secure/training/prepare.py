"""What the coordinator settles once: the encoder, the layout of the shared parameters, the first adapter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from fedclip_secure.config.lock import Contract, ExternalEncoder, FederationLock, ImageEncoder, Parameter
from fedclip_secure.config.method_needs import unmet
from fedclip_secure.config.plan import ExternalModel, FederationPlan, PrivacyPlan
from fedclip_secure.data.dataset import Task
from fedclip_secure.data.embeddings import read_text_features
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError
from fedclip_secure.features.checkpoint import sha256_of
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.methods.base import Method
from fedclip_secure.methods.registry import check_reads, find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.privacy.accounting.accountant import noise_multiplier
from fedclip_secure.privacy.accounting.plan_cost import LARGEST_EPSILON, PlannedRun
from fedclip_secure.privacy.accounting.rdp import least_noise
from fedclip_secure.training.private.bounds import check_bounded, check_terms
from fedclip_secure.training.private.dp_sgd import check_private
from fedclip_secure.training.shared_parameters import read_shared


@dataclass(frozen=True, slots=True)
class Prepared:
    """`lock` is federation.lock; `initial_file` the bytes of initial.safetensors."""

    lock: FederationLock
    initial_file: bytes


def prepare(plan: FederationPlan, home: Path) -> Prepared:
    """Resolve `plan`; files that it names lie in `home`, the folder of federation.yaml.

    Raises:
        ConfigError: the method is unknown, does not go with the plan, or `initial` cannot be read.
        ModelError: the encoder cannot be built from what the plan names, or `initial` does not fit; or, with privacy,
            has larger weights than silos train.
        DataError: the file of text features is at fault.
    """
    method = find_method(plan.method)
    check_reads(plan)
    check_needs(plan)
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
        lock, task, encoder = _resolve(plan, home)
        torch.manual_seed(plan.training.seed)
        initial = read_shared(method.build(task, encoder), method.spec)
    if plan.initial is not None:
        path = home / plan.initial
        _check_global(path)
        initial = AdapterState.from_safetensors(_read(path), initial.layout, str(path))
    if plan.privacy is not None:
        check_terms(plan.privacy, task.logit_scale)
        check_bounded(initial)
    data = initial.to_safetensors()
    locked = FederationLock(
        plan=plan.digest.hex(),
        encoder=lock,
        layout=[Parameter(name=name, shape=list(shape)) for name, shape in initial.layout.entries],
        initial_model=initial.digest.hex(),
        initial_file=hashlib.sha256(data).hexdigest(),
        noise_multiplier=None if plan.privacy is None else _noise_multiplier(plan.privacy, plan, method),
        releases=len(method.phases()),
        method_state=method.server_state(),
    )
    PlannedRun.of(Contract(plan, locked))  # what no silo could claim anything of is refused here already
    return Prepared(locked, data)


def _resolve(plan: FederationPlan, home: Path) -> tuple[ImageEncoder | ExternalEncoder, Task, Encoder | None]:
    classes = tuple(plan.classes)
    if not isinstance(plan.model, ExternalModel):
        encoder, _ = resolve(plan.model, home)
        pinned = {"tokens_sha256": encoder.tokens_sha256(plan.texts())} if encoder.lock.kind == "open_clip" else {}
        text, scale = encoder.text_features(plan.text_prompts()), encoder.lock.logit_scale
        task = Task(classes, text, scale, tuple(plan.classes.values()), tuple(plan.templates))
        return encoder.lock.model_copy(update=pinned), task, encoder
    path = home / plan.model.text_features
    text_features, scale = read_text_features(path, classes, plan.model.dim)
    lock = ExternalEncoder(dim=plan.model.dim, text_features_sha256=sha256_of(path), logit_scale=scale)
    return lock, Task(classes, text_features, scale), None


def _noise_multiplier(privacy: PrivacyPlan, plan: FederationPlan, method: Method) -> float:
    """The plan's own, or the one for its target over all rounds and retrains: more where a larger ε has no claim."""
    check_private(method)
    if privacy.target_epsilon is None:
        assert privacy.noise_multiplier is not None  # noqa: S101 - one of the two is given
        return privacy.noise_multiplier
    steps = (plan.training.rounds + privacy.max_retrains) * privacy.steps_per_round * len(method.phases())
    sigma = noise_multiplier(privacy.target_epsilon, privacy.delta, privacy.sample_rate, steps)
    return max(sigma, least_noise(LARGEST_EPSILON, privacy.delta, privacy.sample_rate, steps) or sigma)


def check_needs(plan: FederationPlan) -> None:
    """Refuse a plan in which the method lacks what it says that it needs.

    Raises:
        ConfigError: names each key, what it is, and what it must be.
    """
    if faults := unmet(plan):
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(f"federation.yaml: method {plan.method.name} does not go with the rest of the plan:{listed}")


def _check_global(path: Path) -> None:
    """What one silo made of its own records, without noise, must not become what everybody starts from."""
    data = _read(path)
    length = int.from_bytes(data[:8], "little")
    if b'"personal"' in data[8 : 8 + min(length, len(data))]:
        raise ConfigError(
            f"'{path}': is one silo's personal adapter, which must not leave its house; start from a global one"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(refused(error, path, otherwise="check `initial` in federation.yaml")) from error
