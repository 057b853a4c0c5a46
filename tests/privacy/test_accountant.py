from __future__ import annotations

import math
import re

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as library
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.accountant import (
    Adjacency,
    delta_at,
    epsilon,
    epsilon_of_group,
    noise_multiplier,
)
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.rdp import rdp_epsilon

DELTA = 1e-5
FIRST = Event(1.0, 64 / 1200, 200)  # 1,200 records
SECOND = Event(0.8, 0.01, 2000)  # 10,000 records
ROUNDING = 1e-4  # of the decimals given
GRID = 2e-4  # by what two bounds from unlike grids may differ, relative where ε > 1

sigmas = st.floats(0.5, 20)
rates = st.floats(0.001, 1)
step_counts = st.integers(1, 500)
deltas = st.floats(1e-9, 1e-3)
events = st.builds(Event, sigmas, rates, step_counts)
few = settings(max_examples=12, deadline=None, derandomize=True)


def slack(value: float) -> float:
    return ROUNDING + GRID * max(1.0, value)


def analytic(sigma: float, delta: float) -> float:
    """ε of one Gaussian mechanism of sensitivity 1 (Balle & Wang 2018, Theorem 8)."""

    def excess(eps: float) -> float:
        above = stats.norm.cdf(0.5 / sigma - eps * sigma)
        return float(above - math.exp(eps + stats.norm.logcdf(-0.5 / sigma - eps * sigma)) - delta)

    return 0.0 if excess(0.0) <= 0 else float(optimize.brentq(excess, 0.0, 500.0, xtol=1e-12))


@pytest.mark.parametrize(
    ("event", "adjacency", "expected"),
    [
        (FIRST, "add_remove", 5.0998),
        (FIRST, "replace_one", 7.6456),
        (SECOND, "add_remove", 4.2934),
        (SECOND, "replace_one", 6.1535),
    ],
)
def test_golden_epsilons_of_privacy_loss_distributions(event: Event, adjacency: Adjacency, expected: float) -> None:
    assert epsilon([event], DELTA, adjacency) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("size", "expected"), [(1, 5.0998), (2, 11.507), (5, 36.516), (10, 95.30)])
def test_golden_epsilons_of_persons_with_several_units(size: int, expected: float) -> None:
    assert epsilon_of_group([FIRST], DELTA, size) == pytest.approx(expected, abs=5e-3)


def test_two_runs_spend_less_than_twice_one() -> None:
    assert epsilon([FIRST, FIRST], DELTA) == pytest.approx(7.192, abs=1e-3)


@pytest.mark.parametrize(("event", "prv", "rdp"), [(FIRST, 5.110, 5.731), (SECOND, 4.304, 4.861)])
def test_opacus_agrees(event: Event, prv: float, rdp: float) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    history = [(event.noise_multiplier, event.sample_rate, event.steps)]
    by_prv, by_rdp = accountants.PRVAccountant(), accountants.RDPAccountant()
    by_prv.history, by_rdp.history = list(history), list(history)
    ours = epsilon([event], DELTA)
    assert by_prv.get_epsilon(DELTA) == pytest.approx(prv, abs=5e-4)
    assert abs(ours - prv) <= max(0.02, 0.005 * ours)
    assert by_rdp.get_epsilon(DELTA) == pytest.approx(rdp, abs=5e-4)
    assert rdp - 1e-3 <= rdp_epsilon([event], DELTA) <= 1.02 * rdp, "whole orders alone are a little looser"


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
@pytest.mark.parametrize("event", [FIRST, SECOND, Event(0.4, 0.2, 3), Event(30.0, 0.5, 400)])
def test_a_finer_grid_never_gives_more_than_what_is_reported(event: Event, adjacency: Adjacency) -> None:
    relation = library.NeighborRel.ADD_OR_REMOVE_ONE if adjacency == "add_remove" else library.NeighborRel.REPLACE_ONE
    fine = library.from_gaussian_mechanism(
        event.noise_multiplier,
        value_discretization_interval=1e-4,
        sampling_prob=event.sample_rate,
        neighboring_relation=relation,
    )
    reference = fine.self_compose(event.steps).get_epsilon_for_delta(DELTA)
    ours = epsilon([event], DELTA, adjacency)
    assert reference - 1e-6 * max(1.0, reference) <= ours <= reference + slack(reference)


@pytest.mark.parametrize("event", [FIRST, SECOND])
def test_losses_rounded_down_never_give_more_than_what_is_reported(event: Event) -> None:
    optimistic = library.from_gaussian_mechanism(
        event.noise_multiplier,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=1e-3,
        sampling_prob=event.sample_rate,
    )
    assert optimistic.self_compose(event.steps).get_epsilon_for_delta(DELTA) <= epsilon([event], DELTA)


