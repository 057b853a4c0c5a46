from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, FederationLock
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.errors import ConfigError
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.terms import Terms, threshold

DIGEST = hashlib.sha256(b"").hexdigest()


def roster(silos: int) -> Roster:
    names = [f"silo-{i:03d}" for i in range(silos)]
    return Roster.of(
        {name: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for name in [*names, "aggregator"]}
    )


def contract(validation: float = 0.2, initial: str | None = None, **agreed: Any) -> Contract:
    plan = {
        "federation": "pets",
        "server": "https://localhost",
        "model": {"name": "external", "dim": 4, "text_features": "text.safetensors"},
        "classes": {"cat": "cat", "dog": "dog"},
        "templates": ["a {}"],
        "splits": {"train": 0.8 - validation, "validation": validation, "test": 0.2},
        "method": {"name": "fedclip"},
        "training": {"rounds": 6, "batch_size": 8, "optimizer": {"lr": 1e-3}},
        "secure_aggregation": agreed,
        "initial": initial,
    }
    lock = {
        "plan": DIGEST,
        "encoder": {"kind": "external", "dim": 4, "text_features_sha256": DIGEST, "logit_scale": 100.0},
        "layout": [{"name": "w", "shape": [3, 4]}, {"name": "b", "shape": [4]}],
        "initial_model": DIGEST,
        "initial_file": DIGEST,
    }
    return Contract(check(plan, FederationPlan, "plan"), check(lock, FederationLock, "lock"))


@pytest.mark.parametrize(("silos", "t"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (10, 7), (50, 34), (255, 171)])
def test_the_malicious_threshold_is_that_of_the_protocol(silos: int, t: int) -> None:
    assert threshold(silos, "malicious", 1) == t


@pytest.mark.parametrize(("silos", "t"), [(3, 2), (4, 3), (5, 3), (10, 6), (50, 26)])
def test_the_curious_threshold_is_a_majority(silos: int, t: int) -> None:
    assert threshold(silos, "honest_but_curious", 1) == t


def test_two_lists_of_t_silos_always_share_an_honest_one() -> None:
    for silos in range(3, 256):
        for colluding in range(silos):
            assert 2 * threshold(silos, "malicious", colluding) - silos > colluding


@pytest.mark.parametrize(
    ("silos", "agreed", "t", "floor"),
    [
        (3, {}, 3, 3),
        (4, {}, 3, 3),
        (5, {}, 4, 4),
        (10, {}, 7, 7),
        (10, {"min_silos": 9}, 7, 9),
        (5, {"colluding": 2}, 4, 4),
        (4, {"threshold": "honest_but_curious"}, 3, 3),
        (3, {"threshold": "honest_but_curious", "colluding": 0}, 2, 3),  # t is 2: the 3 keeps a pair from being summed
    ],
)
def test_threshold_and_floor_follow_from_plan_and_roster(
    silos: int, agreed: dict[str, Any], t: int, floor: int
) -> None:
    terms = Terms.of(contract(**agreed), roster(silos))
    assert (terms.threshold, terms.floor, terms.absent_tolerated) == (t, floor, silos - floor)


@pytest.mark.parametrize(
    ("silos", "agreed", "said"),
    [
        (3, {"threshold": "honest_but_curious"}, "colluding 1 is too many for 3 silos: the threshold 2 must be"),
        (3, {"colluding": 2}, "colluding 2 is too many for 3 silos"),
        (5, {"colluding": 255}, "colluding 255 is too many for 5 silos"),
        (3, {"min_silos": 4}, "the plan needs 4 silos in every round, the roster has 3; invite more silos"),
        (3, {"weights": "public", "public_weights": {"silo-000": 1, "other": 2}}, "they must be the same silos"),
        (255, {"max_weight": 3_000_000}, "max_weight must lie in 1..2105376 for 255 silos"),
    ],
)
def test_plans_that_allow_no_secure_round_are_refused(silos: int, agreed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Terms.of(contract(**agreed), roster(silos))
    assert said in str(refused.value)


def test_validation_adds_a_closing_round_and_two_counts() -> None:
    terms = Terms.of(contract(validation=0.2), roster(3))
    assert (terms.training_rounds, terms.rounds, terms.vector.words) == (6, 7, 16 + 3)
    terms = Terms.of(contract(validation=0), roster(3))
    assert (terms.training_rounds, terms.rounds, terms.vector.words) == (6, 6, 16 + 1)


def test_equal_weights_leave_no_weight_to_choose() -> None:
    assert Terms.of(contract(weights="equal"), roster(3)).grid.max_weight == 1
    assert Terms.of(contract(weights="masked", max_weight=50), roster(3)).grid.max_weight == 50


def test_an_absent_silo_still_counts_for_the_grid() -> None:
    assert Terms.of(contract(), roster(10)).grid.silos == 10


def test_only_the_closing_round_trains_nothing() -> None:
    terms = Terms.of(contract(), roster(3))
    assert [terms.trains(number) for number in (1, 6, 7)] == [True, True, False]
    assert [terms.round_name(number) for number in (6, 7)] == ["round 6 of 6", "closing validation round"]


def test_a_model_that_another_run_ended_with_is_not_counted_twice() -> None:
    assert Terms.of(contract(), roster(3)).counted_from == 1
    assert Terms.of(contract(initial="best.safetensors"), roster(3)).counted_from == 2
