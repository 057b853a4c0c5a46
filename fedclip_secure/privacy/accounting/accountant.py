"""From events to (ε, δ): numerical composition of privacy loss distributions (PLD).

Everything here is an upper bound. One step's losses, which `privacy_loss.py` computes, are put by dp-accounting on a
grid so that no divergence shrinks (Doroshenko et al. 2022, "Connect the Dots"), composed by FFT, and what is cut off
counts as lost. A person is added or removed in all steps alike, so each direction is composed by itself and the worse
one counts.

Loading this takes a second (scipy), so what must start fast imports it where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from dp_accounting.pld import pld_pmf
from numpy.typing import NDArray
from scipy import optimize

from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.events import Event, merged
from fedclip_secure.privacy.accounting.privacy_loss import Direction, StepLoss
from fedclip_secure.privacy.accounting.rdp import check_delta

Adjacency = Literal["add_remove", "replace_one"]
DIRECTIONS: dict[Adjacency, tuple[Direction, ...]] = {
    "add_remove": ("removing", "adding"),
    "replace_one": ("replacing",),
}
DECIMALS = 10_000  # ε and σ are rounded up to 4 decimals
# What the rounding errors of the FFT may take off δ, in all and with each step: against 80-bit arithmetic their sum was
# at most 6e-16 a step, of either sign. They are charged in full.
FFT_ERRORS = (1e-14, 1e-15)
# The memory of a composition grows with its steps: about 0.4 GB for this many.
MOST_STEPS = 2_000_000
# A wider loss in one step is no protection that a number could express, and would overflow.
WIDEST_LOSS = 100_000.0
# How many points one step's losses are spread over. What a grid adds to ε falls with the square of its interval.
GRIDS = (512, 2048, 8192, 32768)
# A finer grid that took less than this off ε (relative, where ε > 1) is fine enough: the rest is about 1/15 of it.
NEGLIGIBLE = 1e-4
# A finer grid is not tried where it would take more points than this after composition.
MOST_POINTS = 4_000_000
# What the composition of a distribution may cut off, as lost.
TAIL = 1e-15
SIGMA_RANGE = (0.01, 10_000.0)  # of noise_multiplier
SMALLEST_EPSILON = 1e-9


def epsilon(events: Sequence[Event], delta: float, adjacency: Adjacency = "add_remove") -> float:
    """ε of all the events together, rounded up to 4 decimals; math.inf where the noise hides nothing."""
    return _epsilon(events, delta, DIRECTIONS[adjacency], size=1)


def epsilon_of_group(events: Sequence[Event], delta: float, size: int) -> float:
    """ε of a person with `size` units, all added or all removed, rounded up to 4 decimals.

    Each unit is sampled by itself, so this is tighter than what follows from ε of one unit (Schuchardt et al. 2024).
    """
    if type(size) is not int or size < 1:
        raise ConfigError(f"a group of {size!r} units has no epsilon; give a whole number of at least 1")
    return _epsilon(events, delta, DIRECTIONS["add_remove"], size)


def delta_at(
    events: Sequence[Event], epsilons: Sequence[float], adjacency: Adjacency = "add_remove"
) -> NDArray[np.float64]:
    """δ at each of `epsilons` (at least 0, in any order), of shape (n,); 1 where the noise hides nothing."""
    if not all(math.isfinite(value) and value >= 0 for value in epsilons):
        raise ConfigError("epsilon has a negative or non-finite value; give numbers of at least 0")
    deltas = np.full(len(epsilons), 1.0 if events else 0.0)
    for pmfs in _refined(events, DIRECTIONS[adjacency], size=1):
        found = [max(pmf.get_delta_for_epsilon(value) for pmf in pmfs) for value in epsilons]
        deltas = np.minimum(deltas, np.array(found) + _fft_errors(events))
    return deltas


def noise_multiplier(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest σ, rounded up to 4 decimals, whose ε over `steps` steps is at most `target_epsilon`.

    Raises:
        ConfigError: no σ up to 10,000 reaches it.
    """
    target = _floor(target_epsilon)

    def excess(log_sigma: float) -> float:
        found = _bound([Event(math.exp(log_sigma), sample_rate, steps)], delta, DIRECTIONS["add_remove"], size=1)
        return math.log(min(max(found, SMALLEST_EPSILON), WIDEST_LOSS) / target)

    low, high = (math.log(sigma) for sigma in SIGMA_RANGE)
    if excess(high) > 0:
        reached = epsilon([Event(SIGMA_RANGE[1], sample_rate, steps)], delta)
        raise ConfigError(
            f"privacy.target_epsilon {target_epsilon} at delta {delta:g} cannot be reached in {steps} step(s) at "
            f"sample_rate {sample_rate:g}: with the largest noise_multiplier, {SIGMA_RANGE[1]:g}, epsilon is "
            f"{reached:g}. Set a target_epsilon of at least that, or lower training.rounds, steps_per_round or "
            "sample_rate"
        )
    root = low if excess(low) <= 0 else optimize.brentq(excess, low, high, xtol=1e-7)
    sigma = math.ceil(math.exp(root) * DECIMALS - 1e-6)  # so that 0.0100 stays itself after log and exp
    while epsilon([Event(sigma / DECIMALS, sample_rate, steps)], delta) > target:  # the root is good to 1e-7
        sigma += 1
    return sigma / DECIMALS


