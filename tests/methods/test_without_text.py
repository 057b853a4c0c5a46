"""Methods with a head of their own, on an encoder that reads no text, against plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import TimmEncoder
from fedclip_secure.config.plan import FederationPlan, MethodPlan, Optimizer, TimmModel
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.errors import ConfigError
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.fedtune import VISUAL_ARMS
from fedclip_secure.methods.registry import METHODS, check_reads, find_method
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.private.independence import check_records_apart
from fedclip_secure.training.shared_parameters import load_shared, parameters_like, read_shared

CPU = torch.device("cpu")
CLASSES = ("dog", "cat", "hat")
LR, COUNT, SIZE = 0.5, 6, 160
TUNED = [f"fedtune:{arm}" for arm in VISUAL_ARMS]
ABLE = [*TUNED, "fedtune:head", "fedtune:full", "linear_probe", "fedavg_full", "fedprox_full"]


def without_text(dim: int) -> Task:
    return Task(CLASSES, np.zeros((0, dim), dtype=np.float32), 1.0, CLASSES, ("{}",))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    home = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model("test_vit", pretrained=False)
    save_file(vit.state_dict(), home / "vit.safetensors")
    return resolve(TimmModel(name="timm/test_vit", pretrained="vit.safetensors"), home)[0]


@pytest.fixture(scope="module")
def task(encoder: Encoder) -> Task:
    return without_text(encoder.lock.dim)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))


def plan_for(tower_plan: FederationPlan, name: str) -> FederationPlan:
    changes = {"batch_size": COUNT, "optimizer": Optimizer(name="sgd", lr=LR), "local_epochs": 1}
    training = tower_plan.training.model_copy(update=changes)
    model = TimmModel(name="timm/test_vit", pretrained="vit.safetensors")
    return tower_plan.model_copy(update={"method": MethodPlan(name=name), "training": training, "model": model})


def one_step(
    plan: FederationPlan, task: Task, encoder: Encoder, pixels: Tensor
) -> tuple[nn.Module, FeatureSet, dict[str, Tensor]]:
    """A module away from its start, its records, and the update of one full-batch step from there, by name."""
    method = find_method(plan.method)
    torch.manual_seed(7)
    module = method.build(task, encoder)
    with torch.no_grad():
        for value in parameters_like(module, method.spec.shared).values():
            value.add_(0.05 * torch.randn_like(value))
    stage, ids = method.spec.stage, np.arange(COUNT * 32, dtype=np.uint8).reshape(COUNT, 32)
    inputs = None if stage.kind == "features" else encoder.encode_images(pixels, stage)
    train = FeatureSet(encoder.encode_images(pixels), np.arange(COUNT) % 3, ids, "made", inputs=inputs)
    splits = {"train": train, "validation": train.select(np.zeros(COUNT, dtype=bool))}
    state = read_shared(module, method.spec)
    update = LocalTrainer(plan, task, splits, CPU, encoder=encoder).train(state)
    load_shared(module, method.spec, state)
    parts, start = {}, 0
    for name, shape in state.layout.entries:
        size = int(np.prod(shape))
        parts[name] = torch.from_numpy(update[start : start + size].reshape(shape))
        start += size
    return module, train, parts


def compare(found: Tensor, wanted: Tensor) -> None:
    assert wanted.norm() > 0
    assert torch.allclose(found, wanted.double(), rtol=2e-3, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", TUNED)
def test_head_takes_the_step_of_softmax_regression_along_with_the_arm(
    tower_plan: FederationPlan, task: Task, encoder: Encoder, pixels: Tensor, name: str
) -> None:
    module, train, update = one_step(plan_for(tower_plan, name), task, encoder, pixels)
    head: Any = module.get_submodule("head")
    with torch.no_grad():
        features = module.get_submodule("visual")(torch.from_numpy(train.taken))
        wrong = torch.softmax(features @ head.weight.T + head.bias, dim=1) - torch.eye(3)[train.labels]
    compare(update["head.weight"], -LR * wrong.T @ features / COUNT)
    compare(update["head.bias"], -LR * wrong.mean(dim=0))
    arm = [part for key, part in update.items() if not key.startswith("head.")]
    assert arm
    assert all(part.norm() > 0 for part in arm if part.ndim > 1)


@pytest.mark.parametrize("name", ["fedtune:visual_bias", "fedtune:layernorm", "fedtune:full"])
def test_step_equals_that_of_timms_own_forward_pass(
    tower_plan: FederationPlan, task: Task, encoder: Encoder, pixels: Tensor, name: str
) -> None:
    module, train, update = one_step(plan_for(tower_plan, name), task, encoder, pixels)
    inside = "inner.visual." if name == "fedtune:full" else "visual.tower.vit."
    prefix = {key: key.replace(inside, "").replace("inner.", "") for key in module.state_dict()}
    reference = timm.create_model("test_vit", pretrained=False, num_classes=3).eval()
    reference.load_state_dict({prefix[key]: value for key, value in module.state_dict().items()})
    losses = cross_entropy(reference(pixels), torch.from_numpy(train.labels))
    tuned = [reference.get_parameter(prefix[key]) for key in update]
    wanted = torch.cat([gradient.reshape(-1) for gradient in torch.autograd.grad(losses, tuned)])
    compare(torch.cat([part.reshape(-1) for part in update.values()]), -LR * wanted)


def test_probe_without_text_is_softmax_regression_on_the_features_as_they_are(
    tower_plan: FederationPlan, task: Task, encoder: Encoder, pixels: Tensor
) -> None:
    module, train, update = one_step(plan_for(tower_plan, "linear_probe"), task, encoder, pixels)
    layer: Any = module
    features = torch.from_numpy(train.image_features)
    with torch.no_grad():
        logits = features @ layer.weight.T + layer.bias
        batch = Batch(features, torch.from_numpy(train.labels), torch.zeros(0, 64), 1.0)
        assert torch.allclose(find_method(MethodPlan(name="linear_probe")).predict(module, batch), logits, atol=1e-5)
        wrong = torch.softmax(logits, dim=1) - torch.eye(3)[train.labels]
    compare(update["weight"], -LR * wrong.T @ features / COUNT)
    compare(update["bias"], -LR * wrong.mean(dim=0))


@pytest.mark.parametrize("name", ABLE)
def test_another_seed_gives_another_model_without_text_too(task: Task, encoder: Encoder, name: str) -> None:
    method, digests = find_method(MethodPlan(name=name)), set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        digests.add(read_shared(method.build(task, encoder), method.spec).digest)
    assert len(digests) == 2


@pytest.mark.parametrize("name", ABLE)
def test_private_training_keeps_records_apart_without_text(task: Task, encoder: Encoder, name: str) -> None:
    method = find_method(MethodPlan(name=name))
    torch.manual_seed(2)
    module = method.build(task, encoder).train()
    method.begin_round(module)
    for phase in method.phases():
        check_records_apart(module, phase, task, encoder.shape_of(method.spec.stage), CPU)


@pytest.fixture(scope="module")
def vit_small() -> Encoder:
    """For counting."""
    network = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    settled = {
        "name": "timm/vit_small_patch16_224", "weights_sha256": "0" * 64, "pool": "token", "dim": 384,
        "preprocessing": {"size": 224, "mean": [0] * 3, "std": [1] * 3, "interpolation": "bicubic",
                          "resize_mode": "shortest"},
    }  # fmt: skip
    return Encoder(network, check(settled, TimmEncoder, "made"), None, CPU)


@pytest.mark.parametrize(
    ("arm", "count"),
    [
        ("visual_prompt", 10 * 384),
        ("visual_prompt_deep", 12 * 10 * 384),
        ("head", 0),
        ("adapter", 12 * (2 * 384 * 48 + 48 + 384)),
        ("visual_bias", 12 * (4 * 384 + 3 * 384 + 4 * 384) + 384),
        ("layernorm", 12 * 2 * 2 * 384 + 2 * 384),
        ("lora", 12 * 2 * 2 * 4 * 384),
        ("full", 21_665_664),
    ],
)
def test_a_vit_s_16_has_the_arms_parameters_and_the_heads(vit_small: Encoder, arm: str, count: int) -> None:
    method = find_method(MethodPlan(name=f"fedtune:{arm}"))
    module = method.build(without_text(384), vit_small)
    shared = sum(value.numel() for value in parameters_like(module, method.spec.shared).values())
    assert shared == count + (384 + 1) * 3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_head_or_is_refused_with_those_that_have_one(tower_plan: FederationPlan, name: str) -> None:
    plan = plan_for(tower_plan, name)
    if METHODS[name].kind.has_head:
        check_reads(plan)
        return
    said = rf"{name} classifies by text features, and timm/test_vit reads no text.*linear_probe, .*fedavg_full"
    with pytest.raises(ConfigError, match=said):
        check_reads(plan)
    check_reads(plan.model_copy(update={"model": tower_plan.model}))


def test_methods_with_a_head_are_the_ones_expected() -> None:
    assert {name for name, entry in METHODS.items() if entry.kind.has_head} == set(ABLE)
