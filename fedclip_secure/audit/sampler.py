"""The batches: every unit is in every step by a coin of its own, or the accounting is for something else."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedclip_secure.audit.audited_parts import Engine
from fedclip_secure.audit.evidence import Evidence, as_normals, binomial_p, by_p_values, chi_square_p, first_of_pairs

Members = npt.NDArray[np.bool_]  # (steps, units)
_LARGEST_LAG = 64  # besides those near multiples of 1/q, the period of batches that take turns


def members_of_steps(engine: Engine, sample_rate: float) -> Members:
    """Who is in each step of a run: enough units for batches of about 64, enough steps to see a unit 16 times."""
    units = min(max(1000, math.ceil(64 / sample_rate)), 8000)
    steps = min(max(256, math.ceil(16 / sample_rate)), 2000)
    return np.stack([engine.members(units) for _ in range(steps)])


def sizes(members: Members, sample_rate: float) -> Evidence:
    """Batch sizes are Binomial(N, q): their sum, and how far they scatter."""
    counts = members.sum(axis=1)
    normals = as_normals(counts, members.shape[1], sample_rate)
    return by_p_values(
        "batch_sizes",
        [
            binomial_p(int(counts.sum()), members.size, sample_rate),
            chi_square_p(float(normals @ normals), normals.size),
        ],
        f"batches hold {counts.mean():.2f} units on average with variance {counts.var():.2f}, "
        f"for an expected {members.shape[1] * sample_rate:.2f} and {_variance(members.shape[1], sample_rate):.2f}",
        "Batches are not Poisson samples, and the accounting is for these.",
    )


def participation(members: Members, sample_rate: float) -> Evidence:
    """In how many steps a unit is, is Binomial(T, q): how far that scatters over units."""
    counts = members.sum(axis=0)
    normals = as_normals(counts, members.shape[0], sample_rate)
    return by_p_values(
        "participation",
        [chi_square_p(float(normals @ normals), normals.size)],
        f"the number of steps that a unit is in has variance {counts.var():.2f}, "
        f"for an expected {_variance(members.shape[0], sample_rate):.2f}",
        "Units take turns, or some come more often than others; the accounting is for coins of their own.",
    )


def independence(members: Members, sample_rate: float) -> Evidence:
    """A unit's steps do not depend on each other, nor do two units of one step: how many pairs are in together.

    The pairs of one lag have no coin in common, so that their number is Binomial(pairs, q²).
    """
    p_values = [
        binomial_p(int(together.sum()), together.size, sample_rate**2)
        for coins in (members, members.T)
        for together in _pairs(coins, sample_rate)
    ]
    return by_p_values(
        "membership_independence",
        p_values,
        f"pairs of units, and of steps, that lie up to {_LARGEST_LAG} apart or about 1/q, are in together as often as "
        f"chance has it: the most unlikely of {len(p_values)} numbers has a p-value of {min(p_values):.2g}",
        "Who is in a step depends on other steps or other units: batches come in cycles, or in blocks.",
    )


def across_runs(one: Members, other: Members, sample_rate: float) -> Evidence:
    """How often a unit is in the same step of two runs that torch's generator entered in the same state."""
    together = int((one & other).sum())
    return by_p_values(
        "membership_across_runs",
        [binomial_p(together, one.size, sample_rate**2)],
        f"in {together:,} of {one.size:,} cases a unit was in the same step of two runs, "
        f"for an expected {one.size * sample_rate**2:,.0f}",
        "Membership comes from a seed: whoever knows it knows the batches, and sampling hides nobody.",
    )


def _pairs(coins: Members, sample_rate: float) -> Iterator[Members]:
    """For each lag, whether both coins of a pair of rows fell; each row is in one pair of a lag at most."""
    near = {round(times / sample_rate) + off for times in (1, 2, 3) for off in (0, 1)}
    for lag in sorted({*range(1, _LARGEST_LAG + 1), *near}):
        first = first_of_pairs(len(coins), lag)
        if len(first):
            yield coins[first] & coins[first + lag]


def _variance(trials: int, probability: float) -> float:
    return trials * probability * (1 - probability)
