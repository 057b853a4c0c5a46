"""Shamir's secret sharing, bytewise over GF(2^8) modulo x^8 + x^4 + x^3 + x + 1 (0x11B, the field of AES).

The field and the share format are those of draft-mcgrew-tss. Table look-ups are not constant in
time; shares are computed and combined on the machine that owns them, never on request of a peer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def _tables() -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Powers and logarithms of the generator 3."""
    exp = np.zeros(510, dtype=np.uint8)
    log = np.zeros(256, dtype=np.int64)
    value = 1
    for power in range(255):
        exp[power] = exp[power + 255] = value
        log[value] = power
        value ^= value << 1  # times 3
        if value & 0x100:
            value ^= 0x11B
    return exp, log


_EXP, _LOG = _tables()


def multiply(a: Bytes, b: Bytes) -> Bytes:
    """Elementwise product in GF(2^8); arguments broadcast."""
    product = _EXP[_LOG[a] + _LOG[b]]
    return np.where((a == 0) | (b == 0), np.uint8(0), product)


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Share `secret` so that any `threshold` of the shares give it back and fewer say nothing of it.

    Args:
        secret: any bytes; each byte is shared by a polynomial of its own.
        threshold: 1..len(points).
        points: distinct x in 1..255.

    Returns:
        One share for each x, as long as `secret`.
    """
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} does not fit {len(points)} shares")
    _check_points(points)
    # Coefficients from the operating system, highest degree first; the secret is the constant one.
    random = np.frombuffer(os.urandom((threshold - 1) * len(secret)), dtype=np.uint8)
    coefficients = [*random.reshape(threshold - 1, len(secret)), np.frombuffer(secret, dtype=np.uint8)]
    x = np.array(points, dtype=np.uint8)[:, None]
    values = np.zeros((len(points), len(secret)), dtype=np.uint8)
    for coefficient in coefficients:  # Horner's rule for all x at once
        values = multiply(values, x) ^ coefficient
    return {point: row.tobytes() for point, row in zip(points, values, strict=True)}


def lagrange_at_zero(points: Sequence[int]) -> Bytes:
    """The weights (len(points),) by which shares at `points` add up to the secret."""
    _check_points(points)
    logs = _LOG[np.array(points, dtype=np.uint8)]
    weights = np.empty(len(points), dtype=np.uint8)
    for i, point in enumerate(points):
        others = [other for other in points if other != point]
        # prod x_j / (x_j - x_i): subtraction is exclusive or, division a difference of logarithms.
        numerator = logs.sum() - logs[i]
        denominator = sum(int(_LOG[other ^ point]) for other in others)
        weights[i] = _EXP[(int(numerator) - denominator) % 255]
    return weights


def combine(shares: Mapping[int, bytes], weights: Bytes | None = None) -> bytes:
    """Give back the secret from at least `threshold` shares, {x: share}.

    `weights` is `lagrange_at_zero(list(shares))` where the caller combines many secrets from the same points.
    """
    rows = np.frombuffer(b"".join(shares.values()), dtype=np.uint8).reshape(len(shares), -1)
    factors = lagrange_at_zero(list(shares)) if weights is None else weights
    return bytes(np.bitwise_xor.reduce(multiply(rows, factors[:, None]), axis=0).tobytes())


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(1 <= x <= 255 for x in points):
        raise ValueError("shares need distinct points in 1..255")
