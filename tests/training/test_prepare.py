from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, ExternalEncoder
from fedclip_secure.config.plan import ExternalModel, FederationPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data.dataset import FeatureSet
from fedclip_secure.errors import ConfigError, DataError, ModelError
from fedclip_secure.features.progress import Progress
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.privacy.accounting.accountant import epsilon
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.accounting.rdp import rdp_epsilon
from fedclip_secure.training.evaluation.evaluate import evaluate
from fedclip_secure.training.inputs import Inputs, load_inputs
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.prepare import Prepared, prepare


def initial_state(prepared: Prepared) -> AdapterState:
    layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in prepared.lock.layout))
    return AdapterState.from_safetensors(prepared.initial_file, layout, "initial.safetensors")


def silo(data: dict[str, Any], workdir: Path, **changes: Any) -> SiloConfig:
    return SiloConfig.model_validate({"name": "lab", "data": data, "workdir": str(workdir), "device": "cpu", **changes})


def silent(progress: Progress) -> None:
    assert progress.done <= progress.total


@pytest.fixture
def home(random_tower: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_tower, tmp_path / "home"))


@pytest.fixture
def external(tower_plan: FederationPlan, home: Path) -> FederationPlan:
    """The same plan over features that come in files, 8 wide."""
    classes = list(tower_plan.classes)
    text = np.eye(len(classes), 8, dtype=np.float32) * 3
    arrays: dict[str, Any] = {"text_features": text, "logit_scale": np.array(100.0, dtype=np.float32)}
    save_file(arrays, home / "prompts.safetensors", {"classes": json.dumps(classes)})
    model = ExternalModel(name="external", dim=8, text_features="prompts.safetensors")
    return tower_plan.model_copy(update={"model": model})


@pytest.fixture
def features(tower_plan: FederationPlan, tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "features": random.normal(size=(50, 8)).astype(np.float32),
        "labels": random.integers(0, 7, 50),
    }
    save_file(arrays, tmp_path / "features.safetensors", {"classes": json.dumps(list(tower_plan.classes))})
    return tmp_path / "features.safetensors"


def test_lock_pins_the_initial_adapter(tower_plan: FederationPlan, home: Path) -> None:
    prepared = prepare(tower_plan, home)
    state = initial_state(prepared)
    assert prepared.lock.initial_model == state.digest.hex()
    assert prepared.lock.initial_file == hashlib.sha256(prepared.initial_file).hexdigest()
    assert [entry.name for entry in prepared.lock.layout] == [
        "hidden.weight",
        "hidden.bias",
        "gate.weight",
        "gate.bias",
    ]


def test_seed_alone_decides_the_initial_adapter_and_stays_inside(tower_plan: FederationPlan, home: Path) -> None:
    before = torch.random.get_rng_state()
    first = prepare(tower_plan, home).lock
    torch.rand(3)
    assert prepare(tower_plan, home).lock == first
    seeded = tower_plan.model_copy(update={"training": tower_plan.training.model_copy(update={"seed": 1})})
    assert prepare(seeded, home).lock.initial_model != first.initial_model
    torch.random.set_rng_state(before)
    prepare(tower_plan, home)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_earlier_adapter_is_continued(tower_plan: FederationPlan, home: Path) -> None:
    state = initial_state(prepare(tower_plan, home))
    moved = AdapterState(state.layout, state.vector + 1)
    (home / "earlier.safetensors").write_bytes(moved.to_safetensors())
    again = prepare(tower_plan.model_copy(update={"initial": "earlier.safetensors"}), home)
    assert again.lock.initial_model == moved.digest.hex()


def test_a_personal_adapter_is_no_start_for_all(tower_plan: FederationPlan, home: Path) -> None:
    state = initial_state(prepare(tower_plan, home))
    (home / "earlier.safetensors").write_bytes(state.to_safetensors({"personal": "must not leave the house"}))
    with pytest.raises(ConfigError, match=r"earlier\.safetensors': is one silo's personal adapter"):
        prepare(tower_plan.model_copy(update={"initial": "earlier.safetensors"}), home)


