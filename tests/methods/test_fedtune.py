"""Each arm against a transformer that is written here from its equations, with the encoder's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import OpenClipEncoder
from fedclip_secure.config.plan import FederationPlan, MethodPlan, OpenClipModel, Optimizer
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.encoder import Encoder, resolve
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.registry import METHODS, find_method
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.shared_parameters import load_shared, parameters_like, read_shared

CPU = torch.device("cpu")
CLASSES, PHRASES = ("dog", "cat", "hat"), ("a dog", "a small cat", "hat")
TEMPLATES = ("a picture of {}", "{}, drawn by hand")
SCALE, LR, COUNT = 20.0, 0.5, 6
VISUAL = ["visual_prompt", "visual_prompt_deep", "adapter", "visual_bias", "layernorm", "lora"]
ARMS = [name for name in METHODS if name.startswith("fedtune:")]
Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def encoder(random_tower: Path) -> Encoder:
    model = OpenClipModel(name="tower", pretrained="tower.safetensors", config="tower.json")
    return resolve(model, random_tower)[0]


@pytest.fixture(scope="module")
def task(encoder: Encoder) -> Task:
    text = encoder.text_features([[template.replace("{}", phrase) for template in TEMPLATES] for phrase in PHRASES])
    return Task(CLASSES, text, SCALE, PHRASES, TEMPLATES)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(COUNT, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def records(encoder: Encoder, plan: MethodPlan, pixels: Tensor) -> FeatureSet:
    stage = find_method(plan).spec.stage
    ids = np.arange(COUNT * 32, dtype=np.uint8).reshape(COUNT, 32)
    inputs = None if stage.kind == "features" else encoder.encode_images(pixels, stage)
    return FeatureSet(encoder.encode_images(pixels), np.arange(COUNT) % 3, ids, "made", inputs=inputs)


def attention(hidden: Tensor, weight: Tensor, bias: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Softmax attention over joint projections, head by head."""
    query, key, value = (hidden @ weight.T + bias).chunk(3, dim=-1)
    size = hidden.shape[-1] // heads
    found = []
    for head in range(heads):
        q, k, v = (part[..., head * size : (head + 1) * size] for part in (query, key, value))
        scores = q @ k.transpose(-1, -2) / size**0.5
        found.append(torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v)
    return torch.cat(found, dim=-1)


def layer_norm(hidden: Tensor, weights: Weights, name: str) -> Tensor:
    centred = hidden - hidden.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def joint_projection(weights: Weights, name: str) -> Tensor:
    """With B·A added to the rows of the query and of the value, where the arm is lora."""
    low_rank = f"{name}.attn.parametrizations.in_proj_weight"
    if f"{low_rank}.original" not in weights:
        return weights[f"{name}.attn.in_proj_weight"]
    a, b = weights[f"{low_rank}.0.a"], weights[f"{low_rank}.0.b"]
    query, key, value = weights[f"{low_rank}.original"].chunk(3)
    return torch.cat([query + b[0] @ a[0], key, value + b[1] @ a[1]])


def block(hidden: Tensor, weights: Weights, name: str, mask: Tensor | None = None) -> Tensor:
    """A pre-norm transformer block of two heads."""
    normed = layer_norm(hidden, weights, f"{name}.ln_1")
    mixed = attention(normed, joint_projection(weights, name), weights[f"{name}.attn.in_proj_bias"], 2, mask)
    hidden = hidden + mixed @ weights[f"{name}.attn.out_proj.weight"].T + weights[f"{name}.attn.out_proj.bias"]
    inner = layer_norm(hidden, weights, f"{name}.ln_2") @ weights[f"{name}.mlp.c_fc.weight"].T
    inner = nn.functional.gelu(inner + weights[f"{name}.mlp.c_fc.bias"])
    return hidden + inner @ weights[f"{name}.mlp.c_proj.weight"].T + weights[f"{name}.mlp.c_proj.bias"]


def visual_features(weights: Weights, tokens: Tensor, first: int) -> Tensor:
    """Features of tokens as they enter block `first`, with whatever an arm adds."""
    vit = "visual.tower.vit"
    hidden = layer_norm(tokens, weights, f"{vit}.ln_pre") if first == 0 else tokens
    own = hidden.shape[1]
    prompts = weights.get("visual.prompts.tokens", torch.zeros(0))
    for number in range(3 - first):
        if number < len(prompts):
            hidden = torch.cat([hidden[:, :own], prompts[number].expand(len(hidden), -1, -1)], dim=1)
        hidden = block(hidden, weights, f"{vit}.transformer.resblocks.{first + number}")
        adapter = f"visual.adapters.{number}"
        if f"{adapter}.up.weight" in weights:
            inner = torch.relu(hidden @ weights[f"{adapter}.down.weight"].T + weights[f"{adapter}.down.bias"])
            hidden = hidden + inner @ weights[f"{adapter}.up.weight"].T + weights[f"{adapter}.up.bias"]
    return layer_norm(hidden[:, 0], weights, f"{vit}.ln_post") @ weights[f"{vit}.proj"]


