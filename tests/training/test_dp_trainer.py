from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.config.plan import FederationPlan, MethodPlan
from fedclip_secure.data.dataset import Counts, FeatureSet, Task
from fedclip_secure.errors import ConfigError, DataError, ModelError
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods import registry
from fedclip_secure.methods.base import Batch, Method, MethodSpec, Phase
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.private.dp_sgd import Coins, PrivateTrainer, check_private, system_coins
from fedclip_secure.training.private.gaussian import GaussianMechanism
from fedclip_secure.training.private.independence import check_records_apart
from fedclip_secure.training.private.poisson import draw_members
from fedclip_secure.training.shared_parameters import load_shared, read_shared
from tests.audit.plans import private_plan
from tests.training.dp_models import CLASSES, DIM, by_loop, make_plan, make_records, make_task, plain_loss, select

CPU = torch.device("cpu")
ADAM = {"name": "adam", "lr": 1e-3}


def counted_coins(keys: list[bytes]) -> Coins:
    """The same keys in every test run, noted as they are handed out."""

    def draw() -> bytes:
        keys.append(hashlib.sha256(b"coins" + len(keys).to_bytes(4, "big")).digest())
        return keys[-1]

    return draw


def trainer(
    plan: FederationPlan,
    records: FeatureSet,
    units: Any = None,
    coins: Coins | None = None,
    noise: float | None = None,
) -> PrivateTrainer:
    """With the plan's noise, or with less than any plan may have."""
    assert plan.privacy is not None
    assert plan.privacy.noise_multiplier is not None
    ids = records.unit_ids if units is None else units
    sigma = plan.privacy.noise_multiplier if noise is None else noise
    return PrivateTrainer(plan, sigma, make_task(), records, ids, CPU, coins=coins or system_coins)


def initial(plan: FederationPlan) -> AdapterState:
    method = find_method(plan.method)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return read_shared(method.build(make_task()), method.spec)


def of_patients(records: int, patients: int) -> npt.NDArray[np.uint8]:
    ids = np.random.default_rng(1).integers(0, 256, (patients, 32), dtype=np.uint8)
    return ids[np.arange(records) % patients]


def batch_of(records: FeatureSet) -> Batch:
    task = make_task()
    images, labels = torch.from_numpy(records.image_features), torch.from_numpy(records.labels)
    return Batch(images, labels, torch.from_numpy(task.text_features), task.logit_scale)


@pytest.mark.parametrize("name", ["fedclip", "linear_probe"])
@pytest.mark.parametrize("patients", [None, 7])
def test_update_is_what_coins_and_a_plain_loop_say(name: str, patients: int | None) -> None:
    plan = make_plan(method={"name": name}, steps_per_round=3, max_grad_norm=0.8, update_divisor=5.0)
    records, keys = make_records(30), list[bytes]()
    units = records.unit_ids if patients is None else of_patients(30, patients)
    state = initial(plan)
    found = trainer(plan, records, units, counted_coins(keys)).train(state)
    assert len(set(keys)) == 6, "one key for each membership and one for each noise"
    method = find_method(plan.method)
    module, (phase,) = method.build(make_task()), method.phases()
    load_shared(module, method.spec, state)
    numbers = np.unique(units.view("V32").reshape(-1), return_inverse=True)[1].reshape(-1)
    mechanism = GaussianMechanism(1.0, 0.8, 5.0)
    for step in range(3):
        chosen = draw_members(keys[2 * step], numbers.max() + 1, 0.5)[numbers]
        total = by_loop(module, phase, select(batch_of(records), chosen), numbers[chosen], 0.8)
        move = torch.from_numpy(mechanism.release(total, keys[2 * step + 1]))
        with torch.no_grad():
            start = 0
            for value in module.parameters():
                value.sub_(move[start : start + value.numel()].view_as(value))
                start += value.numel()
    expected = np.concatenate([value.detach().double().numpy().reshape(-1) for value in module.parameters()])
    assert found.dtype == np.float64
    assert np.allclose(found, expected - state.vector, atol=1e-4)


@pytest.mark.parametrize("name", ["fedclip", "linear_probe", "private_prototypes"])
def test_without_clipping_and_noise_it_is_full_batch_training(name: str) -> None:
    private = {"sample_rate": 1.0, "noise_multiplier": 1.0, "max_grad_norm": 1e6, "update_divisor": 40.0}
    plan = make_plan(
        method={"name": name}, optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.5}, steps_per_round=5, **private
    )
    records, state = make_records(40), initial(plan)
    plain = plan.model_copy(
        update={"privacy": None, "training": plan.training.model_copy(update={"batch_size": 40, "local_epochs": 5})}
    )
    splits = {"train": records, "validation": records.select(np.zeros(40, dtype=bool))}
    expected = LocalTrainer(plain, make_task(), splits, CPU).train(state)
    assert np.allclose(
        trainer(plan, records, noise=1e-12).train(state), expected, atol=1e-4 * np.abs(expected).max() + 1e-5
    )


