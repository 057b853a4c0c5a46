"""Models, batches and plain references for the tests of private training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedclip_secure.config.fields import check
from fedclip_secure.config.plan import FederationPlan, MethodPlan
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.methods.registry import find_method

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
DIM, CLASSES, SCALE = 12, 5, 20.0
KINDS = ("fedclip", "linear_probe", "mlp", "layer_norm")  # the last is no stack of linear layers


def make_task() -> Task:
    text = np.random.default_rng(5).normal(size=(CLASSES, DIM))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return Task(tuple(f"class {number}" for number in range(CLASSES)), text.astype(np.float32), SCALE)


def make_model(kind: str, seed: int = 0) -> tuple[nn.Module, Phase]:
    """A module in training mode, away from its start, and what is trained of it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, phase = _build(kind)
        with torch.no_grad():
            for value in module.parameters():
                value.add_(0.1 * torch.randn_like(value))
    return module.train(), phase


def _build(kind: str) -> tuple[nn.Module, Phase]:
    if kind in ("fedclip", "linear_probe"):
        method = find_method(MethodPlan(name=kind))
        return method.build(make_task()), method.phases()[0]
    middle: nn.Module = nn.LayerNorm(9) if kind == "layer_norm" else nn.ReLU(inplace=True)
    return nn.Sequential(nn.Linear(DIM, 9), middle, nn.Linear(9, CLASSES, bias=False)), Phase(("*",), plain_loss)


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch.images), batch.labels, reduction="none")


def make_batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = 3 * torch.randn(count, DIM, generator=generator)
    text = torch.from_numpy(make_task().text_features)
    return Batch(images, torch.randint(CLASSES, (count,), generator=generator), text, SCALE)


def make_records(count: int, seed: int = 0) -> FeatureSet:
    batch = make_batch(count, seed)
    ids = np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)
    return FeatureSet(batch.images.numpy(), batch.labels.numpy(), ids, "made")


def make_plan(
    *, method: Mapping[str, Any] | None = None, optimizer: Mapping[str, Any] | None = None, **privacy: Any
) -> FederationPlan:
    told = {
        "unit": "record",
        "sample_rate": 0.5,
        "steps_per_round": 1,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "update_divisor": 4.0,
        "delta": 1e-5,
        **privacy,
    }
    plan = {
        "federation": "pets",
        "server": "https://localhost",
        "model": {"name": "external", "dim": DIM, "text_features": "prompts.safetensors"},
        "classes": {name: name for name in make_task().classes},
        "templates": ["a {}"],
        "splits": {"train": 0.5, "validation": 0.0, "test": 0.5},
        "method": method or {"name": "fedclip"},
        "training": {"rounds": 1, "optimizer": optimizer or {"name": "sgd", "lr": 1.0}},
        "secure_aggregation": {"weights": "equal"},
        "privacy": told,
    }
    return check(plan, FederationPlan, "test plan")


def select(batch: Batch, rows: npt.NDArray[np.bool_]) -> Batch:
    chosen = torch.from_numpy(rows)
    return Batch(batch.images[chosen], batch.labels[chosen], batch.text_features, batch.logit_scale)


def gradient(module: nn.Module, phase: Phase, batch: Batch, *, single: bool = False) -> Doubles:
    """Of the summed loss, by autograd alone in float64, (d,); or in float32."""
    module, batch = (module, batch) if single else in_double(module, batch)
    found = torch.autograd.grad(phase.loss(module, batch).sum(), list(module.parameters()))
    flat: Doubles = torch.cat([value.reshape(-1) for value in found]).double().numpy()
    return flat


def in_double(module: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """Copies: where a softmax is sure of itself, single precision leaves few digits of a gradient."""
    double = replace(batch, images=batch.images.double(), text_features=batch.text_features.double())
    return copy.deepcopy(module).double(), double


def cut(value: Doubles, norm: float) -> Doubles:
    length = float(np.linalg.norm(value))
    return value * min(1.0, norm / length) if length else value


def by_loop(
    module: nn.Module, phase: Phase, batch: Batch, units: Integers, norm: float, *, single: bool = False
) -> Doubles:
    """The clipped sum, unit by unit."""
    each = [gradient(module, phase, select(batch, units == unit), single=single) for unit in np.unique(units)]
    parts = [cut(value, norm) for value in each]
    return sum(parts[1:], parts[0])


def by_opacus(module: nn.Module, phase: Phase, batch: Batch, units: Integers, norm: float) -> Doubles:
    """The clipped sum from Opacus's gradients of single records."""
    module, batch = in_double(module, batch)
    for layer in module.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # Opacus's hooks do not take it
    watched = GradSampleModule(module, loss_reduction="sum")
    # Torch's hooks on a first layer want inputs that take gradients.
    batch = replace(batch, images=batch.images.clone().requires_grad_())
    phase.loss(watched, batch).sum().backward()  # type: ignore[no-untyped-call]
    found = [value.grad_sample.reshape(len(units), -1) for value in watched.parameters()]
    each = torch.cat(found, dim=1).numpy()
    parts = [cut(each[units == unit].sum(axis=0), norm) for unit in np.unique(units)]
    return sum(parts[1:], parts[0])
