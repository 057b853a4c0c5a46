"""From a plan whose encoder reads no text to an evaluation, over images on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from fedclip_cli.evaluation import Measured, evaluation_json
from PIL import Image
from safetensors.torch import save_file

from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, TimmEncoder
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.export.load_script import loading
from fedclip_secure.features.progress import Progress
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.training.evaluation.evaluate import evaluate
from fedclip_secure.training.evaluation.predict import predict
from fedclip_secure.training.inputs import Inputs, load_inputs
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.prepare import Prepared, prepare

CPU = torch.device("cpu")
PRIVACY = {
    "unit": "record", "sample_rate": 0.5, "steps_per_round": 1, "noise_multiplier": 1.0, "max_grad_norm": 1.0,
    "update_divisor": 8.0, "delta": 1e-5,
}  # fmt: skip


def silent(progress: Progress) -> None:
    assert progress.done <= progress.total


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and two classes of images that their colour tells apart."""
    folder = tmp_path_factory.mktemp("home")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", pretrained=False).state_dict(), folder / "vit.safetensors")
    random = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(20):
            noise = random.integers(-30, 30, size=(48, 48, 3))
            picture = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / "images" / name / f"{number}.png")
    return folder


def plan_for(method: str, **more: Any) -> FederationPlan:
    plan = {
        "federation": "colours",
        "server": "https://localhost",
        "model": {"name": "timm/test_vit", "pretrained": "vit.safetensors"},
        "classes": {"red": "red", "blue": "blue"},
        "splits": {"train": 0.6, "validation": 0.0, "test": 0.4},
        "method": {"name": method},
        "training": {"rounds": 1, "batch_size": 8, "local_epochs": 8, "optimizer": {"name": "adam", "lr": 1e-3}},
        **more,
    }
    return check(plan, FederationPlan, "plan")


def silo(home: Path, workdir: Path, **changes: Any) -> SiloConfig:
    data = {"format": "folder", "path": str(home / "images")}
    settings = {"name": "lab", "data": data, "workdir": str(workdir), "device": "cpu"}
    return SiloConfig.model_validate({**settings, "weights": str(home / "vit.safetensors"), **changes})


def initial(prepared: Prepared) -> AdapterState:
    layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in prepared.lock.layout))
    return AdapterState.from_safetensors(prepared.initial_file, layout, "initial.safetensors")


def trained(plan: FederationPlan, prepared: Prepared, inputs: Inputs) -> AdapterState:
    start = initial(prepared)
    update = LocalTrainer(plan, inputs.task, inputs.splits, CPU, encoder=inputs.encoder).train(start)
    return AdapterState(start.layout, (start.vector + update).astype(np.float32))


@pytest.mark.parametrize("method", ["fedtune:head", "fedtune:layernorm", "fedavg_full"])
def test_images_are_learned_without_text_and_no_zero_shot_stands_beside(
    home: Path, tmp_path: Path, method: str
) -> None:
    plan = plan_for(method)
    prepared = prepare(plan, home)
    assert isinstance(prepared.lock.encoder, TimmEncoder)
    contract = Contract.decode(Contract(plan, prepared.lock).encode(), "server")
    inputs = load_inputs(silo(home, tmp_path), contract, silent)
    assert inputs.task.text_features.shape == (0, 64)
    state = trained(plan, prepared, inputs)
    result = evaluate(plan, inputs.task, inputs.splits["test"], state, CPU, encoder=inputs.encoder)
    assert result.adapter.accuracy == 1.0
    assert result.zero_shot_confusion is None
    assert result.zero_shot.accuracy is None
    assert {each.zero_shot.accuracy for each in result.classes} == {None}
    report: Any = evaluation_json("test", [Measured("last", 1, result, tmp_path / "plot.svg")])
    assert report["accuracy"] == {"zero_shot": None, "federated": 1.0}
    assert report["classes"]["red"]["zero_shot"] is None
    found = predict(silo(home, tmp_path), contract, state, [home / "images/blue/0.png"], silent)
    assert found.probabilities[0].argmax() == 1


def test_method_that_needs_text_is_refused_by_coordinator_and_silo(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fedclip classifies by text features, and timm/test_vit reads no text"):
        prepare(plan_for("fedclip"), home)
    lock = prepare(plan_for("linear_probe"), home).lock
    with pytest.raises(ConfigError, match=r"choose one that learns a head \(linear_probe, "):
        load_inputs(silo(home, tmp_path), Contract(plan_for("fedclip"), lock), silent)


def test_silo_with_other_weights_is_refused(home: Path, tmp_path: Path) -> None:
    plan = plan_for("linear_probe")
    contract = Contract(plan, prepare(plan, home).lock)
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="not the file that the coordinator locked"):
        load_inputs(silo(home, tmp_path, weights=str(tmp_path / "other.safetensors")), contract, silent)


def test_lock_pins_the_weights_and_the_head(home: Path) -> None:
    lock = prepare(plan_for("fedtune:head"), home).lock
    assert isinstance(lock.encoder, TimmEncoder)
    assert lock.encoder.weights_sha256 == hashlib.sha256((home / "vit.safetensors").read_bytes()).hexdigest()
    assert [(entry.name, entry.shape) for entry in lock.layout] == [("weight", [2, 64]), ("bias", [2])]


def test_card_of_an_export_claims_no_program_for_it(home: Path) -> None:
    plan = plan_for("linear_probe")
    said = loading(Contract(plan, prepare(plan, home).lock))
    assert "applied by fedclip-secure" in said
    assert "```" not in said


@pytest.mark.parametrize("method", ["fedtune:visual_bias", "linear_probe"])
def test_audit_looks_at_a_model_with_a_head(method: str) -> None:
    private = {
        "privacy": PRIVACY,
        "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
        "secure_aggregation": {"weights": "equal"},
        "training": {"rounds": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
    }
    plan = plan_for(method, **private)
    scene = make_scene(plan, 6)
    assert scene.records.text_features.shape[0] == 0
    assert scene.task.logit_scale == 1.0
    logits = scene.method.predict(scene.module, scene.batch(np.arange(6)))
    assert logits.shape == (6, 2)