@pytest.mark.parametrize(("size", "interval"), [(2, 1e-3), (5, 5e-3)])
def test_another_search_never_gives_more_for_a_person_with_several_units(size: int, interval: float) -> None:
    chances = stats.binom.pmf(np.arange(size + 1), size, FIRST.sample_rate)
    fine = library.from_mixture_gaussian_mechanism(
        FIRST.noise_multiplier, range(size + 1), chances, value_discretization_interval=interval
    )
    reference = fine.self_compose(FIRST.steps).get_epsilon_for_delta(DELTA)
    ours = epsilon_of_group([FIRST], DELTA, size)
    assert reference * (1 - 1e-4) <= ours <= reference + slack(reference)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize(("sigma", "steps"), [(0.3, 1), (1.0, 1), (20.0, 100), (30.0, 400), (5000.0, 1)])
def test_without_sampling_it_is_the_plain_gaussian_and_never_below(sigma: float, steps: int, delta: float) -> None:
    exact = analytic(sigma / math.sqrt(steps), delta)
    ours = epsilon([Event(sigma, 1.0, steps)], delta)
    assert exact <= ours <= exact + slack(exact) + (0.0 if delta > 1e-9 else 0.02 * exact)


def test_replacing_without_sampling_is_a_gaussian_of_twice_the_sensitivity() -> None:
    exact = analytic(3.0 / 2, DELTA)
    assert exact <= epsilon([Event(3.0, 1.0, 1)], DELTA, "replace_one") <= exact + slack(exact)


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_person_always_sampled_is_a_gaussian_of_that_many_times_the_sensitivity(size: int) -> None:
    exact = analytic(50.0 / size, DELTA)
    assert exact <= epsilon_of_group([Event(50.0, 1.0, 1)], DELTA, size) <= exact + slack(exact)


@few
@given(event=events, delta=deltas, more=st.floats(1, 3))
def test_more_steps_and_more_sampling_cost_more_and_more_noise_and_delta_less(
    event: Event, delta: float, more: float
) -> None:
    base = epsilon([event], delta)
    sigma, rate, steps = event.noise_multiplier, event.sample_rate, event.steps
    assert epsilon([Event(sigma, rate, math.ceil(steps * more))], delta) >= base - slack(base)
    assert epsilon([Event(sigma, min(1.0, rate * more), steps)], delta) >= base - slack(base)
    assert epsilon([Event(sigma * more, rate, steps)], delta) <= base + slack(base)
    assert epsilon([event], delta * more) <= base + slack(base)


@few
@given(parts=st.lists(events, min_size=1, max_size=3), delta=deltas)
def test_privacy_loss_distributions_never_exceed_rdp(parts: list[Event], delta: float) -> None:
    bound = rdp_epsilon(parts, delta)
    assert epsilon(parts, delta) <= bound + slack(bound)


@few
@given(event=events, delta=deltas)
def test_a_group_of_one_is_one_unit_and_larger_groups_cost_more(event: Event, delta: float) -> None:
    one = epsilon([event], delta)
    assert epsilon_of_group([event], delta, 1) == one
    two = epsilon_of_group([event], delta, 2)
    assert two >= one - slack(one)


def test_replacing_costs_more_than_removing_and_less_than_two_removals() -> None:
    assert epsilon([FIRST], DELTA) < epsilon([FIRST], DELTA, "replace_one") < epsilon_of_group([FIRST], DELTA, 2)


def test_merging_equals_composing() -> None:
    whole, other = Event(1.0, 0.05, 60), Event(2.0, 0.1, 30)
    split = [Event(1.0, 0.05, 20), other, Event(1.0, 0.05, 40)]
    assert epsilon(split, DELTA) == epsilon([other, whole], DELTA)
    fine = {
        event: library.from_gaussian_mechanism(
            event.noise_multiplier, value_discretization_interval=2e-4, sampling_prob=event.sample_rate
        ).self_compose(event.steps)
        for event in split
    }
    composed = fine[split[0]].compose(fine[split[1]]).compose(fine[split[2]])
    reference = composed.get_epsilon_for_delta(DELTA)
    assert epsilon(split, DELTA) == pytest.approx(reference, abs=slack(reference))


def test_ten_thousand_entries_of_one_kind_are_one_event() -> None:
    assert epsilon([Event(5.0, 0.01, 1)] * 10_000, DELTA) == epsilon([Event(5.0, 0.01, 10_000)], DELTA)


def test_the_same_question_gets_the_same_answer() -> None:
    assert {epsilon([FIRST, SECOND], DELTA) for _ in range(3)} == {epsilon([SECOND, FIRST], DELTA)}


def test_gaussian_differential_privacy_claims_too_little_which_is_why_it_is_not_offered() -> None:
    """Bu, Dong, Long & Su 2020: the central limit of the trade-off function, mu = q·sqrt(T·(exp(1/σ²) - 1))."""
    mu = FIRST.sample_rate * math.sqrt(FIRST.steps * math.expm1(FIRST.noise_multiplier**-2))
    claimed = analytic(1 / mu, DELTA)
    assert claimed == pytest.approx(4.32, abs=0.01)
    assert claimed < epsilon([FIRST], DELTA) - 0.7


