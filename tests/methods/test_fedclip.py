from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.config.plan import MethodPlan
from fedclip_secure.data.dataset import Task
from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.fedclip import FedClip
from fedclip_secure.methods.registry import METHODS, find_method
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.privacy.report import wording
from fedclip_secure.training.shared_parameters import parameters_like
from tests.audit.plans import private_plan

Loss = Literal["cross_entropy", "inbatch"]
SCALE = 100.0


def make_task(classes: int = 5, dim: int = 16) -> Task:
    text = np.random.default_rng(0).normal(size=(classes, dim))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return Task(tuple(f"class {number}" for number in range(classes)), text.astype(np.float32), SCALE)


def make_batch(task: Task, count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = torch.from_numpy(task.text_features)
    images = 10 * torch.randn(count, text.shape[1], generator=generator)
    return Batch(images, torch.randint(len(text), (count,), generator=generator), text, task.logit_scale)


def reference(parameters: dict[str, Tensor], batch: Batch, loss: Loss) -> Tensor:
    """The equations written out on their own, record by record, in float64."""
    w1, b1, w2, b2 = (parameters[name] for name in ("hidden.weight", "hidden.bias", "gate.weight", "gate.bias"))
    rows = []
    for feature in batch.images.double():
        weights = torch.exp(w2 @ torch.tanh(w1 @ feature + b1) + b2)
        weighted = weights / weights.sum() * feature
        rows.append(weighted / weighted.square().sum().sqrt())
    adapted, text, labels = torch.stack(rows), batch.text_features.double(), batch.labels
    if loss == "cross_entropy":
        return negative_log_likelihood(SCALE * adapted @ text.T, labels)
    similarity, diagonal = SCALE * adapted @ text[labels].T, torch.arange(len(labels))
    return (negative_log_likelihood(similarity, diagonal) + negative_log_likelihood(similarity.T, diagonal)) / 2


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    picked = logits[torch.arange(len(targets)), targets]
    return (torch.logsumexp(logits, dim=1) - picked).mean()


@pytest.mark.parametrize("loss", ["cross_entropy", "inbatch"])
def test_step_equals_a_plain_reference(loss: Loss) -> None:
    task = make_task()
    batch, method = make_batch(task), FedClip(loss=loss)
    model = method.build(task)
    plain = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    (phase,) = method.phases()
    losses = phase.loss(model, batch)
    assert losses.shape == (8,)
    expected = reference(plain, batch, loss)
    torch.testing.assert_close(losses.mean().double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(losses.mean(), list(model.parameters()))
    wanted = torch.autograd.grad(expected, list(plain.values()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


def test_adapter_of_vit_b_32_has_525312_parameters() -> None:
    model = FedClip(loss="cross_entropy").build(make_task(dim=512))
    assert sum(value.numel() for value in model.parameters()) == 525_312


@pytest.mark.parametrize("name", METHODS)
def test_every_method_shares_or_keeps_each_parameter_exactly_once(name: str) -> None:
    scene = make_scene(private_plan(name), 2)
    spec, model = scene.method.spec, scene.module
    shared, private = set(parameters_like(model, spec.shared)), set(parameters_like(model, spec.private))
    assert shared | private == {key for key, value in model.named_parameters() if value.requires_grad}
    assert not shared & private


def test_reports_know_the_methods_that_are_one_sum() -> None:
    assert {name for name in METHODS if find_method(private_plan(name).method).spec.one_sum} == wording.ONE_SUM


def test_untrained_adapter_is_close_to_zero_shot() -> None:
    task = make_task(classes=10, dim=512)
    method, text = FedClip(loss="cross_entropy"), torch.from_numpy(task.text_features)
    labels = torch.arange(1000) % 10
    images = 10 * nn.functional.normalize(text[labels] + 0.05 * torch.randn(1000, 512), dim=-1)
    batch = Batch(images, labels, text, SCALE)
    with torch.no_grad():
        adapted, plain = method.predict(method.build(task), batch), zero_shot_logits(batch)
    cosines = nn.functional.cosine_similarity(adapted, plain, dim=-1)
    assert cosines.min() > 0.95
    assert (adapted.argmax(1) == plain.argmax(1)).double().mean() > 0.97


def test_zero_shot_logits_are_scaled_cosines() -> None:
    batch = make_batch(make_task())
    cosine = nn.functional.cosine_similarity(batch.images[:, None], batch.text_features[None], dim=-1)
    torch.testing.assert_close(zero_shot_logits(batch), SCALE * cosine, rtol=1e-4, atol=1e-4)


def test_cross_entropy_of_a_record_does_not_depend_on_the_others() -> None:
    task = make_task()
    batch, method = make_batch(task), FedClip(loss="cross_entropy")
    model = method.build(task)
    (phase,) = method.phases()
    alone = Batch(batch.images[:1], batch.labels[:1], batch.text_features, SCALE)
    torch.testing.assert_close(phase.loss(model, batch)[:1], phase.loss(model, alone), rtol=1e-4, atol=1e-5)


def test_only_cross_entropy_counts_as_per_record() -> None:
    assert find_method(MethodPlan(name="fedclip")).spec.per_record_loss
    assert not find_method(MethodPlan(name="fedclip", loss="inbatch")).spec.per_record_loss


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"method\.name: 'fedavg' is unknown.*it has fedclip"):
        find_method(MethodPlan(name="fedavg"))
