from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.data.dataset import Task
from fedclip_secure.errors import ModelError
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.methods.fedclip import FedClip
from fedclip_secure.methods.linear_probe import LinearProbe
from fedclip_secure.methods.registry import METHODS, find_method
from fedclip_secure.training.private import clipping
from fedclip_secure.training.private.clipping import clipped_sum
from tests.audit.plans import private_plan
from tests.training.dp_models import (
    CLASSES,
    DIM,
    KINDS,
    Integers,
    by_loop,
    by_opacus,
    gradient,
    make_batch,
    make_model,
    plain_loss,
    select,
)
from tests.waiting import BOUND

ALONE: Callable[[int], Integers] = np.arange


def scaled(phase: Phase, factor: float) -> Phase:
    return Phase(phase.parameters, lambda model, batch: factor * phase.loss(model, batch))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 24),
    patients=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    norm=st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e6]),
)
def test_clipped_sum_equals_opacus_and_a_plain_loop_for_records_and_patients(
    kind: str, count: int, patients: int, seed: int, norm: float
) -> None:
    module, phase = make_model(kind, seed)
    batch = make_batch(count, seed)
    of_patients = np.random.default_rng(seed).integers(0, patients, count)
    for units in (ALONE(count), of_patients):
        found, plain = clipped_sum(module, phase, batch, units, norm), by_loop(module, phase, batch, units, norm)
        # Where a softmax is sure of itself, single precision leaves few digits of a gradient, to autograd as well.
        lost = np.linalg.norm(by_loop(module, phase, batch, units, norm, single=True) - plain)
        for expected in (by_opacus(module, phase, batch, units, norm), plain):
            limit = 1e-5 * max(float(np.linalg.norm(expected)), min(norm, 1.0)) + 4 * lost
            assert found.dtype == np.float64
            assert np.linalg.norm(found - expected) <= limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1.0, 1e6, 1e30])
def test_no_unit_moves_the_sum_by_more_than_the_norm_however_large_its_gradient(kind: str, factor: float) -> None:
    module, phase = make_model(kind)
    batch, units = make_batch(12), ALONE(12) // 3
    whole = clipped_sum(module, scaled(phase, factor), batch, units, 0.7)
    assert np.isfinite(whole).all()
    for unit in range(4):
        kept = units != unit
        rest = clipped_sum(module, scaled(phase, factor), select(batch, kept), units[kept], 0.7)
        assert np.linalg.norm(whole - rest) <= 0.7
        alone = clipped_sum(module, scaled(phase, factor), select(batch, ~kept), units[~kept], 0.7)
        assert np.linalg.norm(alone) <= 0.7 * (1 + 1e-12)
        if factor > 1:
            assert np.linalg.norm(alone) == pytest.approx(0.7, rel=1e-6)


