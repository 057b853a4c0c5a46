"""Made-up records for a plan's own method: no record of a silo is ever read here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import normalize

from fedclip_secure.audit.setting import Setting
from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import OpenClipEncoder, TimmEncoder
from fedclip_secure.config.plan import FederationPlan, TimmModel
from fedclip_secure.data.dataset import Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods.base import Batch, Method
from fedclip_secure.methods.registry import find_method
from fedclip_secure.training.device_records import select
from fedclip_secure.training.private.gradients import Integers
from fedclip_secure.training.shared_parameters import load_shared, parameters_like

_LEAST_PARAMETERS = 8192  # so many that a few hundred steps have a million noisy coordinates
_LEAST_DIM = 64
_LOGIT_SCALE = 100.0  # CLIP's
_MOST_RECORDS = 4  # of a patient
_SIZE = 16  # pixels
_ENCODER: dict[str, Any] = {
    "embed_dim": _LEAST_DIM,
    "vision_cfg": {"image_size": _SIZE, "patch_size": 8, "width": _LEAST_DIM, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
_VISION_ONLY: dict[str, Any] = {"img_size": _SIZE, "patch_size": 8, "embed_dim": _LEAST_DIM, "num_heads": 2}
_LOCKED = {
    "weights_sha256": "0" * 64,
    "preprocessing": {"size": _SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                      "resize_mode": "shortest"},
    "dim": _LEAST_DIM,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A method's module, in training mode, and `units` units with R records; `unit_of` (R,) says whose each is."""

    method: Method
    module: nn.Module
    task: Task
    encoder: Encoder | None
    records: Batch
    unit_of: Integers
    units: int
    setting: Setting

    @property
    def device(self) -> torch.device:
        """Of the module; tokens and pixels stay in the CPU's memory."""
        return self.records.labels.device

    def batch(self, rows: Integers) -> Batch:
        """The records at `rows`."""
        return select(self.records, torch.from_numpy(rows).to(self.device))

    @property
    def about(self) -> str:
        """What is trained, in words."""
        shape = "x".join(map(str, self.records.images.shape[1:]))
        count = sum(value.numel() for value in parameters_like(self.module, self.method.spec.shared).values())
        inside = "" if self.encoder is None else f" inside {self.setting.encoder_in_words}"
        return f"{count:,} parameters{inside}, {shape} values a record, {self.device.type}, {self.setting.came_from}"


def make_scene(plan: FederationPlan, units: int, setting: Setting | None = None) -> Scene:
    """Records of `units` units of the plan's kind, and the plan's method as it is trained in `setting`.

    Patients have 1 to 4 records. Features, text features and initial weights are the same in every scene.

    Raises:
        ModelError: the model that was received is not of the plan's method, or of another width.
    """
    setting = setting or Setting()
    method = find_method(plan.method)
    patients = plan.privacy is not None and plan.privacy.unit == "patient"
    sizes = 1 + np.arange(units) % _MOST_RECORDS if patients else np.ones(units, dtype=np.int64)
    unit_of = np.repeat(np.arange(units), sizes)
    inside = method.spec.backprop != "none"
    encoder = (setting.encoder or _small_encoder(plan, method.spec.first_block + 2, setting.device)) if inside else None
    with same_torch_seed():
        task = _task(method, plan, setting.dim) if encoder is None else _task_of(encoder, plan)
        shape = task.text_features.shape[1:] if encoder is None else encoder.shape_of(method.spec.stage)
        features = 10 * torch.randn(len(unit_of), *shape)
        labels = torch.randint(len(task.classes), (len(unit_of),))
        torch.manual_seed(plan.training.seed)  # as `prepare` draws the weights
        module = method.build(task, encoder).to(setting.device)
    if setting.start is not None:
        load_shared(module, method.spec, setting.start)
    text = torch.from_numpy(task.text_features).to(setting.device)
    here = features.to(setting.device) if features.dim() == 2 else features  # as `load_records`
    records = Batch(here, labels.to(setting.device), text, task.logit_scale)
    method.begin_round(module)
    return Scene(method, module.train(), task, encoder, records, unit_of, units, setting)


@contextmanager
def same_torch_seed() -> Iterator[None]:
    """Torch's generator starts here from one seed every time: noise or membership that came from it would repeat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _task(method: Method, plan: FederationPlan, dim: int | None) -> Task:
    """Random text features as wide as `dim`, or as the narrowest, by steps of _LEAST_DIM, with enough parameters."""
    without_text, width = isinstance(plan.model, TimmModel), dim or _LEAST_DIM
    while True:
        text = normalize(torch.randn(0 if without_text else len(plan.classes), width), dim=-1)
        task = Task(tuple(plan.classes), text.numpy(), 1.0 if without_text else _LOGIT_SCALE)
        if dim is not None:
            return task
        shared = parameters_like(method.build(task, None), method.spec.shared)
        if sum(value.numel() for value in shared.values()) >= _LEAST_PARAMETERS:
            return task
        width += _LEAST_DIM


def _task_of(encoder: Encoder, plan: FederationPlan) -> Task:
    """The plan's own classes and templates, as `encoder` reads them."""
    text = encoder.text_features(plan.text_prompts())
    scale = encoder.lock.logit_scale
    return Task(tuple(plan.classes), text, scale, tuple(plan.classes.values()), tuple(plan.templates))


def _small_encoder(plan: FederationPlan, blocks: int, device: torch.device) -> Encoder:
    """A small vision transformer with random weights, always the same ones; a text transformer too, as the plan's."""
    settled: OpenClipEncoder | TimmEncoder
    with same_torch_seed():
        if isinstance(plan.model, TimmModel):
            settled = check({"name": "timm/random", "pool": "token", **_LOCKED}, TimmEncoder, "made-up encoder")
            network: nn.Module = VisionTransformer(num_classes=0, depth=blocks, **_VISION_ONLY)
        else:
            config = {**_ENCODER, "vision_cfg": {**_ENCODER["vision_cfg"], "layers": blocks}}
            about = {"name": "random", "config": json.dumps(config), "logit_scale": _LOGIT_SCALE, **_LOCKED}
            settled = check(about, OpenClipEncoder, "made-up encoder")
            network = open_clip.CLIP(**config)
    return Encoder(network, settled, None, device)
