from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn

from fedclip_secure.config.plan import FederationPlan, MethodPlan, OpenClipModel, Optimizer
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.methods.base import Batch, Method
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.private.dp_sgd import PrivateTrainer, check_private
from fedclip_secure.training.private.independence import check_records_apart
from fedclip_secure.training.shared_parameters import load_shared, parameters_like, read_shared
from tests.training.dp_models import make_plan

CPU, LR, LENGTH = torch.device("cpu"), 0.05, 4
PHRASES = ("dog", "electric guitar", "house")
TEMPLATES = ("a picture of a {}",)
DOMAINS = {"scan-b": ["hill"], "scan-a": ["lake", "moor"]}  # scan-a is number 0

SILOS = ("lake", "hill", "moor")
THREE = {f"domain-{number}": [silo] for number, silo in enumerate(SILOS)}


@dataclass(frozen=True)
class World:
    """An encoder with random weights, and a task."""

    encoder: Encoder
    task: Task

    def build(self, method: Method) -> nn.Module:
        return method.build(self.task, self.encoder)

    def records(self, count: int, domain: int = 0, seed: int = 0) -> FeatureSet:
        """Features in a cloud of their domain's, around their class's text."""
        random = np.random.default_rng([seed, domain])
        labels = np.arange(count) % len(PHRASES)
        centre = np.random.default_rng(domain).normal(size=64)
        features = centre + 3 * self.task.text_features[labels] + 0.3 * random.normal(size=(count, 64))
        units = random.integers(0, 256, (count, 32), dtype=np.uint8)
        return FeatureSet((5 * features).astype(np.float32), labels, units, "made")

    def batch(self, records: FeatureSet) -> Batch:
        images, labels = torch.from_numpy(records.image_features), torch.from_numpy(records.labels)
        return Batch(images, labels, torch.from_numpy(self.task.text_features), self.task.logit_scale)

    def trainer(self, plan: FederationPlan, silo: str, records: FeatureSet) -> LocalTrainer:
        splits = {"train": records, "validation": records}
        return LocalTrainer(plan, self.task, splits, CPU, encoder=self.encoder, silo=silo)


@pytest.fixture(scope="module")
def world(random_tower: Path) -> World:
    model = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")
    encoder = resolve(model, random_tower)[0]
    text = encoder.text_features([[TEMPLATES[0].replace("{}", phrase)] for phrase in PHRASES])
    return World(encoder, Task(("d", "g", "h"), text, 20.0, PHRASES, TEMPLATES))


def options(domains: Mapping[str, list[str]] = DOMAINS, **changes: Any) -> dict[str, Any]:
    return {"name": "fedapt", "domains": dict(domains), "length": LENGTH, **changes}


def make_method(domains: Mapping[str, list[str]] = DOMAINS, **changes: Any) -> Method:
    return find_method(MethodPlan(**options(domains, **changes)))


def training(plan: FederationPlan, **changes: Any) -> FederationPlan:
    update = {"batch_size": 100, "optimizer": Optimizer(name="sgd", lr=LR), **changes}
    return plan.model_copy(
        update={"training": plan.training.model_copy(update=update), "method": MethodPlan(**options())}
    )


