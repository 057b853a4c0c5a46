from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from fedclip_secure.config.plan import FederationPlan, MethodPlan, OpenClipModel, Optimizer
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.features.stage import Stage
from fedclip_secure.features.towers import VisualTower
from fedclip_secure.methods.base import Batch, Method
from fedclip_secure.methods.feddat import DualAdapters
from fedclip_secure.methods.registry import find_method
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.private.dp_sgd import PrivateTrainer, check_private
from fedclip_secure.training.private.independence import check_records_apart
from fedclip_secure.training.shared_parameters import parameters_like, read_shared
from fedclip_secure.training.unshared_state import PrivateState
from tests.training.dp_models import make_plan

CPU, RECORDS, CLASSES, LR = torch.device("cpu"), 9, 5, 0.05
Weights = dict[str, Tensor]
FEATURES: dict[str, Any] = {"place": "features", "width": 6}
PLACES: list[dict[str, Any]] = [
    FEATURES,
    {"place": "blocks", "width": 3},
    {"place": "blocks", "width": 3, "first_block": 1},
]
each_place = pytest.mark.parametrize("options", PLACES, ids=["features", "blocks", "blocks-from-1"])


@dataclass(frozen=True)
class World:
    """An encoder with random weights, a task, and images."""

    encoder: Encoder
    task: Task
    pixels: Tensor

    def records(self, method: Method) -> FeatureSet:
        """The images as `method` takes them."""
        random = np.random.default_rng(4)
        features, labels = self.encoder.encode_images(self.pixels), random.integers(0, CLASSES, RECORDS)
        stage = method.spec.stage
        inputs = self.encoder.encode_images(self.pixels, stage) if stage.kind == "tokens" else None
        units = random.integers(0, 256, (RECORDS, 32), dtype=np.uint8)
        return FeatureSet(features, labels, units, "made", inputs=inputs)

    def batch(self, method: Method) -> Batch:
        records, text = self.records(method), torch.from_numpy(self.task.text_features)
        return Batch(torch.from_numpy(records.taken), torch.from_numpy(records.labels), text, self.task.logit_scale)

    def build(self, method: Method) -> nn.Module:
        return method.build(self.task, self.encoder)

    def moved_state(self, method: Method) -> AdapterState:
        return read_shared(moved(self.build(method)), method.spec)

    def trainer(self, plan: FederationPlan, path: Path | None = None) -> LocalTrainer:
        records = self.records(find_method(plan.method))
        splits, private = {"train": records, "validation": records}, PrivateState(path)
        return LocalTrainer(plan, self.task, splits, CPU, encoder=self.encoder, silo="a", private_state=private)


@pytest.fixture(scope="module")
def world(random_tower: Path) -> World:
    model = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")
    encoder = resolve(model, random_tower)[0]
    text = np.random.default_rng(0).normal(size=(CLASSES, encoder.lock.dim))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    task = Task(tuple(f"class {number}" for number in range(CLASSES)), text.astype(np.float32), 20.0)
    return World(encoder, task, torch.randn(RECORDS, 3, 64, 64, generator=torch.Generator().manual_seed(3)))


def method_of(options: dict[str, Any]) -> Method:
    return find_method(MethodPlan(name="feddat", **options))


