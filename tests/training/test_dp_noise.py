from __future__ import annotations

import hashlib
import math
import os
import random
from fractions import Fraction
from itertools import count, pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.stats import binom, chi2, kstest, norm

from fedclip_secure.training.private.dp_sgd import system_coins
from fedclip_secure.training.private.gaussian import GaussianMechanism, _box_muller
from fedclip_secure.training.private.poisson import draw_members

FALSE_ALARM = 1e-6  # of every test that could fail by chance
SIZE = 525_312
Doubles = npt.NDArray[np.float64]


def noise(size: int, sigma: float = 1.0, norm_bound: float = 1.0, total: float = 0.0) -> Doubles:
    """What is added to a sum, in units of the deviation; the divisor is a power of two, so float32 is all it loses."""
    mechanism = GaussianMechanism(sigma, norm_bound, 64.0)
    released = mechanism.release(np.full(size, total), os.urandom(32))
    return (released.astype(np.float64) * 64 - total) / (sigma * norm_bound)


def box_muller(first: Doubles, second: Doubles) -> None:
    _box_muller(torch.from_numpy(first), torch.from_numpy(second), torch.empty(len(first), dtype=torch.float64))


@pytest.mark.parametrize(("sigma", "bound"), [(1.0, 1.0), (0.7, 2.5), (3.0, 1e-4), (1e-3, 1e3)])
def test_noise_has_deviation_sigma_times_norm_and_mean_zero(sigma: float, bound: float) -> None:
    found = noise(SIZE, sigma, bound)
    squares = float(np.square(found).sum())
    assert chi2.ppf(FALSE_ALARM / 2, SIZE) < squares < chi2.isf(FALSE_ALARM / 2, SIZE)
    assert abs(found.sum()) / math.sqrt(SIZE) < norm.isf(FALSE_ALARM / 2)


def test_bounds_on_the_deviation_find_one_percent() -> None:
    low, high = chi2.ppf(FALSE_ALARM / 2, SIZE) / SIZE, chi2.isf(FALSE_ALARM / 2, SIZE) / SIZE
    assert 0.99**2 < low < high < 1.01**2


def test_noise_is_normal_in_its_middle_and_its_tails() -> None:
    found = noise(4 * SIZE)
    assert kstest(found, "norm").pvalue > FALSE_ALARM
    for edge in (-4.0, -3.0, 3.0, 4.0):
        beyond = int((found * np.sign(edge) > abs(edge)).sum())
        chance = float(norm.sf(abs(edge)))
        assert (
            binom.ppf(FALSE_ALARM / 8, len(found), chance) <= beyond <= binom.isf(FALSE_ALARM / 8, len(found), chance)
        )


def test_smallest_uniforms_give_the_stated_tail_and_nothing_infinite() -> None:
    edges = np.array([2.0**-53, 1.0, 0.5, 0.25, 0.75, 2.0**-53])
    first, second = np.full(6, 2.0**-53), edges.copy()
    box_muller(first, second)
    assert np.allclose(np.hypot(first, second), 8.5716743, atol=1e-6)
    assert np.allclose(first, 8.5716743 * np.cos(2 * np.pi * edges), atol=1e-9)
    assert np.allclose(second, 8.5716743 * np.sin(2 * np.pi * edges), atol=1e-6)
    none = np.ones(6)
    box_muller(none, edges)
    assert not none.any()
    assert not edges.any()


def test_noise_is_uncorrelated_between_coordinates_and_between_steps() -> None:
    steps = [noise(SIZE) for _ in range(4)]
    limit = norm.isf(FALSE_ALARM / 20) / math.sqrt(SIZE)
    for one, other in pairwise(steps):
        assert abs(np.mean(one * other)) < limit
    for lag in (1, 2, 4, 1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17):
        product = steps[0][:-lag] * steps[0][lag:]
        assert abs(product.mean()) < norm.isf(FALSE_ALARM / 20) / math.sqrt(len(product))


def test_both_deviates_of_a_pair_are_independent_in_size_too() -> None:
    found = noise(1 << 16)
    one, other = np.square(found[: 1 << 15]) - 1, np.square(found[1 << 15 :]) - 1
    assert abs(np.mean(one * other)) / 2 < norm.isf(FALSE_ALARM / 2) / math.sqrt(1 << 15)


def test_noise_is_as_long_as_the_sum_whatever_its_length() -> None:
    for size in (1, 2, 3, 4, 5, (1 << 17) - 1, (1 << 17) + 1, (1 << 18) + 3):
        found = noise(size)
        assert found.shape == (size,)
        assert np.count_nonzero(found) >= 0.99 * size


def test_same_key_gives_the_same_noise_and_another_key_another() -> None:
    mechanism, total = GaussianMechanism(1.0, 1.0, 3.0), np.zeros(300_001)
    one = mechanism.release(total, bytes(32))
    assert np.array_equal(one, mechanism.release(total, bytes(32)))
    assert np.array_equal(one, GaussianMechanism(1.0, 1.0, 3.0).release(total, bytes(32)))
    assert (one == mechanism.release(total, bytes([1] * 32))).mean() < 0.001


