"""The most that a unit may ever spend, over plans that were chosen after seeing what earlier ones gave."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.rdp import rdp, to_epsilon

ORDERS = range(2, 1025)
LARGEST_SIGMA = 10_000  # of a plan
DECIMALS = 10_000  # σ is rounded up to 4 decimals


@dataclass(frozen=True, slots=True)
class Cap:
    """A lifetime limit: a filter over RDP at one order, which follows from epsilon and delta alone.

    Feldman & Zrnic 2021, "Individual Privacy Accounting via a Rényi Filter": if a unit takes part only while the RDP
    of all its events, at one order, stays within a budget, then all that was released has that RDP - even where each
    plan, and how long it ran, was chosen after seeing the results of those before. The proof follows a supermartingale
    for that one order. An order picked afterwards, to suit the events that came, would be the luckiest of many such
    processes, and no bound holds for that. So the order is the one at which a plain Gaussian mechanism (whose RDP
    grows in proportion to the order) may spend the most, and whatever is then run is charged at that order.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ConfigError(f"a cap of epsilon {self.epsilon} limits nothing or forbids all; give a value above 0")
        if not 0 < self.delta < 1:
            raise ConfigError(f"a cap at delta {self.delta} promises nothing; give a value between 0 and 1")
        if self.budget <= 0:
            least = math.ceil(to_epsilon(0.0, ORDERS[-1], self.delta) * 1000 + 1) / 1000
            raise ConfigError(
                f"a cap of epsilon {self.epsilon:g} at delta {self.delta:g} leaves nothing to spend at any order; "
                f"give an epsilon of at least {least:g}, or a larger delta"
            )

    @property
    def order(self) -> int:
        """The order of the filter."""
        return _order(self.epsilon, self.delta)

    @property
    def budget(self) -> float:
        """RDP at `order` that may be spent in all."""
        return _budget(self.epsilon, self.delta, self.order)

    def cost(self, events: Iterable[Event]) -> float:
        """RDP at `order` of all the events."""
        return rdp(events, self.order)

    def epsilon_of(self, spent: float) -> float:
        """The ε, at the cap's delta, of having `spent` so much RDP at `order`; 0 if nothing was spent."""
        return to_epsilon(spent, self.order, self.delta) if spent > 0 else 0.0

    def rounds_that_fit(self, spent: float, per_round: Event) -> int:
        """How many more rounds fit after `spent`; 0 if none does."""
        cost = self.cost([per_round])
        rounds = max(0, math.floor((self.budget - spent) / cost))
        while rounds > 0 and spent + rounds * cost > self.budget:  # the division was rounded up
            rounds -= 1
        return rounds + 1 if spent + (rounds + 1) * cost <= self.budget else rounds

    def sigma_that_fits(self, spent: float, total: Event) -> float | None:
        """The smallest noise_multiplier, rounded up to 4 decimals, with which `total` fits after `spent`.

        None if even LARGEST_SIGMA does not.
        """

        def fits(sigma: int) -> bool:
            return spent + self.cost([replace(total, noise_multiplier=sigma / DECIMALS)]) <= self.budget

        low, high = 1, LARGEST_SIGMA * DECIMALS
        if not fits(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        return high / DECIMALS


def _budget(epsilon: float, delta: float, order: int) -> float:
    """The RDP at `order` that gives (epsilon, delta): `to_epsilon` the other way round."""
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


@lru_cache(maxsize=64)
def _order(epsilon: float, delta: float) -> int:
    return max(ORDERS, key=lambda order: _budget(epsilon, delta, order) / order)
