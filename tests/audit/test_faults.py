"""Every planted fault, and the test of the audit that catches it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from fedclip_secure.audit.audited_parts import MakeEngine
from fedclip_secure.audit.canaries import as_planned, not_refuted
from fedclip_secure.audit.evidence import Evidence
from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.audit.reference_trainer import Work
from fedclip_secure.audit.selftest import Mechanism, one_thread, run_audit
from fedclip_secure.audit.setting import Setting
from fedclip_secure.audit.trainer import MakeTrainer, as_by_hand, keys_fresh, noise_apart, noise_of_each, rehearse
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.private.dp_sgd import PrivateTrainer
from fedclip_secure.training.shared_parameters import read_shared
from tests.audit import faults
from tests.audit.plans import SIGMA, private_plan

ODD = Setting(dim=67)  # of such a width alone, and no second one besides


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def mechanism(engine: MakeEngine, plan: FederationPlan | None = None) -> Mechanism:
    plan = plan or private_plan()
    assert plan.privacy is not None
    return Mechanism(plan, plan.privacy, SIGMA, engine, ODD)


def furthest(found: Mechanism) -> Evidence:
    return next(one for one in found.clipping() if one.name == "sensitivity")


def failing(evidence: Iterable[Evidence]) -> set[str]:
    return {found.name for found in evidence if not found.passed}


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (faults.NoiseOff, "noise_deviation"),
        (faults.NoiseShortByRootOfBatch, "noise_deviation"),
        (faults.NoiseShortByHalf, "noise_deviation"),
        (faults.NoiseShortByOnePercent, "noise_deviation"),
        (faults.SameNoiseEveryStep, "noise_across_steps"),
        (faults.NoiseTwiceInAStep, "noise_across_coordinates"),
        (faults.NoiseFromASeed, "noise_across_runs"),
        (faults.UniformNoise, "noise_shape"),
    ],
)
def test_fault_of_the_noise_is_caught(fault: MakeEngine, caught_by: str) -> None:
    assert caught_by in failing(mechanism(fault).noise())


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (faults.ShuffledBatches, "batch_sizes"),
        (faults.NeighboursTogether, "membership_independence"),
        (faults.MembershipFromASeed, "membership_across_runs"),
        (faults.MembershipFromItsOwnSeed, "membership_across_runs"),
    ],
)
def test_fault_of_the_sampler_is_caught(fault: MakeEngine, caught_by: str) -> None:
    assert caught_by in failing(mechanism(fault).sampling())


def test_cyclic_batches_are_caught_by_participation_though_their_sizes_are_right() -> None:
    caught_by = failing(mechanism(faults.CyclicBatches).sampling())
    assert {"participation", "membership_independence"} <= caught_by
    assert "batch_sizes" not in caught_by


@pytest.mark.parametrize(("fault", "unit"), [(faults.ClippedBatchMean, "record"), (faults.ClippedBatchSum, "patient")])
def test_clipping_a_batch_in_place_of_units_is_caught_by_sensitivity(fault: MakeEngine, unit: str) -> None:
    assert not furthest(mechanism(fault, private_plan(unit=unit))).passed


def test_clipping_patients_record_by_record_is_caught_by_sensitivity() -> None:
    plan = private_plan(unit="patient")
    assert furthest(mechanism(faults.ClippedRecordByRecord, plan)).measured > 1.5
    assert furthest(mechanism(faults.Honest, plan)).passed


def test_clipping_that_couples_records_is_caught() -> None:
    found = replace(mechanism(faults.CoupledRecords), setting=Setting(dim=9)).clipping()
    assert failing(found) == {"sensitivity", "records_apart"}
    assert found[0].measured > 1.3


def test_sensitivity_that_breaks_on_the_received_model_alone_is_caught() -> None:
    plan = private_plan()
    scene = make_scene(plan, 1)
    vector = read_shared(scene.module, scene.method.spec)
    received = AdapterState(vector.layout, (vector.vector * 20).astype(np.float32))
    assert np.abs(vector.vector).max() < faults.LARGE_WEIGHT < np.abs(received.vector).max()
    fresh = mechanism(faults.LooseOnLargeWeights, plan)
    assert furthest(fresh).passed
    dim = scene.records.images.shape[1]
    assert not furthest(replace(fresh, setting=Setting(dim=dim, start=received))).passed
    assert furthest(replace(fresh, make_engine=faults.Honest, setting=Setting(dim=dim, start=received))).passed


def test_clipping_that_fails_in_the_second_phase_alone_is_caught_by_sensitivity() -> None:
    assert not furthest(mechanism(faults.LooseInTheSecondPhase, private_plan("feddat"))).passed


@pytest.mark.parametrize("dim", [64, 66])
def test_clipping_that_fails_at_odd_widths_alone_is_caught_by_sensitivity(dim: int) -> None:
    assert not furthest(replace(mechanism(faults.LooseAtOddWidths), setting=Setting(dim=dim))).passed


def test_last_bits_that_depend_on_the_batch_are_caught_though_the_sum_moves_by_no_more_than_the_norm() -> None:
    assert failing(mechanism(faults.LastBitsOfTheBatch).clipping()) == {"records_apart"}


@pytest.mark.parametrize(
    "fault", [faults.NoiseOff, faults.NoiseShortByRootOfBatch, faults.NoiseShortByHalf, faults.SameNoiseEveryStep]
)
def test_gross_fault_is_caught_by_the_canaries_scores(fault: MakeEngine) -> None:
    assert not as_planned(mechanism(fault).attack()).passed


def test_noise_that_is_off_is_caught_by_the_attack() -> None:
    found = mechanism(faults.NoiseOff).attack()
    assert not not_refuted(found).passed
    # One of 10,000 canaries that was put in may, in 200 steps, never be drawn (about 0.1 are expected).
    assert found.right >= 3990


def test_clipping_patients_record_by_record_is_caught_by_the_canaries_scores() -> None:
    plan = private_plan(unit="patient")
    assert not as_planned(mechanism(faults.ClippedRecordByRecord, plan).attack()).passed
    assert as_planned(mechanism(faults.Honest, plan).attack()).passed


def rehearsed(fault: MakeTrainer, method: str = "fedclip", by_hand: int | None = None, steps: int = 5) -> set[str]:
    """The tests that a trainer fails in two rounds of `steps` steps; `by_hand` releases at most are made again."""
    plan = private_plan(method, steps_per_round=steps)
    assert plan.privacy is not None
    scene = make_scene(plan, 300)
    most = ALL if by_hand is None else by_hand * sum(value.numel() for value in scene.module.parameters())
    found = rehearse(Work(plan, plan.privacy, SIGMA, scene), fault, most)
    return failing(test(found) for test in (keys_fresh, as_by_hand, noise_of_each, noise_apart))


ALL = 1 << 60
KEYS, BY_HAND, NOISE, APART = "trainer_keys", "trainer", "trainer_noise", "trainer_noise_across_steps"


@pytest.mark.parametrize(
    ("trainer", "method"), [(PrivateTrainer, "fedclip"), (PrivateTrainer, "feddat"), (faults.CopiedTrainer, "feddat")]
)
def test_honest_trainer_passes(trainer: MakeTrainer, method: str) -> None:
    assert rehearsed(trainer, method) == set()


@pytest.mark.parametrize(
    ("fault", "method", "caught_by"),
    [
        (faults.NoiseKeysDrawnOnce, "fedclip", {KEYS, BY_HAND, APART}),
        (faults.NoiseKeysOfRoundOne, "fedclip", {BY_HAND, APART}),
        (faults.KeysRepeatAfterThreeSteps, "fedclip", {BY_HAND, APART}),
        (faults.SameKeyForBothPhases, "feddat", {BY_HAND, APART}),
        (faults.NoNoiseFromStepFourOn, "fedclip", {BY_HAND, NOISE, APART}),
        (faults.NoNoiseInTheSecondPhase, "feddat", {BY_HAND, NOISE, APART}),
        (faults.NoNoiseInRoundTwo, "fedclip", {BY_HAND, NOISE, APART}),
        (faults.NoNoiseInTheVeryLastStep, "fedclip", {BY_HAND, NOISE}),
        (faults.NoiseShortInRoundTwo, "fedclip", {BY_HAND}),
        (faults.MovesWithoutNoise, "fedclip", {BY_HAND}),
        (faults.one_key_for_all, "fedclip", {KEYS, BY_HAND, APART}),
        (faults.keys_from_the_seed, "fedclip", {KEYS, BY_HAND, APART}),
        (faults.keys_from_the_seed_unless_told, "fedclip", {APART}),
        (faults.keys_come_again_unless_told, "fedclip", {APART}),
        (faults.half_the_noise, "fedclip", {BY_HAND, NOISE}),
        (faults.one_step_more, "fedclip", {KEYS, BY_HAND}),
    ],
)
def test_fault_of_the_trainer_is_caught(fault: MakeTrainer, method: str, caught_by: set[str]) -> None:
    assert caught_by <= rehearsed(fault, method)


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (PrivateTrainer, set()),
        (faults.NoiseKeysOfRoundOne, {APART}),
        (faults.KeysRepeatAfterThreeSteps, {BY_HAND, APART}),
        (faults.NoNoiseFromStepFourOn, {NOISE}),
        (faults.NoNoiseInRoundTwo, {NOISE}),
        (faults.NoNoiseInTheVeryLastStep, {NOISE}),
        (faults.MovesWithoutNoise, {BY_HAND}),
        (faults.half_the_noise, {NOISE}),
    ],
)
def test_fault_is_caught_where_only_some_releases_are_made_again(fault: MakeTrainer, caught_by: set[str]) -> None:
    """32 of 100 releases are, drawn by the system; two of the same noise are among them but in one case of 1e5."""
    found = rehearsed(fault, by_hand=1, steps=50)
    assert caught_by <= found
    assert caught_by or not found


def test_audit_of_values_that_are_no_numbers_fails_and_is_json() -> None:
    result = run_audit(private_plan(steps_per_round=4), SIGMA, make_engine=faults.NotANumber)
    assert {"sensitivity", "noise_deviation", "noise_shape", "canary_scores"} <= failing(result.evidence)
    json.dumps(result.as_json(), allow_nan=False)


def test_whole_audit_of_a_faulty_engine_fails_and_says_what_that_means() -> None:
    result = run_audit(private_plan(steps_per_round=4), SIGMA, make_engine=faults.NoiseShortByOnePercent)
    assert "noise_deviation" in failing(result.evidence)
    assert not result.passed
    shown = {test.name: test.shows for test in result.for_report().self_tests}
    assert "not as large as the plan says" in shown["noise_deviation"]