def test_noise_of_the_update_is_sigma_times_norm_over_the_divisor_whatever_the_batch() -> None:
    plan = make_plan(noise_multiplier=2.0, max_grad_norm=0.5, update_divisor=10.0, sample_rate=1.0)
    for count in (0, 1, 100):
        records, state, keys = make_records(count), initial(plan), list[bytes]()
        noisy = trainer(plan, records, coins=counted_coins(keys)).train(state)
        noise = GaussianMechanism(2.0, 0.5, 10.0).release(np.zeros(len(noisy)), keys[1])
        rest = noisy + noise  # what the clipped sum did: at most a norm of count · C / divisor
        assert np.linalg.norm(rest) <= count * 0.5 / 10 + 1e-4
        assert np.std(noise) == pytest.approx(2.0 * 0.5 / 10, rel=0.2)


def test_empty_batches_and_no_records_at_all_step_with_noise_alone() -> None:
    plan = make_plan(sample_rate=1e-12, steps_per_round=3, optimizer=ADAM)
    state = initial(plan)
    for count in (0, 5):
        update = trainer(plan, make_records(count)).train(state)
        assert np.isfinite(update).all()
        assert 1e-4 < np.abs(update).max() <= 3e-3 * 1.01


def test_one_record_trains() -> None:
    assert np.abs(trainer(make_plan(sample_rate=1.0), make_records(1)).train(initial(make_plan()))).max() > 0


def test_gradients_that_are_not_finite_leave_a_finite_update() -> None:
    records = make_records(20)
    records.image_features[3] = 3e38
    records.image_features[3, ::2] *= -1
    assert np.isfinite(trainer(make_plan(sample_rate=1.0), records).train(initial(make_plan()))).all()


def test_seeds_and_equal_trainers_do_not_repeat_a_round() -> None:
    plan, records, state = make_plan(), make_records(30), initial(make_plan())
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        private = trainer(plan, records)
        torch.manual_seed(0)
        updates += [private.train(state), private.train(state)]
    for one in range(4):
        for other in range(one):
            assert not np.isclose(updates[one], updates[other], atol=1e-9).all()


def test_training_draws_nothing_from_torchs_generator() -> None:
    private, state = trainer(make_plan(steps_per_round=2), make_records(20)), initial(make_plan())
    before = torch.random.get_rng_state()
    private.train(state)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_system_keys_are_drawn_anew_for_each_membership_and_each_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    system = os.urandom

    def urandom(size: int) -> bytes:
        drawn.append(system(size))
        return drawn[-1]

    private = trainer(make_plan(steps_per_round=4), make_records(20))
    monkeypatch.setattr(os, "urandom", urandom)
    private.train(initial(make_plan()))
    assert [len(key) for key in drawn] == [32] * 8
    assert len(set(drawn)) == 8


def test_patients_are_taken_or_left_whole() -> None:
    records = make_records(2)
    mirrored = replace(
        records, image_features=np.stack([records.image_features[0]] * 2), labels=np.zeros(2, dtype=np.int64)
    )
    units = of_patients(2, 1)
    plan = make_plan(sample_rate=0.5, max_grad_norm=0.25, update_divisor=1.0, steps_per_round=1)
    private, state = trainer(plan, mirrored, units, noise=1e-9), initial(plan)
    norms = {round(float(np.linalg.norm(private.train(state))), 4) for _ in range(40)}
    assert norms == {0.0, 0.25}, "never half of a patient, and never twice the norm"


def two_phases(phases: Sequence[Phase], *, feeds: bool = True) -> type[Method]:
    """A method with a private head and a shared body, each with a phase of its own."""

    class TwoPhases(Method):
        @property
        def spec(self) -> MethodSpec:
            return MethodSpec(frozenset({"image_features"}), "none", ("0.*",), ("1.*",), True, feeds)

        def build(self, task: Task, encoder: Encoder | None = None) -> nn.Module:
            return nn.Sequential(nn.Linear(DIM, 6), nn.Linear(6, CLASSES))

        def phases(self, silo: str | None = None) -> Sequence[Phase]:
            return phases

        def predict(self, model: nn.Module, batch: Batch) -> Tensor:
            raise NotImplementedError

    return TwoPhases


BODY, HEAD = Phase(("0.*",), plain_loss), Phase(("1.*",), plain_loss)