def text_features(weights: Weights, embeddings: Tensor, ends: Tensor) -> Tensor:
    """Of whole prompts, 77 tokens long, under the causal mask."""
    hidden = embeddings + weights["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    for number in range(2):
        hidden = block(hidden, weights, f"transformer.resblocks.{number}", mask)
    pooled = layer_norm(hidden, weights, "ln_final")[torch.arange(len(hidden)), ends]
    return normalize(pooled @ weights["text_projection"], dim=-1)


def text_classifier(weights: Weights, encoder: Encoder, context: Tensor | None) -> Tensor:
    """T (3, D): of the plan's templates, or of a context ahead of the phrases."""
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    table = weights["token_embedding.weight"]
    if context is None:
        tokens = tokenize([template.replace("{}", phrase) for phrase in PHRASES for template in TEMPLATES])
        found = text_features(weights, table[tokens], tokens.argmax(dim=1))
        return normalize(found.reshape(3, 2, -1).mean(dim=1), dim=-1)
    tokens = tokenize([f"{'X ' * 16}{phrase}." for phrase in PHRASES])
    prompts = torch.cat([table[tokens[:, :1]], context.expand(3, -1, -1), table[tokens[:, 17:]]], dim=1)
    return text_features(weights, prompts, tokens.argmax(dim=1))


def plan_for(tower_plan: FederationPlan, method: MethodPlan) -> FederationPlan:
    training = tower_plan.training.model_copy(
        update={"batch_size": COUNT, "optimizer": Optimizer(name="sgd", lr=LR), "local_epochs": 1}
    )
    return tower_plan.model_copy(update={"method": method, "training": training})


def one_step(plan: FederationPlan, task: Task, train: FeatureSet, encoder: Encoder) -> tuple[nn.Module, Any]:
    """A module away from its start, and the update of one full-batch step from there."""
    method = find_method(plan.method)
    torch.manual_seed(7)
    module = method.build(task, encoder)
    with torch.no_grad():
        for value in parameters_like(module, method.spec.shared).values():
            value.add_(0.05 * torch.randn_like(value))
    state = read_shared(module, method.spec)
    splits = {"train": train, "validation": train.select(np.zeros(len(train), dtype=bool))}
    update = LocalTrainer(plan, task, splits, CPU, encoder=encoder).train(state)
    load_shared(module, method.spec, state)
    return module, update


def compare(update: Any, losses: Tensor, tuned: Sequence[Tensor]) -> None:
    gradients = torch.autograd.grad(losses.mean(), tuned)
    wanted = -LR * torch.cat([gradient.reshape(-1) for gradient in gradients]).double().numpy()
    assert np.linalg.norm(wanted) > 0
    assert np.allclose(update, wanted, rtol=2e-3, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("arm", VISUAL)
def test_step_of_a_visual_arm_equals_the_equations(  # noqa: PLR0917 - fixtures
    tower_plan: FederationPlan, task: Task, encoder: Encoder, pixels: Tensor, arm: str, first: int
) -> None:
    plan = plan_for(tower_plan, MethodPlan(name=f"fedtune:{arm}", first_block=first))
    train = records(encoder, plan.method, pixels)
    module, update = one_step(plan, task, train, encoder)
    weights = dict(module.named_parameters())
    tuned = list(parameters_like(module, ("*",)).values())
    features = visual_features(weights, torch.from_numpy(train.taken), first)
    logits = SCALE * normalize(features, dim=-1) @ torch.from_numpy(task.text_features).T
    compare(update, cross_entropy(logits, torch.from_numpy(train.labels), reduction="none"), tuned)


@pytest.mark.parametrize("arm", ["text_context", "text_bias"])
def test_step_of_a_text_arm_equals_the_equations_over_whole_prompts(
    tower_plan: FederationPlan, task: Task, encoder: Encoder, pixels: Tensor, arm: str
) -> None:
    plan = plan_for(tower_plan, MethodPlan(name=f"fedtune:{arm}"))
    train = records(encoder, plan.method, pixels)
    module, update = one_step(plan, task, train, encoder)
    tuned = parameters_like(module, ("*",))
    weights = dict(encoder.whole().named_parameters())
    weights |= {name.removeprefix("tower."): value for name, value in tuned.items()}
    text = text_classifier(weights, encoder, tuned.get("context"))
    logits = SCALE * normalize(torch.from_numpy(train.image_features), dim=-1) @ text.T
    compare(update, cross_entropy(logits, torch.from_numpy(train.labels), reduction="none"), list(tuned.values()))


def test_arms_that_add_nothing_yet_start_at_zero_shot(encoder: Encoder, task: Task, pixels: Tensor) -> None:
    text, labels = torch.from_numpy(task.text_features), torch.zeros(COUNT, dtype=torch.long)
    plain = zero_shot_logits(Batch(torch.from_numpy(encoder.encode_images(pixels)), labels, text, SCALE))
    for arm in ("adapter", "visual_bias", "layernorm", "lora", "text_bias", "head"):
        method = find_method(MethodPlan(name=f"fedtune:{arm}"))
        images = torch.from_numpy(encoder.encode_images(pixels, method.spec.stage))
        with torch.no_grad():
            found = method.predict(method.build(task, encoder), Batch(images, labels, text, SCALE))
        assert torch.allclose(found, plain, atol=1e-3), arm


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith(("fedtune:", "fedavg", "fedprox"))])
def test_another_seed_gives_another_model_and_the_encoder_stays_as_it_is(
    encoder: Encoder, task: Task, pixels: Tensor, name: str
) -> None:
    before = {key: value.clone() for key, value in encoder.whole().named_parameters()}
    method, digests = find_method(MethodPlan(name=name)), set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        module = method.build(task, encoder)
        digests.add(read_shared(module, method.spec).digest)
    assert len(digests) == 2
    with torch.no_grad():
        for value in parameters_like(module, ("*",)).values():
            value.zero_()
    assert all(torch.equal(before[key], value) for key, value in encoder.whole().named_parameters())
    assert not any(value.requires_grad for value in encoder.whole().parameters())