@pytest.mark.parametrize(("sigma", "bound"), [(1.0, 1.0), (0.7, 2.5), (3.0, 1e-4), (1.9999, 1.0), (512.0, 0.25)])
def test_noisy_sum_lies_on_a_power_of_two_grid_that_follows_from_the_plan_alone(sigma: float, bound: float) -> None:
    mechanism = GaussianMechanism(sigma, bound, 1.0)
    assert math.frexp(mechanism.grid)[0] == 0.5
    assert sigma * bound * 2.0**-17 < mechanism.grid <= sigma * bound * 2.0**-16
    total = np.random.default_rng(0).normal(size=10_000) * bound
    steps = mechanism.release(total, os.urandom(32)).astype(np.float64) / mechanism.grid
    assert np.array_equal(steps, np.rint(steps))


def test_release_is_the_sum_plus_the_same_noise_rounded_and_divided() -> None:
    total = np.random.default_rng(0).normal(size=5000) * 40
    mechanism = GaussianMechanism(0.8, 1.5, 77.0)
    plain = mechanism.release(np.zeros(5000), bytes(32)).astype(np.float64) * 77
    found = mechanism.release(total, bytes(32)).astype(np.float64) * 77
    assert np.abs(found - plain - total).max() < 2 * mechanism.grid


def test_noise_and_divisor_do_not_depend_on_the_sum() -> None:
    assert GaussianMechanism(2.0, 3.0, 10.0).deviation == 6.0
    small, large = (GaussianMechanism(2.0, 3.0, divisor).release(np.ones(9), bytes(32)) for divisor in (8.0, 16.0))
    assert np.array_equal(small, 2 * large)


def test_nothing_that_is_seeded_reaches_noise_or_membership() -> None:
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        seen.append((noise(64), draw_members(system_coins(), 256, 0.5)))
    (one, first), (other, second) = seen
    assert (one == other).mean() < 0.1
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.9, 1 / 3])
def test_share_of_members_is_the_sample_rate(rate: float) -> None:
    drawn = int(draw_members(os.urandom(32), 1_000_000, rate).sum())
    assert binom.ppf(FALSE_ALARM / 2, 1_000_000, rate) <= drawn <= binom.isf(FALSE_ALARM / 2, 1_000_000, rate)


def test_each_unit_takes_part_by_itself_and_as_often_as_all_others() -> None:
    steps, units, rate = 2000, 200, 0.1
    drawn = np.array([draw_members(os.urandom(32), units, rate) for _ in range(steps)])
    times = drawn.sum(axis=0)
    low, high = (binom.ppf(FALSE_ALARM / (2 * units), steps, rate), binom.isf(FALSE_ALARM / (2 * units), steps, rate))
    assert (low <= times).all()
    assert (times <= high).all()
    # The size of a batch is Binomial too: its variance is what cyclic or shuffled batches get wrong.
    spread = float(np.square(drawn.sum(axis=1) - units * rate).sum() / (units * rate * (1 - rate)))
    # The binomial's kurtosis adds little to that of the normal: widened by 1.2.
    width = 1.2 * norm.isf(FALSE_ALARM / 2) * math.sqrt(2 * steps)
    assert abs(spread - steps) < width
    joint = float(np.mean((drawn[:, :-1] - rate) * (drawn[:, 1:] - rate)) / (rate * (1 - rate)))
    assert abs(joint) < norm.isf(FALSE_ALARM / 2) / math.sqrt(steps * (units - 1))


def test_membership_threshold_is_exact() -> None:
    key = hashlib.sha256(b"exact").digest()
    words = _words(key, 1000)
    for rate in (0.3, 0.05, 2.0**-9 * 1.1, float(np.nextafter(1.0, 0.0))):
        expected = [Fraction(word, 2**64) < Fraction(rate) for word in words]
        assert draw_members(key, 1000, rate).tolist() == expected
    middle = float(sorted(words)[500]) / 2.0**64
    assert 480 < draw_members(key, 1000, middle).sum() < 520


def test_rate_of_one_takes_everybody_and_no_units_are_no_members() -> None:
    assert draw_members(os.urandom(32), 100_000, 1.0).all()
    assert draw_members(os.urandom(32), 0, 0.5).shape == (0,)
    assert not draw_members(os.urandom(32), 100_000, 1e-25).any()


def _words(key: bytes, units: int) -> list[int]:
    """The stream of AES-256-CTR as little-endian 64-bit words, block by block with the library's ECB."""
    encrypt = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305 - the reference for CTR
    blocks = count()
    stream = b"".join(encrypt.update(next(blocks).to_bytes(16, "big")) for _ in range(units // 2))
    return [int.from_bytes(stream[8 * unit : 8 * unit + 8], "little") for unit in range(units)]
