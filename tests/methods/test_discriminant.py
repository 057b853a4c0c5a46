from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from fedclip_secure.data.dataset import Task
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.discriminant import GRADIENT_NORM, Discriminant
from fedclip_secure.methods.fedclip import FedClip
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.training.private.clipping import clipped_sum, shared_pass
from fedclip_secure.training.shared_parameters import parameters_like, read_shared

Doubles = npt.NDArray[np.float64]
CLASSES, DIM, EXTRA, SCALE = 5, 16, 4, 100.0
WIDTH = DIM + EXTRA
METHOD = Discriminant()


def make_task(classes: int = CLASSES, dim: int = DIM) -> Task:
    text = np.random.default_rng(0).normal(size=(classes, dim))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return Task(tuple(f"class {number}" for number in range(classes)), text.astype(np.float32), SCALE)


def make_batch(task: Task, count: int, seed: int = 1) -> Batch:
    """Records that lie apart by class, but not where the text is; nobody is of the last class."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.from_numpy(task.text_features)
    labels = torch.randint(len(text) - 1, (count,), generator=generator)
    images = text.roll(1, dims=1)[labels] + 1.5 + 0.2 * torch.randn(count, text.shape[1], generator=generator)
    return Batch(7 * images, labels, text, task.logit_scale)


def add_up(model: nn.Module, batch: Batch) -> nn.Module:
    """One step of SGD on the summed loss, with 1 for its learning rate."""
    (phase,) = METHOD.phases()
    torch.autograd.backward(phase.loss(model, batch).sum())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model


def share_of_right(model: nn.Module, batch: Batch) -> float:
    return float((METHOD.predict(model, batch).argmax(1) == batch.labels).double().mean())


def plain_lift(features: Doubles) -> Doubles:
    """φ by hand, record by record."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"fedclip-secure/v1/discriminant").digest(8), np.uint8))
    signs = np.where(bits == 1, 1.0, -1.0).reshape(EXTRA, DIM)
    rows = []
    for feature in features:
        x = feature / np.sqrt((feature**2).sum())
        hidden = np.maximum(signs @ x, 0)
        rows.append(np.concatenate([x, hidden / np.sqrt((hidden**2).sum()) / 2]))
    return np.array(rows)


def plain_logits(task: Task, train: Batch, images: Doubles) -> Doubles:
    """The docstring's equations over the records themselves, with the text as a record of weight 1."""
    text = np.pad(task.text_features.astype(np.float64), ((0, 0), (0, EXTRA)))
    phi = np.concatenate([plain_lift(train.images.double().numpy()), text])
    labels = np.concatenate([train.labels.numpy(), np.arange(CLASSES)])
    weights = np.concatenate([np.ones(len(train.labels)), np.full(CLASSES, 1 / CLASSES)])
    counts = np.array([weights[labels == c].sum() for c in range(CLASSES)])
    own = np.array([np.average(phi[labels == c], axis=0, weights=weights[labels == c]) for c in range(CLASSES)])
    centre = np.average(phi, axis=0, weights=weights)
    offsets = text - np.average(text, axis=0, weights=counts)
    slope = sum(counts[c] * (own[c] - centre) @ offsets[c] for c in range(CLASSES))
    slope /= sum(counts[c] * offsets[c] @ offsets[c] for c in range(CLASSES))
    expected = centre + slope * offsets
    means = (3 * expected + counts[:, None] * own) / (3 + counts)[:, None]
    within = sum(w * np.outer(f - means[y], f - means[y]) for w, f, y in zip(weights, phi, labels, strict=True))
    total = counts.sum()
    spread = max(sum(w * ((f - own[y]) ** 2).sum() for w, f, y in zip(weights, phi, labels, strict=True)), 1) / total
    ridge = 0.03 * spread
    precision = (total - 1 + ridge * SCALE) * np.linalg.inv(within + ridge * np.eye(WIDTH))
    return np.array([[f @ precision @ m - m @ precision @ m / 2 for m in means] for f in plain_lift(images)])


def test_one_step_adds_each_record_s_count_features_and_moments() -> None:
    task = make_task()
    batch = make_batch(task, 9)
    model = METHOD.build(task)
    before = read_shared(model, METHOD.spec).arrays()
    after = read_shared(add_up(model, batch), METHOD.spec).arrays()
    phi, one_hot = plain_lift(batch.images.double().numpy()), np.eye(CLASSES)[batch.labels.numpy()]
    for name, expected in (
        ("classes.bias", one_hot.sum(axis=0)),
        ("classes.weight", one_hot.T @ phi),
        ("moments.weight", phi.T @ phi),
    ):
        np.testing.assert_allclose(after[name] - before[name], expected, atol=1e-5)


def test_logits_equal_a_plain_reference_over_the_records() -> None:
    task = make_task()
    train, unseen = make_batch(task, 60), make_batch(task, 20, seed=2)
    found = METHOD.predict(add_up(METHOD.build(task), train), unseen).double().numpy()
    expected = plain_logits(task, train, unseen.images.double().numpy())
    np.testing.assert_allclose(
        found - found.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), rtol=1e-3, atol=0.02
    )


