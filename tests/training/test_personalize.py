from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedclip_secure.config.plan import FederationPlan, MethodPlan, PrivacyPlan
from fedclip_secure.data.dataset import FeatureSet, Task, split
from fedclip_secure.errors import DataError
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.evaluation.evaluate import evaluate
from fedclip_secure.training.inputs import Inputs
from fedclip_secure.training.personalize import EPOCHS, HELD_OUT, SHARES, Personalized, personalize, without_privacy
from fedclip_secure.training.shared_parameters import read_shared

CPU = torch.device("cpu")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DIM = 16


def make_records(task: Task, count: int, seed: int, shift: float) -> FeatureSet:
    """Features near their class's text, after a shift that only this silo has."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(task.classes)
    images = task.text_features[labels] * (1 + shift * np.sin(np.arange(DIM))) + 0.1 * random.normal(size=(count, DIM))
    units = random.integers(0, 256, (count, 32), dtype=np.uint8)
    return FeatureSet((10 * images).astype(np.float32), labels, units, "made")


def make_inputs(task: Task, shift: float = 3.0, validation: int = 70) -> Inputs:
    counts = {"train": 140, "validation": validation, "test": 140}
    return Inputs(task, {name: make_records(task, n, seed, shift) for seed, (name, n) in enumerate(counts.items())})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are over before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def task() -> Task:
    text = np.random.default_rng(5).normal(size=(len(CLASSES), DIM))
    return Task(CLASSES, (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32), 50.0)


def with_options(plan: FederationPlan, method: str = "fedclip", **training: Any) -> FederationPlan:
    changed = plan.training.model_copy(update=training)
    return plan.model_copy(update={"method": MethodPlan(name=method), "training": changed})


def initial(plan: FederationPlan, task: Task) -> AdapterState:
    method = find_method(plan.method)
    return read_shared(method.build(task, None), method.spec)


def made_from(plan: FederationPlan, inputs: Inputs) -> tuple[AdapterState, Personalized]:
    start = initial(plan, inputs.task)
    return start, personalize(plan, inputs, start, CPU)


@pytest.mark.parametrize("method", ["fedclip", "linear_probe"])
def test_personal_adapter_beats_the_global_one_where_this_silo_is_special(
    tower_plan: FederationPlan, task: Task, method: str
) -> None:
    plan, inputs = with_options(tower_plan, method, local_epochs=3), make_inputs(task)
    start, found = made_from(plan, inputs)
    assert found.chosen.share in SHARES
    assert 1 <= found.chosen.epoch <= EPOCHS
    assert found.chosen.validation.correct > found.start.validation.correct + 5
    test = inputs.splits["test"]
    before, after = (evaluate(plan, task, test, state, CPU).adapter for state in (start, found.chosen.state))
    assert after.correct > before.correct + 10, "on records that did not choose it"
    assert (found.records, found.training.batch_size, found.training.local_epochs) == (140, 32, 1)


def test_what_is_told_of_the_chosen_adapter_is_what_it_does(tower_plan: FederationPlan, task: Task) -> None:
    inputs = make_inputs(task)
    start, found = made_from(tower_plan, inputs)
    for state, told in ((start, found.start.validation), (found.chosen.state, found.chosen.validation)):
        assert evaluate(tower_plan, task, inputs.splits["validation"], state, CPU).adapter == told


def test_the_global_adapter_wins_ties(tower_plan: FederationPlan, task: Task) -> None:
    plan = with_options(tower_plan, "linear_probe")
    inputs = make_inputs(task, shift=0.0)  # zero-shot is right already
    start, found = made_from(plan, inputs)
    assert found.start.validation.accuracy == 1.0
    assert (found.chosen.epoch, found.chosen.share) == (0, 0.0)
    assert found.chosen.state.digest == start.digest


def test_training_that_ruins_the_adapter_leaves_the_global_one(tower_plan: FederationPlan, task: Task) -> None:
    plan = with_options(tower_plan, "linear_probe")
    inputs = make_inputs(task, shift=0.0)
    train = inputs.splits["train"]
    wrong = FeatureSet(train.image_features, (train.labels + 1) % len(CLASSES), train.unit_ids, "mislabelled")
    start, found = made_from(plan, Inputs(task, {**inputs.splits, "train": wrong}))
    assert found.chosen.state.digest == start.digest


def test_without_validation_records_some_training_records_choose_and_train_nothing(
    tower_plan: FederationPlan, task: Task
) -> None:
    inputs = make_inputs(task, validation=0)
    _, found = made_from(tower_plan, inputs)
    assert found.held_out
    assert found.records + found.chosen.validation.total == 140
    assert 0.5 * HELD_OUT < found.chosen.validation.total / 140 < 2 * HELD_OUT
    again = personalize(tower_plan, inputs, initial(tower_plan, task), CPU)
    assert again.chosen.validation.total == found.chosen.validation.total, "by a hash, not by chance"


def test_held_out_records_are_drawn_from_the_whole_training_split_of_the_plan(
    tower_plan: FederationPlan, task: Task
) -> None:
    everything = make_records(task, 400, 0, 3.0)
    splits = split(everything, tower_plan.federation, {"train": 0.5, "validation": 0.0, "test": 0.5})
    _, found = made_from(tower_plan, Inputs(task, splits))
    assert 0.5 * HELD_OUT < found.chosen.validation.total / len(splits["train"]) < 2 * HELD_OUT


def test_too_few_records_to_choose_by_are_refused(tower_plan: FederationPlan, task: Task) -> None:
    inputs = make_inputs(task, validation=0)
    few = inputs.splits["train"].select(np.arange(140) < 1)
    with pytest.raises(DataError, match=r"made: .*; add records"):
        made_from(tower_plan, Inputs(task, {**inputs.splits, "train": few}))


def test_a_plan_with_privacy_trains_at_home_without_it_and_by_adam(tower_plan: FederationPlan, task: Task) -> None:
    privacy = PrivacyPlan(
        unit="record", sample_rate=0.5, steps_per_round=4, noise_multiplier=1.0, max_grad_norm=1.0,
        update_divisor=150.0, delta=1e-5,
    )  # fmt: skip
    sgd = tower_plan.training.optimizer.model_copy(update={"name": "sgd", "lr": 1.0})
    plan = with_options(tower_plan, batch_size=None, optimizer=sgd).model_copy(update={"privacy": privacy})
    _, found = made_from(plan, make_inputs(task, validation=0))
    assert (found.training.optimizer.name, found.training.optimizer.lr, found.training.batch_size) == ("adam", 1e-3, 32)
    assert found.chosen.validation.correct > found.start.validation.correct


def test_a_plan_without_privacy_keeps_its_optimizer(tower_plan: FederationPlan) -> None:
    assert without_privacy(tower_plan).training.optimizer == tower_plan.training.optimizer


def test_prototypes_are_personalized_too(tower_plan: FederationPlan, task: Task) -> None:
    sgd = tower_plan.training.optimizer.model_copy(update={"name": "sgd", "lr": 1.0})
    _, found = made_from(with_options(tower_plan, "private_prototypes", optimizer=sgd), make_inputs(task))
    assert found.chosen.validation.correct >= found.start.validation.correct
