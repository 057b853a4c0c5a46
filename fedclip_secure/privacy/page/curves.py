"""The curves of a report's page: upper bounds computed from the plan that it holds, and what an attack did reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedclip_secure.privacy.accounting import accountant
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.report.document import Attack

Floats = npt.NDArray[np.float64]
_ROUNDS = 10  # points of the curve over rounds
_EPSILONS = 48  # points of the privacy profile


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """`y` (N,) over rising `x` (N,)."""

    x: Floats
    y: Floats


def over_rounds(run: PlannedRun) -> Curve:
    """Epsilon after some numbers of rounds, from none to all that the plan allows."""
    rounds = sorted({1, *(math.ceil(run.rounds * part / _ROUNDS) for part in range(1, _ROUNDS + 1))})
    epsilons = [accountant.epsilon([run.after(count)], run.delta) for count in rounds]
    return Curve(np.array([0, *rounds], float), np.array([0, *epsilons], float))


def profile(run: PlannedRun, epsilon: float) -> Curve:
    """Delta over epsilon, to a quarter beyond the claim's: what holds at other slacks, all at once."""
    grid = np.linspace(0, 1.25 * epsilon, _EPSILONS)
    return Curve(grid, np.asarray(accountant.delta_at([run.total], grid.tolist()), float))


def most_true_positives(profile: Curve, false_positives: Floats) -> Floats:
    """An upper bound (N,) of any attack's true positive rate at each false positive rate (N,).

    Every pair (epsilon, delta) that holds gives two lines (Kairouz, Oh & Viswanath 2015, section 2.1); the bound is
    the lowest of them, so a coarse grid of pairs only makes it higher.
    """
    epsilon, delta = profile.x[:, None], profile.y[:, None]
    steep = np.exp(np.minimum(epsilon, 700.0)) * false_positives + delta
    flat = 1 - np.exp(-epsilon) * (1 - delta - false_positives)
    bound: Floats = np.clip(np.minimum(steep, flat).min(axis=0), false_positives, 1)
    return bound


def surely_reached(attack: Attack) -> Curve:
    """Lower confidence limits of the attack's true positive rates, over upper ones of its false positive rates.

    The measured rates are shares of a sample. By the inequality of Dvoretzky, Kiefer and Wolfowitz, with Massart's
    constant (1990), all of them together lie this near to the true ones with the attack's `confidence`. Points that
    then show no more than guessing does are left out.
    """
    allowed = (1 - attack.confidence) / 2  # one half each for absent and present canaries
    each = 0.45 * attack.canaries  # of both kinds at least: each canary is in by a fair coin
    if allowed <= 0 or each == 0:
        return Curve(np.zeros(0), np.zeros(0))
    distance = math.sqrt(math.log(1 / allowed) / (2 * each))
    reached = [(rates.false_positives + distance, rates.true_positives - distance) for rates in attack.curve]
    points = np.array(sorted(point for point in reached if point[0] < point[1]), dtype=float).reshape(-1, 2)
    return Curve(points[:, 0], points[:, 1])