def test_it_starts_at_zero_shot() -> None:
    task = make_task()
    batch = make_batch(task, 50)
    found, expected = METHOD.predict(METHOD.build(task), batch), zero_shot_logits(batch)
    differences = (found - found.mean(1, keepdim=True)) - (expected - expected.mean(1, keepdim=True))
    assert differences.abs().max() < 0.2
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_it_learns_where_zero_shot_is_wrong_and_keeps_a_class_without_records() -> None:
    task = make_task()
    model, unseen = add_up(METHOD.build(task), make_batch(task, 200)), make_batch(task, 200, seed=2)
    assert (METHOD.predict(model, unseen).argmax(1) == unseen.labels).double().mean() > 0.95
    assert (zero_shot_logits(unseen).argmax(1) == unseen.labels).double().mean() < 0.7
    assert torch.isfinite(METHOD.predict(model, unseen)).all()


def test_silos_with_a_class_each_learn_what_one_with_all_records_does() -> None:
    task = make_task()
    batch, model = make_batch(task, 80), METHOD.build(task)
    start = read_shared(model, METHOD.spec)
    whole = read_shared(add_up(model, batch), METHOD.spec).vector
    total = start.vector.astype(np.float64)
    for label in range(CLASSES):
        rows = batch.labels == label
        silo = METHOD.build(task)
        silo.load_state_dict({name: torch.from_numpy(value) for name, value in start.arrays().items()})
        own = Batch(batch.images[rows], batch.labels[rows], batch.text_features, SCALE)
        total += read_shared(add_up(silo, own), METHOD.spec).vector - start.vector
    np.testing.assert_allclose(total, whole, atol=1e-4)


def test_an_adapter_of_vit_b_32_is_smaller_than_fedclip_s() -> None:
    task = make_task(49, 512)
    sizes = [sum(value.numel() for value in method.build(task).parameters()) for method in (METHOD, FedClip())]
    assert sizes == [640 * 640 + 49 * 641, 525_312]
    assert sizes[0] == 441_009


def test_every_record_s_gradient_has_the_same_norm_and_a_zero_feature_s_is_smaller() -> None:
    task = make_task()
    batch, model, (phase,) = make_batch(task, 8), METHOD.build(task), METHOD.phases()
    batch.images[0] = 0
    losses, parameters = phase.loss(model, batch), list(model.parameters())
    for row, loss in enumerate(losses):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        norm = sum(float(value.square().sum()) for value in found) ** 0.5
        assert norm == pytest.approx(1.0 if row == 0 else GRADIENT_NORM, rel=1e-5)


def test_clipped_sums_take_the_fast_path_and_cut_nothing_at_the_norm() -> None:
    task = make_task()
    batch, model, (phase,) = make_batch(task, 30), METHOD.build(task).train(), METHOD.phases()
    assert shared_pass(model, phase, batch) is not None
    plain = torch.autograd.grad(phase.loss(model, batch).sum(), list(parameters_like(model, phase.parameters).values()))
    wanted = np.concatenate([value.double().flatten().numpy() for value in plain])
    for limit, share in ((GRADIENT_NORM * (1 + 1e-5), 1.0), (GRADIENT_NORM / 2, 0.5)):
        found = clipped_sum(model, phase, batch, np.arange(30), limit)
        np.testing.assert_allclose(found, share * wanted, atol=1e-4)


def test_noise_that_drowns_the_records_leaves_the_text() -> None:
    """M's asymmetry gives the noise away; a symmetric M of the same noise is taken for what records said."""
    task, generator = make_task(dim=64), torch.Generator().manual_seed(3)
    text = torch.from_numpy(task.text_features)
    labels = torch.randint(CLASSES, (400,), generator=generator)
    batch = Batch(text[labels] + 0.15 * torch.randn(400, 64, generator=generator), labels, text, SCALE)
    noisy = add_up(METHOD.build(task), batch)
    with torch.no_grad():
        for value in noisy.parameters():
            value.add_(15 * torch.randn(value.shape, generator=generator))
    right = [share_of_right(noisy, batch)]
    with torch.no_grad():
        moments = noisy.get_parameter("moments.weight")
        moments.copy_((moments + moments.T) / 2)
    right.append(share_of_right(noisy, batch))
    zero_shot = float((zero_shot_logits(batch).argmax(1) == labels).double().mean())
    assert right[0] > zero_shot - 0.1
    assert right[1] < zero_shot - 0.3


def test_another_seed_gives_another_initial_model_and_the_same_seed_the_same() -> None:
    digests = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            digests.append(read_shared(METHOD.build(make_task()), METHOD.spec).digest)
    assert digests[0] == digests[2] != digests[1]


def test_classes_of_one_text_give_finite_logits() -> None:
    text = np.tile(make_task().text_features[:1], (CLASSES, 1))
    task = Task(make_task().classes, text, SCALE)
    model = add_up(METHOD.build(task), make_batch(task, 30))
    assert torch.isfinite(METHOD.predict(model, make_batch(task, 10))).all()