@pytest.fixture(scope="module")
def vit_b_32() -> Encoder:
    """A CLIP of this size, its memory as it happens to be: for counting."""
    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):
        network = open_clip.CLIP(**config)
    network = network.to_empty(device="cpu")
    with torch.device("cpu"):
        network.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    settled = {
        "name": "ViT-B-32", "config": json.dumps(config), "weights_sha256": "0" * 64, "dim": 512, "logit_scale": 100,
        "preprocessing": {"size": 224, "mean": [0] * 3, "std": [1] * 3, "interpolation": "bicubic",
                          "resize_mode": "shortest"},
    }  # fmt: skip
    return Encoder(network, check(settled, OpenClipEncoder, "made"), None, CPU)


@pytest.mark.parametrize(
    ("arm", "count"),
    [
        ("text_context", 8_192),
        ("visual_prompt", 7_680),
        ("visual_prompt_deep", 92_160),
        ("head", 513 * 3),
        ("adapter", 894_528),
        ("visual_bias", 102_912),
        ("text_bias", 68_096),
        ("layernorm", 39_936),
        ("lora", 147_456),
        ("full", 151_277_313),
    ],
)
def test_vit_b_32_has_as_many_parameters_as_the_paper_counts(vit_b_32: Encoder, arm: str, count: int) -> None:
    text = np.eye(3, 512, dtype=np.float32)
    method = find_method(MethodPlan(name=f"fedtune:{arm}"))
    module = method.build(Task(CLASSES, text, SCALE, PHRASES, TEMPLATES), vit_b_32)
    assert sum(value.numel() for value in parameters_like(module, method.spec.shared).values()) == count


def test_a_context_that_does_not_fit_is_refused(encoder: Encoder, task: Task) -> None:
    method = find_method(MethodPlan(name="fedtune:text_context", context_length=75))
    with pytest.raises(ModelError, match=r"context of 75 tokens and the longest phrase, of 3, do not fit.*77"):
        method.build(task, encoder)


def test_a_block_past_the_last_is_refused(encoder: Encoder) -> None:
    stage = find_method(MethodPlan(name="fedtune:lora", first_block=3)).spec.stage
    with pytest.raises(ModelError, match=r"first_block: 3 is past the last of the tower's 3 blocks"):
        encoder.shape_of(stage)


def test_an_option_of_another_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method fedtune:head.*\s+rank: unknown key"):
        find_method(MethodPlan(name="fedtune:head", rank=4))
    with pytest.raises(ConfigError, match=r"method\.arm: the name 'fedtune:lora' settles it"):
        find_method(MethodPlan(name="fedtune:lora", arm="adapter"))


@pytest.mark.parametrize("name", [name for name in ARMS if name != "fedtune:head"])
def test_an_external_model_is_refused_by_what_trains_inside_an_encoder(task: Task, name: str) -> None:
    with pytest.raises(ModelError, match=r"trains inside the encoder, and the plan's model is external"):
        find_method(MethodPlan(name=name)).build(task, None)
