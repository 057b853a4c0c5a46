from __future__ import annotations

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.rdp import least_noise, rdp, rdp_epsilon, to_epsilon

DELTA = 1e-5


@pytest.mark.parametrize("order", [2, 5, 33, 256, 1024])
@pytest.mark.parametrize("event", [Event(1.0, 64 / 1200, 200), Event(3.0, 0.01, 50), Event(0.7, 0.9, 4)])
def test_rdp_at_one_order_converts_to_what_dp_accounting_says(event: Event, order: int) -> None:
    library = RdpAccountant([order])
    library.compose(
        PoissonSampledDpEvent(event.sample_rate, GaussianDpEvent(event.noise_multiplier)),
        event.steps,
    )
    assert to_epsilon(rdp([event], order), order, DELTA) == pytest.approx(library.get_epsilon(DELTA), rel=1e-9)


def test_rdp_of_the_plain_gaussian_is_in_proportion_to_the_order() -> None:
    assert rdp([Event(2.0, 1.0, 8)], 2) == 2.0
    assert rdp([Event(2.0, 1.0, 8)], 7) == 7.0


def test_rdp_at_order_two_is_the_chi_squared_divergence() -> None:
    exact = math.log1p(0.1**2 * math.expm1(1 / 1.5**2))
    assert rdp([Event(1.5, 0.1, 1)], 2) == pytest.approx(exact, rel=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(1e-3, 1e4), st.floats(1e-12, 1), st.integers(1, 10**6), st.integers(2, 1024))
def test_rdp_of_anything_is_above_zero_and_adds_up(sigma: float, rate: float, steps: int, order: int) -> None:
    one = rdp([Event(sigma, rate, 1)], order)
    assert 0 < one < math.inf
    assert rdp([Event(sigma, rate, steps)], order) == pytest.approx(steps * one)


@pytest.mark.parametrize("order", [1, 0, -2, 2.5, True])
def test_order_without_a_finite_sum_is_refused(order: int) -> None:
    with pytest.raises(ConfigError, match="whole order of at least 2"):
        rdp([Event(1.0, 0.1, 1)], order)


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (0.05, 500), (1e-6, 1), (1.0, 1_000_000)])
def test_the_least_noise_is_enough_and_a_little_less_is_not(rate: float, steps: int) -> None:
    least = least_noise(1000.0, 1e-5, rate, steps)
    assert least is not None
    assert rdp_epsilon([Event(least, rate, steps)], 1e-5) <= 1000
    assert rdp_epsilon([Event(least - 1e-4, rate, steps)], 1e-5) > 1000


def test_where_no_noise_is_enough_there_is_no_least() -> None:
    assert least_noise(1e-3, 1e-5, 1.0, 1_000_000) is None
