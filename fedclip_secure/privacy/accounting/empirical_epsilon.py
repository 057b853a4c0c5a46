"""The least epsilon that an attack's success in one training run proves.

Steinke, Nasr & Jagielski 2023, "Privacy Auditing with One (1) Training Run" (arXiv:2305.08846): many canaries enter a
single run, each by a fair coin, and an attacker who sees what is released guesses some of the coins. Where the run is
(epsilon, delta)-private, more right guesses than theorem 5.2 there allows are improbable.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

MOST_CANARIES = 20_000  # that a bound is computed for: twice as many as an audit has
CONFIDENCE = 0.95  # of the published bound


def epsilon_at_least(right: int, guesses: int, canaries: int, delta: float, error: float) -> float:
    """The largest epsilon that `right` of `guesses` refute at `delta` with a probability of error up to `error`.

    A lower bound of epsilon with confidence 1 - error (section 5 and appendix D of the paper); 0 where none is.
    """
    low, high = 0.0, 1.0
    while _p_value(right, guesses, canaries, high, delta) < error:
        high *= 2
        if high > 512:
            return 512.0  # only with delta 0 and no wrong guess
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(right, guesses, canaries, middle, delta) < error else (low, middle)
    return low


def _p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """A bound on the chance of so many right guesses under (epsilon, delta)-privacy (theorem 5.2).

    Guesses are at best as good as under randomised response, right with e^ε/(1 + e^ε); and delta lets the number of
    right ones grow by i with a chance of 2·canaries·delta/i at most.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    at_least = float(stats.binom.sf(right - 1, guesses, chance))
    if right == 0:
        return 1.0
    gained = np.arange(1, right + 1)
    just_below = np.cumsum(stats.binom.pmf(right - gained, guesses, chance))
    return min(1.0, at_least + 2 * canaries * delta * float((just_below / gained).max()))
