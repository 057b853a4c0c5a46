"""The privacy loss of one step, as the pair of distributions that an attacker has to tell apart.

Along the direction of the gradients in question, in units of the noise's deviation, every pair is of two mixtures of
normal distributions: `upper` has its parts at or below 0 and `lower` at or above 0, so that the privacy loss
log(upper / lower) falls with the outcome z, and one cut of the line gives the hockey-stick divergence (Balle & Wang
2018). dp-accounting has the same pairs, but searches for the cuts one by one, which takes seconds for larger persons.

- removing: the dataset with the units against the one without; adding: the other way round. Each dominates its
  direction under composition, neither dominates the other (Zhu, Dong & Wang 2022; Lebeda et al. 2024).
- replacing: one unit for another, whose gradients point in opposite directions.
- a person with k units: Binomial(k, q) of them are in a step, and their gradients may all be equal. The scalar mixture
  over that number dominates any gradients of at most these norms (Choquette-Choo et al. 2023, Corollary 4.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Direction = Literal["removing", "adding", "replacing"]
Array = NDArray[np.float64]

# Mass of one step that is charged as if all were lost: millions of steps of it stay below any delta that is accepted.
LOST_MASS = 1e-22
# Numbers of units less likely than this are counted as the next larger number that is likelier. This is pessimistic
# (more units only help an attacker), and leaves a person with 1,000 files some hundred terms instead of 1,001.
RARE = 1e-25
# Beyond 40 deviations a normal distribution has no mass that a double can hold.
FAR = 40.0
# The cut is found to within 1e-10 deviations. The divergence is flat there, at its maximum, so that what is missed goes
# with the square of this: less than the rounding of the divergence itself.
HALVINGS = 42


@dataclass(frozen=True, slots=True)
class Mixture:
    """Normal distributions of deviation 1."""

    distances: Array  # (parts, 1) from 0
    log_weights: Array  # (parts, 1)


@dataclass(frozen=True, slots=True)
class StepLoss:
    """One step of the Poisson-sampled Gaussian mechanism, for a person with `size` units."""

    noise_multiplier: float
    sample_rate: float
    direction: Direction
    size: int = 1

    def bounds(self) -> tuple[float, float]:
        """The losses between which all but LOST_MASS on either side lies."""
        upper, _ = _mixtures(self)
        low = np.array([-FAR - upper.distances.max()])
        high = np.array([FAR])
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            light = _below(upper, middle) < LOST_MASS
            low, high = np.where(light, middle, low), np.where(light, high, middle)
        rightmost = -special.ndtri(LOST_MASS)  # no part of `upper` is centred above 0
        return float(self._loss(np.array([rightmost]))[0]), float(self._loss(low)[0])

    def divergences(self, epsilons: Array) -> Array:
        """The hockey-stick divergence (a δ) at each of the rising `epsilons`, of shape (n,); non-increasing."""
        upper, lower = _mixtures(self)
        cut = self._cut(epsilons)
        log_below = _log_sum(lower.log_weights + special.log_ndtr(cut - lower.distances))
        deltas = np.clip(_below(upper, cut) - np.exp(epsilons + log_below), 0.0, 1.0)
        # Rounding may let neighbours cross: raised, never lowered.
        raised: Array = np.maximum.accumulate(deltas[::-1])[::-1]
        return raised

    def _loss(self, z: Array) -> Array:
        upper, lower = _mixtures(self)
        over = upper.log_weights - upper.distances * (z + upper.distances / 2)
        under = lower.log_weights + lower.distances * (z - lower.distances / 2)
        return _log_sum(over) - _log_sum(under)

    def _cut(self, epsilons: Array) -> Array:
        """Where the falling loss crosses each epsilon; an end of the line where it never does."""
        upper, lower = _mixtures(self)
        low = np.full_like(epsilons, -FAR - upper.distances.max())
        high = np.full_like(epsilons, FAR + lower.distances.max())
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = self._loss(middle) > epsilons
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return (low + high) / 2


@lru_cache(maxsize=64)
def _mixtures(step: StepLoss) -> tuple[Mixture, Mixture]:
    """`upper` and `lower` of a step."""
    sampled = _sampled(step.noise_multiplier, step.sample_rate, step.size)
    nothing = Mixture(np.zeros((1, 1)), np.zeros((1, 1)))
    return (
        nothing if step.direction == "adding" else sampled,
        nothing if step.direction == "removing" else sampled,
    )


def _sampled(noise_multiplier: float, sample_rate: float, size: int) -> Mixture:
    """Binomial(size, sample_rate) units, each as far out as clipping lets it."""
    numbers = np.arange(size + 1)
    weights = stats.binom.pmf(numbers, size, sample_rate)
    kept = np.flatnonzero((weights >= RARE) | (numbers == size))
    raised = np.bincount(np.searchsorted(kept, numbers), weights=weights)
    raised = np.maximum(raised, 1e-300)  # an underflow counts as possible
    return Mixture(kept[:, None] / noise_multiplier, np.log(raised)[:, None])


def _below(mixture: Mixture, z: Array) -> Array:
    """The mass below each of z, of a mixture whose parts lie at or below 0."""
    mass: Array = (np.exp(mixture.log_weights) * special.ndtr(z + mixture.distances)).sum(axis=0)
    return mass


def _log_sum(terms: Array) -> Array:
    """Log of the sum of exp over the first axis."""
    top = terms.max(axis=0)
    total: Array = top + np.log(np.exp(terms - top).sum(axis=0))
    return total
