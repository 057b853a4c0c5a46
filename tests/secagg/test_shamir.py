from __future__ import annotations

import os
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_secure.secagg import shamir

ALL = np.arange(256, dtype=np.uint8)
byte = st.integers(0, 255)


def times(a: int, b: int) -> int:
    """Multiplication modulo 0x11B, bit by bit: nothing in common with tables of logarithms."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def test_every_product_is_that_of_long_multiplication() -> None:
    table = shamir.multiply(ALL[:, None], ALL[None, :])
    assert table.tolist() == [[times(a, b) for b in range(256)] for a in range(256)]


def test_products_are_those_of_fips_197() -> None:
    # FIPS 197 section 4.2: {57} x {83} = {c1}, {57} x {13} = {fe}.
    products = shamir.multiply(np.array([0x57, 0x57], dtype=np.uint8), np.array([0x83, 0x13], dtype=np.uint8))
    assert products.tolist() == [0xC1, 0xFE]


@given(byte, byte, byte)
def test_the_field_is_distributive_and_associative(a: int, b: int, c: int) -> None:
    def mul(x: int, y: int) -> int:
        return int(shamir.multiply(np.array([x], dtype=np.uint8), np.array([y], dtype=np.uint8))[0])

    assert mul(a, b ^ c) == mul(a, b) ^ mul(a, c)
    assert mul(mul(a, b), c) == mul(a, mul(b, c))


def test_every_byte_but_zero_has_one_inverse() -> None:
    table = shamir.multiply(ALL[1:, None], ALL[None, 1:])
    assert (np.count_nonzero(table == 1, axis=1) == 1).all()


def test_shares_of_the_internet_draft_give_its_secret() -> None:
    # draft-mcgrew-tss-03 section 9: the first byte of a share is x.
    shares = [bytes.fromhex("01b9fa07e185"), bytes.fromhex("02f5409b4511")]
    assert shamir.combine({share[0]: share[1:] for share in shares}) == b"test\x00"


@pytest.mark.parametrize(("threshold", "silos"), [(1, 3), (2, 3), (3, 3), (3, 5), (5, 5)])
def test_any_threshold_of_the_shares_gives_the_secret_back(threshold: int, silos: int) -> None:
    secret = os.urandom(32)
    shares = shamir.split(secret, threshold, range(1, silos + 1))
    for count in range(threshold, silos + 1):
        for points in combinations(shares, count):
            assert shamir.combine({x: shares[x] for x in points}) == secret


def test_255_shares_with_the_plans_threshold_give_the_secret_back() -> None:
    secret = os.urandom(32)
    shares = shamir.split(secret, 171, range(1, 256))
    assert shamir.combine(dict(list(shares.items())[-171:])) == secret


def test_one_share_too_few_leaves_every_secret_possible() -> None:
    # Whatever the missing share is taken to be, another secret comes out: two shares of three rule out none.
    shares = shamir.split(b"\x2a", 3, [1, 2, 3])
    guesses = {shamir.combine({1: shares[1], 2: shares[2], 3: bytes([guess])}) for guess in range(256)}
    assert len(guesses) == 256


def test_a_share_at_another_point_gives_another_secret() -> None:
    secret = os.urandom(32)
    shares = shamir.split(secret, 3, [1, 2, 3, 4])
    assert shamir.combine({1: shares[1], 2: shares[2], 4: shares[3]}) != secret


def test_coefficients_are_fresh_each_time() -> None:
    assert shamir.split(bytes(32), 2, [1, 2]) != shamir.split(bytes(32), 2, [1, 2])


@pytest.mark.parametrize("points", [[0, 1, 2], [1, 1, 2], [1, 2, 256]])
def test_points_outside_the_field_and_repeated_ones_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match=r"distinct points in 1\.\.255"):
        shamir.split(b"secret", 2, points)
    with pytest.raises(ValueError, match=r"distinct points in 1\.\.255"):
        shamir.lagrange_at_zero(points)


@pytest.mark.parametrize("threshold", [0, 4])
def test_a_threshold_that_does_not_fit_is_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match="does not fit 3 shares"):
        shamir.split(b"secret", threshold, [1, 2, 3])


def test_weights_once_for_many_secrets_give_the_same() -> None:
    shares = shamir.split(os.urandom(32), 3, [2, 7, 200])
    assert shamir.combine(shares, shamir.lagrange_at_zero(list(shares))) == shamir.combine(shares)