def test_earlier_adapter_at_fault_is_named(tower_plan: FederationPlan, home: Path) -> None:
    plan = tower_plan.model_copy(update={"initial": "earlier.safetensors"})
    with pytest.raises(ConfigError, match=r"earlier\.safetensors': cannot be read.*`initial`"):
        prepare(plan, home)
    (home / "earlier.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"earlier\.safetensors: is not a safetensors file"):
        prepare(plan, home)


def test_external_text_features_are_locked(external: FederationPlan, home: Path) -> None:
    encoder = prepare(external, home).lock.encoder
    assert isinstance(encoder, ExternalEncoder)
    assert (encoder.dim, encoder.logit_scale) == (8, 100.0)
    assert encoder.text_features_sha256 == hashlib.sha256((home / "prompts.safetensors").read_bytes()).hexdigest()


def test_missing_text_features_are_named(external: FederationPlan, home: Path) -> None:
    (home / "prompts.safetensors").unlink()
    with pytest.raises(DataError, match=r"prompts\.safetensors"):
        prepare(external, home)


def test_external_features_train(external: FederationPlan, home: Path, features: Path, tmp_path: Path) -> None:
    prepared = prepare(external, home)
    settings = silo({"format": "embeddings", "path": str(features)}, tmp_path / "work")
    inputs = load_inputs(settings, Contract(external, prepared.lock), silent, home / "prompts.safetensors")
    assert {name: len(part) for name, part in inputs.splits.items()}.keys() == {"train", "validation", "test"}
    assert sum(len(part) for part in inputs.splits.values()) == 50
    trainer = LocalTrainer(external, inputs.task, inputs.splits, torch.device("cpu"))
    assert np.abs(trainer.train(initial_state(prepared))).max() > 0


def test_external_model_needs_its_own_text_features_and_feature_files(
    external: FederationPlan, home: Path, features: Path, tmp_path: Path
) -> None:
    contract = Contract(external, prepare(external, home).lock)
    settings = silo({"format": "embeddings", "path": str(features)}, tmp_path)
    with pytest.raises(ConfigError, match="text features: is missing"):
        load_inputs(settings, contract, silent)
    with pytest.raises(ModelError, match="not the file that the coordinator locked"):
        load_inputs(settings, contract, silent, features)
    folder = silo({"format": "folder", "path": str(tmp_path)}, tmp_path)
    with pytest.raises(ConfigError, match="no encoder runs here; set `embeddings`"):
        load_inputs(folder, contract, silent, home / "prompts.safetensors")


def test_lock_of_another_kind_than_the_plan_is_refused(
    tower_plan: FederationPlan, external: FederationPlan, home: Path, features: Path, tmp_path: Path
) -> None:
    settings = silo({"format": "embeddings", "path": str(features)}, tmp_path)
    for plan, other in ((tower_plan, external), (external, tower_plan)):
        with pytest.raises(ConfigError, match=r"federation\.lock: its encoder is not the plan's"):
            load_inputs(settings, Contract(plan, prepare(other, home).lock), silent, home / "prompts.safetensors")


def test_real_images_go_from_folder_to_update(
    tower_plan: FederationPlan, home: Path, pacs_mini: Path, tmp_path: Path
) -> None:
    prepared = prepare(tower_plan, home)
    contract = Contract(tower_plan, prepared.lock)
    data = {"format": "folder", "path": str(pacs_mini / "photo")}
    settings = silo(data, tmp_path / "work", weights=str(home / "tower.safetensors"))
    calls: list[tuple[int, int]] = []
    inputs = load_inputs(settings, contract, lambda now: calls.append((now.done, now.total)))
    again = load_inputs(settings, contract, lambda now: calls.append((now.done, now.total)))
    assert (calls[0], calls[-2], calls[-1]) == ((0, 168), (168, 168), (168, 168))
    assert same(inputs, again)
    state = initial_state(prepared)
    update = LocalTrainer(tower_plan, inputs.task, inputs.splits, torch.device("cpu")).train(state)
    trained = AdapterState(state.layout, (state.vector + update).astype(np.float32))
    result = evaluate(tower_plan, inputs.task, inputs.splits["test"], trained, torch.device("cpu"))
    assert result.adapter.total == result.zero_shot.total == len(inputs.splits["test"])


def same(left: Inputs, right: Inputs) -> bool:
    pairs: list[tuple[FeatureSet, FeatureSet]] = [(left.splits[name], right.splits[name]) for name in left.splits]
    return all((one.image_features == two.image_features).all() for one, two in pairs)


def test_config_model_and_canonical_load_no_torch() -> None:
    program = (
        "import sys, fedclip_secure.config.plan, fedclip_secure.config.lock, fedclip_secure.config.silo, "
        "fedclip_secure.model.state, fedclip_secure.canonical, fedclip_secure.data.embeddings, "
        "fedclip_secure.data.folder; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Privacy


def private(plan: FederationPlan, **changes: Any) -> FederationPlan:
    """The same plan with privacy; `changes` of the block, and of `method` and `training`."""
    values = plan.model_dump(mode="json")
    values["training"] = {**values["training"], "batch_size": None, "rounds": 4, **changes.pop("training", {})}
    values["splits"] = {"train": 0.8, "validation": 0.0, "test": 0.2}
    values["secure_aggregation"] |= {"weights": "equal", "public_weights": None}
    values["method"] = changes.pop("method", {"name": "fedclip"})
    values["privacy"] = {
        "unit": "record", "sample_rate": 0.2, "steps_per_round": 5, "max_grad_norm": 1.0, "update_divisor": 20.0,
        "delta": 1e-5, "max_retrains": 1, **(changes or {"noise_multiplier": 1.25}),
    }  # fmt: skip
    return check(values, FederationPlan, "plan")


def test_the_lock_holds_the_plans_noise_and_how_often_a_step_releases(tower_plan: FederationPlan, home: Path) -> None:
    lock = prepare(private(tower_plan), home).lock
    assert (lock.noise_multiplier, lock.releases) == (1.25, 1)
    assert prepare(tower_plan, home).lock.noise_multiplier is None


def test_a_target_becomes_the_least_noise_for_all_rounds_and_retrains_together(
    tower_plan: FederationPlan, home: Path
) -> None:
    noise = prepare(private(tower_plan, target_epsilon=3.0), home).lock.noise_multiplier
    assert noise is not None
    steps = (4 + 1) * 5
    assert epsilon([Event(noise, 0.2, steps)], 1e-5) <= 3.0 < epsilon([Event(noise - 2e-3, 0.2, steps)], 1e-5)


def test_a_loss_that_couples_records_is_refused_with_privacy(tower_plan: FederationPlan, home: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.loss is inbatch, and must be cross_entropy: `inbatch` couples"):
        prepare(private(tower_plan, method={"name": "fedclip", "loss": "inbatch"}), home)


@pytest.mark.parametrize("norm", [1e-7, 1e7])
def test_norm_that_single_precision_would_lose_is_refused_with_privacy(
    tower_plan: FederationPlan, home: Path, norm: float
) -> None:
    plan = private(tower_plan, noise_multiplier=1.0, max_grad_norm=norm)
    with pytest.raises(ConfigError, match=r"privacy\.max_grad_norm is .*; 1e-06 to 1e\+06 is trained with"):
        prepare(plan, home)


def test_huge_initial_weights_are_refused_with_privacy_and_with_privacy_alone(
    tower_plan: FederationPlan, home: Path
) -> None:
    state = initial_state(prepare(tower_plan, home))
    huge = AdapterState(state.layout, np.full_like(state.vector, 100.5))
    (home / "earlier.safetensors").write_bytes(huge.to_safetensors())
    going_on = {"initial": "earlier.safetensors"}
    assert prepare(tower_plan.model_copy(update=going_on), home).lock.initial_model == huge.digest.hex()
    with pytest.raises(ModelError, match=r"a parameter of size 100; with `privacy` at most 100 .* another `initial`"):
        prepare(private(tower_plan).model_copy(update=going_on), home)


def test_scale_that_no_clip_has_is_refused_with_privacy(external: FederationPlan, home: Path) -> None:
    arrays: dict[str, Any] = {
        "text_features": np.eye(7, 8, dtype=np.float32),
        "logit_scale": np.array(1001, np.float32),
    }
    save_file(arrays, home / "prompts.safetensors", {"classes": json.dumps(list(external.classes))})
    assert prepare(external, home).lock.encoder.logit_scale == 1001
    with pytest.raises(ConfigError, match=r"logit_scale is 1e\+03; with `privacy` at most 1000"):
        prepare(private(external), home)


@pytest.mark.parametrize("target", [700.0, 1000.0])
def test_a_target_that_nothing_can_be_claimed_for_gets_the_noise_of_the_largest_claim(
    tower_plan: FederationPlan, home: Path, target: float
) -> None:
    plan = private(tower_plan, target_epsilon=target)
    lock = prepare(plan, home).lock
    planned = PlannedRun.of(Contract(plan, lock))
    assert planned is not None
    assert planned.epsilon() < target
    assert 999 < rdp_epsilon([planned.total], planned.delta) <= 1000


def test_noise_that_allows_no_claim_is_refused_with_the_least_that_does(tower_plan: FederationPlan, home: Path) -> None:
    said = r"privacy: with noise_multiplier 0\.05 epsilon over 25 step\(s\).* to at least (\d\.\d+)"
    with pytest.raises(ConfigError, match=said) as refused:
        prepare(private(tower_plan, noise_multiplier=0.05), home)
    found = re.search(said, str(refused.value))
    assert found is not None
    assert prepare(private(tower_plan, noise_multiplier=float(found[1])), home).lock.noise_multiplier == float(found[1])


ONCE = {"rounds": 1, "optimizer": {"name": "sgd", "lr": 1.0}}


@pytest.mark.parametrize(
    ("training", "privacy"),
    [
        ({}, {}),
        ({**ONCE, "rounds": 2}, {"sample_rate": 1.0, "steps_per_round": 1}),
        ({**ONCE, "optimizer": {"name": "adam", "lr": 1.0}}, {"sample_rate": 1.0, "steps_per_round": 1}),
        (ONCE, {"sample_rate": 0.5, "steps_per_round": 1}),
        (ONCE, {"sample_rate": 1.0, "steps_per_round": 2}),
    ],
)
def test_prototypes_are_added_up_once(
    tower_plan: FederationPlan, home: Path, training: dict[str, Any], privacy: dict[str, Any]
) -> None:
    given = {"noise_multiplier": 2.0, **privacy}
    plan = private(tower_plan, method={"name": "private_prototypes"}, training=training, **given)
    with pytest.raises(
        ConfigError, match=r"private_prototypes does not go .*\n  (training|privacy)\..* is .*, and must"
    ):
        prepare(plan, home)


def test_prototypes_with_their_schedule_are_prepared(tower_plan: FederationPlan, home: Path) -> None:
    given = {"noise_multiplier": 2.0, "sample_rate": 1.0, "steps_per_round": 1}
    lock = prepare(private(tower_plan, method={"name": "private_prototypes"}, training=ONCE, **given), home).lock
    assert [entry.name for entry in lock.layout] == ["weight"]