def _floor(target_epsilon: float) -> float:
    """To the decimals that ε has."""
    if not (math.isfinite(target_epsilon) and target_epsilon * DECIMALS >= 1):
        raise ConfigError(
            f"privacy.target_epsilon {target_epsilon} cannot be reached or shown; give a finite value from 0.0001 on"
        )
    return math.floor(target_epsilon * DECIMALS) / DECIMALS


def _epsilon(events: Sequence[Event], delta: float, directions: Sequence[Direction], size: int) -> float:
    bound = _bound(events, delta, directions, size)
    return math.ceil(bound * DECIMALS) / DECIMALS if math.isfinite(bound) else bound


def _bound(events: Sequence[Event], delta: float, directions: Sequence[Direction], size: int) -> float:
    """ε, from grids that are refined until it hardly falls; each of them gives an upper bound."""
    check_delta(delta)
    certain = delta - _fft_errors(events)
    if certain < delta / 2:
        raise ConfigError(
            f"delta {delta:g} drowns in the rounding errors of so many steps; "
            f"give at least {2 * _fft_errors(events):.2g}"
        )
    best = math.inf if events else 0.0
    for pmfs in _refined(events, directions, size):
        with np.errstate(over="ignore"):  # a quotient beyond all numbers is compared with a loss, and larger
            found = max(float(pmf.get_epsilon_for_delta(certain)) for pmf in pmfs)
        gained, best = best - found, min(best, found)
        if gained < NEGLIGIBLE * max(1.0, best):
            break
    return best


def _refined(events: Sequence[Event], directions: Sequence[Direction], size: int) -> Iterator[list[pld_pmf.PLDPmf]]:
    """The composed distribution of each direction, on finer and finer grids; none if the noise hides nothing."""
    parts = merged(events)
    if not parts:
        return
    if sum(event.steps for event in parts) > MOST_STEPS:
        raise ConfigError(
            f"more than {MOST_STEPS} steps cannot be accounted for together; lower rounds or steps_per_round"
        )
    losses = [[StepLoss(event.noise_multiplier, event.sample_rate, way, size) for event in parts] for way in directions]
    widest = max(high - low for way in losses for low, high in (loss.bounds() for loss in way))
    if widest > WIDEST_LOSS:
        return
    for points in GRIDS:
        pmfs = [_composed(way, [event.steps for event in parts], widest / points) for way in losses]
        yield pmfs
        if sum(pmf.size for pmf in pmfs) * 4 > MOST_POINTS:
            return


def _composed(losses: Sequence[StepLoss], steps: Sequence[int], interval: float) -> pld_pmf.PLDPmf:
    """Each of `losses` as often as `steps` says, on a grid of `interval`."""
    parts = [_on_grid(loss, interval).self_compose(times, TAIL) for loss, times in zip(losses, steps, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = pld_pmf.compose_pmfs(total, part, TAIL)
    return total


@lru_cache(maxsize=64)  # a curve over rounds asks for the same step again and again
def _on_grid(loss: StepLoss, interval: float) -> pld_pmf.DensePLDPmf:
    low, high = loss.bounds()
    first, last = math.floor(low / interval), math.ceil(high / interval)
    deltas = loss.divergences(np.arange(first, last + 1, dtype=np.float64) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas).to_dense_pmf()


def _fft_errors(events: Sequence[Event]) -> float:
    once, each = FFT_ERRORS
    return once + each * sum(event.steps for event in events)