def moved(model: nn.Module) -> nn.Module:
    """Away from the start, where Up is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("tower."):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.train()


def full_batch(plan: FederationPlan, options: dict[str, Any], epochs: int = 1) -> FederationPlan:
    training = plan.training.model_copy(
        update={"batch_size": RECORDS, "local_epochs": epochs, "optimizer": Optimizer(name="sgd", lr=LR)}
    )
    return plan.model_copy(update={"training": training, "method": MethodPlan(name="feddat", **options)})


# The equations on their own: the encoder as open_clip calls it, with hooks where the adapters lie.


def adapter(weights: Weights, number: int) -> Callable[[Tensor], Tensor]:
    down, down_bias, up, up_bias = (
        weights[f"{number}.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    return lambda hidden: hidden + (hidden @ down.T + down_bias).clamp(min=0) @ up.T + up_bias


def reference_logits(kinds: Sequence[Weights], options: dict[str, Any], world: World) -> Tensor:
    def mean(number: int) -> Callable[[Tensor], Tensor]:
        adapters = [adapter(weights, number) for weights in kinds]
        return lambda hidden: sum((one(hidden) for one in adapters[1:]), adapters[0](hidden)) / len(adapters)

    clip, first = world.encoder.whole(), options.get("first_block", 0)
    if options["place"] == "features":
        features = mean(0)(clip.encode_image(world.pixels))  # type: ignore[operator]
    else:
        blocks = list(clip.visual.transformer.resblocks)[first:]  # type: ignore[union-attr, arg-type]
        handles = [
            block.register_forward_hook(lambda _layer, _given, hidden, number=number: mean(number)(hidden))
            for number, block in enumerate(blocks)
        ]
        features = clip.encode_image(world.pixels)  # type: ignore[operator]
        for handle in handles:
            handle.remove()
    unit: Tensor = features / features.norm(dim=1, keepdim=True)
    return world.task.logit_scale * unit @ torch.from_numpy(world.task.text_features).T


def reference_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    own, target = torch.softmax(student / 3, dim=1), torch.softmax(teacher.detach() / 3, dim=1)
    divergence = (target * (target / own).log()).sum(dim=1)
    wrong = torch.logsumexp(student, dim=1) - student[torch.arange(len(labels)), labels]
    return ((wrong + 9 * divergence) / 2).mean()


def descend(weights: Weights, loss: Tensor) -> Weights:
    gradients = torch.autograd.grad(loss, list(weights.values()))
    named = zip(weights.items(), gradients, strict=True)
    return {name: (value - LR * gradient).detach().requires_grad_() for (name, value), gradient in named}


def weights_of(arrays: dict[str, npt.NDArray[Any]], prefix: str) -> Weights:
    kept = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return {name: torch.from_numpy(np.array(array)).requires_grad_() for name, array in kept.items()}


@each_place
def test_two_rounds_of_the_trainer_equal_a_plain_reference(
    options: dict[str, Any], tower_plan: FederationPlan, world: World, tmp_path: Path
) -> None:
    method, plan, path = method_of(options), full_batch(tower_plan, options, epochs=2), tmp_path / "private.safetensors"
    records, received = world.records(method), world.moved_state(method)
    trainer, labels = world.trainer(plan, path), torch.from_numpy(records.labels)
    for _ in range(2):  # in the second A0 is away from its start
        update = trainer.train(received)
        kept = load_file(path)
        ours, local = weights_of(received.arrays(), "shared."), weights_of(kept, "before.local.")
        frozen = {name: value.detach() for name, value in ours.items()}

        def logits(*kinds: Weights) -> Tensor:
            return reference_logits(kinds, options, world)

        for _ in range(2):
            ours = descend(ours, reference_loss(logits(ours), logits(local, frozen), labels))
            local = descend(local, reference_loss(logits(local), logits(ours), labels))
        for name, value in local.items():
            np.testing.assert_allclose(kept[f"after.local.{name}"], value.detach(), rtol=1e-3, atol=1e-5)
        wanted = AdapterState.from_arrays({f"shared.{name}": value.detach().numpy() for name, value in ours.items()})
        expected = wanted.vector.astype(np.float64) - received.vector
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(update, expected, rtol=2e-3, atol=1e-5)
        received = wanted


@each_place
def test_gradient_reaches_what_learns_and_no_target(options: dict[str, Any], world: World) -> None:
    method = method_of(options)
    model, batch = moved(world.build(method)), world.batch(method)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for phase in method.phases():
        loss = phase.loss(model, batch).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        reached = {name for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
        assert reached == set(parameters_like(model, phase.parameters))


def test_adapters_in_the_tower_of_vit_b_32_have_894528_parameters() -> None:
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
        model = DualAdapters(768, 48, VisualTower(clip.visual))
    assert sum(value.numel() for value in parameters_like(model, ("shared.*",)).values()) == 894_528


def test_adapter_on_the_feature_has_two_small_layers(world: World) -> None:
    method, dim = method_of({"width": 48}), world.task.text_features.shape[1]
    assert read_shared(world.build(method), method.spec).layout.size == 2 * 48 * dim + 48 + dim


@each_place
def test_feddat_shares_or_keeps_each_parameter_exactly_once(options: dict[str, Any], world: World) -> None:
    method = method_of(options)
    model = world.build(method)
    shared, private = (set(parameters_like(model, part)) for part in (method.spec.shared, method.spec.private))
    assert shared | private == {name for name, value in model.named_parameters() if value.requires_grad}
    assert not shared & private
    assert len(shared) == len(private)


@each_place
def test_feddat_starts_at_zero_shot(options: dict[str, Any], world: World) -> None:
    method = method_of(options)
    records = world.records(method)
    batch = world.batch(method)
    plain = replace(batch, images=torch.from_numpy(records.image_features))
    with torch.no_grad():
        logits = method.predict(world.build(method).eval(), batch)
    torch.testing.assert_close(logits, zero_shot_logits(plain), rtol=1e-4, atol=1e-4)


def test_another_seed_gives_another_initial_adapter_and_the_same_seed_the_same(world: World) -> None:
    method, digests = method_of(FEATURES), []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            digests.append(read_shared(world.build(method), method.spec).digest)
    assert digests[0] == digests[2] != digests[1]


def test_local_adapter_and_received_copy_predict_nothing(world: World) -> None:
    method = method_of(FEATURES)
    model, batch = moved(world.build(method)), world.batch(method)
    before = method.predict(model, batch)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("shared."):
                value.normal_()
    assert torch.equal(method.predict(model, batch), before)


def test_private_part_goes_on_in_another_process_where_it_was(
    tower_plan: FederationPlan, world: World, tmp_path: Path
) -> None:
    method, plan = method_of(FEATURES), full_batch(tower_plan, FEATURES)
    first = world.moved_state(method)
    second = AdapterState(first.layout, first.vector * np.float32(0.9))

    def started(seed: int, path: Path) -> LocalTrainer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # what a fresh A0 is
            return world.trainer(plan, path)

    throughout = started(1, tmp_path / "one")
    wanted = [throughout.train(first), throughout.train(second)]
    np.testing.assert_allclose(started(1, tmp_path / "two").train(first), wanted[0], atol=1e-6)
    resumed = started(2, tmp_path / "two")
    np.testing.assert_allclose(resumed.train(second), wanted[1], atol=1e-6)
    np.testing.assert_allclose(resumed.train(second), wanted[1], atol=1e-6, err_msg="trained again: the same A0")
    assert not np.allclose(started(2, tmp_path / "three").train(second), wanted[1], atol=1e-6), "A0 matters"


@each_place
def test_both_steps_of_feddat_keep_records_apart(options: dict[str, Any], world: World) -> None:
    method = method_of(options)
    check_private(method)
    model, shape = moved(world.build(method)), world.encoder.shape_of(method.spec.stage)
    for phase in method.phases():
        check_records_apart(model, phase, world.task, shape, CPU)


@pytest.mark.parametrize("options", PLACES[:2], ids=["features", "blocks"])
def test_private_training_of_feddat_without_noise_and_clipping_is_full_batch_training(
    options: dict[str, Any], tower_plan: FederationPlan, world: World
) -> None:
    method, plain = method_of(options), full_batch(tower_plan, options, epochs=2)
    records, received = world.records(method), world.moved_state(method)
    quiet = {"sample_rate": 1.0, "noise_multiplier": 1.0, "max_grad_norm": 1e6, "update_divisor": float(RECORDS)}
    plan = make_plan(
        method={"name": "feddat", **options}, optimizer={"name": "sgd", "lr": LR}, steps_per_round=2, **quiet
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = world.trainer(plain).train(received)
        torch.manual_seed(1)
        private = PrivateTrainer(plan, 1e-12, world.task, records, records.unit_ids, CPU, encoder=world.encoder)
    np.testing.assert_allclose(private.train(received), expected, rtol=1e-3, atol=2e-5)


def test_options_that_do_not_go_together_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"`first_block` goes with `place: blocks`"):
        method_of({"first_block": 1})
    with pytest.raises(ModelError, match="external"):
        method_of({"place": "blocks"}).build(world.task)
    with pytest.raises(ModelError, match=r"first_block: 3 is past the last of the tower's 3 blocks"):
        method_of({"place": "blocks", "first_block": 3}).build(world.task, world.encoder)
    assert method_of({"place": "blocks", "first_block": 2}).spec.stage == Stage("tokens", 2)
