from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from fedclip_secure.audit.audited_parts import TrainingEngine
from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.audit.selftest import AuditResult, Mechanism, one_thread, run_audit
from fedclip_secure.audit.setting import Setting
from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.registry import METHODS, find_method
from fedclip_secure.privacy.report.document import TESTS
from fedclip_secure.privacy.report.software import code_sha256
from tests.audit.plans import SIGMA, private_plan


@pytest.fixture(scope="module")
def honest() -> AuditResult:
    return run_audit(private_plan(), SIGMA)


def test_mechanism_as_planned_passes_every_test(honest: AuditResult) -> None:
    assert [found for found in honest.evidence if not found.passed] == []
    assert tuple(found.name for found in honest.evidence) == TESTS


ON_FEATURES = [name for name in METHODS if find_method(private_plan(name).method).spec.backprop == "none"]
INSIDE = [name for name in METHODS if name not in {*ON_FEATURES, "fedavg_full", "fedprox_full"}]  # as fedtune:full


@pytest.mark.parametrize(
    ("method", "unit"),
    [
        *((name, "patient") for name in ON_FEATURES if name != "fedtune:head"),  # as linear_probe
        ("fedclip", "record"),
        ("fedtune:text_bias", "record"),
        *(pytest.param(name, "patient", marks=pytest.mark.long) for name in INSIDE),
    ],
)
def test_one_unit_moves_the_clipped_sum_of_every_method_by_at_most_the_norm_and_by_itself(
    method: str, unit: str
) -> None:
    plan = private_plan(method, unit=unit, max_grad_norm=0.5)
    assert plan.privacy is not None
    with one_thread():
        found, apart = Mechanism(plan, plan.privacy, SIGMA, TrainingEngine, Setting(dim=67)).clipping()
    assert found.passed
    assert found.measured > 0.999, "some unit was clipped"
    assert apart.passed


def test_one_noisy_sum_over_everybody_passes_every_test() -> None:
    plan = private_plan("private_prototypes", unit="patient", sample_rate=1, steps_per_round=1)
    result = run_audit(plan, SIGMA)
    assert [found for found in result.evidence if not found.passed] == []


def test_audit_is_plain_json_that_says_that_no_record_was_read(honest: AuditResult) -> None:
    body = honest.as_json()
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["version"] == 1
    assert "made up" in body["records"]


def test_audit_says_when_it_was_to_the_hour_and_of_which_program_where_and_from_what(honest: AuditResult) -> None:
    body, part = honest.as_json(), honest.for_report()
    assert body["at"] == part.at == honest.at
    assert 0 <= time.time() - honest.at < 2 * 3600
    assert honest.at % 3600 == 0
    assert body["code"] == part.code == code_sha256()
    assert (body["device"], body["start"]) == ("cpu", "new weights by the plan's seed")
    assert all("8,320 parameters, 64 values a record, cpu, new weights" in test.shows for test in part.self_tests[:1])


def test_report_takes_the_audit(honest: AuditResult) -> None:
    part = honest.for_report()
    assert all(test.passed for test in part.self_tests)
    assert part.attack is not None
    assert 0 < part.attack.epsilon_at_least < 5.0998
    rates = [(point.false_positives, point.true_positives) for point in part.attack.curve]
    assert rates == sorted(rates)
    assert rates[-1] == (1, 1)


def test_audit_leaves_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    make_scene(private_plan(), 10)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_patients_of_a_scene_have_one_to_four_records_each() -> None:
    scene = make_scene(private_plan(unit="patient"), 8)
    assert np.bincount(scene.unit_of).tolist() == [1, 2, 3, 4, 1, 2, 3, 4]


def test_plan_without_privacy_has_nothing_to_test() -> None:
    with pytest.raises(ConfigError, match="there is no mechanism to test"):
        run_audit(private_plan().model_copy(update={"privacy": None}), SIGMA)