def test_each_phase_draws_its_own_batch_and_is_its_own_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "two", registry.Entry(two_phases([BODY, HEAD])))
    plan, keys = make_plan(method={"name": "two"}, steps_per_round=3), list[bytes]()
    private = trainer(plan, make_records(20), coins=counted_coins(keys))
    private.train(initial(plan))
    assert len(set(keys)) == 3 * 2 * 2


def test_private_part_that_feeds_the_shared_one_without_noise_is_refused() -> None:
    check_private(two_phases([BODY, HEAD])())
    check_private(two_phases([BODY], feeds=False)())
    with pytest.raises(ConfigError, match=r"private part \(1\.\*\).*not trained with noise"):
        check_private(two_phases([BODY])())


def test_loss_that_couples_records_is_refused_by_its_name() -> None:
    plan = make_plan(method={"name": "fedclip", "loss": "inbatch"})
    with pytest.raises(ConfigError, match=r"method\.loss.*`inbatch`.*couples the records.*`loss: cross_entropy`"):
        trainer(plan, make_records(5))


def test_loss_that_couples_records_is_found_even_where_the_method_denies_it() -> None:
    method = find_method(MethodPlan(name="fedclip", loss="inbatch"))
    module = method.build(make_task())
    with pytest.raises(ModelError, match="loss of a record depends on its neighbours"):
        check_records_apart(module, method.phases()[0], make_task(), (DIM,), CPU)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_refused_with_or_without_parameters(affine: bool) -> None:
    module = nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8, affine=affine), nn.Linear(8, CLASSES))
    with pytest.raises(ModelError, match="the layer 1 is a BatchNorm"):
        check_records_apart(module, Phase(("*",), plain_loss), make_task(), (DIM,), CPU)


@pytest.mark.parametrize("name", ["linear_probe", "fedclip", "feddat"])
@pytest.mark.parametrize("width", [32, 128])
def test_model_that_is_sure_of_its_records_is_not_refused(name: str, width: int) -> None:
    method = find_method(MethodPlan(name=name))
    for seed in range(20):
        text = np.random.default_rng(seed).normal(size=(2, width)).astype(np.float32)
        task = Task(("a", "b"), text / np.linalg.norm(text, axis=1, keepdims=True), 100.0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = method.build(task).train()
        for size in (0.0, 3.0):
            with torch.no_grad():
                for value in module.parameters():
                    value.add_(size * torch.sin(torch.arange(float(value.numel())).square()).reshape(value.shape))
            method.begin_round(module)
            for phase in method.phases():
                check_records_apart(module, phase, task, (width,), CPU)


class Aside(nn.Module):
    """A layer whose weight is used past it too, or only there."""

    def __init__(self, *, layer_too: bool) -> None:
        super().__init__()
        self.layer, self.layer_too = nn.Linear(DIM, CLASSES, bias=False), layer_too

    def forward(self, images: Tensor) -> Tensor:
        past = images @ self.layer.weight.T
        return self.layer(images) + past if self.layer_too else past


def test_weight_that_is_used_past_its_layer_is_told_from_one_that_is_not() -> None:
    check_records_apart(Aside(layer_too=False), Phase(("*",), plain_loss), make_task(), (DIM,), CPU)
    with pytest.raises(ModelError, match="choose another `method`"):
        check_records_apart(Aside(layer_too=True), Phase(("*",), plain_loss), make_task(), (DIM,), CPU)


@pytest.mark.parametrize("name", registry.METHODS)
def test_every_method_that_takes_privacy_keeps_records_apart(name: str) -> None:
    scene = make_scene(private_plan(name), 4)
    check_private(scene.method)
    for phase in scene.method.phases():
        check_records_apart(scene.module, phase, scene.task, tuple(scene.records.images.shape[1:]), CPU)


def test_nothing_is_validated_and_faulty_calls_are_told() -> None:
    plan, records = make_plan(), make_records(4)
    private = trainer(plan, records)
    assert private.validate(initial(plan)) == Counts(0, 0)
    assert private.records == 4
    with pytest.raises(DataError, match=r"made: \(3, 32\) uint8 unit ids for 4 records"):
        trainer(plan, records, records.unit_ids[:3])
    with pytest.raises(ModelError, match=r"'hidden\.weight'"):
        private.train(AdapterState.from_arrays({"hidden.weight": np.zeros((4, 4))}))
    with pytest.raises(ConfigError, match="privacy is missing"):
        PrivateTrainer(plan.model_copy(update={"privacy": None}), 1.0, make_task(), records, records.unit_ids, CPU)
    with pytest.raises(ConfigError, match="batch_size is missing"):
        LocalTrainer(plan, make_task(), {"train": records, "validation": records}, CPU)
