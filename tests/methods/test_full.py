from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fedclip_secure.config.plan import FederationPlan, MethodPlan, OpenClipModel, Optimizer
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.features.stage import Stage
from fedclip_secure.methods.registry import find_method
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.shared_parameters import read_shared

CPU, LR, COUNT = torch.device("cpu"), 0.05, 6
CLASSES, TEMPLATES = ("dog", "cat", "hat"), ("a picture of a {}", "a drawing of a {}")


@pytest.fixture(scope="module")
def encoder(random_tower: Path) -> Encoder:
    model = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")
    return resolve(model, random_tower)[0]


@pytest.fixture(scope="module")
def task(encoder: Encoder) -> Task:
    text = encoder.text_features([[template.replace("{}", name) for template in TEMPLATES] for name in CLASSES])
    return Task(CLASSES, text, encoder.lock.logit_scale, CLASSES, TEMPLATES)


@pytest.fixture(scope="module")
def train(encoder: Encoder) -> FeatureSet:
    pixels = torch.rand(COUNT, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    ids = np.arange(COUNT * 32, dtype=np.uint8).reshape(COUNT, 32)
    inputs = encoder.encode_images(pixels, Stage("pixels"))
    return FeatureSet(encoder.encode_images(pixels), np.arange(COUNT) % 3, ids, "made", inputs=inputs)


def plan_for(tower_plan: FederationPlan, epochs: int, method: MethodPlan) -> FederationPlan:
    training = tower_plan.training.model_copy(
        update={"batch_size": COUNT, "local_epochs": epochs, "optimizer": Optimizer(name="sgd", lr=LR)}
    )
    return tower_plan.model_copy(update={"method": method, "training": training})


def reference(model: torch.nn.Module, images: Tensor, labels: Tensor, loss: str) -> Tensor:
    """CLIP by open_clip's own forward pass; the loss of Radford et al. 2021, figure 3, or cross-entropy."""
    clip: open_clip.CLIP = model
    tokens = open_clip.get_tokenizer("ViT-B-32")([t.replace("{}", name) for name in CLASSES for t in TEMPLATES])
    texts = normalize(clip.encode_text(tokens), dim=-1).reshape(3, 2, -1).mean(dim=1)
    logits = clip.logit_scale.exp() * normalize(clip.encode_image(images), dim=-1) @ normalize(texts, dim=-1).T
    if loss == "cross_entropy":
        return cross_entropy(logits, labels)
    similarity, own = logits[:, labels], torch.arange(len(labels))
    return (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2


@pytest.mark.parametrize(
    ("name", "options", "mu"),
    [
        ("fedavg_full", {"loss": "cross_entropy"}, 0.0),
        ("fedavg_full", {"loss": "inbatch"}, 0.0),
        ("fedtune:full", {}, 0.0),
        ("fedprox_full", {"mu": 3.0}, 3.0),
    ],
)
def test_two_steps_on_the_whole_encoder_equal_open_clips_own_forward_pass(  # noqa: PLR0917 - fixtures
    tower_plan: FederationPlan,
    encoder: Encoder,
    task: Task,
    train: FeatureSet,
    name: str,
    options: dict[str, Any],
    mu: float,
) -> None:
    plan = plan_for(tower_plan, 2, MethodPlan(name=name, **options))
    method = find_method(plan.method)
    torch.manual_seed(3)
    built = method.build(task, encoder)
    state = read_shared(built, method.spec)
    splits = {"train": train, "validation": train.select(np.zeros(len(train), dtype=bool))}
    update = LocalTrainer(plan, task, splits, CPU, encoder=encoder).train(state)

    clip = built.get_submodule("inner.clip")
    values = list(clip.parameters())
    start = [value.detach().clone() for value in values]
    images, labels = torch.from_numpy(train.taken), torch.from_numpy(train.labels)
    for _ in range(2):
        loss = reference(clip, images, labels, options.get("loss", "cross_entropy"))
        prox = sum(((value - first) ** 2).sum() for value, first in zip(values, start, strict=True))
        gradients = torch.autograd.grad(loss + mu / 2 * prox, values)
        with torch.no_grad():
            for value, gradient in zip(values, gradients, strict=True):
                value.sub_(LR * gradient)
    wanted = torch.cat([(value - first).reshape(-1) for value, first in zip(values, start, strict=True)])
    scale = float(wanted.detach().abs().max())
    assert np.allclose(update, wanted.detach().double().numpy(), rtol=1e-2, atol=1e-4 * scale)


def test_proximal_term_holds_the_model_back(
    tower_plan: FederationPlan, encoder: Encoder, task: Task, train: FeatureSet
) -> None:
    lengths = []
    splits = {"train": train, "validation": train.select(np.zeros(len(train), dtype=bool))}
    for mu in (0.01, 10.0):
        plan = plan_for(tower_plan, 5, MethodPlan(name="fedprox_full", mu=mu))
        torch.manual_seed(3)
        method = find_method(plan.method)
        state = read_shared(method.build(task, encoder), method.spec)
        update = LocalTrainer(plan, task, splits, CPU, encoder=encoder).train(state)
        lengths.append(float(np.linalg.norm(update)))
    assert lengths[1] < 0.9 * lengths[0]
