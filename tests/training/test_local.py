from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedclip_secure.config.plan import FederationPlan, Optimizer
from fedclip_secure.data.dataset import Counts, FeatureSet, Task
from fedclip_secure.errors import DataError, ModelError
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.evaluation.evaluate import evaluate
from fedclip_secure.training.local_training import LocalTrainer, make_optimizer
from fedclip_secure.training.shared_parameters import read_shared

CPU = torch.device("cpu")
DIM, CLASSES = 16, ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def make_records(task: Task, count: int, seed: int) -> FeatureSet:
    """Features near their class's text, after one shift that zero-shot does not know."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(task.classes)
    shifted = task.text_features[labels] * (1 + 3 * np.sin(np.arange(DIM))) + 0.1 * random.normal(size=(count, DIM))
    units = random.integers(0, 256, (count, 32), dtype=np.uint8)
    return FeatureSet((10 * shifted).astype(np.float32), labels, units, "made")


@pytest.fixture
def task() -> Task:
    text = np.random.default_rng(5).normal(size=(len(CLASSES), DIM))
    return Task(CLASSES, (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32), 50.0)


@pytest.fixture
def splits(task: Task) -> dict[str, FeatureSet]:
    return {name: make_records(task, 70, seed) for seed, name in enumerate(("train", "validation", "test"))}


def training(plan: FederationPlan, loss: str = "cross_entropy", **changes: Any) -> FederationPlan:
    method = plan.method.model_copy(update={"loss": loss})
    return plan.model_copy(update={"training": plan.training.model_copy(update=changes), "method": method})


def initial(plan: FederationPlan, task: Task) -> AdapterState:
    method = find_method(plan.method)
    return read_shared(method.build(task), method.spec)


def add(state: AdapterState, update: np.ndarray[Any, np.dtype[np.float64]]) -> AdapterState:
    return AdapterState(state.layout, (state.vector + update).astype(np.float32))


@pytest.mark.parametrize("loss", ["cross_entropy", "inbatch"])
def test_one_full_batch_step_equals_torch_by_hand(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet], loss: str
) -> None:
    sgd = Optimizer(name="sgd", lr=0.5)
    plan = training(tower_plan, loss, batch_size=70, optimizer=sgd)
    state = initial(plan, task)
    update = LocalTrainer(plan, task, splits, CPU).train(state)
    w1, b1, w2, b2 = (torch.from_numpy(array.copy()).requires_grad_() for array in state.arrays().values())
    images, labels = torch.from_numpy(splits["train"].image_features), torch.from_numpy(splits["train"].labels)
    attention = torch.softmax(torch.tanh(images @ w1.T + b1) @ w2.T + b2, dim=1)
    logits = 50 * torch.nn.functional.normalize(attention * images) @ torch.from_numpy(task.text_features).T
    if loss == "cross_entropy":
        value = torch.nn.functional.cross_entropy(logits, labels)
    else:
        similarity, own = logits[:, labels], torch.arange(70)
        cross_entropy = torch.nn.functional.cross_entropy
        value = (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2
    gradients = torch.autograd.grad(value, [w1, b1, w2, b2])
    wanted = -0.5 * torch.cat([gradient.reshape(-1) for gradient in gradients]).double().numpy()
    assert update.dtype == np.float64
    assert np.allclose(update, wanted, rtol=1e-3, atol=1e-5)


def test_training_beats_zero_shot_on_unseen_records(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]
) -> None:
    plan = training(tower_plan, local_epochs=30)
    trainer, state = LocalTrainer(plan, task, splits, CPU), initial(tower_plan, task)
    before = trainer.validate(state)
    trained = add(state, trainer.train(state))
    result = evaluate(plan, task, splits["test"], trained, CPU)
    assert before.total == trainer.validate(trained).total == 70
    assert trainer.validate(trained).correct > before.correct
    assert result.adapter.correct > result.zero_shot.correct
    assert [counts.adapter.total for counts in result.classes] == [10] * 7


def test_optimiser_starts_afresh_each_round(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]
) -> None:
    plan = training(tower_plan, batch_size=70)
    trainer, state = LocalTrainer(plan, task, splits, CPU), initial(tower_plan, task)
    first = trainer.train(state)
    assert np.allclose(first, trainer.train(state), atol=1e-5)


def test_update_follows_the_layout_of_what_was_received(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]
) -> None:
    plan = training(tower_plan, batch_size=70, optimizer=Optimizer(name="sgd", lr=0.1))
    trainer, state = LocalTrainer(plan, task, splits, CPU), initial(tower_plan, task)
    names = sorted(state.arrays())
    reordered = AdapterState.from_arrays(state.arrays(), names)
    update = AdapterState(reordered.layout, trainer.train(reordered).astype(np.float32)).arrays()
    plain = AdapterState(state.layout, trainer.train(state).astype(np.float32)).arrays()
    assert all(np.allclose(update[name], plain[name], atol=1e-5) for name in names)


def test_inbatch_skips_batches_of_one(tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]) -> None:
    # 70 records in batches of 69: the last batch has one, where weight decay alone would move weights.
    decaying = Optimizer(name="sgd", lr=0.0001, weight_decay=1000.0)
    state = initial(tower_plan, task)
    plan = training(tower_plan, "inbatch", batch_size=69, optimizer=decaying)
    update = LocalTrainer(plan, task, splits, CPU).train(state)
    assert np.abs(update + 0.1 * state.vector).max() < 0.01
    plan = training(tower_plan, "cross_entropy", batch_size=69, optimizer=decaying)
    assert np.abs(LocalTrainer(plan, task, splits, CPU).train(state) + 0.19 * state.vector).max() < 0.01


def test_records_are_those_of_the_training_split(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]
) -> None:
    assert LocalTrainer(tower_plan, task, splits, CPU).records == 70


def test_silo_without_training_records_is_told(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]
) -> None:
    one = splits["train"].select(np.arange(70) == 0)
    none = one.select(np.array([False]))
    with pytest.raises(DataError, match=r"made: 0 record\(s\) fall into the training split"):
        LocalTrainer(tower_plan, task, {**splits, "train": none}, CPU)
    with pytest.raises(DataError, match=r"1 record\(s\).*needs 2"):
        LocalTrainer(training(tower_plan, "inbatch"), task, {**splits, "train": one}, CPU)


def test_empty_validation_counts_nothing(tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]) -> None:
    none = splits["validation"].select(np.zeros(70, dtype=bool))
    counts = LocalTrainer(tower_plan, task, {**splits, "validation": none}, CPU).validate(initial(tower_plan, task))
    assert counts == Counts(0, 0)
    assert counts.accuracy is None
    with pytest.raises(DataError, match="this split holds no records"):
        evaluate(tower_plan, task, none, initial(tower_plan, task), CPU)


def test_adapter_of_another_encoder_is_refused(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]
) -> None:
    other = AdapterState.from_arrays({"hidden.weight": np.zeros((4, 4))})
    with pytest.raises(ModelError, match=r"'hidden\.weight'.*\(16, 16\), the adapter \(4, 4\)"):
        LocalTrainer(tower_plan, task, splits, CPU).train(other)


def test_training_that_diverges_is_told(tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]) -> None:
    plan = training(tower_plan, local_epochs=3, optimizer=Optimizer(name="sgd", lr=1e38))
    with pytest.raises(ModelError, match=r"NaN or infinity; the plan's `training\.optimizer\.lr` is too high"):
        LocalTrainer(plan, task, splits, CPU).train(initial(plan, task))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (Optimizer(name="adam", lr=0.1, weight_decay=0.2), torch.optim.Adam),
        (Optimizer(name="adamw", lr=0.1, weight_decay=0.2), torch.optim.AdamW),
        (Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.2), torch.optim.SGD),
    ],
)
def test_optimiser_is_the_plans(options: Optimizer, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = make_optimizer([torch.zeros(1, requires_grad=True)], options)
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["weight_decay"] == 0.2
    if kind is torch.optim.SGD:
        assert optimizer.defaults["momentum"] == 0.9
    else:
        assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-6)


def test_linear_probe_beats_its_start_and_moves_no_coordinate_past_lr_times_steps(
    tower_plan: FederationPlan, task: Task, splits: dict[str, FeatureSet]
) -> None:
    method = tower_plan.method.model_copy(update={"name": "linear_probe"})
    plan = training(tower_plan, local_epochs=10, batch_size=7).model_copy(update={"method": method})
    state, lr, steps = initial(plan, task), plan.training.optimizer.lr, 10 * 70 // 7
    update = LocalTrainer(plan, task, splits, CPU).train(state)
    assert np.abs(update).max() <= lr * steps * 1.0001, "a coordinate_clip of lr · steps cuts nothing of Adam's"
    result = evaluate(plan, task, splits["test"], add(state, update), CPU)
    assert result.adapter.correct > result.zero_shot.correct
    assert evaluate(plan, task, splits["test"], state, CPU).adapter == result.zero_shot
