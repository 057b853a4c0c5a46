"""Epsilon by Opacus's accountants, for readers who want a second opinion beside the report's own figures.

Loading this loads torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant

from fedclip_secure.config.lock import Contract
from fedclip_secure.privacy.accounting.events import Event, merged
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.report.document import Estimate


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """Upper bounds of epsilon, add/remove one unit."""

    prv: float  # privacy random variables (Gopi, Lee & Wutschitz 2021, arXiv:2106.02848), within 0.01
    rdp: float  # Rényi differential privacy, best over Opacus's orders
    versions: dict[str, str]


def cross_check(events: Sequence[Event], delta: float) -> CrossCheck:
    """Epsilon at `delta` of all `events` (at least one) together, as Opacus finds it."""
    prv, rdp = PRVAccountant(), RDPAccountant()
    for accountant in (prv, rdp):
        accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in merged(events)]
    # At q = 1 Opacus takes the logarithm of 0, which is right; an order at the end of its range is only looser.
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        return CrossCheck(float(prv.get_epsilon(delta)), float(rdp.get_epsilon(delta)), {"opacus": version("opacus")})


def second_opinion(contract: Contract) -> Estimate | None:
    """Epsilon of all that a plan allows, as a report holds it; None without privacy."""
    planned = PlannedRun.of(contract)
    if planned is None:
        return None
    found = cross_check([planned.total], planned.delta)
    return Estimate(library=f"opacus {found.versions['opacus']} PRV", epsilon=found.prv)