def test_delta_falls_with_epsilon_and_meets_it_in_any_order_asked() -> None:
    found = epsilon([FIRST], DELTA)
    curve = delta_at([FIRST], [0.0, 1.0, found, 20.0])
    assert np.all(np.diff(curve) < 0)
    assert curve[2] == pytest.approx(DELTA, rel=1e-3)
    assert 0 < curve[0] < 1
    np.testing.assert_array_equal(delta_at([FIRST], [20.0, found, 1.0, 0.0]), curve[::-1])
    assert np.all(delta_at([FIRST], [1.0, 5.0], "replace_one") > delta_at([FIRST], [1.0, 5.0]))


def test_delta_is_that_of_the_plain_gaussian_without_sampling() -> None:
    points = [0.0, 0.5, 1.0, 3.0]
    exact = [stats.norm.cdf(0.5 - eps) - math.exp(eps) * stats.norm.cdf(-0.5 - eps) for eps in points]
    assert np.all(delta_at([Event(1.0, 1.0, 1)], points) >= np.array(exact) - 1e-15)
    np.testing.assert_allclose(delta_at([Event(1.0, 1.0, 1)], points), exact, rtol=1e-4)


def test_nothing_done_costs_nothing() -> None:
    assert epsilon([], DELTA) == epsilon_of_group([], DELTA, 5) == rdp_epsilon([], DELTA) == 0.0
    assert delta_at([], [0.0, 1.0]).tolist() == [0.0, 0.0]


def test_noise_that_hides_nothing_gives_no_finite_claim() -> None:
    assert epsilon([Event(1e-3, 1.0, 1)], DELTA) == math.inf
    assert delta_at([Event(1e-3, 1.0, 1)], [5.0]).tolist() == [1.0]


def test_next_to_no_privacy_loss_is_next_to_zero() -> None:
    event = Event(1000.0, 1e-9, 1)
    assert epsilon([event], DELTA) <= 1e-4
    assert 0 <= rdp_epsilon([event], 1e-12) < 0.1


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 1e-13, math.inf, math.nan])
def test_delta_that_cannot_be_accounted_for_is_refused_with_the_remedy(delta: float) -> None:
    for question in (epsilon, rdp_epsilon):
        with pytest.raises(ConfigError, match=r"delta .* give a value of at least 1e-12 and below 1"):
            question([FIRST], delta)


def test_delta_that_drowns_in_rounding_errors_is_refused_with_one_that_does_not() -> None:
    many = [Event(5000.0, 1.0, 100_000)]
    with pytest.raises(ConfigError, match=r"delta 1e-10 drowns .* give at least 2e-10"):
        epsilon(many, 1e-10)
    assert epsilon(many, 2.1e-10) >= analytic(5000.0 / math.sqrt(100_000), 2.1e-10)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_group_that_is_none_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        epsilon_of_group([FIRST], DELTA, size)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_epsilon_off_the_curve_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="numbers of at least 0"):
        delta_at([FIRST], [1.0, value])


def test_more_steps_than_memory_allows_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than 2000000 steps"):
        epsilon([Event(1000.0, 0.001, 1_000_000), Event(900.0, 0.001, 1_000_001)], DELTA)


@pytest.mark.parametrize(("target", "rate", "steps"), [(3.0, 64 / 1200, 200), (8.0, 1.0, 10), (1.23456, 0.1, 20)])
def test_calibrated_noise_reaches_the_target_and_hardly_less_does_not(target: float, rate: float, steps: int) -> None:
    sigma = noise_multiplier(target, DELTA, rate, steps)
    assert sigma == round(sigma, 4)
    assert epsilon([Event(sigma, rate, steps)], DELTA) <= target
    assert epsilon([Event(sigma - 2e-4, rate, steps)], DELTA) > math.floor(target * 1e4) / 1e4


def test_calibration_is_over_all_rounds() -> None:
    one_round = noise_multiplier(3.0, DELTA, 64 / 1200, 20)
    assert epsilon([Event(one_round, 64 / 1200, 200)], DELTA) > 6.5
    assert noise_multiplier(3.0, DELTA, 64 / 1200, 200) > 1.5 * one_round


def test_a_target_that_any_noise_reaches_gets_the_least_there_is() -> None:
    assert noise_multiplier(5.0, 1e-3, 1e-7, 1) == 0.01


@pytest.mark.parametrize("target", [1e-6, 0.0, -1.0, math.nan, math.inf])
def test_target_below_what_can_be_shown_is_refused_with_the_remedy(target: float) -> None:
    with pytest.raises(ConfigError, match=r"target_epsilon .* cannot be reached.* from 0.0001 on"):
        noise_multiplier(target, DELTA, 0.1, 100)


def test_target_that_no_noise_reaches_is_refused_with_the_remedy() -> None:
    said = r"with the largest noise_multiplier, 10000, epsilon is (\S+)\. Set a target_epsilon of at least that"
    with pytest.raises(ConfigError, match=said) as refused:
        noise_multiplier(0.001, DELTA, 1.0, 1_000_000)
    found = re.search(said, str(refused.value))
    assert found is not None
    assert 9000 < noise_multiplier(float(found[1]), DELTA, 1.0, 1_000_000) <= 10_000