def test_records_of_a_unit_that_cancel_do_not_slip_past_the_norm() -> None:
    layer = nn.Linear(2, 2, bias=False)
    images = torch.tensor([[1e8, 1.0], [-1e8, 1.0]])
    batch = Batch(images, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2), 1.0)
    phase = Phase(("*",), lambda model, batch: model(batch.images).sum(dim=1))
    found = clipped_sum(layer, phase, batch, np.zeros(2, dtype=np.int64), 0.5)
    assert np.linalg.norm(found) <= 0.5 * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_unit_with_a_gradient_that_is_not_finite_adds_nothing_and_spoils_no_other(kind: str, bad: float) -> None:
    module, phase = make_model(kind)
    batch, units = make_batch(9), ALONE(9) // 3
    batch.images[4] = bad
    if bad == 3e38:  # finite, but its products are not
        batch.images[4, ::2] *= -1
    found = clipped_sum(module, phase, batch, units, 1.0)
    assert np.isfinite(found).all()
    rest = clipped_sum(module, phase, select(batch, units != 1), units[units != 1], 1.0)
    lone = clipped_sum(module, phase, select(batch, units == 1), units[units == 1], 1.0)
    assert np.isfinite(lone).all()
    assert np.allclose(found, rest + lone, atol=1e-5)
    if not np.isfinite(bad):
        assert not lone.any()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_is_zero_and_one_record_is_its_own_clipped_gradient(kind: str) -> None:
    module, phase = make_model(kind)
    size = sum(value.numel() for value in module.parameters())
    nothing = clipped_sum(module, phase, make_batch(0), ALONE(0), 1.0)
    assert nothing.shape == (size,)
    assert not nothing.any()
    one = make_batch(1)
    own = gradient(module, phase, one)
    norm = float(np.linalg.norm(own))
    assert np.allclose(clipped_sum(module, phase, one, ALONE(1), 2 * norm), own, atol=1e-5 * norm)
    assert np.allclose(clipped_sum(module, phase, one, ALONE(1), norm / 4), own / 4, atol=1e-5 * norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_micro_batches_do_not_change_the_sum_and_a_larger_unit_stays_whole(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, phase = make_model(kind)
    batch = make_batch(20)
    units = np.array([3, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 9, 8, 8, 1, 5, 5, 3, 0])
    expected = clipped_sum(module, phase, batch, units, 0.3)
    monkeypatch.setattr(clipping, "_ROWS", rows)
    found = clipped_sum(module, phase, batch, units, 0.3)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_every_row_is_in_one_micro_batch_with_all_of_its_unit() -> None:
    units = np.random.default_rng(0).integers(0, 40, 200)
    seen: list[int] = []
    for rows, numbers in clipping._micro_batches(units, 16):
        assert len(rows) <= 16 or len(set(units[rows])) == 1
        assert len(set(zip(units[rows], numbers, strict=True))) == len(set(numbers)) == numbers[-1] + 1
        assert np.isin(units, units[rows]).sum() == len(rows), "whole units"
        seen.extend(rows)
    assert sorted(seen) == list(range(200))


def test_only_the_phases_parameters_are_summed_and_all_is_left_as_it_was() -> None:
    module, phase = make_model("fedclip")
    batch, units = make_batch(6), ALONE(6) // 2
    whole = clipped_sum(module, phase, batch, units, 1e6)
    names = [name for name, _ in module.named_parameters()]
    sizes = [value.numel() for value in module.parameters()]
    parts = dict(zip(names, np.split(whole, np.cumsum(sizes)[:-1]), strict=True))
    biases = clipped_sum(module, Phase(("*.bias",), phase.loss), batch, units, 1e6)
    assert np.allclose(biases, np.concatenate([parts["hidden.bias"], parts["gate.bias"]]), atol=1e-5)
    weight = clipped_sum(module, Phase(("gate.weight",), phase.loss), batch, units, 1e6)
    assert np.allclose(weight, parts["gate.weight"], atol=1e-5)
    cut = clipped_sum(module, Phase(("gate.weight",), phase.loss), batch, units, 1e-3)
    assert np.linalg.norm(cut) <= 3e-3 * (1 + 1e-12)
    assert all(value.requires_grad and value.grad is None for value in module.parameters())
    assert not any(layer._forward_hooks for layer in module.modules())


def test_layer_used_twice_is_summed_record_by_record() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, images: Tensor) -> Tensor:
            twice: Tensor = self.layer(torch.tanh(self.layer(images)))
            return twice[:, :CLASSES]

    module, phase, batch, units = Twice(), Phase(("*",), plain_loss), make_batch(9), ALONE(9) // 2
    found = clipped_sum(module, phase, batch, units, 0.5)
    expected = by_loop(module, phase, batch, units, 0.5)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_clipped_sums_need_no_opacus() -> None:
    code = (
        "import sys, numpy as np, torch\n"
        "from fedclip_secure.methods.base import Batch, Phase\n"
        "from fedclip_secure.training.private.clipping import clipped_sum\n"
        "batch = Batch(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3), 1.0)\n"
        "phase = Phase(('*',), lambda model, batch: model(batch.images).sum(dim=1))\n"
        "assert clipped_sum(torch.nn.Linear(3, 2), phase, batch, np.arange(2), 1.0).any()\n"
        "sys.exit('opacus' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=BOUND).returncode == 0


def test_batch_norm_is_refused_with_its_reason() -> None:
    module = nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    with pytest.raises(ModelError, match=r"BatchNorm.*choose another `method`"):
        clipped_sum(module, Phase(("*",), plain_loss), make_batch(4), ALONE(4), 1.0)


class Prompts(nn.Module):
    """The layer sees the classes' texts, not the records."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def prompt_loss(model: nn.Module, batch: Batch) -> Tensor:
    layer: nn.Module = model.get_submodule("layer")
    logits = batch.images @ layer(batch.text_features).T
    return nn.functional.cross_entropy(logits, batch.labels, reduction="none")


@pytest.mark.parametrize("count", [4, 16, 5])
def test_parameter_that_sees_classes_and_not_records_is_clipped_by_records(count: int) -> None:
    module, phase = Prompts(nn.Linear(DIM, DIM)), Phase(("*",), prompt_loss)
    batch = make_batch(count)
    text = nn.functional.normalize(torch.sin(torch.arange(16.0 * DIM)).reshape(16, DIM))  # as many classes as records
    batch = replace(batch, text_features=text)
    found = clipped_sum(module, phase, batch, ALONE(count), 1.0)
    assert np.allclose(found, by_loop(module, phase, batch, ALONE(count), 1.0), atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if find_method(private_plan(name).method).spec.backprop != "none"]
)
def test_what_a_unit_adds_inside_an_encoder_does_not_depend_on_anybody_else(name: str) -> None:
    # Not even in its last bits: a ReLU that sits on its edge would make a whole gradient of one.
    scene = make_scene(private_plan(name, unit="patient"), 4)
    phase = scene.method.phases()[0]
    together = clipped_sum(scene.module, phase, scene.records, scene.unit_of, 0.5)
    alone = np.zeros_like(together)
    for unit in range(4):
        rows = np.flatnonzero(scene.unit_of == unit)
        alone += clipped_sum(scene.module, phase, scene.batch(rows), scene.unit_of[rows], 0.5)
    assert np.abs(together - alone).max() <= 1e-15


def test_loss_that_is_no_value_for_each_record_is_refused() -> None:
    module, _ = make_model("mlp")
    mean = Phase(("*",), lambda model, batch: plain_loss(model, batch).mean())
    with pytest.raises(ModelError, match=r"loss gives values of shape \(\) for a batch of"):
        clipped_sum(module, mean, make_batch(4), ALONE(4), 1.0)


@pytest.mark.parametrize("kind", ["mlp", "layer_norm"])
def test_autocast_and_tf32_are_off_inside_and_as_they_were_after(kind: str) -> None:
    module, phase = make_model(kind)
    batch, units = make_batch(6), ALONE(6)
    seen = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        losses = phase.loss(model, batch)
        seen.append((losses.dtype, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return losses

    expected = clipped_sum(module, phase, batch, units, 1.0)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            found = clipped_sum(module, Phase(("*",), loss), batch, units, 1.0)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("medium", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert np.array_equal(found, expected)
    assert set(seen) == {(torch.float32, "highest", False)}


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e-2, 1e-3, 1.5e-4])
def test_what_a_unit_adds_does_not_depend_on_how_many_records_others_have(max_grad_norm: float) -> None:
    # 512 units of two records that all but cancel, and one unit more, of 512 records.
    text = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    method = LinearProbe(loss="cross_entropy")
    module = method.build(Task(("a", "b"), text, 100.0)).train()
    with torch.no_grad():
        module.get_parameter("weight").zero_()
        module.get_parameter("bias").copy_(torch.tensor([max_grad_norm * 1e-4, 0.0]))
    (phase,) = method.phases()

    def total(labels: Tensor, units: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        images = torch.zeros(len(labels), 512)
        images[:, 0] = 1
        return clipped_sum(module, phase, Batch(images, labels, torch.from_numpy(text), 100.0), units, max_grad_norm)

    labels, units = torch.tensor([0, 1] * 512), np.repeat(np.arange(1, 513), 2)
    more = torch.cat([torch.ones(512, dtype=torch.long), labels])
    added = total(more, np.concatenate([np.zeros(512, np.int64), units])) - total(labels, units)
    assert np.linalg.norm(added) <= max_grad_norm


@pytest.mark.parametrize("count", range(1, 40))
def test_a_record_adds_the_same_to_the_last_bit_whatever_the_size_of_its_batch(count: int) -> None:
    text = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    torch.manual_seed(0)
    method = FedClip(loss="cross_entropy")
    module = method.build(Task(tuple("abcde"), text, 100.0)).train()
    images, labels = 10 * torch.randn(40, 96), torch.randint(5, (40,))
    (phase,) = method.phases()

    def total(rows: slice) -> npt.NDArray[np.float64]:
        batch = Batch(images[rows], labels[rows], torch.from_numpy(text), 100.0)
        return clipped_sum(module, phase, batch, np.arange(40)[rows], 1.0)

    one = total(slice(0, 1))
    among = total(slice(0, count + 1)) - total(slice(1, count + 1))
    assert np.linalg.norm(among - one) <= 1e-12


@pytest.mark.parametrize("rate", [1e-6, 0.5])
def test_model_that_draws_random_numbers_is_refused(rate: float) -> None:
    module, phase = make_model("fedclip", 0)
    loss = Phase(phase.parameters, lambda model, batch: nn.functional.dropout(phase.loss(model, batch), rate))
    with pytest.raises(ModelError, match="draws random numbers while it trains, as dropout does"):
        clipped_sum(module.train(), loss, make_batch(3), ALONE(3), 1.0)
