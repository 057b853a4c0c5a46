from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedclip_secure import canonical
from fedclip_secure.aggregator.home import Home
from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, FederationLock, differences, read_lock, write_lock
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.errors import ConfigError, FedClipError
from tests.config.test_plan import PLAN, plan_with

LOCK: dict[str, Any] = {
    "version": 1,
    "plan": "1" * 64,
    "encoder": {
        "kind": "open_clip",
        "name": "ViT-B-32",
        "config": "{}",
        "weights_sha256": "2" * 64,
        "preprocessing": {
            "size": 224,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
        "dim": 512,
        "logit_scale": 100.0,
    },
    "layout": [{"name": "w", "shape": [2, 3]}, {"name": "b", "shape": []}],
    "initial_model": "3" * 64,
    "initial_file": "4" * 64,
    "method_state": {"anchor": [1, 2.5, "x"]},
}


def contract(plan: dict[str, Any] = PLAN, lock: dict[str, Any] = LOCK) -> Contract:
    return Contract(check(plan, FederationPlan, "plan"), check(lock, FederationLock, "lock"))


def test_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    lock = check(LOCK, FederationLock, "lock")
    write_lock(tmp_path / "federation.lock", lock)
    assert read_lock(tmp_path / "federation.lock") == lock


def test_contract_travels_and_keeps_digest_and_order() -> None:
    mine = contract()
    theirs = Contract.decode(mine.encode(), "the server")
    assert theirs == mine
    assert theirs.digest == mine.digest
    assert list(theirs.plan.classes) == list(mine.plan.classes)
    assert mine.pin == f"sha256:{mine.digest.hex()}"


@pytest.mark.parametrize("key", ["plan", "initial_model", "initial_file"])
def test_contract_digest_covers_the_lock(key: str) -> None:
    assert contract(lock={**LOCK, key: "9" * 64}).digest != contract().digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("config", "{ }"),
        ("weights_sha256", "5" * 64),
        ("dim", 513),
        ("logit_scale", 99.0),
        ("preprocessing", {**LOCK["encoder"]["preprocessing"], "size": 225}),
        ("preprocessing", {**LOCK["encoder"]["preprocessing"], "mean": [0.5, 0.5, 0.4]}),
        ("preprocessing", {**LOCK["encoder"]["preprocessing"], "interpolation": "bilinear"}),
        ("preprocessing", {**LOCK["encoder"]["preprocessing"], "resize_mode": "squash"}),
    ],
)
def test_contract_digest_covers_the_encoder(key: str, value: object) -> None:
    assert contract(lock={**LOCK, "encoder": {**LOCK["encoder"], key: value}}).digest != contract().digest


def test_contract_digest_covers_layout_order_and_method_state() -> None:
    turned, state = {**LOCK, "layout": LOCK["layout"][::-1]}, {**LOCK, "method_state": {}}
    assert len({contract(lock=lock).digest for lock in (LOCK, turned, state)}) == 3


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"1", b'{"version": 2}', b"[" * 100_000])
def test_garbage_in_the_lock_is_refused_by_name(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "federation.lock"
    path.write_bytes(garbage)
    with pytest.raises(ConfigError, match=r"federation\.lock: "):
        read_lock(path)


def test_missing_lock_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation\.lock: is missing; run `fedclip-agg prepare`"):
        read_lock(tmp_path / "federation.lock")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        canonical.encode([1, 2]),
        canonical.encode([{}, {}]),
        canonical.encode({"plan": 1}),
        canonical.encode([PLAN | {"classes": [[[1], "a"], ["b", "c"]]}, LOCK]),
        canonical.encode([PLAN | {"classes": [[{}, "a"], ["b", "c"]]}, LOCK]),
        canonical.encode([PLAN | {"model": []}, LOCK]),
        canonical.encode([PLAN, LOCK | {"encoder": {"kind": "other"}}]),
    ],
)
def test_garbage_from_a_server_is_refused(data: bytes) -> None:
    with pytest.raises(FedClipError):
        Contract.decode(data, "the server")


def test_plan_edited_after_prepare_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.plan_path.write_text(json.dumps(PLAN))
    plan = home.plan()
    write_lock(home.lock_path, check({**LOCK, "plan": plan.digest.hex()}, FederationLock, "lock"))
    assert home.contract().plan == plan
    home.plan_path.write_text(json.dumps(PLAN, indent=1) + " # only its form")
    assert home.contract().plan == plan
    home.plan_path.write_text(json.dumps(plan_with("training.rounds", 51)))
    with pytest.raises(ConfigError, match=r"has changed since `prepare`; run `fedclip-agg prepare` again"):
        home.contract()


def test_differences_stand_side_by_side() -> None:
    theirs = contract(plan_with("training.rounds", 51), {**LOCK, "initial_file": "9" * 64})
    assert differences(contract(), theirs) == [
        ("training.rounds", "50", "51"),
        ("initial_file", "4" * 64, "9" * 64),
    ]
    assert differences(contract(), contract()) == []


def test_another_order_of_classes_is_a_difference() -> None:
    rows = differences(contract(), contract(plan_with("classes", dict(reversed(PLAN["classes"].items())))))
    assert rows == [
        (
            "classes (order counts)",
            "normal: no finding, covid: COVID-19, pneumonia: pneumonia",
            "pneumonia: pneumonia, covid: COVID-19, normal: no finding",
        )
    ]


def test_key_that_only_one_side_has_is_a_difference() -> None:
    external = {"kind": "external", "dim": 4, "text_features_sha256": "7" * 64, "logit_scale": 1.0}
    rows = {
        key: (mine, theirs)
        for key, mine, theirs in differences(contract(), contract(lock={**LOCK, "encoder": external}))
    }
    assert rows["encoder.name"] == ("ViT-B-32", "(absent)")
    assert rows["encoder.text_features_sha256"] == ("(absent)", "7" * 64)


@pytest.mark.parametrize("key", ["plan", "layout", "initial_model"])
def test_lock_that_lacks_a_value_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "federation.lock"
    path.write_text(json.dumps({k: v for k, v in LOCK.items() if k != key}))
    with pytest.raises(ConfigError, match=f"{key}: is missing"):
        read_lock(path)


def test_every_difference_of_plans_has_another_digest() -> None:
    for key, value in (("model.pretrained", "x"), ("deadlines.join", 601), ("initial", None)):
        theirs = contract(plan_with(key, value))
        assert bool(differences(contract(), theirs)) is (theirs.digest != contract().digest) is True
