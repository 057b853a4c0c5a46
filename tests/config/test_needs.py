"""What methods need of a plan, what `init` writes for each, and that the two go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedclip_secure.aggregator.home import init_home
from fedclip_secure.config.fields import check
from fedclip_secure.config.method_needs import NEEDS, unlisted, unmet
from fedclip_secure.config.method_recipes import RECIPES
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.registry import METHODS, find_method
from fedclip_secure.training.prepare import prepare
from tests.config.test_plan import PLAN

TINY = {"name": "fedclip-tiny", "pretrained": "shipped"}
PRIVATE = {
    "unit": "record", "sample_rate": 1.0, "steps_per_round": 1, "noise_multiplier": 1.0, "max_grad_norm": 1.9531,
    "update_divisor": 1.0, "delta": 1e-5,
}  # fmt: skip


def written(folder: Path, method: str) -> FederationPlan:
    return init_home(folder / "home", "lung-xray", ["localhost"], 8443, method).plan()


def changed(plan: FederationPlan, **blocks: Any) -> FederationPlan:
    """`plan` with keys of its blocks set; None takes one out."""
    data = plan.model_dump(mode="json")
    for block, values in blocks.items():
        data[block] = {**data[block], **values} if data[block] else values
        data[block] = {key: value for key, value in data[block].items() if value is not None}
    return check(data, FederationPlan, "plan")


def test_the_table_is_what_the_methods_say_of_themselves() -> None:
    options = {"fedapt": {"domains": {"one": ["a"]}}}
    for name in METHODS:
        plan = check({**PLAN, "method": {"name": name, **options.get(name, {})}}, FederationPlan, "plan")
        assert find_method(plan.method).spec.needs == NEEDS.get(name, ()), name
    assert set(NEEDS) <= set(METHODS)


def test_init_knows_every_method_and_no_other() -> None:
    assert list(RECIPES) == list(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_that_init_writes_for_a_method_can_be_prepared(method: str, tmp_path: Path) -> None:
    plan = written(tmp_path, method)
    assert plan.method.name == method
    path = tmp_path / "home" / "federation.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "model": TINY}, sort_keys=False))
    lock = prepare(check({**plan.model_dump(mode="json"), "model": TINY}, FederationPlan, "plan"), tmp_path).lock
    assert lock.layout


@pytest.mark.parametrize("method", METHODS)
def test_the_privacy_that_init_writes_as_a_comment_goes_with_the_method(method: str, tmp_path: Path) -> None:
    written(tmp_path, method)
    text = (tmp_path / "home" / "federation.yaml").read_text()
    block = text[text.index("# privacy:") :].split("\n\n")[0]
    text = text.replace(block, "\n".join(line.removeprefix("# ") for line in block.splitlines()))
    text = text.replace("validation: 0.2", "validation: 0").replace("train: 0.6", "train: 0.8")
    text = text.replace("weights: masked", "weights: equal")
    lines = [line for line in text.splitlines() if not line.strip().startswith(("batch_size:", "local_epochs:"))]
    path = tmp_path / "private.yaml"
    path.write_text("\n".join(lines))
    from fedclip_secure.config.fields import read_model

    plan = read_model(path, FederationPlan)
    assert plan.privacy is not None
    assert unmet(plan) == []


def test_a_method_that_there_is_not_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--method clipfed: is unknown to this version; it has fedclip, linear_probe"):
        written(tmp_path, "clipfed")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("block", "values", "fault"),
    [
        ("training", {"rounds": 50}, "training.rounds is 50, and must be 1: each record is added up once"),
        ("training", {"local_epochs": 2}, "training.local_epochs is 2, and must be 1: each record is added up once"),
        ("training", {"optimizer": {"name": "adam", "lr": 1.0}}, "training.optimizer.name is adam, and must be sgd"),
        (
            "training",
            {"optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.9}},
            "training.optimizer.momentum is 0.9, and must be 0: what silos add must be the plain sum",
        ),
        (
            "training",
            {"optimizer": {"name": "sgd", "lr": 5e-5}},
            "training.optimizer.lr is 5e-05, and must be as training.batch_size, 1: then a record counts for 1",
        ),
        ("secure_aggregation", {"weights": "masked"}, "secure_aggregation.weights is masked, and must be equal"),
        (
            "secure_aggregation",
            {"coordinate_clip": 0.1},
            "secure_aggregation.coordinate_clip is 0.1, and must be at least 1 for each training record of the largest",
        ),
    ],
)
def test_what_discriminant_needs_is_named_with_key_value_and_what_it_must_be(
    block: str, values: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    plan = written(tmp_path, "discriminant")
    assert unmet(plan) == []
    (found,) = unmet(changed(plan, **{block: values}))
    assert found.startswith(fault)
    with pytest.raises(ConfigError, match="method discriminant does not go with the rest of the plan:"):
        prepare(changed(plan, **{block: values}), tmp_path)


def test_the_clip_of_discriminant_is_held_against_a_silos_records(tmp_path: Path) -> None:
    plan = changed(written(tmp_path, "discriminant"), secure_aggregation={"coordinate_clip": 100.0})
    assert unmet(plan, records=100) == []
    (found,) = unmet(plan, records=101)
    assert "is 100, and must be at least 1 for each of the 101 training records here" in found


def test_with_privacy_a_method_needs_what_it_needs_there(tmp_path: Path) -> None:
    training = {"batch_size": None, "optimizer": {"name": "sgd", "lr": 1.0}}
    splits = {"train": 0.8, "validation": 0.0, "test": 0.2}
    plan = changed(written(tmp_path, "discriminant"), training=training, splits=splits, privacy=PRIVATE)
    assert unmet(plan) == []
    faults = unmet(changed(plan, privacy={**PRIVATE, "sample_rate": 0.05, "steps_per_round": 10, "update_divisor": 60}))
    assert [fault.split(":")[0] for fault in faults] == [
        "privacy.sample_rate is 0.05, and must be 1",
        "privacy.steps_per_round is 10, and must be 1",
        "training.optimizer.lr is 1, and must be as privacy.update_divisor, 60",
    ]


def test_every_silo_of_the_roster_has_a_domain_in_fedapt(tmp_path: Path) -> None:
    plan = written(tmp_path, "fedapt")
    assert unlisted(plan, ["silo-a", "silo-b", "silo-c"]) == []
    told = ["method.domains lists lab-x, lab-y nowhere, and must list each silo once"]
    assert unlisted(plan, ["lab-y", "silo-a", "lab-x"]) == told
    assert unlisted(written(tmp_path / "other", "fedclip"), ["lab-y"]) == []
