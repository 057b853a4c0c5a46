"""The numbers of a report, from events alone. Every one is an upper bound, rounded up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting import accountant
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.accounting.rdp import rdp_epsilon
from fedclip_secure.privacy.report.document import Accounting, Estimate, Group, Limit

GROUPS = (2, 5, 10)  # units of one person, besides 1
_MOST_EXPRESSED = 1e6


def epsilon(run: PlannedRun, rounds: int, adjacency: accountant.Adjacency = "add_remove") -> float:
    """Epsilon after so many rounds; zero before the first."""
    found = _epsilon(run.after(rounds), run.delta, adjacency) if rounds else 0.0
    if not math.isfinite(found):
        raise ConfigError(
            "the noise of the plan hides nothing, so nothing can be claimed; the plan needs a larger noise_multiplier"
        )
    return found


def everywhere(run: PlannedRun, silos: int) -> float | None:
    """Epsilon of one unit at each of so many silos that run the whole plan; None where no number expresses it."""
    return _finite(_epsilon(run.after(run.rounds * silos), run.delta, "add_remove"))


def groups(run: PlannedRun, one: float) -> list[Group]:
    """Epsilon of persons with several units; `one` is that of a single unit."""
    larger = [Group(units=size, epsilon=_finite(_epsilon_of_group(run.total, run.delta, size))) for size in GROUPS]
    return [Group(units=1, epsilon=one), *larger]


def _finite(epsilon: float) -> float | None:
    return epsilon if epsilon <= _MOST_EXPRESSED else None


@lru_cache(maxsize=256)  # the silos of a federation have the same plan
def _epsilon(event: Event, delta: float, adjacency: accountant.Adjacency) -> float:
    return accountant.epsilon([event], delta, adjacency)


@lru_cache(maxsize=256)
def _epsilon_of_group(event: Event, delta: float, size: int) -> float:
    return accountant.epsilon_of_group([event], delta, size)


def tolerance(pld: float) -> float:
    """By how much another accountant may differ from PLD without question."""
    return max(0.02, 0.005 * pld)


def accounting(run: PlannedRun, prv: Estimate | None) -> Accounting:
    """PLD for the whole plan and its cross-checks."""
    pld = epsilon(run, run.rounds)
    return Accounting(
        library=f"dp-accounting {version('dp-accounting')}",
        pld=pld,
        rdp=_up(rdp_epsilon([run.total], run.delta), 4),
        prv=prv,
        agree=None if prv is None else abs(pld - prv.epsilon) <= tolerance(pld),
    )


def claimed(figures: Accounting) -> float:
    """PLD, or the larger of the two accountants where they disagree."""
    return max(figures.pld, figures.prv.epsilon) if figures.agree is False and figures.prv else figures.pld


@dataclass(frozen=True, slots=True)
class Charges:
    """RDP at the order that a silo's limit is kept at."""

    order: int
    budget: float
    this_run: float
    every_run: float

    @classmethod
    def of(cls, limit: Limit, run: PlannedRun, reserved: Sequence[Event]) -> Charges:
        """`reserved` are all events of the ledger.

        Raises:
            ConfigError: a limit too small for any order.
        """
        cap = Cap(limit.epsilon, limit.delta)
        return cls(cap.order, cap.budget, cap.cost([run.total]), cap.cost(reserved))


def _up(value: float, decimals: int) -> float:
    rounded = round(value, decimals)
    return rounded if rounded >= value else round(rounded + 10.0**-decimals, decimals)
