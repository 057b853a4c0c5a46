from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.accountant import epsilon
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.privacy_filter import ORDERS, Cap
from fedclip_secure.privacy.accounting.rdp import to_epsilon

FIRST = Event(1.0, 64 / 1200, 200)
ROUND = Event(1.0, 64 / 1200, 20)
CAP = Cap(8.0, 1e-5)

caps = st.builds(Cap, st.floats(0.1, 100), st.floats(1e-9, 1e-3))
events = st.builds(Event, st.floats(0.5, 20), st.floats(0.001, 1), st.integers(1, 300))
some = settings(max_examples=15, deadline=None, derandomize=True)


@some
@given(cap=caps)
def test_the_budget_spent_in_full_is_the_epsilon_of_the_cap(cap: Cap) -> None:
    assert cap.budget > 0
    assert cap.epsilon_of(cap.budget) == pytest.approx(cap.epsilon)
    assert cap.epsilon_of(0.0) == 0.0


@some
@given(cap=caps)
def test_no_other_order_lets_a_plain_gaussian_spend_more(cap: Cap) -> None:
    most = cap.budget / cap.order  # 1/(2σ²), over all steps
    assert to_epsilon(0.999 * most * cap.order, cap.order, cap.delta) <= cap.epsilon
    assert all(to_epsilon(1.001 * most * order, order, cap.delta) > cap.epsilon for order in ORDERS)


@some
@given(parts=st.lists(events, min_size=1, max_size=3), cap=caps)
def test_the_filter_is_never_below_the_privacy_loss_distribution(parts: list[Event], cap: Cap) -> None:
    charged = cap.epsilon_of(cap.cost(parts))
    assume(charged < 500)
    assert epsilon(parts, cap.delta) <= charged + 2e-4 * max(1.0, charged)


def test_two_runs_cost_the_filter_twice_and_somewhat_more_than_their_epsilon() -> None:
    once, twice = CAP.cost([FIRST]), CAP.cost([FIRST, FIRST])
    assert twice == pytest.approx(2 * once)
    true = epsilon([FIRST, FIRST], CAP.delta)
    assert true == pytest.approx(7.19, abs=5e-3)
    assert true < CAP.epsilon_of(twice) < 1.3 * true


@some
@given(cap=caps, per_round=events, share=st.floats(0, 1.2))
def test_rounds_that_fit_is_the_largest_number_that_fits(cap: Cap, per_round: Event, share: float) -> None:
    spent, cost = share * cap.budget, cap.cost([per_round])
    rounds = cap.rounds_that_fit(spent, per_round)
    assert rounds >= 0
    assert rounds == 0 or spent + rounds * cost <= cap.budget
    assert spent + (rounds + 1) * cost > cap.budget


def test_rounds_that_fit_to_the_last_bit_are_counted_right() -> None:
    cost = CAP.cost([ROUND])
    for whole in range(1, 500):
        spent = CAP.budget - whole * cost
        rounds = CAP.rounds_that_fit(spent, ROUND)
        assert spent + rounds * cost <= CAP.budget < spent + (rounds + 1) * cost


@some
@given(cap=caps, total=events, share=st.floats(0, 0.99))
def test_sigma_that_fits_just_fits(cap: Cap, total: Event, share: float) -> None:
    spent = share * cap.budget
    sigma = cap.sigma_that_fits(spent, total)
    assert sigma is not None
    assert sigma == round(sigma, 4)
    assert spent + cap.cost([replace(total, noise_multiplier=sigma)]) <= cap.budget
    assert sigma == 1e-4 or spent + cap.cost([replace(total, noise_multiplier=sigma - 1e-4)]) > cap.budget


def test_a_cap_that_is_spent_or_overspent_leaves_nothing() -> None:
    for spent in (CAP.budget, 2 * CAP.budget):
        assert CAP.rounds_that_fit(spent, ROUND) == 0
        assert CAP.sigma_that_fits(spent, FIRST) is None


def test_what_is_left_shrinks_with_what_is_spent() -> None:
    rounds = [CAP.rounds_that_fit(share * CAP.budget, ROUND) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[0] > 10
    assert rounds[-1] == 0


def test_the_order_follows_from_the_cap_alone() -> None:
    order = CAP.order
    CAP.cost([Event(50.0, 0.001, 1)])
    assert Cap(8.0, 1e-5).order == CAP.order == order
    assert Cap(1.0, 1e-5).order > order


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_cap_that_is_no_limit_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="give a value above 0"):
        Cap(value, 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_cap_at_a_delta_that_promises_nothing_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Cap(3.0, delta)


def test_cap_too_small_for_any_order_is_refused_with_one_that_is_not() -> None:
    with pytest.raises(
        ConfigError, match=r"leaves nothing to spend at any order; give an epsilon of at least (\S+),"
    ) as found:
        Cap(0.001, 1e-5)
    least = float(str(found.value).split("at least ")[1].split(",")[0])
    assert Cap(least, 1e-5).budget > 0
