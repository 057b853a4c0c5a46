"""What a test of the mechanism found, and the arithmetic by which it decides.

A test that looks at random outcomes fails by chance with a probability of at most FALSE_ALARM. Each of its statistics
has an exact distribution, or an exact bound, while the mechanism is right, so that its p-value is below p with
probability p at most; the smallest of n, times n, then is too (Bonferroni).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

FALSE_ALARM = 1e-6
_ROWS = 1024  # whose correlations are in memory at a time

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The outcome of one test."""

    name: str
    passed: bool
    quantity: str  # what `measured` and `bound` are
    measured: float
    bound: float
    shows: str  # the outcome in words
    failure: str  # what it means where the test does not pass


def by_p_values(name: str, p_values: Sequence[float], shows: str, failure: str) -> Evidence:
    """The evidence of all `p_values` together: it passes unless one is too small for chance, or NaN."""
    return _by_smallest(name, float(np.min(p_values)), len(p_values), shows, failure)


def _by_smallest(name: str, smallest: float, count: int, shows: str, failure: str) -> Evidence:
    together = min(1.0, count * float(np.nan_to_num(smallest, nan=0.0)))
    quantity = f"smallest of {count:,} p-value(s), times their number; passes from the bound on"
    return Evidence(name, together >= FALSE_ALARM, quantity, together, FALSE_ALARM, shows, failure)


def by_correlations(name: str, largest: float, count: int, failure: str) -> Evidence:
    """The evidence of `count` standard normal variables that should be near 0, `largest` in size of them."""
    shows = f"the largest of {count:,} correlation(s) lies {largest:.2f} of its deviations from 0"
    return _by_smallest(name, normal_p(largest), count, shows, failure)


def normal_p(statistic: float) -> float:
    """Two-sided p-value of a standard normal variable."""
    return math.erfc(abs(statistic) / math.sqrt(2))


def chi_square_p(squares: float, degrees: int) -> float:
    """Two-sided p-value of a sum of `degrees` squared standard normal variables."""
    return float(2 * min(special.chdtr(degrees, squares), special.chdtrc(degrees, squares)))


def binomial_p(count: int, trials: int, probability: float) -> float:
    """Two-sided p-value of `count` successes."""
    below = stats.binom.cdf(count, trials, probability)
    above = stats.binom.sf(count - 1, trials, probability)
    return float(min(1.0, 2 * min(below, above)))


def largest_correlation(rows: Doubles) -> float:
    """The largest `correlation` in size of any two of `rows` (T, k), T >= 2; of a pair, with the later one as first."""
    norms, largest = np.linalg.norm(rows, axis=1), 0.0
    for start in range(0, len(rows), _ROWS):
        stop = min(start + _ROWS, len(rows))
        earlier = np.arange(stop) < np.arange(start, stop)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):  # no noise at all correlates with anything
            found = np.abs(rows[start:stop] @ rows[:stop].T / norms[:stop])
        largest = max(largest, float(np.nan_to_num(found, nan=np.inf)[earlier].max(initial=0.0)))
    return largest


def correlation(first: Doubles, second: Doubles) -> float:
    """How strongly two equally shaped arrays of independent standard normal variables are correlated.

    Whatever `second` is, its inner product with `first` over its own norm is a standard normal variable, exactly.
    Infinite where `second` is zero.
    """
    norm = float(np.linalg.norm(second))
    return float(np.vdot(first, second)) / norm if norm else math.inf


def distance_from_uniform(places: Doubles) -> float:
    """The largest distance of a sample's distribution function from the uniform one on (0, 1).

    Kolmogorov and Smirnov's, where `places` are those of a sample in the distribution that it should have.
    """
    expected = np.sort(places, axis=None)
    steps = np.arange(expected.size + 1) / expected.size
    return max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))


def distance_p(distance: float, size: int) -> float:
    """p-value of `distance_from_uniform` of a sample of `size`, whatever the size.

    By the inequality of Dvoretzky, Kiefer and Wolfowitz with the constant that Massart (1990) proved.
    """
    return float(np.minimum(1.0, 2 * math.exp(-2 * size * distance**2)))  # NaN stays NaN


def as_normals(counts: Counts, trials: int, probability: float) -> Doubles:
    """Standard normal variables, exactly and independently, from independent binomial `counts`.

    A count's place in its distribution, drawn evenly over the step that the distribution makes there, is uniform.
    """
    words = np.frombuffer(os.urandom(8 * counts.size), dtype="<u8") >> np.uint64(11)
    within = ((words + 0.5) * 2.0**-53).reshape(counts.shape)  # in (0, 1)
    below = stats.binom.cdf(counts - 1, trials, probability)
    uniform = below + within * stats.binom.pmf(counts, trials, probability)
    normals: Doubles = special.ndtri(np.clip(uniform, 1e-300, 1 - 2.0**-53))
    return normals


def first_of_pairs(count: int, lag: int) -> Counts:
    """The first places of pairs among `count` places that lie `lag` apart; each place is in one pair at most."""
    places = np.arange(max(0, count - lag))
    first: Counts = places[(places // lag) % 2 == 0]
    return first
