"""The noise: normal, of deviation sigma·C, and every coordinate of every step drawn afresh, in every phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special

from fedclip_secure.audit.audited_parts import Engine
from fedclip_secure.audit.evidence import (
    Doubles,
    Evidence,
    by_correlations,
    by_p_values,
    chi_square_p,
    correlation,
    distance_from_uniform,
    distance_p,
    first_of_pairs,
    largest_correlation,
    normal_p,
)
from fedclip_secure.audit.made_up_records import Scene
from fedclip_secure.config.plan import PrivacyPlan

# At 1.1 million deviates a sigma that is off by 1 % is 14 deviations away from what the right one gives, and the test
# fails from 5 on.
COORDINATES = 1_100_000
FEWER_COORDINATES = 100_000  # enough to tell noise that repeats
_MOST_STEPS = 150  # of a method with few parameters; the wide sums have the coordinates
_WIDE_STEPS = 4
# Neighbours, the ends of a cipher's block, and what is drawn together or by one thread (powers of two).
_LAGS = (*range(1, 17), *(1 << power for power in range(5, 18)))


def noise_of_steps(
    engine: Engine, scene: Scene, privacy: PrivacyPlan, noise_multiplier: float, coordinates: int
) -> list[Doubles]:
    """Released minus clipped sum of whole steps on the scene's records, in deviations of the plan's noise.

    One (T, d) for each phase: of as many steps as have `coordinates` in all phases together, or of _MOST_STEPS.
    """
    phases = scene.method.phases()
    found: list[list[Doubles]] = [[] for _ in phases]
    while len(found[0]) < _MOST_STEPS and sum(noise.size for noises in found for noise in noises) < coordinates:
        for phase, noises in zip(phases, found, strict=True):
            rows = np.flatnonzero(engine.members(scene.units)[scene.unit_of])
            total = engine.clipped_sum(scene.module, phase, scene.batch(rows), scene.unit_of[rows])
            noises.append(_noise(engine, total, privacy, noise_multiplier))
    return [np.stack(noises) for noises in found]


def noise_of_wide_sums(engine: Engine, privacy: PrivacyPlan, noise_multiplier: float) -> Doubles:
    """As `noise_of_steps`, for a few sums of many coordinates, all zero: (T, d)."""
    total = np.zeros(COORDINATES // _WIDE_STEPS)
    return np.stack([_noise(engine, total, privacy, noise_multiplier) for _ in range(_WIDE_STEPS)])


def _noise(engine: Engine, total: Doubles, privacy: PrivacyPlan, noise_multiplier: float) -> Doubles:
    noisy = engine.release(total).astype(np.float64) * privacy.update_divisor
    noise: Doubles = (noisy - total) / (noise_multiplier * privacy.max_grad_norm)
    return noise


def deviation(noises: Sequence[Doubles]) -> Evidence:
    """Its size: by the sum of the squares, which is chi-square, and by the mean."""
    p_values = [chi_square_p(float(np.vdot(noise, noise)), noise.size) for noise in noises]
    p_values += [normal_p(float(noise.sum()) / noise.size**0.5) for noise in noises]
    found = " and ".join(f"{np.sqrt(np.vdot(noise, noise) / noise.size):.5f}" for noise in noises)
    return by_p_values(
        "noise_deviation",
        p_values,
        f"the noise's deviation is {found} of the plan's sigma·C, over {sum(n.size for n in noises):,} coordinates",
        "The noise is not as large as the plan says; epsilon is not what is claimed.",
    )


def shape(noises: Sequence[Doubles]) -> Evidence:
    """Its distribution."""
    distances = [distance_from_uniform(special.ndtr(noise)) for noise in noises]
    return by_p_values(
        "noise_shape",
        [distance_p(distance, noise.size) for distance, noise in zip(distances, noises, strict=True)],
        f"the noise's distribution is at most {max(distances):.5f} from the normal one (Kolmogorov-Smirnov)",
        "The noise is not Gaussian, and the accounting is for Gaussian noise.",
    )


def across_steps(noises: Sequence[Doubles]) -> Evidence:
    """Correlation of every two steps."""
    pairs = sum(len(noise) * (len(noise) - 1) // 2 for noise in noises)
    failure = "Steps share their noise, and a difference of two is without it."
    return by_correlations("noise_across_steps", max(map(largest_correlation, noises)), pairs, failure)


def across_coordinates(noises: Sequence[Doubles]) -> Evidence:
    """Correlation of coordinates at several distances; each coordinate is in one pair of a distance at most."""
    statistics = [
        correlation(noise[:, first], noise[:, first + lag])
        for noise in noises
        for lag in (*_LAGS, noise.shape[1] // 2)
        if len(first := first_of_pairs(noise.shape[1], lag))
    ]
    failure = "Coordinates share their noise, and a difference of two is without it."
    return by_correlations("noise_across_coordinates", float(np.abs(statistics).max()), len(statistics), failure)


def across_runs(one: Sequence[Doubles], other: Sequence[Doubles]) -> Evidence:
    """Correlation with the noise of another run that torch's generator entered in the same state, step by step."""
    statistics = [
        correlation(first, second)
        for mine, others in zip(one, other, strict=True)
        for first, second in zip(mine, others, strict=False)
    ]
    failure = "The noise comes from a seed: whoever knows it takes the noise away."
    return by_correlations("noise_across_runs", float(np.abs(statistics).max()), len(statistics), failure)
