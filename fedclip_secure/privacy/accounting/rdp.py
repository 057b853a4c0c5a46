"""Rényi differential privacy (RDP) of the Poisson-sampled Gaussian mechanism, at whole orders; add/remove one unit.

Plain numpy: at a whole order the divergence is a finite sum, and what must start fast loads no scipy for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from fedclip_secure.config.fields import LEAST_NOISE, MOST_NOISE
from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.events import Event, merged

# Added to the logarithm of each step's sum: its terms, some 10^3 large, are rounded at the 16th digit.
ROUNDING = 1e-12
WHOLE_ORDERS = (*range(2, 64), *range(64, 1025, 16))
SMALLEST_DELTA = 1e-12  # far above what composition cuts off


def rdp(events: Iterable[Event], order: int) -> float:
    """RDP at `order` of all the events together; above 0 for any event.

    Mironov, Talwar & Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", section 3.3.

    Raises:
        ConfigError: the order is no whole number of at least 2.
    """
    if type(order) is not int or order < 2:
        raise ConfigError(f"the order {order!r} has no finite sum; give a whole order of at least 2")
    return math.fsum(event.steps * _one_step(event, order) for event in merged(events))


def to_epsilon(spent: float, order: int, delta: float) -> float:
    """The ε at `delta` that an RDP of `spent` at `order` gives.

    Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy", Proposition 12.
    """
    return max(0.0, spent + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def rdp_epsilon(events: Iterable[Event], delta: float) -> float:
    """ε by Rényi differential privacy, best over whole orders: an upper bound that PLD does not exceed."""
    check_delta(delta)
    parts = merged(events)
    return min(to_epsilon(rdp(parts, order), order, delta) for order in WHOLE_ORDERS) if parts else 0.0


def least_noise(largest: float, delta: float, sample_rate: float, steps: int) -> float | None:
    """The smallest σ, rounded up to 4 decimals, whose ε over `steps` steps is at most `largest`; None: none is."""

    def fits(tenthousandths: int) -> bool:
        return rdp_epsilon([Event(tenthousandths / 10_000, sample_rate, steps)], delta) <= largest

    low, high = round(LEAST_NOISE * 10_000), round(MOST_NOISE * 10_000)
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low / 10_000


def check_delta(delta: float) -> None:
    """Refuse a delta at which nothing is computed here.

    Raises:
        ConfigError: not of SMALLEST_DELTA to 1.
    """
    if not SMALLEST_DELTA <= delta < 1:  # refuses NaN too
        raise ConfigError(
            f"delta {delta} cannot be accounted for; give a value of at least {SMALLEST_DELTA:g} and below 1"
        )


def _one_step(event: Event, order: int) -> float:
    sigma, q = event.noise_multiplier, event.sample_rate
    if q == 1:
        return order / 2 / sigma / sigma
    taken = np.arange(order + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(taken[1:]))])
    log_choices = log_factorials[-1] - log_factorials - log_factorials[::-1]
    log_odds = taken * math.log(q) + (order - taken) * math.log1p(-q)
    log_terms = log_choices + log_odds + taken * (taken - 1) / 2 / sigma / sigma
    top = float(log_terms.max())
    log_sum = top + math.log(float(np.exp(log_terms - top).sum()))
    if math.isnan(log_sum):  # never less than everything
        return math.inf
    return (max(0.0, log_sum) + ROUNDING) / (order - 1)