def moved(model: nn.Module) -> nn.Module:
    """Away from the start, where prompts are short."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in (model.get_parameter("prompt"), model.get_parameter("network.weight")):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.train()


# The equations on their own, by open_clip's modules over all of the context.


def keys_of(seed: int = 0) -> Tensor:
    drawn = np.random.Generator(np.random.PCG64(seed)).random((len(DOMAINS), LENGTH, 2048), dtype=np.float32)
    return torch.from_numpy(drawn)[:, :, :16]


def reference_text(encoder: Encoder, prompt: Tensor, key: Tensor) -> Tensor:
    clip: Any = encoder.whole()
    tokens = open_clip.tokenize([f"X X X X {phrase}." for phrase in PHRASES])
    words = clip.token_embedding(tokens)
    hidden = torch.cat([words[:, :1], prompt + prompt * key, words[:, 1 + LENGTH :]], dim=1) + clip.positional_embedding
    hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask))
    features: Tensor = hidden[torch.arange(len(PHRASES)), tokens.argmax(dim=1)] @ clip.text_projection
    unit: Tensor = features / features.norm(dim=1, keepdim=True)
    return unit


def reference_loss(encoder: Encoder, prompt: Tensor, network: Tensor, batch: Batch, domain: int) -> Tensor:
    unit, rows = batch.images / batch.images.norm(dim=1, keepdim=True), torch.arange(len(batch.labels))
    classes = batch.logit_scale * unit @ reference_text(encoder, prompt, keys_of()[domain]).T
    domains = 10 * unit @ network.T
    wrong = torch.logsumexp(classes, dim=1) - classes[rows, batch.labels]
    mean: Tensor = (wrong + torch.logsumexp(domains, dim=1) - domains[:, domain]).mean()
    return mean


@pytest.mark.parametrize(("silo", "domain"), [("moor", 0), ("hill", 1)])
def test_step_of_the_trainer_equals_a_plain_reference(
    world: World, tower_plan: FederationPlan, silo: str, domain: int
) -> None:
    plan, method, records = training(tower_plan), make_method(), world.records(20)
    received = read_shared(moved(world.build(method)), method.spec)
    update = world.trainer(plan, silo, records).train(received)
    prompt, network = (torch.from_numpy(np.array(array)).requires_grad_() for array in received.arrays().values())
    loss = reference_loss(world.encoder, prompt, network, world.batch(records), domain)
    gradients = torch.autograd.grad(loss, [prompt, network])
    wanted = -LR * torch.cat([gradient.reshape(-1) for gradient in gradients])
    assert wanted.abs().max() > 1e-3
    np.testing.assert_allclose(update, wanted, rtol=1e-3, atol=1e-6)


def test_a_prompt_for_each_class_and_a_row_for_each_domain_travel_and_nothing_else_is_trained(world: World) -> None:
    method = make_method()
    model = world.build(method)
    state = read_shared(model, method.spec)
    assert state.layout.entries == (("prompt", (3, LENGTH, 16)), ("network.weight", (2, 64)))
    assert set(state.arrays()) == {name for name, value in model.named_parameters() if value.requires_grad}
    assert not parameters_like(model, method.spec.private)


def test_exact_prediction_encodes_the_prompts_of_each_image(world: World) -> None:
    method = make_method(fast=False)
    model, batch = moved(world.build(method)), world.batch(world.records(6))
    with torch.no_grad():
        found = method.predict(model, batch)
        for image, logits in zip(batch.images, found, strict=True):
            scores = model.get_parameter("network.weight") @ image
            weights = torch.softmax((scores - scores.mean()) / scores.std() / 0.01, dim=0)
            key = (weights[:, None, None] * keys_of()).sum(dim=0)
            text = reference_text(world.encoder, model.get_parameter("prompt"), key)
            torch.testing.assert_close(logits, 20 * text @ image / image.norm(), rtol=1e-4, atol=1e-4)


def test_trained_network_tells_the_domains_and_fast_agrees_with_exact(world: World, tower_plan: FederationPlan) -> None:
    plan = training(tower_plan, optimizer=Optimizer(name="adam", lr=0.01), local_epochs=5)
    plan = plan.model_copy(update={"method": MethodPlan(**options(THREE))})
    method, exact = make_method(THREE), make_method(THREE, fast=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = world.build(method)
    state = read_shared(model, method.spec)
    silos = [world.trainer(plan, silo, world.records(60, domain)) for domain, silo in enumerate(SILOS)]
    for _ in range(6):
        change = np.mean([silo.train(state) for silo in silos], axis=0)
        state = AdapterState(state.layout, (state.vector + change).astype(np.float32))
    load_shared(model, method.spec, state)
    for domain in range(3):
        batch = world.batch(world.records(70, domain, seed=1))
        with torch.no_grad():
            scores = batch.images @ model.get_parameter("network.weight").T
            found, slow = (one.predict(model, batch).argmax(dim=1) for one in (method, exact))
        assert (scores.argmax(dim=1) == domain).double().mean() > 0.95
        assert (found == slow).double().mean() >= 0.995


def test_between_two_domains_exact_mixes_their_keys_and_fast_takes_the_one_ahead(world: World) -> None:
    fast, exact = make_method(THREE), make_method(THREE, fast=False)
    model, image = world.build(fast), torch.from_numpy(world.records(1).image_features)
    scores = torch.tensor([1.0, 0.987, -2.0])
    weights = torch.softmax((scores - scores.mean()) / scores.std() / 0.01, dim=0)
    assert torch.allclose(weights, torch.tensor([0.68, 0.32, 0.0]), atol=5e-3)
    batch = Batch(image, torch.zeros(1, dtype=torch.int64), torch.empty(3, 64), 20.0)
    unit = image[0] / image.norm()
    with torch.no_grad():
        model.get_parameter("prompt").normal_(generator=torch.Generator().manual_seed(0))
        model.get_parameter("network.weight").copy_(torch.outer(scores, unit))
        keys = model.get_buffer("keys")
        ahead, mixed = (20 * model(key) @ unit for key in (keys[0], torch.tensordot(weights, keys, dims=1)))
        torch.testing.assert_close(fast.predict(model, batch)[0], ahead, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(exact.predict(model, batch)[0], mixed, rtol=1e-4, atol=1e-3)
    assert (ahead - mixed).abs().max() > 0.02


@pytest.mark.parametrize("fast", [True, False])
def test_one_domain_and_scores_without_spread_give_numbers(world: World, fast: bool) -> None:
    batch = world.batch(world.records(4))
    unit = nn.functional.normalize(batch.images, dim=1)
    with torch.no_grad():
        method = make_method({"only": ["lake"]}, fast=fast)
        model = world.build(method)
        key = model.get_buffer("keys")[0]
        torch.testing.assert_close(method.predict(model, batch), 20 * unit @ model(key).T, rtol=1e-4, atol=1e-4)
        method = make_method(fast=fast)
        model = world.build(method)
        model.get_parameter("network.weight").zero_()
        keys = model.get_buffer("keys")
        text = model(keys[0] if fast else keys.mean(dim=0))
        torch.testing.assert_close(method.predict(model, batch), 20 * unit @ text.T, rtol=1e-4, atol=1e-4)


def test_keys_follow_from_the_seed_and_the_lock_holds_their_hash(world: World) -> None:
    state = make_method().server_state()
    assert state["domains"] == ["scan-a", "scan-b"]
    assert state == make_method(dict(reversed(DOMAINS.items()))).server_state(), "a mapping has no order"
    assert state["keys_sha256"] != make_method(seed=1).server_state()["keys_sha256"]
    assert (
        make_method(length=1).server_state()["keys_sha256"]
        == "be6d07bb665887265e538998402750bed225296c62fe4486a85780b1a78d54e6"
    )
    keys = world.build(make_method(seed=1)).get_buffer("keys")
    assert torch.equal(keys, keys_of(1))
    assert 0 <= keys.min() <= keys.max() < 1


def test_silo_without_a_domain_is_refused_by_name() -> None:
    assert len(make_method().phases()) == len(make_method().phases("moor")) == 1
    with pytest.raises(ConfigError, match=r"method\.domains: the silo sea is in none; the coordinator adds it"):
        make_method().phases("sea")


def test_silo_with_two_domains_and_a_domain_without_silos_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"domains: lake is listed more than once; a silo has one domain"):
        make_method({"a": ["lake"], "b": ["lake", "moor"]})
    with pytest.raises(ConfigError, match=r"domains\.b: "):
        make_method({"a": ["lake"], "b": []})
    with pytest.raises(ConfigError, match=r"domains: "):
        make_method({})
    with pytest.raises(ConfigError, match=r"domains: is missing"):
        find_method(MethodPlan(name="fedapt"))


def test_prompt_that_does_not_fit_and_a_plan_without_an_encoder_are_refused(world: World) -> None:
    longest = 77 - 5  # start, two words, the stop, end
    world.build(make_method(length=longest))
    with pytest.raises(ModelError, match=r"do not fit into the encoder's 77; make the phrases .* shorter"):
        world.build(make_method(length=longest + 1))
    with pytest.raises(ModelError, match="external"):
        make_method().build(world.task)


def test_another_seed_of_training_gives_another_initial_model(world: World) -> None:
    method, digests = make_method(), []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            digests.append(read_shared(world.build(method), method.spec).digest)
    assert digests[0] != digests[1]


def test_private_training_of_fedapt_keeps_records_apart_and_is_plain_training_without_noise(
    world: World, tower_plan: FederationPlan
) -> None:
    method, records = make_method(), world.records(9)
    check_private(method)
    model = moved(world.build(method))
    check_records_apart(model, method.phases("hill")[0], world.task, (64,), CPU)
    received = read_shared(model, method.spec)
    quiet = {"sample_rate": 1.0, "noise_multiplier": 1.0, "max_grad_norm": 1e6, "update_divisor": 9.0}
    plan = make_plan(method=options(), optimizer={"name": "sgd", "lr": LR}, steps_per_round=2, **quiet)
    private = PrivateTrainer(
        plan, 1e-12, world.task, records, records.unit_ids, CPU, encoder=world.encoder, silo="hill"
    )
    expected = world.trainer(training(tower_plan, local_epochs=2), "hill", records).train(received)
    np.testing.assert_allclose(private.train(received), expected, rtol=1e-3, atol=2e-5)
