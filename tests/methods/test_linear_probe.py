from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedclip_secure.config.plan import MethodPlan
from fedclip_secure.data.dataset import Task
from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.linear_probe import LinearProbe
from fedclip_secure.methods.registry import find_method
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.training.shared_parameters import read_shared

SCALE = 100.0
PROBE = LinearProbe(loss="cross_entropy")


@pytest.fixture
def task() -> Task:
    text = np.random.default_rng(0).normal(size=(5, 16))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return Task(tuple(f"class {number}" for number in range(5)), text.astype(np.float32), SCALE)


@pytest.fixture
def batch(task: Task) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = 10 * torch.randn(8, 16, generator=generator)
    labels = torch.randint(5, (8,), generator=generator)
    return Batch(images, labels, torch.from_numpy(task.text_features), SCALE)


def moved(model: nn.Module) -> nn.Module:
    """Away from the start, where the bias is all but zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def reference_step(model: nn.Module, batch: Batch, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """One gradient step record by record in float64, the gradient by hand: s·(p - y) xᵀ."""
    weight, bias = (value.detach().double() for value in model.parameters())
    losses, weight_gradient, bias_gradient = [], torch.zeros_like(weight), torch.zeros_like(bias)
    for feature, label in zip(batch.images.double(), batch.labels, strict=True):
        x = feature / feature.square().sum().sqrt()
        logits = SCALE * (weight @ x + bias)
        losses.append(torch.logsumexp(logits, 0) - logits[label])
        error = torch.softmax(logits, 0)
        error[label] -= 1
        weight_gradient += SCALE * torch.outer(error, x) / len(batch.labels)
        bias_gradient += SCALE * error / len(batch.labels)
    return torch.stack(losses), weight - lr * weight_gradient, bias - lr * bias_gradient


def test_step_of_the_probe_equals_a_plain_reference(task: Task, batch: Batch) -> None:
    model = moved(PROBE.build(task))
    losses, weight, bias = reference_step(model, batch, lr=0.01)
    (phase,) = PROBE.phases()
    found = phase.loss(model, batch)
    torch.testing.assert_close(found.double(), losses, rtol=1e-4, atol=1e-4)
    torch.autograd.backward(found.mean())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    for ours, theirs in zip(model.parameters(), (weight, bias), strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-4, atol=1e-5)


def test_probe_has_a_weight_for_each_class_and_dimension_and_a_bias_for_each_class() -> None:
    text = np.eye(7, 512, dtype=np.float32)
    state = read_shared(PROBE.build(Task(tuple("abcdefg"), text, SCALE)), PROBE.spec)
    assert state.layout.entries == (("weight", (7, 512)), ("bias", (7,)))
    assert state.layout.size == 7 * 512 + 7 == 3_591


def test_probe_starts_at_zero_shot(task: Task, batch: Batch) -> None:
    with torch.no_grad():
        logits = PROBE.predict(PROBE.build(task), batch)
    torch.testing.assert_close(logits, zero_shot_logits(batch), rtol=0, atol=1e-3)


def test_another_seed_gives_another_initial_model_and_the_same_seed_the_same(task: Task) -> None:
    """A silo adds its update to one and the same model only once, so a new run must start from a new one."""
    digests = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            digests.append(read_shared(PROBE.build(task), PROBE.spec).digest)
    assert digests[0] == digests[2] != digests[1]


def test_length_of_a_feature_changes_nothing_for_the_probe(task: Task, batch: Batch) -> None:
    model = moved(PROBE.build(task))
    longer = Batch(3 * batch.images, batch.labels, batch.text_features, SCALE)
    torch.testing.assert_close(PROBE.predict(model, longer), PROBE.predict(model, batch), rtol=1e-4, atol=1e-3)


def test_probe_loss_of_a_record_does_not_depend_on_the_others(task: Task, batch: Batch) -> None:
    model, (phase,) = moved(PROBE.build(task)), PROBE.phases()
    alone = Batch(batch.images[:1], batch.labels[:1], batch.text_features, SCALE)
    torch.testing.assert_close(phase.loss(model, batch)[:1], phase.loss(model, alone), rtol=1e-4, atol=1e-3)
    assert PROBE.spec.per_record_loss


def test_inbatch_loss_is_refused_for_the_probe() -> None:
    assert find_method(MethodPlan(name="linear_probe")) == PROBE
    with pytest.raises(ConfigError, match=r"method linear_probe.*\s+loss: this method has cross_entropy only"):
        find_method(MethodPlan(name="linear_probe", loss="inbatch"))
