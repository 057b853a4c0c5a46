"""What the audit takes from the silo that it runs at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedclip_secure.audit.at_silo import setting_of
from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.audit.setting import FRESH, Setting
from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.errors import ModelError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.final_models import newest_model
from fedclip_secure.training.prepare import prepare
from fedclip_secure.training.shared_parameters import read_shared
from tests.audit.plans import private_plan
from tests.privacy.reports import Site, contract

SILO = check(
    {"name": "cedar", "data": {"format": "folder", "path": "images"}, "device": "cpu"}, SiloConfig, "silo.yaml"
)


def received_by(plan: Contract) -> AdapterState:
    scene = make_scene(plan.plan, 1, Setting(dim=plan.lock.encoder.dim))
    state = read_shared(scene.module, scene.method.spec)
    return AdapterState(state.layout, (state.vector + 1).astype(np.float32))


def inside_the_shipped_encoder(home: Path, method: str) -> Contract:
    values: dict[str, Any] = private_plan(method).model_dump(mode="json", exclude_none=True)
    values["classes"] = dict(values["classes"])
    values["model"] = {"name": "fedclip-tiny", "pretrained": "shipped"}
    plan = check(values, FederationPlan, "plan")
    return Contract(plan, prepare(plan, home).lock)


def test_features_are_as_wide_as_the_plans_and_the_model_is_the_one_received() -> None:
    agreed = contract()
    received = received_by(agreed)
    setting = setting_of(agreed, SILO, received)
    assert (setting.dim, setting.device, setting.silo) == (agreed.lock.encoder.dim, torch.device("cpu"), "cedar")
    assert received.digest.hex()[:16] in setting.came_from
    scene = make_scene(agreed.plan, 3, setting)
    assert read_shared(scene.module, scene.method.spec).digest == received.digest
    assert scene.records.images.shape == (3, agreed.lock.encoder.dim)


def test_without_one_it_is_the_plans_initial_model_where_that_follows_from_the_seed() -> None:
    agreed = contract()
    assert setting_of(agreed, SILO, None).came_from == FRESH, "the lock's came from elsewhere"
    scene = make_scene(agreed.plan, 1, Setting(dim=agreed.lock.encoder.dim))
    digest = read_shared(scene.module, scene.method.spec).digest.hex()
    drawn = Contract(agreed.plan, agreed.lock.model_copy(update={"initial_model": digest}))
    assert setting_of(drawn, SILO, None).came_from == "the plan's initial model"


def test_model_of_another_width_is_refused() -> None:
    agreed = contract()
    setting = setting_of(agreed, SILO, received_by(agreed))
    with pytest.raises(ModelError, match="comes from another encoder or method"):
        make_scene(agreed.plan, 1, Setting(dim=agreed.lock.encoder.dim + 1, start=setting.start))


def test_method_inside_the_encoder_is_tested_in_the_plans_own_where_that_is_at_hand(tmp_path: Path) -> None:
    agreed = inside_the_shipped_encoder(tmp_path, "fedtune:visual_bias")
    setting = setting_of(agreed, SILO, None)
    assert setting.came_from == "the plan's initial model"
    assert "inside the plan's encoder fedclip-tiny" in make_scene(agreed.plan, 2, setting).about
    elsewhere = agreed.lock.encoder.model_copy(update={"name": "ViT-B-32"})
    other = Contract(agreed.plan, agreed.lock.model_copy(update={"encoder": elsewhere}))
    assert setting_of(other, SILO, None).encoder is None, "nothing is downloaded"
    assert "inside a small random encoder" in make_scene(other.plan, 2, setting_of(other, SILO, None)).about


def test_newest_model_is_the_last_one_of_this_run(tmp_path: Path) -> None:
    agreed = contract()
    terms = Terms.of(agreed, Site(tmp_path / "site").roster)
    folder = tmp_path / "work" / "adapters"
    folder.mkdir(parents=True)
    assert newest_model(tmp_path / "work", agreed, terms) is None
    state = AdapterState(terms.layout, np.ones(terms.layout.size, dtype=np.float32))
    state.to_file(folder / "last.safetensors")
    chain = {"plan": agreed.pin, "models": ["00" * 32, state.digest.hex()]}
    (folder / "models.json").write_text(json.dumps({**chain, "plan": "sha256:" + "0" * 64}))
    assert newest_model(tmp_path / "work", agreed, terms) is None, "another run's"
    (folder / "models.json").write_text(json.dumps(chain))
    found = newest_model(tmp_path / "work", agreed, terms)
    assert found is not None
    assert found.digest == state.digest
